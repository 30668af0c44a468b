# SPDX-License-Identifier: Apache-2.0
"""The example of two micro-batches on host devices, and how it reads compiled programs and traces."""

import gzip
import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jax_ep.examples import two_microbatches

SMALL = ["--tokens=4", "--hidden=16", "--experts=8", "--top-k=2", "--intermediate=8", "--layers=1"]


def test_main(tmp_path, capsys):
    file = tmp_path / "result.json"
    assert two_microbatches.main([*SMALL, "--sms=4", f"--json={file}"]) == 0
    result = json.loads(file.read_text())
    assert (result["same"], result["ranks"], result["pairs"]) == (1, 8, 0)
    names = ["one batch", "in turn", "compute alone", "one stream"]
    names += ["side by side", "side by side, 4 SMs"]
    assert list(result["rows"]) == names
    assert all(row["ms"] > 0 for row in result["rows"].values())
    assert "hidden" in result["rows"]["side by side"] and "hidden" not in result["rows"]["in turn"]
    assert "100.0000% of the values" in capsys.readouterr().out


def test_wrong_arguments(capsys):
    for arguments, message in (["--picture=a.png"], "expected --profile"), (["--profile=a"], "expected GPUs, got cpu"):  # fmt: skip
        with pytest.raises(SystemExit):
            two_microbatches.main([*SMALL, *arguments])
        assert message in capsys.readouterr().err


@pytest.mark.parametrize("schedule", [two_microbatches.in_turn, two_microbatches.side_by_side])
def test_order_of_stages(schedule):
    seen = []

    def batch(name):
        value = jnp.zeros(())
        for stage in range(3):
            seen.append(f"{name}{stage}")
            value = yield value + stage
        return value

    results = schedule(batch("a"), batch("b"))
    np.testing.assert_array_equal(results, [3, 3])
    beside = schedule is two_microbatches.side_by_side
    assert " ".join(seen) == ("a0 a1 b0 a2 b1 b2" if beside else "a0 a1 a2 b0 b1 b2")


def test_turns_stand_behind_one_barrier():
    def batch(x):
        x = yield x * 2
        x = yield x + 1
        return x

    jaxpr = jax.make_jaxpr(lambda a, b: two_microbatches.side_by_side(batch(a), batch(b)))(1.0, 2.0)
    barriers = [e for e in jaxpr.eqns if e.primitive.name == "optimization_barrier"]
    assert [len(e.invars) for e in barriers] == [1, 2, 2]


def test_pairs_of():
    start = '  %{0} = ((f32[2]), f32[2]) call-start(%x), to_apply=%f, frontend_attributes={{_xla_stream_annotation="collective"}}'  # fmt: skip
    done, product = "  ROOT %d = f32[2] call-done(%{0})", "  %y = f32[2] fusion(%x), calls=%gemm_1"
    lines = [start.format("a"), product, done.format("a"), start.format("b"), done.format("b")]
    other = start.format("c").split(", frontend")[0], done.format("c")
    assert two_microbatches.pairs_of("\n".join([*lines, *other])) == (2, 1)


def trace_event(pid, tid, name, **more):
    return dict(ph="X", pid=pid, tid=tid, name=name, ts=1.0, dur=2.0) | more


def test_trace_and_picture(tmp_path):
    named = dict(ph="M", name="process_name")
    thread = dict(ph="M", name="thread_name", pid=1)
    events = [
        named | dict(pid=1, args=dict(name="/device:GPU:0")),
        named | dict(pid=2, args=dict(name="/device:GPU:1")),
        named | dict(pid=3, args=dict(name="/host:CPU")),
        thread | dict(tid=7, args=dict(name="Stream #7(Compute)")),
        thread | dict(tid=8, args=dict(name="Stream #8(Compute)")),
        thread | dict(tid=9, args=dict(name="XLA Ops")),
        trace_event(1, 7, "gemm"),
        trace_event(1, 8, "void jax_ep::dispatch", ts=2.0),
        trace_event(1, 8, "copy", args=dict(hlo_op="jax_ep_combine.1")),
        trace_event(1, 9, "module"),
        trace_event(2, 7, "gemm"),
        trace_event(3, 7, "launch"),
    ]
    with gzip.open(tmp_path / "a.trace.json.gz", "wt") as file:
        json.dump(dict(traceEvents=events), file)
    spans = two_microbatches.read_trace(str(tmp_path))
    assert [(s.stream[:9], s.start, s.length, s.ours) for s in spans] == [
        ("Stream #7", 1, 2, False),
        ("Stream #8", 2, 2, True),
        ("Stream #8", 1, 2, True),
    ]
    pytest.importorskip("matplotlib")
    two_microbatches.picture(str(tmp_path / "a.png"), spans)
    assert (tmp_path / "a.png").stat().st_size > 1000
    with pytest.raises(FileNotFoundError, match="expected a .*trace.json.gz, got none"):
        two_microbatches.read_trace(str(tmp_path / "empty"))
