# SPDX-License-Identifier: Apache-2.0
"""A picture of the sweeps."""


def plot(path: str, results: dict, sms: list[int], tokens: list[int]) -> None:
    """For each workload, time against the number of SMs, and against tokens beside the floors."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    sweeps = [bool(sms), bool(tokens)]
    shape = (len(results), sum(sweeps))
    size = (6 * shape[1], 4 * shape[0])
    figure, axes = pyplot.subplots(*shape, figsize=size, squeeze=False)
    for line, (workload, rows) in zip(axes, results.items(), strict=True):
        if sms:
            for what in ("dispatch bf16", "combine bf16"):
                times = [rows[f"{what}, {n} SMs"]["median_us"] for n in sms]
                line[0].plot(sms, times, marker="o", label=what)
            line[0].set(xlabel="SMs", ylim=(0, 1.05 * line[0].get_ylim()[1]))
        if tokens:
            for what in ("dispatch bf16", "dispatch fp8, quantised", "combine bf16"):
                swept = [rows[f"{what}, T={n}"] for n in tokens]
                (drawn,) = line[-1].plot(
                    tokens, [row["median_us"] for row in swept], marker="o", label=what
                )
                floors = [row["floor_us"] for row in swept]
                line[-1].plot(tokens, floors, ":", color=drawn.get_color())
            line[-1].set(xlabel="tokens per rank; dotted: byte floors", yscale="log")
            line[-1].set_xscale("log", base=2)
            line[-1].set_xticks(tokens, [str(n) for n in tokens])
        for axis in line:
            axis.set(title=workload, ylabel="median (us)")
            axis.grid(alpha=0.3)
            axis.legend()
    figure.tight_layout()
    figure.savefig(path, dpi=120)
    pyplot.close(figure)
