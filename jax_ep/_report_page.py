# SPDX-License-Identifier: Apache-2.0
"""The report's page: numbers to one self-contained HTML file."""

import numpy as np

from . import _report_parts as parts
from ._report_numbers import Summary
from ._report_parts import escape, number, section
from ._report_style import CSS

SHOWN_LAYERS = 4  # before the rest is folded away


def page(summary: Summary) -> str:
    """The whole page."""
    header = summary.header
    sections = [
        _waits(summary),
        _phases(summary),
        _loads(summary),
        _drops(summary),
    ]
    if not summary.operations:
        sections = [*sections[2:], _no_timings()]
    facts = [
        header.devices,
        f"{header.num_layers} MoE layer{'s' if header.num_layers > 1 else ''}",
        f"{header.num_experts} experts on {header.num_ranks} ranks"
        + (f", {header.num_groups} groups" if header.num_groups > 1 else ""),
        f"{header.steps:,} steps",
        f"started {header.started[:16].replace('T', ' ')} UTC",
    ]
    return (
        '<!DOCTYPE html>\n<html lang="en"><head><meta charset="utf-8">'
        '<meta name="viewport" content="width=device-width, initial-scale=1">'
        f"<title>{escape(header.run)}: jax_ep report</title><style>{CSS}</style></head><body><main>"
        f"<header><h1>{escape(header.run)}</h1><p>{' · '.join(map(escape, facts))}</p></header>"
        f"{parts.tiles(_tiles(summary))}{''.join(sections)}"
        f"<footer>Written by <code>python -m jax_ep report</code>, jax_ep {escape(header.jax_ep)}."
        " Times are quantiles within 2.2 %, as durations are counted in buckets.</footer>"
        "</main></body></html>\n"
    )


def device_name(summary: Summary, device: int) -> str:
    """What a device is called: its rank, and its group where there are several."""
    group, rank = divmod(device, summary.header.num_ranks)
    return f"rank {rank}" + (f" of group {group}" if summary.header.num_groups > 1 else "")


def slow_sentence(summary: Summary) -> str:
    """Which rank is slow."""
    slow = summary.slow
    if slow is None:
        return "No rank stands out: the ranks wait for each other about equally."
    name = device_name(summary, slow.device)
    return (
        f"{name[0].upper()}{name[1:]} is slow: each of the others waits {number(slow.wait_us)} µs "
        f"for it in an operation, on average, and {number(slow.others_us)} µs for another one."
    )


def _tiles(summary: Summary) -> list[tuple[str, str, str]]:
    entries = []
    if len(summary.ranks):
        worst = summary.imbalance[-1].argmax()
        layer = f"layer {worst}, " if summary.header.num_layers > 1 else ""
        entries.append(
            (
                "busiest rank",
                f"{number(summary.imbalance[-1, worst])} ×",
                f"an equal share, {layer}at the end",
            )
        )
        dropped = int(summary.dropped_by_device.sum())
        entries.append(
            (
                "dropped pairs",
                f"{dropped / max(summary.pairs, 1):.2%}" if dropped else "none",
                f"{dropped:,} of {summary.pairs:,}" if dropped else f"of {summary.pairs:,}",
            )
        )
    for operation in summary.operations:
        if operation.name in ("dispatch", "combine"):
            total = operation.phases[-1]
            entries.append(
                (operation.name, f"{number(total.p50)} µs", f"p50; p99 {number(total.p99)} µs")
            )
    if summary.operations:
        slow = summary.slow
        entries.append(
            (
                "slow rank",
                "none" if slow is None else device_name(summary, slow.device).removeprefix("rank "),
                "stands out" if slow is None else f"awaited {number(slow.wait_us)} µs an operation",
            )
        )
    return entries


def _waits(summary: Summary) -> str:
    header = summary.header
    rows = [device_name(summary, n) for n in range(header.num_devices)]
    own = np.arange(header.num_devices)[:, None] % header.num_ranks == np.arange(header.num_ranks)
    most = max((o.waits_us.max() for o in summary.operations), default=0.0)
    least = 40 + (36 if header.num_ranks <= 16 else 15) * header.num_ranks
    figures = (
        parts.matrix(
            f"{o.name}: longest single wait is {number(o.longest_us.max())} µs",
            np.where(own, np.nan, o.waits_us),
            rows,
            most,
        )
        for o in summary.operations
        if o.waits_us.any()
    )
    return section(
        "Who waits for whom",
        f"{escape(slow_sentence(summary))} In the row of a rank: µs that it waits for each other "
        "one in an operation, on average.",
        f"<div class=side style='--least:{least}px'>{''.join(figures)}</div>",
    )


