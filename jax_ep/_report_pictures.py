# SPDX-License-Identifier: Apache-2.0
"""The report's charts as PNGs, for papers and tickets; needs matplotlib."""

from pathlib import Path

import numpy as np
from matplotlib.cm import ScalarMappable
from matplotlib.colors import TwoSlopeNorm
from matplotlib.figure import Figure

from ._report_numbers import MEASURABLE_US, Summary
from ._report_page import SHOWN_LAYERS, device_name, slow_sentence

_COLOURS = {"cmap": "RdBu_r", "norm": TwoSlopeNorm(1.0, 0.0, 2.0)}


def draw(summary: Summary, page: Path) -> list[Path]:
    """Write `PAGE-load.png`, `-waits.png` and `-phases.png`, those there is something for."""
    figures = {}
    if len(summary.experts):
        figures["load"] = _load(summary)
    if any(o.waits_us.any() for o in summary.operations):
        figures["waits"] = _waits(summary)
    if summary.operations:
        figures["phases"] = _phases(summary)
    paths = []
    for name, figure in figures.items():
        paths.append(page.with_name(f"{page.stem}-{name}.png"))
        figure.savefig(paths[-1], format="png", dpi=120)
    return paths


def _load(summary: Summary) -> Figure:
    """For the least balanced layers: experts and ranks over time; then imbalance and drops."""
    layers = sorted(np.argsort(-summary.imbalance[-1], kind="stable")[:SHOWN_LAYERS])
    steps, window = summary.header.steps, summary.header.window
    edges = np.minimum(np.arange(len(summary.experts) + 1) * window, steps)
    figure = Figure(figsize=(11, 2.4 + 1.9 * len(layers)), layout="constrained")
    axes = figure.subplots(len(layers) + 1, 2, sharex=True, squeeze=False)
    for row, layer in zip(axes, layers, strict=False):
        for ax, shares, what in zip(
            row, (summary.experts, summary.ranks), ("expert", "rank"), strict=True
        ):
            rows = np.arange(shares.shape[2] + 1) - 0.5
            ax.pcolormesh(edges, rows, shares[:, layer].T, **_COLOURS)
            ax.set(title=f"Layer {layer}: {what}s", ylabel=what)
            ax.invert_yaxis()
    bar = figure.colorbar(ScalarMappable(**_COLOURS), ax=axes[:-1], extend="max", shrink=0.9)
    bar.set_label("load / equal share")
    middles = (edges[1:] + edges[:-1]) / 2
    axes[-1, 0].plot(middles, summary.imbalance, linewidth=1)
    axes[-1, 0].set(title="Busiest rank over the mean", ylabel="×", ylim=(0, None))
    axes[-1, 1].plot(middles, 100 * summary.dropped, color="tab:red")
    axes[-1, 1].set(title="Dropped pairs", ylabel="%", ylim=(0, None))
    for ax in axes[-1]:
        ax.grid(alpha=0.3)
        ax.set_xlabel("step")
    figure.suptitle(summary.header.run)
    return figure


def _waits(summary: Summary) -> Figure:
    """Wait matrices, a panel for each operation."""
    shown = [o for o in summary.operations if o.waits_us.any()]
    ranks, devices = summary.header.num_ranks, summary.header.num_devices
    figure = Figure(figsize=(1.2 + 3.6 * len(shown), 4.2), layout="constrained")
    axes = figure.subplots(1, len(shown), squeeze=False)[0]
    most = max(o.waits_us.max() for o in shown)
    for ax, o in zip(axes, shown, strict=True):
        image = ax.imshow(o.waits_us, cmap="Reds", vmin=0, vmax=most)
        ax.set(title=o.name, xlabel="awaited rank", ylabel="waiting", xticks=range(ranks))
        ax.set_yticks(range(devices), [device_name(summary, n) for n in range(devices)])
    figure.colorbar(image, ax=axes, label="µs an operation")
    figure.suptitle(slow_sentence(summary), fontsize=10)
    return figure


def _phases(summary: Summary) -> Figure:
    """p50 as a bar, p99 as a whisker, of each phase of each operation."""
    figure = Figure(figsize=(9, 1.4 + 0.9 * len(summary.operations)), layout="constrained")
    ax = figure.subplots()
    height = 0.8 / len(summary.operations[0].phases)
    colours = ("tab:orange", "tab:blue", "tab:green", "tab:gray")
    for at, o in enumerate(summary.operations):
        for n, (phase, colour) in enumerate(zip(o.phases, colours, strict=True)):
            if not phase.p99 >= MEASURABLE_US:
                continue
            y = at + (n - 1.5) * height
            tail = [[0], [max(phase.p99 - phase.p50, 0)]]
            ax.barh(y, phase.p50, height, color=colour, xerr=tail, error_kw={"linewidth": 0.8})
            ax.text(phase.p99, y, f"  {phase.name}", va="center", fontsize=7)
    ax.set_yticks(range(len(summary.operations)), [o.name for o in summary.operations])
    ax.invert_yaxis()
    ax.set(xlabel="µs: p50, and p99 as a whisker", title="Phases")
    ax.grid(axis="x", alpha=0.3)
    return figure
