# SPDX-License-Identifier: Apache-2.0
"""`python -m jax_ep bench`: its arithmetic, and a run on host devices."""

import importlib.util
import json
import os
import subprocess
import sys
import types

import jax
import numpy as np
import pytest

from jax_ep import __main__, _bench, _group
from jax_ep._bench import beside, exchange, timing
from jax_ep._bench.work import WORKLOADS, Moved, Traffic, Workload, routing

ROWS = """
empty loop
plan
plan, skewed routing
plan, L2 cold
plan, xla
dispatch bf16
dispatch bf16, without plan
dispatch bf16, skewed routing
dispatch f16
dispatch f32
dispatch fp8, quantised
dispatch fp8, delivered bf16
dispatch bf16, capacity factor 1.25
dispatch bf16, capacity factor 1, drops
dispatch bf16, alignment 128
dispatch bf16, batched, factor 1.25
dispatch bf16, a rank late
dispatch bf16, L2 cold
dispatch bf16, 2 SMs
dispatch bf16 beside GEMMs, 2 SMs
dispatch bf16, xla
dispatch bf16, T=8
dispatch fp8, quantised, T=8
combine bf16
combine bf16, skewed routing
combine f16
combine f32
combine bf16, batched, factor 1.25
combine bf16, a rank late
combine bf16, L2 cold
combine bf16, 2 SMs
combine bf16 beside GEMMs, 2 SMs
combine bf16, xla
combine bf16, T=8
lax.all_to_all of the K copies
layer fwd+bwd
layer fwd+bwd, xla
layer fwd+bwd, experts alone
layer communication
layer communication, xla
"""


def test_traffic_counts_copies_and_rows():
    work = Workload(tokens=2, hidden=128, top_k=2, experts=4)  # 2 experts on each rank
    idx = np.array([[[0, 1], [1, 2]], [[2, 3], [2, 3]]])  # rank 0 sends one token, rank 1 none
    traffic = Traffic.of(idx, work)
    assert traffic == Traffic(sent=1, arrived=1, received=3, rows=5)
    assert traffic.dispatch(work, 256, 132, 256) == (
        *(132, 2 * 256 + 132 + 5 * 256, 3 * 132),
        False,
    )
    assert traffic.combine(work, 512) == (512, (5 + 2 + 2) * 512, 3 * 512, True)


def test_traffic_leaves_out_dropped_pairs_and_counts_padding():
    work = Workload(tokens=2, hidden=128, top_k=2, experts=4)
    idx = np.array([[[0, 1], [1, -1]], [[2, 3], [2, -1]]])
    assert Traffic.of(idx, work) == Traffic(sent=0, arrived=0, received=2, rows=3)
    assert Traffic.of(idx, work, alignment=8).rows == 16


def test_floor_is_the_slower_of_link_and_memory():
    memory = dict(read_1_write_4=1000.0, read_4_write_1=2000.0, read_1_write_1=900.0)
    ceilings = timing.Ceilings(ppermute=100.0, copies=200.0, **memory)
    bytes_ = dict(link=2e6, deepep=0.0)
    assert ceilings.floor_us(Moved(memory=5e6, mostly_reads=False, **bytes_)) == 10.0
    assert ceilings.floor_us(Moved(memory=5e7, mostly_reads=False, **bytes_)) == 50.0
    assert ceilings.floor_us(Moved(memory=5e7, mostly_reads=True, **bytes_)) == 25.0
    alone = timing.Ceilings(ppermute=None, copies=None, **memory)
    assert alone.floor_us(Moved(link=0.0, memory=5e6, deepep=0.0, mostly_reads=False)) == 5.0


@pytest.mark.parametrize("skew", [0.0, 3.0])
def test_routing_is_distinct_and_as_skewed_as_asked(skew):
    work = WORKLOADS["training"]
    idx = routing(work, 2, skew=skew, seed=0)
    assert idx.shape == (2, work.tokens, work.top_k) and idx.dtype == np.int32
    assert all(len(set(token)) == work.top_k for token in idx[0, :100])
    load = np.bincount(idx.reshape(-1), minlength=work.experts)
    first, last = load[:8].sum(), load[-8:].sum()
    assert (first > 5 * last) if skew else (0.9 < first / last < 1.1)


def test_prefill_floor_is_the_one_of_the_documentation():
    work = WORKLOADS["prefill"]
    row = work.hidden * 2
    traffic = Traffic.of(routing(work, 2, skew=0.0, seed=1), work)
    moved = traffic.dispatch(work, row, row, row)
    assert 58.3e6 < moved.link < 58.8e6 and 580e6 < moved.memory < 600e6


