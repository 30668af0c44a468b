# SPDX-License-Identifier: Apache-2.0
"""A model of dispatch and combine between nodes: what 2 to 128 nodes would take, and what binds.

Nothing is timed here. Routing is drawn from `jax_ep.routing`; what every rank sends and receives is
counted; each stage takes its bytes over its rate, a pipelined operation the longest stage of the
busiest rank plus the time to fill::

    NPROC=64 python benchmarks/scale_model.py --json out.json --plot out.svg

A token crosses RDMA once for each destination node, to the GPU with the sender's local index, which
forwards it over NVLink; combine mirrors that. The small-batch kernels put one message for each
(token, destination rank). Inputs: scale_inputs.py. See docs/scale.md.
"""

import argparse
import dataclasses
import json
import math
from pathlib import Path
from typing import NamedTuple

import numpy as np
from scale_inputs import INPUTS, MACHINES, Machine, given
from scale_published import compare
from scale_traffic import Traffic, Work, count

# Stages


@dataclasses.dataclass(frozen=True)
class Kernels:
    """Whose kernels: what they move through memory and SMs, and how fast an SM is."""

    name: str
    sm_gbs: dict[str, float]  # by operation and type
    small_us: dict[str, float]  # small batches: all but the links
    small_copies: str = "rank"  # one message for each (token, "rank") or (token, expert) "pair"
    expert_rows: bool = True  # rows for each expert, else for each (token, rank)
    copies_out: bool = True  # where not expert_rows: the last copy out of buffers is in the time
    routing_bytes: int = 2  # of one expert id, that all ranks get with a small batch


def _v1_sm_gbs(us: str, row_bytes: int, passes: float) -> float:
    """GB/s of an SM: `passes` times T rows in the time measured at EP2 with 24 SMs."""
    return passes * 4096 * row_bytes / 1e3 / (given(us) - given("start_us")) / 24


def _v1_small_us(us: str, row_bytes: int) -> float:
    """What EP2 took, less its link: half of 128 x 8 messages."""
    return given(us) - 512 * row_bytes / 1e3 / given("h200_link_gbs")


_AT_EP2 = 2 * (1 - 2**-8)  # ranks that a token visits
OURS = Kernels(
    "jax_ep",
    {
        "dispatch fp8": given("dispatch_sm_gbs"),
        "dispatch bf16": given("dispatch_sm_gbs"),
        "combine bf16": given("combine_sm_gbs"),
    },
    {"dispatch": given("small_dispatch_us"), "combine": given("small_combine_us")},
)
DEEPEP_V1 = Kernels(
    "DeepEP V1",
    {
        "dispatch fp8": _v1_sm_gbs("v1_dispatch_fp8_us", 7392, 4 * _AT_EP2),
        "dispatch bf16": _v1_sm_gbs("v1_dispatch_bf16_us", 14336, 4 * _AT_EP2),
        "combine bf16": _v1_sm_gbs("v1_combine_us", 14336, 3 * _AT_EP2 + 1),
    },
    {
        "dispatch": _v1_small_us("v1_small_dispatch_us", 7408),
        "combine": _v1_small_us("v1_small_combine_us", 14336),
    },
    small_copies="pair",
    expert_rows=False,
    routing_bytes=0,
)
DEEPEP_V2 = dataclasses.replace(
    DEEPEP_V1,
    name="DeepEP V2",
    sm_gbs=dict.fromkeys(DEEPEP_V1.sm_gbs, given("v2_sm_gbs")),
    copies_out=False,
)


def on_nic(messages, message_bytes: float):
    """µs of a NIC for puts with a signal each."""
    packets = math.ceil(message_bytes / given("packet_bytes"))
    header = packets * given("packet_header_bytes") + given("put_header_bytes")
    wire = (message_bytes + header + given("signal_bytes")) / 1e3 / given("nic_gbs")
    return messages * max(wire, 2 / given("nic_messages_us"))


def rows_through_sms(traffic: Traffic, operation: str, kernels: Kernels) -> np.ndarray:
    """[R] rows that SMs read and write, reads and writes counted apart (the picture: docs/scale.md).

    With one node this is what docs/performance.md counts: 2 + c + K for each token of dispatch,
    K + 2c + 1 of combine.
    """
    t, work = traffic, traffic.work
    pairs_in, copies_in = t.pairs.sum(0), t.copies.sum(0)
    if kernels.expert_rows and operation == "dispatch":
        return work.tokens + t.copies.diagonal() + t.nic_out + t.nic_in + t.link_in + pairs_in
    if kernels.expert_rows:
        return pairs_in + 2 * t.link_out + t.nic_in + t.nic_out + work.tokens
    on_nodes = t.node_copies.sum(1) if work.nodes > 1 else np.zeros_like(copies_in)
    if operation == "dispatch":  # into slots; forwarded (or pushed); copied out
        return 2 * on_nodes + 2 * copies_in + 2 * copies_in * kernels.copies_out
    return 3 * copies_in + on_nodes + (on_nodes + work.tokens) * kernels.copies_out


