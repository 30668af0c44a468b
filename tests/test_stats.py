# SPDX-License-Identifier: Apache-2.0
"""Timings as records become them, the recorder, and the statistics file."""

import dataclasses
import os
import re

import jax
import numpy as np
import pytest
from conftest import make_mesh
from jax import lax
from jax.sharding import AxisType, NamedSharding
from jax.sharding import PartitionSpec as P

import jax_ep
from jax_ep import _ffi, _stats_file, _stats_recorder
from jax_ep._stats import OPERATIONS

DISPATCH, COMBINE = OPERATIONS.index("dispatch"), OPERATIONS.index("combine")


@dataclasses.dataclass
class Device:
    """Stands for `jax.Device` of a GPU."""

    id: int
    local_hardware_id: int
    platform: str = "gpu"


class Ring:
    """Stands for what the extension reads: records of each device."""

    def __init__(self, monkeypatch, num_ranks):
        self.records = [[] for _ in range(num_ranks)]
        devices = [Device(10 + r, r) for r in range(num_ranks)]
        monkeypatch.setattr(jax, "local_devices", lambda: devices)
        monkeypatch.setattr(_ffi, "read_stats", self.read)

    def add(self, rank, number, operation, stamps, waits):
        record = [number, 1 + OPERATIONS.index(operation), *stamps, *waits]
        self.records[rank].append(record)

    def read(self):
        return [
            (rank, rank, 7 + len(self.records), np.array(records, np.uint64).tobytes())
            for rank, records in enumerate(self.records)
        ]


def test_there_are_no_timings_without_cuda():
    timings = jax_ep.stats()
    assert len(timings) == 0 and timings.waits_ns.shape == (0, 0)


def test_phases(monkeypatch):
    ring = Ring(monkeypatch, 2)
    ring.add(0, 7, "combine", (1000, 1400, 2000, 2100, 2500), (0, 350))
    ring.add(0, 6, "plan", (100, 130, 0, 0, 200), (0, 30))
    ring.add(1, 8, "dispatch", (50, 0, 90, 190, 200), (100, 0))
    ring.add(1, 9, "dispatch_start", (300, 0, 340, 190, 350), (0, 0))  # stale: of an earlier turn
    ring.add(1, 10, "dispatch_done", (400, 0, 340, 450, 480), (45, 0))
    t = jax_ep.stats()
    np.testing.assert_array_equal(t.push_ns[3:], [40, 0])
    np.testing.assert_array_equal(t.wait_ns[3:], [0, 50])
    t = t[:3]
    assert t.names.tolist() == ["plan", "combine", "dispatch"]
    np.testing.assert_array_equal(t.device, [10, 10, 11])
    np.testing.assert_array_equal(t.number, [6, 7, 8])
    np.testing.assert_array_equal(t.wait_ns, [30, 400, 100])
    np.testing.assert_array_equal(t.push_ns, [0, 600, 40])  # a plan has no push
    np.testing.assert_array_equal(t.work_ns, [70, 500, 10])
    np.testing.assert_array_equal(t.total_ns, [100, 1500, 150])
    np.testing.assert_array_equal(t.waits_ns, [[0, 30], [0, 350], [100, 0]])
    assert len(t[t.operation == COMBINE]) == 1


def test_groups_of_different_sizes_are_padded(monkeypatch):
    rows = [(0, 0, 9, np.arange(9, dtype=np.uint64)), (1, 3, 11, np.arange(11, dtype=np.uint64))]
    monkeypatch.setattr(jax, "local_devices", lambda: [Device(0, 0), Device(1, 1)])
    monkeypatch.setattr(_ffi, "read_stats", lambda: [(*row[:3], row[3].tobytes()) for row in rows])
    np.testing.assert_array_equal(jax_ep.stats().waits_ns, [[7, 8, 0, 0], [7, 8, 9, 10]])
    np.testing.assert_array_equal(jax_ep.stats().num_ranks, [2, 4])


