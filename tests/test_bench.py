# SPDX-License-Identifier: Apache-2.0
"""`python -m jax_ep bench`: its arithmetic, and a run on host devices."""

import json
import os
import subprocess
import sys

import numpy as np
import pytest

from jax_ep import _bench


def test_traffic_counts_copies_and_rows():
    work = _bench.Workload(tokens=2, hidden=128, top_k=2, experts=4)  # 2 experts on each rank
    idx = np.array([[[0, 1], [1, 2]], [[2, 3], [2, 3]]])  # rank 0 sends one token, rank 1 none
    traffic = _bench.Traffic.of(idx, work)
    assert traffic == _bench.Traffic(sent=1, arrived=1, rows=5)
    assert traffic.dispatch_bytes(work, 256, 256) == (256, 2 * 256 + 256 + 5 * 256)
    assert traffic.combine_bytes(work) == (256, (5 + 2 + 2) * 256)


@pytest.mark.parametrize("skew", [0.0, 3.0])
def test_routing_is_distinct_and_as_skewed_as_asked(skew):
    work = _bench.WORKLOADS["training"]
    idx = _bench.routing(work, 2, skew=skew, seed=0)
    assert idx.shape == (2, work.tokens, work.top_k) and idx.dtype == np.int32
    assert all(len(set(token)) == work.top_k for token in idx[0, :100])
    load = np.bincount(idx.reshape(-1), minlength=work.experts)
    first, last = load[:8].sum(), load[-8:].sum()
    assert (first > 5 * last) if skew else (0.9 < first / last < 1.1)


def test_prefill_floor_is_the_one_of_the_documentation():
    work = _bench.WORKLOADS["prefill"]
    traffic = _bench.Traffic.of(_bench.routing(work, 2, skew=0.0, seed=1), work)
    link, memory = traffic.dispatch_bytes(work, work.hidden * 2, work.hidden * 2)
    assert 58.3e6 < link < 58.8e6 and 580e6 < memory < 600e6


def test_a_run_keeps_every_figure(tmp_path):
    result, picture = tmp_path / "bench.json", tmp_path / "bench.png"
    options = ["--workload", "smoke", "--sms", "2", "4", "--json", result, "--plot", picture]
    environment = os.environ | {"XLA_FLAGS": "--xla_force_host_platform_device_count=2"}
    words = [sys.executable, "-m", "jax_ep", "bench", *map(str, options)]
    done = subprocess.run(words, capture_output=True, text=True, timeout=200, env=environment)
    assert done.returncode == 0, done.stdout + done.stderr
    facts = json.loads(result.read_text())
    rows = facts["results"]["smoke"]
    assert rows["dispatch bf16"]["median_us"] > 0 and rows["dispatch bf16"]["ratio"] > 0
    assert {"combine bf16, 4 SMs", "dispatch fp8, quantised", "ceilings"} <= set(rows)
    assert len(facts["devices"]) == 2 and facts["workloads"]["smoke"]["hidden"] == 256
    assert "XLA has none on this platform" in done.stdout and picture.stat().st_size > 5000