def stages(traffic, operation: str, dtype: str, machine, kernels, num_sms: int) -> dict[str, float]:
    """µs of each stage on its busiest rank, for batches that are pipelined through all of them."""
    row = traffic.work.row_bytes(dtype)
    slot = row + given("slot_header_bytes")
    out, arrive = on_nic(traffic.nic_out, slot), on_nic(traffic.nic_in, slot)
    link = [traffic.link_out, traffic.link_in]  # combine: the other way round, the same maximum
    rows = rows_through_sms(traffic, operation, kernels)
    in_memory = rows + traffic.nic_out + traffic.nic_in  # the NIC reads and writes memory, too
    sm_gbs = kernels.sm_gbs[f"{operation} {dtype}"]
    return {
        "NIC": float(max(out.max(), arrive.max())),
        "NVLink": float(max(x.max() for x in link)) * row / 1e3 / machine.link,
        "memory": float(in_memory.max()) * row / 1e3 / machine.memory[operation],
        "SMs": float(rows.max()) * row / 1e3 / (num_sms * sm_gbs),
    }


def pipelined_us(traffic, operation, dtype, machine, kernels=OURS, num_sms=64):
    """µs of an operation, and its stages."""
    parts = stages(traffic, operation, dtype, machine, kernels, num_sms)
    fill = given("flag_us") * 2 + (given("rdma_us") if traffic.work.nodes > 1 else 0)
    return given("start_us") + fill + max(parts.values()), parts


def plan_us(work: Work, machine: Machine, exchange: str = "routing") -> float:
    """All ranks exchange something, along the rails and then over NVLink, and count.

    routing: all of it, so that a rank counts the pairs of all. counts: how many pairs a rank has
    for each expert, which would do where a token's header carries its rows; not what we have.
    """
    pairs = work.tokens * work.top_k
    sent = pairs * 2 if exchange == "routing" else work.experts * 4
    counted = pairs * work.ranks if exchange == "routing" else pairs + work.experts * work.ranks
    base = given("plan_us") + given("plan_pair_ns") * 1e-3 * max(0, counted - 65536)
    if work.nodes == 1:
        return base + (work.ranks - 2) * sent / 1e3 / machine.link
    fan_out = work.nodes * (work.local - 1) * sent / 1e3 / machine.link
    return base + given("rdma_us") + max(on_nic(work.nodes - 1, sent), fan_out)


def small_us(traffic, operation, dtype, machine, kernels=OURS):
    """µs of a small batch by direct puts, and its stages."""
    work = traffic.work
    row = work.row_bytes(dtype) + (16 if dtype == "fp8" else 0)
    sent = traffic.pairs if kernels.small_copies == "pair" else traffic.copies
    node = np.arange(work.ranks) // work.local
    same_node, same_rank = node[:, None] == node, np.eye(work.ranks, dtype=bool)
    remote, near = sent * ~same_node, sent * (same_node & ~same_rank)
    others = work.ranks - work.local
    header = on_nic(others, max(8, work.tokens * work.top_k * kernels.routing_bytes))
    headers = header if operation == "dispatch" else on_nic(others, 8)
    parts = {
        "NIC": float(on_nic(max(remote.sum(1).max(), remote.sum(0).max()), row) + headers),
        "NVLink": float(max(near.sum(1).max(), near.sum(0).max())) * row / 1e3 / machine.link,
    }
    pairs = max(0, work.ranks * work.tokens * work.top_k - 2048) * kernels.expert_rows
    counting = given("plan_pair_ns") * 1e-3 * pairs * (operation == "dispatch")
    flight = given("rdma_us") if work.nodes > 1 else 0
    return kernels.small_us[operation] + counting + flight + max(parts.values()), parts


# What the published figures ran. Routing as their tests draw it: groups are nodes.


class Case(NamedTuple):
    """A published figure's workload, kernels and way to count."""

    name: str
    machine: str
    kernels: Kernels
    work: Work
    num_sms: int  # 0: the small-batch kernels
    counted: str  # what its GB/s count: "rank" or "node" copies, or "pair"s; own ones, too