def _phases(summary: Summary) -> str:
    rows = []
    for o in summary.operations:
        rows.append((f"{o.name} ({o.count:,})", [(p.name, p.p50, p.p99) for p in o.phases]))
    head = ["wait", "push", "place / expand / reduce", "total"]
    tables = [parts.bars("All devices, µs: p50 and p99", head, rows)]
    devices = []
    for n in range(summary.header.num_devices):
        for o in summary.operations:
            cells = [(p.name, *p.by_device[n]) for p in o.phases]
            devices.append((f"{device_name(summary, n)}, {o.name}", cells))
    folded = parts.bars("Each device, µs: p50 and p99", head, devices)
    tables.append(f"<details><summary>each device</summary>{folded}</details>")
    lost = (
        f" Timings of {summary.lost:,} operations were overwritten before they were read."
        if summary.lost
        else ""
    )
    return section(
        "Where the time goes",
        "Phases of an operation, as the whole GPU goes through them: wait for the peers, push to "
        f"them, then number rows (plan), expand (dispatch) or add up (combine).{lost}",
        *tables,
    )


def _loads(summary: Summary) -> str:
    if not len(summary.experts):
        return section(
            "Load", "No steps were recorded: <code>Recorder.add</code> takes their loads."
        )
    steps = summary.header.steps
    order = np.argsort(-summary.imbalance[-1], kind="stable")
    shown = sorted(order[:SHOWN_LAYERS])
    hidden = sorted(order[SHOWN_LAYERS:])
    figures = "".join(_layer(summary, layer) for layer in shown)
    if hidden:
        rest = "".join(_layer(summary, layer) for layer in hidden)
        figures += f"<details><summary>{len(hidden)} more layers</summary>{rest}</details>"
    last = summary.experts[-1]
    layer, expert = np.unravel_index(last.argmax(), last.shape)
    finding = (
        f"At the end the busiest expert, {expert} of layer {layer}, has {number(last.max())} × an "
        f"equal share, and the busiest rank {number(summary.imbalance[-1].max())} ×. A step takes "
        "as long as the busiest rank of each layer."
    )
    names = [f"layer {layer}" for layer in range(summary.header.num_layers)]
    chart = parts.line_chart(
        "Busiest rank over the mean, each layer", summary.imbalance, names, steps, " ×"
    )
    return section("Load", finding, chart, figures, parts.heat_legend())


def _layer(summary: Summary, layer: int) -> str:
    steps = summary.header.steps
    title = f"Layer {layer}: " if summary.header.num_layers > 1 else ""
    experts = parts.heat_map(f"{title}experts", summary.experts[:, layer], steps, "expert")
    if summary.header.num_experts == summary.header.num_ranks:
        return experts
    ranks = parts.heat_map(f"{title}ranks", summary.ranks[:, layer], steps, "rank")
    return f"<div class=pair>{experts}{ranks}</div>"


def _drops(summary: Summary) -> str:
    dropped = summary.dropped_by_device
    if not len(summary.dropped):
        return ""
    if not dropped.any():
        return section("Drops", "No pair was dropped.")
    worst = int(dropped.argmax())
    finding = (
        f"{int(dropped.sum()):,} of {summary.pairs:,} pairs were dropped "
        f"({dropped.sum() / summary.pairs:.2%}), most of them, {int(dropped[worst]):,}, on "
        f"{device_name(summary, worst)}. A larger capacity or a better balance keeps them."
    )
    chart = parts.line_chart(
        "Share of pairs that were dropped",
        100 * summary.dropped[:, None],
        ["dropped"],
        summary.header.steps,
        " %",
    )
    columns = [device_name(summary, n) for n in range(len(dropped))]
    counts = parts.counts("Dropped pairs of each rank", columns, dropped)
    return section("Drops", escape(finding), chart, counts)


def _no_timings() -> str:
    return section(
        "No timings",
        "Only the CUDA kernels record any, where <code>jax_ep.initialize(mesh, stats=True)</code> "
        "has switched them on.",
    )
