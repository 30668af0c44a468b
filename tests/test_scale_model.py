# SPDX-License-Identifier: Apache-2.0
"""The model of scale: traffic against a walk by hand, times computed by hand, what must not fall."""

import importlib.util
import json
import pathlib

import numpy as np
import pytest

BENCHMARKS = pathlib.Path(__file__).parent.parent / "benchmarks"
LOCAL = 8


@pytest.fixture(scope="module")
def model():
    with pytest.MonkeyPatch.context() as patch:
        patch.syspath_prepend(BENCHMARKS)
        spec = importlib.util.spec_from_file_location("model", BENCHMARKS / "scale_model.py")
        assert spec and spec.loader
        module = importlib.util.module_from_spec(spec)
        spec.loader.exec_module(module)
    return module


def walk(idx, experts):
    """Copies of each rank on NIC and link, token by token: one for each node, then forwarded."""
    ranks = len(idx)
    sent = {name: np.zeros(ranks, int) for name in ("nic_out", "nic_in", "link_out", "link_in")}
    for source in range(ranks):
        for token in idx[source]:
            visited = {int(e) // (experts // ranks) for e in token}
            for node in {rank // LOCAL for rank in visited}:
                forwarder = node * LOCAL + source % LOCAL
                if forwarder != source:
                    sent["nic_out"][source] += 1
                    sent["nic_in"][forwarder] += 1
                for rank in visited - {forwarder}:
                    if rank // LOCAL == node:
                        sent["link_out"][forwarder] += 1
                        sent["link_in"][rank] += 1
    return sent


@pytest.mark.parametrize("routing", ["uniform", "grouped", "skewed"])
def test_traffic_is_that_of_the_drawn_tokens(model, routing):
    work = model.Work(5, 16, routing, top_k=6)
    traffic = model.count(work)
    draw = importlib.import_module("scale_traffic").draw  # loaded with the model
    idx = [draw(work, rank) for rank in range(work.ranks)]
    assert traffic.pairs.sum() == work.ranks * 16 * 6
    for name, want in walk(idx, work.experts).items():
        np.testing.assert_array_equal(getattr(traffic, name), want, err_msg=name)
    if routing == "grouped":
        nodes = [{int(e) * 5 // work.experts for e in token} for token in np.concatenate(idx)]
        assert max(map(len, nodes)) == 4


def test_shifted_ranks_send_what_they_would(model):
    """With fewer ranks drawn the others name shifted experts: the same traffic, turned by nodes."""
    traffic = model.count(model.Work(4, 32, "uniform"), drawn_ranks=16)
    np.testing.assert_array_equal(traffic.copies[16:], np.roll(traffic.copies[:16], 16, 1))
    np.testing.assert_array_equal(traffic.nic_out[16:], traffic.nic_out[:16])
    assert traffic.nic_in.sum() == traffic.nic_out.sum()
    assert traffic.link_in.sum() == traffic.link_out.sum()


def rails_only(model, tokens):
    """16 ranks on two nodes, every token goes to the other node's GPU with the same index."""
    work = model.Work(2, tokens, "uniform", top_k=1)
    copies = tokens * np.roll(np.eye(16, dtype=int), 8, 1)
    nodes = tokens * np.repeat([[0, 1], [1, 0]], 8, axis=0)
    return model.Traffic(work, pairs=copies, copies=copies, node_copies=nodes)


def test_a_case_by_hand(model):
    traffic = rails_only(model, 1000)
    machine = model.MACHINES["H100"]
    us, parts = model.pipelined_us(traffic, "dispatch", "bf16", machine)
    # A slot of 14336 + 128 B: 4 packets of 26 B of headers, 16 of RDMA, 54 for the signal, 50 GB/s.
    assert parts["NIC"] == pytest.approx(1000 * (14464 + 4 * 26 + 16 + 54) / 50e3)
    assert parts["NVLink"] == 0
    # x read, slot written, read from the ring, row written: 4; 64 SMs of 67 GB/s.
    assert parts["SMs"] == pytest.approx(4000 * 14336e-3 / (64 * 67))
    assert parts["memory"] == pytest.approx(6000 * 14336e-3 / 2700)  # and by the NICs
    assert us == pytest.approx(12 + 2 * 1.3 + 8.35 + parts["NIC"])
    assert model.ring_slots("bf16") == -(-50e3 * 2 * 8.35 // 14464)
    # Direct puts: rows without a slot's header, then 8 routing messages of 2000 B.
    _, parts = model.small_us(traffic, "dispatch", "bf16", machine)
    routing = 8 * (2000 + 26 + 16 + 54) / 50e3
    assert parts["NIC"] == pytest.approx(1000 * (14336 + 4 * 26 + 16 + 54) / 50e3 + routing)


def test_one_node_is_what_was_measured_on_two_gpus(model):
    """docs/performance.md, 2 H100: 246 and 232 µs, 401 and 699 with 24 SMs; within 25 %."""
    traffic = model.count(model.Work(1, 4096, "uniform", local=2))
    rows = [
        model.rows_through_sms(traffic, op, model.OURS).max() / 4096
        for op in ("dispatch", "combine")
    ]
    assert rows == pytest.approx([11, 11], rel=0.01)  # 2 + c + K and K + 2c + 1 with c = 1, K = 8
    for operation, all_sms_us, few_us in (("dispatch", 246, 401), ("combine", 232, 699)):
        for num_sms, measured in ((132, all_sms_us), (24, few_us)):
            us, _ = model.pipelined_us(
                traffic, operation, "bf16", model.MACHINES["H100"], num_sms=num_sms
            )
            assert us == pytest.approx(measured, rel=0.25), (operation, num_sms)


def test_more_work_or_slower_parts_never_take_less(model):
    h100, h800 = model.MACHINES["H100"], model.MACHINES["H800"]
    small, large = (model.count(model.Work(2, T, "uniform")) for T in (64, 128))
    for path in (model.pipelined_us, model.small_us):
        for operation in ("dispatch", "combine"):
            us = path(small, operation, "bf16", h100)[0]
            assert us < path(large, operation, "bf16", h100)[0]
            assert us <= path(small, operation, "bf16", h800)[0]
            if operation == "dispatch":
                assert path(small, operation, "fp8", h100)[0] < us
    plans = [model.plan_us(model.Work(n, 4096, "uniform"), h100) for n in (1, 2, 4, 8)]
    assert plans == sorted(plans)
    few = model.pipelined_us(large, "combine", "bf16", h100, num_sms=1)[0]
    assert few > model.pipelined_us(large, "combine", "bf16", h100, num_sms=2)[0]


def test_grouped_routing_bounds_what_the_network_carries(model):
    grouped, uniform = (model.count(model.Work(8, 64, r)) for r in ("grouped", "uniform"))
    assert grouped.node_copies.sum() <= 4 * 64 * 64 < uniform.node_copies.sum()


def test_a_plan_by_counts_is_less_at_scale(model):
    far, h100 = model.Work(128, 4096, "uniform"), model.MACHINES["H100"]
    assert model.plan_us(far, h100, "counts") < model.plan_us(far, h100) / 5
    # A message of 1024 counts from each rank; the counts of all ranks are added up.
    counted = 4096 * 8 + 1024 * 1024 - 65536
    link = 128 * 7 * 4096 / 350e3
    want = 10.1 + 8.35 + counted * 0.0189e-3 + link
    nic = 127 * (4096 + 26 + 16 + 54) / 50e3
    assert nic > link
    assert model.plan_us(far, h100, "counts") == pytest.approx(want - link + nic)


def test_errors_are_those_of_time(model):
    """A case predicted twice as fast as published is 50 % short, by either unit."""
    published = importlib.import_module("scale_published")
    cases = {
        figure.case: {
            name: {"us": value / 2, "gbs": value * 2, "binds": "NIC"}
            for name, value in (("dispatch", figure.dispatch), ("combine", figure.combine))
        }
        for figure in published.FIGURES
        if "first" not in figure.source
    }
    figures = [row for row in published.compare(cases) if "first" not in row["source"]]
    assert {row["unit"] for row in figures} == {"us", "gbs"}
    assert {row[name]["error_percent"] for row in figures for name in ("dispatch", "combine")} == {
        -50
    }


def test_results_are_of_this_model(model):
    """The kept file has these inputs, and its first small row comes out again."""
    kept = json.loads((BENCHMARKS / "results" / "scale_model.json").read_text())
    assert kept["inputs"] == {name: entry._asdict() for name, entry in model.INPUTS.items()}
    published = importlib.import_module("scale_published")
    assert kept["comparison"] == published.compare(kept["cases"])
    row = next(r for r in kept["predictions"] if r["tokens"] == 128)
    again = model.predict(model.Work(row["nodes"], 128, row["routing"]), model.MACHINES["H100"])
    for path in ("forwarded", "one hop"):
        for name, cell in row[path].items():
            assert again[path][name]["us"] == pytest.approx(cell["us"], rel=0.01), (path, name)