CASES = [
    Case("V1 EP8", "H800", DEEPEP_V1, Work(1, 4096, "uniform"), 24, "rank"),
    *[
        Case(f"V1 EP{8 * n}", "H800", DEEPEP_V1, Work(n, 4096, "grouped"), 24, "node")
        for n in (2, 4, 8)
    ],
    *[
        Case(f"V1 low latency EP{8 * n}", "H800", DEEPEP_V1, Work(n, 128, "uniform"), 0, "pair")
        for n in (1, 2, 4, 8, 16, 32)
    ],
    Case("V2 EP 8x2", "H100", DEEPEP_V2, Work(2, 8192, "uniform"), 12, "node"),
    Case("V2 EP 8x4", "H100", DEEPEP_V2, Work(4, 8192, "uniform"), 6, "node"),
    Case("UCCL-EP EP8", "H200", DEEPEP_V1, Work(1, 4096, "uniform"), 24, "rank"),
]


def predict_case(case: Case) -> dict:
    """µs and GB/s as the project of the case counts them, of FP8 dispatch and BF16 combine."""
    traffic, machine = count(case.work), MACHINES[case.machine]
    results = {}
    for operation, dtype in (("dispatch", "fp8"), ("combine", "bf16")):
        if case.num_sms:
            us, parts = pipelined_us(traffic, operation, dtype, machine, case.kernels, case.num_sms)
        else:
            us, parts = small_us(traffic, operation, dtype, machine, case.kernels)
        counted = {"rank": traffic.copies, "node": traffic.node_copies, "pair": traffic.pairs}
        rows = counted[case.counted].sum() / case.work.ranks
        gbs = rows * case.work.row_bytes(dtype) / 1e3 / us
        results[operation] = {**_cell(us, parts), "gbs": round(gbs, 1)}
    return results


# Our design, at scale

NODES = (2, 4, 8, 16, 32, 64, 128)
ROUTINGS = ("grouped", "uniform", "skewed")
OPERATIONS = (("dispatch", "fp8"), ("dispatch", "bf16"), ("combine", "bf16"))


def predict(work: Work, machine: Machine, num_sms: int = 64) -> dict:
    """Our design on one workload: forwarded, and in small batches by direct puts, too."""
    traffic = count(work)
    pairs_in = traffic.pairs.sum(0)
    result = {
        "plan_us": round(plan_us(work, machine), 1),
        "plan_by_counts_us": round(plan_us(work, machine, "counts"), 1),
        "nodes_of_a_token": round(float(traffic.node_copies.sum() / work.ranks / work.tokens), 3),
        "ranks_of_a_token": round(float(traffic.copies.sum() / work.ranks / work.tokens), 3),
        "busiest_nic_over_mean": round(float(traffic.nic_in.max() / traffic.nic_in.mean()), 3),
        "busiest_rank_over_mean": round(float(pairs_in.max() / pairs_in.mean()), 3),
        "forwarded": {},
        "one hop": {},
    }
    for operation, dtype in OPERATIONS:
        us, parts = pipelined_us(traffic, operation, dtype, machine, num_sms=num_sms)
        cell = _cell(us, parts)
        others = max(part for name, part in parts.items() if name != "SMs")
        cell["sms_that_keep_up"] = math.ceil(parts["SMs"] * num_sms / others)
        result["forwarded"][f"{operation} {dtype}"] = cell
        if work.tokens <= 512:
            cell = _cell(*small_us(traffic, operation, dtype, machine))
            result["one hop"][f"{operation} {dtype}"] = cell
    return result


def _cell(us: float, parts: dict[str, float]) -> dict:
    stages_us = {name: round(part, 1) for name, part in parts.items()}
    return {"us": round(us, 1), "binds": max(parts, key=parts.__getitem__), "stages_us": stages_us}


def predict_all(nodes=NODES, tokens=(4096, 128, 8)) -> list[dict]:
    """One row for each number of nodes, tokens and routing, on H100."""
    return [
        {"nodes": n, "tokens": T, "routing": r, **predict(Work(n, T, r), MACHINES["H100"])}
        for T in tokens
        for r in ROUTINGS
        for n in nodes
    ]


def ring_slots(dtype: str, hidden: int = 7168) -> int:
    """Slots that keep a NIC busy while a credit returns: its rate times there and back."""
    slot = Work(1, 1, "uniform", hidden).row_bytes(dtype) + given("slot_header_bytes")
    return math.ceil(given("nic_gbs") * 1e3 * 2 * given("rdma_us") / slot)


# Output