def test_quantiles_are_within_their_buckets():
    ns = np.random.default_rng(0).lognormal(11, 1.5, 5000).astype(np.int64)
    counts = np.bincount(_stats_file.bucket(ns), minlength=_stats_file.BUCKETS)
    for q in (0.01, 0.5, 0.99):
        exact = np.quantile(ns, q, method="inverted_cdf")
        assert _stats_file.quantile_ns(counts, q) == pytest.approx(exact, rel=0.0225)
    assert np.isnan(_stats_file.quantile_ns(np.zeros(_stats_file.BUCKETS), 0.5))
    np.testing.assert_array_equal(_stats_file.bucket(np.array([0, 1, 2**40])), [0, 0, 511])


def test_bad_switch():
    with pytest.raises(TypeError, match="stats: expected True, False or None, got 1"):
        jax_ep.initialize(make_mesh(), stats=1)


def recorder_of(mesh, **options):
    return jax_ep.Recorder(mesh, **{"num_experts": 16, "num_layers": 2, **options})


def test_loads_and_drops_of_sharded_arrays():
    mesh = make_mesh()
    recorder = recorder_of(mesh)
    rng = np.random.default_rng(0)
    load = rng.integers(0, 100, (5, 2, 16), np.int32)
    dropped = rng.integers(0, 5, (5, 2, mesh.size), np.int32)
    split = NamedSharding(mesh, P(None, "expert"))
    recorder.add(load[0], dropped[0])
    recorder.add(*jax.device_put((load[1], dropped[1]), split))
    recorder.add(load[2:4], dropped[2:4])
    recorder.add(jax.device_put(load[4], split))
    run = recorder.run()
    dropped[4] = 0
    assert run.header.steps == 5 and run.header.window == 1
    np.testing.assert_array_equal(run.load, load)
    np.testing.assert_array_equal(run.dropped, dropped)


def test_a_long_run_keeps_few_windows():
    recorder = recorder_of(make_mesh(), num_layers=1)
    steps = 3 * _stats_recorder.WINDOWS
    load = np.arange(steps * 16).reshape(steps, 1, 16)
    for step in load:
        recorder.add(step[0])
    run = recorder.run()
    assert run.header.window == 4 and run.header.steps == steps
    np.testing.assert_array_equal(run.load, load.reshape(-1, 4, 1, 16).sum(1))
    assert run.load.shape == run.header.shapes()["load"]


def test_timings_are_counted_once_and_losses_seen(monkeypatch, tmp_path):
    ring = Ring(monkeypatch, 2)
    ring.add(0, 1, "dispatch", (0, 1, 2, 3, 4), (0, 9))  # before the recorder
    ring.add(1, 1, "dispatch", (0, 1, 2, 3, 4), (9, 0))
    mesh = jax.sharding.Mesh(jax.devices()[:2], ("expert",), axis_types=(AxisType.Auto,))
    recorder = recorder_of(mesh)
    recorder._device = {10: 0, 11: 1}
    for rank in (0, 1):
        recorder._read[10 + rank] = 1
    stamps = (0, 100, 1100, 1100, 3100)
    for number in (2, 3):
        ring.add(0, number, "dispatch", stamps, (0, 40))
    ring.add(1, 2, "combine", stamps, (70, 0))
    ring.add(1, 5, "combine", stamps, (50, 0))
    for _ in range(3):
        run = recorder.run()
    assert run.durations.sum() == 4 * len(_stats_file.PHASES)
    counts = run.durations[DISPATCH, _stats_file.PHASES.index("work"), 0]
    assert counts[_stats_file.bucket(np.array(2000))] == counts.sum() == 2
    np.testing.assert_array_equal(run.waits[DISPATCH], [[0, 80], [0, 0]])
    np.testing.assert_array_equal(run.waits[COMBINE], [[0, 0], [120, 0]])
    np.testing.assert_array_equal(run.longest[COMBINE], [[0, 0], [70, 0]])
    np.testing.assert_array_equal(run.lost, [0, 2])
    ring.records[0] = []
    ring.add(0, 1, "dispatch", stamps, (0, 1))  # a new generation counts from 1 again
    assert recorder.run().waits[DISPATCH, 0, 1] == 81


