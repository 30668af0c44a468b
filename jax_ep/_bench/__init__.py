# SPDX-License-Identifier: Apache-2.0
"""`python -m jax_ep bench`: plan, dispatch and combine beside XLA's collectives, on all devices here.

Floors come from a link and a memory ceiling measured in the same run; results are compared with
`implementation="xla"` first. `timing.py` says how times are taken.
"""

import dataclasses
import json
import sys

import jax

from .. import _group, _info
from . import beside, ceilings, exchange, layer, peers
from .plot import plot
from .timing import COLUMNS, Timer
from .work import WORKLOADS

CONDITIONS = (
    "default capacity, ragged, tail not zeroed, uniform routing, default SMs, plan within dispatch, L2 "
    "as the turn before left it; a row's name says what differs"
)
NOTES = dict(
    median_us="of runs of a loop of `length` operations, over its length; the slowest rank ends it",
    p99_us="of the same runs; with length 1 of single operations",
    wire_gbs="wire_mb, the bytes that really cross the link, over the median",
    floor_us="the larger of wire_mb over the link's and memory_mb over the memory's ceiling, the "
    "latter at 1 read : 4 writes for dispatch, 4 : 1 for combine",
    deepep_gbs="all copies that a rank receives, from itself too, over the median: the formula of "
    "DeepEP's tests/test_intranode.py",
    hidden="(alone_us + gemm_us - both_us) / alone_us: the share of the operation that products of "
    "matrices of at least its length hide; one minus it is what they lose while it runs",
    gemm_slower="both_us / gemm_us - 1",
    op_slower="time beside shorter products over alone_us, - 1; null: too short for a product",
    late_us="of the run without an operation: the delay of the last rank, and a launch",
)


def run(name: str, sms: list[int], tokens: list[int]) -> dict[str, dict]:
    """Everything of one workload; the rows by name."""
    work, timer = WORKLOADS[name], Timer()
    ex = exchange.Exchange(timer, work)
    kinds = ", ".join(sorted({d.device_kind for d in timer.devices}))
    print(f"\n{name}: {work}, {timer.R} ranks on {kinds}")
    measured = ceilings.measure(timer, 512 if timer.on_gpu else 8)
    timer.ceilings = measured
    timer.rows["ceilings"] = dataclasses.asdict(measured) | dict(link=measured.link)
    print(ceilings.describe(measured))
    ex.check()
    ex.check(wire_dtype=exchange.FP8)
    *numbers, ratio = COLUMNS
    print(f"{'':44}{''.join(f'{column:>10}' for column in numbers)}{ratio:>8}")
    exchange.time_exchanges(ex, sms)
    if sms:
        beside.time_beside(ex, sms)
    peers.time_peers(ex)
    if work.expert_hidden is not None:
        layer.time_layer(ex, work.expert_hidden)
    for count in tokens:
        exchange.time_tokens(exchange.Exchange(timer, dataclasses.replace(work, tokens=count)))
    _group.check()
    return timer.rows


def _command(workloads: list[str], sms: list[int], tokens: list[int]) -> str:
    """What repeats the run, without the paths of its files."""
    options = {"--workload": workloads, "--sms": sms, "--tokens": tokens}
    words = [str(word) for key, values in options.items() for word in (key, *values)]
    return " ".join(["python -m jax_ep bench", *words])


def counted(sms: list[int | str]) -> list[int]:
    """Numbers of SMs with "all" as the GPUs here have it."""
    first = jax.devices()[0]
    if "all" in sms and not hasattr(first, "core_count"):
        sys.exit(f"--sms all: expected GPUs, got {first.device_kind}")
    return list(dict.fromkeys(int(first.core_count if n == "all" else n) for n in sms))


def main(
    workloads: list[str],
    sms: list[int | str],
    tokens: list[int],
    json_path: str | None,
    plot_path: str | None,
) -> int:
    """Run the workloads, print tables, keep JSON and a plot if asked."""
    known = _info.facts()
    print(f"jax {known['jax']}, driver {known['driver']}. Rows: {CONDITIONS}.")
    swept = counted(sms)
    results = {name: run(name, swept, tokens) for name in workloads}
    if json_path:
        facts = dict(
            command=_command(workloads, swept, tokens),
            devices=[d.device_kind for d in jax.devices()],
            versions={
                k: known[k] for k in ("jax_ep", "python", "jax", "jaxlib", "driver", "build")
            },
            workloads={name: dataclasses.asdict(WORKLOADS[name]) for name in workloads},
            conditions=CONDITIONS,
            notes=NOTES,
            results=results,
        )
        with open(json_path, "w") as file:
            json.dump(facts, file, indent=1)
    if plot_path:
        plot(plot_path, results, swept, tokens)
    return 0