def print_cases(cases: dict[str, dict]) -> None:
    print(f"{'':24}{'dispatch us':>12}{'GB/s':>6} {'binds':8}{'combine us':>11}{'GB/s':>6} binds")
    for name, case in cases.items():
        d, c = case["dispatch"], case["combine"]
        print(
            f"{name:24}{d['us']:12.0f}{d['gbs']:6.0f} {d['binds']:8}"
            f"{c['us']:11.0f}{c['gbs']:6.0f} {c['binds']}"
        )


def print_comparison(rows: list[dict]) -> None:
    print(f"{'':22}{'published':>14}{'predicted':>14}{'error of time %':>18}")
    for row in rows:
        d, c = row["dispatch"], row["combine"]
        first = " (first release)" if "first" in row["source"] else ""
        print(
            f"{row['case']:22}{d['published']:8}{c['published']:6}{d['predicted']:8.0f}"
            f"{c['predicted']:6.0f}{d['error_percent']:+10.0f}{c['error_percent']:+8.0f}"
            f"  {'GB/s' if row['unit'] == 'gbs' else 'us'}{first}"
        )


def print_rows(rows: list[dict]) -> None:
    """`path`: forwarded over NVLink, or one hop (direct puts); all on H100, microseconds."""
    names = [f"{operation} {dtype}" for operation, dtype in OPERATIONS]
    head = "".join(f"{name:>20}" for name in names)
    print(f"{'T':>4} {'routing':8}{'nodes':>6} {'path':9}{'plan':>6}{head}")
    for row in rows:
        for path in ("forwarded", "one hop"):
            cells = [f"{cell['us']:.0f} {cell['binds']:6}" for cell in row[path].values()]
            plan = f"{row['plan_us']:.0f}" if path == "forwarded" else "in it"
            if cells:
                print(
                    f"{row['tokens']:4} {row['routing']:8}{row['nodes']:6} {path:9}{plan:>6}"
                    + "".join(f"{cell:>20}" for cell in cells)
                )


def plot(rows: list[dict], path: Path) -> None:
    import matplotlib

    matplotlib.use("Agg")
    matplotlib.rcParams["svg.fonttype"] = "none"  # text stays text: a small file
    matplotlib.rcParams["svg.hashsalt"] = "scale"  # the same file every time
    from matplotlib import pyplot as plt

    figure, panels = plt.subplots(1, 2, figsize=(10, 4), layout="constrained")
    colours = dict(zip(ROUTINGS, ("C0", "C1", "C2"), strict=True))
    for panel, tokens in zip(panels, (4096, 128), strict=True):
        for routing in ROUTINGS:
            of = [r for r in rows if (r["tokens"], r["routing"]) == (tokens, routing)]
            nodes = [r["nodes"] for r in of]
            for kind, style in (("forwarded", "-"), ("one hop", "--")):
                us = [r[kind]["dispatch fp8"]["us"] for r in of if r[kind]]
                if us:
                    label = f"{routing}, {kind}"
                    panel.plot(nodes, us, style, marker=".", color=colours[routing], label=label)
        plan = [r["plan_us"] for r in of]
        panel.plot(nodes, plan, ":", color="black", label="plan (forwarded)")
        panel.set(title=f"FP8 dispatch, T={tokens}", xlabel="nodes of 8 H100", ylabel="µs")
        panel.set_xscale("log", base=2)
        panel.set_yscale("log")
        panel.set_xticks(NODES, [str(n) for n in NODES])
        panel.legend(fontsize="small")
    figure.savefig(path, metadata={"Date": None} if path.suffix == ".svg" else None)
    plt.close(figure)


def main() -> None:
    parser = argparse.ArgumentParser(description="A model of dispatch and combine")
    parser.add_argument("--nodes", type=int, nargs="+", default=NODES)
    parser.add_argument("--json", type=Path, help="write inputs and results here")
    parser.add_argument("--plot", type=Path, help="draw predictions here (svg, png)")
    options = parser.parse_args()
    cases = {case.name: predict_case(case) for case in CASES}
    comparison = compare(cases)
    print_cases(cases)
    print_comparison(comparison)
    rows = predict_all(options.nodes)
    print_rows(rows)
    if options.json:
        run = {
            "inputs": {name: entry._asdict() for name, entry in INPUTS.items()},
            "ring_slots": {dtype: ring_slots(dtype) for dtype in ("fp8", "bf16")},
            "cases": cases,
            "comparison": comparison,
            "predictions": rows,
        }
        options.json.write_text(json.dumps(run, indent=1, ensure_ascii=False) + "\n")
    if options.plot:
        plot(rows, options.plot)


if __name__ == "__main__":
    main()