def test_timings_are_read_before_the_ring_is_full(monkeypatch):
    ring = Ring(monkeypatch, 2)
    mesh = jax.sharding.Mesh(jax.devices()[:2], ("expert",), axis_types=(AxisType.Auto,))
    recorder = recorder_of(mesh)
    recorder._device = {10: 0, 11: 1}
    number = 0
    for _ in range(40):
        for _ in range(700):
            number += 1
            ring.add(0, number, "dispatch", (0, 1, 2, 3, 4), (0, 1))
        ring.records[0] = ring.records[0][-4096:]
        recorder.add(np.zeros((2, 16), int))
    run = recorder.run()
    assert run.lost.sum() == 0 and run.durations.sum() == 4 * 40 * 700


@pytest.fixture
def run():
    recorder = recorder_of(make_mesh(), name="a run")
    for step in range(3):
        recorder.add(np.full((2, 16), step), np.ones((2, 8), int))
    return recorder.run()


def test_file_round_trip(run, tmp_path):
    _stats_file.write(tmp_path / "run.npz", run)
    again = _stats_file.read(tmp_path / "run.npz")
    assert again.header == run.header and again.header.run == "a run"
    for name in _stats_file._ARRAYS:
        np.testing.assert_array_equal(getattr(again, name), getattr(run, name))
    assert os.listdir(tmp_path) == ["run.npz"]


