# SPDX-License-Identifier: Apache-2.0
"""A picture of the sweeps."""

import math

from . import beside


def plot(path: str, results: dict, sms: list[int], tokens: list[int]) -> None:
    """A line of panels for each workload: the sweeps that were run."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    panels = [_times, _losses] if sms else []
    panels += [_tokens] if tokens else []
    shape = (len(results), len(panels))
    size = (6 * shape[1], 4 * shape[0])
    figure, axes = pyplot.subplots(*shape, figsize=size, squeeze=False)
    for line, (workload, rows) in zip(axes, results.items(), strict=True):
        for axis, panel in zip(line, panels, strict=True):
            panel(axis, rows, tokens if panel is _tokens else sms)
            axis.set(title=workload)
            axis.grid(alpha=0.3)
            axis.legend()
    figure.tight_layout()
    figure.savefig(path, dpi=120)
    pyplot.close(figure)


def _times(axis, rows: dict, sms: list[int]) -> None:
    """Time against the number of SMs."""
    for what in ("dispatch bf16", "combine bf16"):
        times = [rows[f"{what}, {n} SMs"]["median_us"] for n in sms]
        axis.plot(sms, times, marker="o", label=what)
    axis.set(xlabel="SMs", ylabel="median (us)", ylim=(0, 1.05 * axis.get_ylim()[1]))


def _losses(axis, rows: dict, sms: list[int]) -> None:
    """What an operation and products beside it lose to each other, against the number of SMs."""
    for op in ("dispatch", "combine"):
        swept = [rows[beside.names(n)[op]] for n in sms]
        lost = [100 * (1 - row["hidden"]) for row in swept]
        (drawn,) = axis.plot(sms, lost, marker="o", label=f"GEMM beside {op}")
        slower = [math.nan if row["op_slower"] is None else row["op_slower"] for row in swept]
        slower = [100 * share for share in slower]
        axis.plot(sms, slower, "--", color=drawn.get_color(), label=f"{op} beside a GEMM")
    axis.set(xlabel="SMs", ylabel="lost while the other runs (%)")


def _tokens(axis, rows: dict, tokens: list[int]) -> None:
    """Time against tokens beside the floors."""
    for what in ("dispatch bf16", "dispatch fp8, quantised", "combine bf16"):
        swept = [rows[f"{what}, T={n}"] for n in tokens]
        (drawn,) = axis.plot(tokens, [row["median_us"] for row in swept], marker="o", label=what)
        axis.plot(tokens, [row["floor_us"] for row in swept], ":", color=drawn.get_color())
    axis.set(xlabel="tokens per rank; dotted: byte floors", ylabel="median (us)", yscale="log")
    axis.set_xscale("log", base=2)
    axis.set_xticks(tokens, [str(n) for n in tokens])