def test_products_cover_the_operation_or_end_before_it():
    assert beside.counts(250.0, 400.0, 55.0) == (1, 2)
    assert beside.counts(850.0, 400.0, 55.0) == (3, 9)
    assert beside.counts(40.0, 400.0, 55.0) == (1, 0)
    assert beside.counts(1e9, 400.0, 55.0) == (beside.MOST, beside.MOST)


def test_shares_of_what_is_lost():
    row = beside.shares(100.0, 200.0, 215.0, 130.0)
    assert (row["hidden"], row["gemm_slower"], row["op_slower"]) == (0.85, 0.075, 0.3)
    assert beside.shares(100.0, 200.0, 300.0) == dict(
        alone_us=100.0, gemm_us=200.0, both_us=300.0, hidden=0.0, gemm_slower=0.5, op_slower=None
    )


def test_a_failure_is_named_before_results_are_compared(monkeypatch):
    def fail():
        raise RuntimeError("rank 1, plan: waited for rank 0")

    timer = types.SimpleNamespace(mapped=lambda _: lambda *_: np.zeros((2, 3)))
    poisoned = types.SimpleNamespace(
        timer=timer, on_device=lambda _: None, uniform=[0], x={"bfloat16": None}, weights=None
    )
    with pytest.raises(SystemExit, match="results differ"):
        exchange.Exchange.check(poisoned)
    monkeypatch.setattr(_group, "check", fail)
    with pytest.raises(RuntimeError, match="rank 1, plan"):
        exchange.Exchange.check(poisoned)


@pytest.mark.parametrize(("words", "swept"), [([], __main__.SMS), (["16", "all"], [16, "all"])])
def test_sms_without_numbers_sweeps_a_list(monkeypatch, words, swept):
    ran = []
    monkeypatch.setattr(_bench, "main", lambda *args: ran.append(args) or 0)
    assert __main__.main(["bench", "--sms", *words]) == 0
    assert ran[0][1] == swept


def test_all_sms_are_those_of_the_gpu(monkeypatch):
    with pytest.raises(SystemExit, match="--sms all: expected GPUs, got cpu"):
        _bench.counted([8, "all"])
    monkeypatch.setattr(jax, "devices", lambda: [types.SimpleNamespace(core_count=132)])
    assert _bench.counted([8, "all", 132]) == [8, 132]


def test_bad_options_say_what_is_expected(capsys, monkeypatch):
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    for options, message in (
        (["--workload", "lunch"], "invalid choice: 'lunch'"),
        (["--tokens", "0"], "argument --tokens: invalid positive int value: '0'"),
        (["--sms", "many"], "argument --sms: invalid positive int or all value: 'many'"),
        (["--plot", "p.png"], "--plot: expected matplotlib (pip install matplotlib), got none"),
    ):
        with pytest.raises(SystemExit) as stopped:
            __main__.main(["bench", *options])
        assert stopped.value.code == 2 and message in capsys.readouterr().err


def test_a_run_keeps_every_figure(tmp_path):
    result, picture = tmp_path / "bench.json", tmp_path / "bench.png"
    sweeps = ["--sms", "2", "--tokens", "8"]
    options = ["--workload", "smoke", *sweeps, "--json", result, "--plot", picture]
    flags = "--xla_force_host_platform_device_count=2 --xla_backend_optimization_level=0"
    words = [sys.executable, "-m", "jax_ep", "bench", *map(str, options)]
    environment = os.environ | {"XLA_FLAGS": flags}
    done = subprocess.run(words, capture_output=True, text=True, timeout=300, env=environment)
    assert done.returncode == 0, done.stdout + done.stderr
    facts = json.loads(result.read_text())
    assert facts["command"] == " ".join(["python -m jax_ep bench --workload smoke", *sweeps])
    rows = facts["results"]["smoke"]
    assert set(rows) == {"ceilings", *ROWS.strip().splitlines()}
    base, bounded = rows["dispatch bf16"], rows["dispatch bf16, capacity factor 1.25"]
    assert all(base[k] > 0 for k in ("median_us", "p99_us", "wire_gbs", "floor_us", "ratio"))
    assert (base["capacity_rows"], bounded["capacity_rows"]) == (2 * 64 * 4, 64 * 4 * 5 // 4)
    assert bounded["options"] == {"capacity_factor": 1.25} and base["num_sms"] == "default"
    assert rows["combine bf16, 2 SMs"]["num_sms"] == 2
    both = rows["dispatch bf16 beside GEMMs, 2 SMs"]
    assert both["num_sms"] == 2 and both["products"][0] >= 1
    assert all(both[key] > 0 for key in ("alone_us", "gemm_us", "both_us"))
    assert len(facts["devices"]) == 2 and facts["workloads"]["smoke"]["hidden"] == 256
    assert "XLA has none on this platform" in done.stdout and picture.stat().st_size > 5000