def test_truncated_files_and_others_are_named(run, tmp_path):
    path = tmp_path / "run.npz"
    _stats_file.write(path, run)
    whole = path.read_bytes()
    for size in (0, 1, 100, len(whole) // 2, len(whole) - 1):
        path.write_bytes(whole[:size])
        with pytest.raises(ValueError, match=f"{path}: expected a statistics file of jax_ep, got"):
            _stats_file.read(path)
    damaged = bytearray(whole)
    damaged[len(whole) // 3] ^= 0xFF
    path.write_bytes(damaged)
    with pytest.raises(ValueError, match="expected a statistics file"):
        _stats_file.read(path)
    np.savez(path, load=np.zeros(3))
    with pytest.raises(ValueError, match="expected a statistics file"):
        _stats_file.read(path)
    with pytest.raises(FileNotFoundError):
        _stats_file.read(tmp_path / "absent.npz")


def test_versions_and_shapes_are_checked(run, tmp_path, monkeypatch):
    path = tmp_path / "run.npz"
    monkeypatch.setattr(_stats_file, "VERSION", 2)
    _stats_file.write(path, run)
    monkeypatch.setattr(_stats_file, "VERSION", 1)
    with pytest.raises(ValueError, match="expected statistics of version 1, got version 2"):
        _stats_file.read(path)
    other = dataclasses.replace(run, load=run.load[:, :1])
    _stats_file.write(path, other, replace=True)
    with pytest.raises(ValueError, match=r"expected load of shape \(3, 2, 16\), got \(3, 1, 16\)"):
        _stats_file.read(path)


def test_nothing_is_lost(run, tmp_path, monkeypatch):
    path = tmp_path / "run.npz"
    _stats_file.write(path, run)
    _stats_file.write(path, run)  # the same run
    kept = path.read_bytes()
    other = dataclasses.replace(run, header=dataclasses.replace(run.header, num_experts=8))
    for another in (
        other,
        dataclasses.replace(run, header=dataclasses.replace(run.header, steps=2)),
    ):
        with pytest.raises(FileExistsError, match="an earlier state of this run, got another"):
            _stats_file.write(path, another)
    monkeypatch.setattr(np, "savez_compressed", lambda *args, **arrays: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        _stats_file.write(path, run)
    assert path.read_bytes() == kept and os.listdir(tmp_path) == ["run.npz"]


def of_process(run, process, **changes):
    """What a process would have that saw half of the experts and devices."""
    half = lambda a, axis: np.where(np.arange(a.shape[axis]) * 2 // a.shape[axis] == process, a, 0)
    header = dataclasses.replace(run.header, process=process, **changes)
    return dataclasses.replace(
        run, header=header, load=half(run.load, 2), dropped=half(run.dropped, 2), lost=run.lost + 1
    )


def test_parts_of_processes_merge(run):
    merged = _stats_file.merge([of_process(run, 0), of_process(run, 1)], ["a", "b"])
    np.testing.assert_array_equal(merged.load, run.load)
    np.testing.assert_array_equal(merged.dropped, run.dropped)
    np.testing.assert_array_equal(merged.lost, 2 * run.lost + 2)
    with pytest.raises(
        ValueError, match="b: expected one file of each process, got several of .* 0"
    ):
        _stats_file.merge([of_process(run, 1), of_process(run, 0), of_process(run, 0)], list("abb"))
    with pytest.raises(
        ValueError, match="b: expected statistics of the same model and run as a, with num_experts=16, got num_experts=32"
    ):  # fmt: skip
        _stats_file.merge([of_process(run, 0), of_process(run, 1, num_experts=32)], ["a", "b"])


def test_traces_show_the_operations():
    """Names of scopes, which Perfetto and Nsight show, forward and backward."""
    mesh = make_mesh((2,))

    def layer(x, idx):
        d = jax_ep.dispatch(x, idx, num_experts=4)
        flying = jax_ep.combine_start(lax.stop_gradient(d.tokens), d.handle)
        return jax_ep.combine(d.tokens, d.handle) + jax_ep.combine_done(flying)

    split = P("expert")
    on_ranks = jax.shard_map(layer, mesh=mesh, in_specs=split, out_specs=split)
    x, idx = np.ones((8, 16), np.float32), np.zeros((8, 2), np.int32)
    lowered = jax.jit(jax.value_and_grad(lambda x: on_ranks(x, idx).sum())).lower(x)
    text = lowered.as_text(debug_info=True)
    for scope in ("dispatch", "combine", "combine_done"):  # on xla a start is nothing
        assert re.search(rf"jax_ep\.{scope}[/)]", text), scope
    assert "jax_ep.combine/jax_ep_dispatch" in text  # the gradient of combine
    assert jax_ep.dispatch.__name__ == "dispatch" and "rows arrive" in jax_ep.dispatch.__doc__


@pytest.mark.parametrize(
    "error, message, call",
    [
        (TypeError, "mesh: expected a jax.sharding.Mesh, got str", lambda m: jax_ep.Recorder("m", num_experts=8)),
        (ValueError, "axis_name: expected axes of the mesh", lambda m: jax_ep.Recorder(m, "other", num_experts=8)),
        (ValueError, "num_experts: expected a multiple of the group's 8 ranks, got 12", lambda m: recorder_of(m, num_experts=12)),
        (ValueError, "num_layers: expected a positive integer, got 0", lambda m: recorder_of(m, num_layers=0)),
        (ValueError, r"load: expected shape \[2, 16\], or with leading steps, got \[16\]", lambda m: recorder_of(m).add(np.zeros(16, int))),
        (TypeError, "load: expected integers, got float64", lambda m: recorder_of(m).add(np.zeros((2, 16)))),
        (ValueError, r"num_dropped: expected shape \[2, 8\]", lambda m: recorder_of(m).add(np.zeros((2, 16), int), np.zeros(8, int))),
        (ValueError, "num_dropped: expected 3 steps, as load has, got 1", lambda m: recorder_of(m).add(np.zeros((3, 2, 16), int), np.zeros((2, 8), int))),
    ],
)  # fmt: skip
def test_bad_input(error, message, call):
    with pytest.raises(error, match=message):
        call(make_mesh())
