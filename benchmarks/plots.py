# SPDX-License-Identifier: Apache-2.0
"""Draw kept results of `python -m jax_ep bench` for docs/performance.md.

python benchmarks/plots.py --out docs/performance.svg
"""

import argparse
import json
from pathlib import Path

RESULTS = Path(__file__).parent / "results"
BARS = {
    "dispatch bf16": "dispatch BF16, with plan",
    "dispatch fp8, quantised": "dispatch FP8, with plan",
    "combine bf16": "combine BF16",
    "lax.all_to_all of the K copies": "all_to_all of the K copies",
    "sort and lax.ragged_all_to_all": "sort, ragged_all_to_all",
    "dispatch bf16, xla": 'dispatch, "xla"',
    "combine bf16, xla": 'combine, "xla"',
}
OURS = 3  # of the bars: the CUDA kernels
LINES = ("dispatch bf16", "dispatch fp8, quantised", "combine bf16")


def main() -> None:
    """Draw both files of results."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--out", type=Path, default=Path("docs/performance.svg"))
    draw(*kept_results(), parser.parse_args().out)


def kept_results() -> tuple[dict, dict]:
    """The large sizes, and the sweep of tokens."""
    exchange, decode = (RESULTS / f"{name}_2xH200.json" for name in ("exchange", "decode"))
    return json.loads(exchange.read_text()), json.loads(decode.read_text())


def draw(exchange: dict, decode: dict, path: Path) -> None:
    """Bars of the large sizes, and the sweep of tokens beside its floors."""
    import matplotlib

    matplotlib.use("Agg")
    matplotlib.rcParams["svg.fonttype"] = "none"  # text stays text: a small file
    matplotlib.rcParams["svg.hashsalt"] = "performance"  # the same file every time
    from matplotlib import pyplot

    figure, (*large, small) = pyplot.subplots(1, 3, figsize=(13, 3.6), layout="constrained")
    for axis, name in zip(large, ("prefill", "training"), strict=True):
        bars(axis, exchange, name)
    large[1].set_yticklabels([])
    tokens(small, decode)
    figure.savefig(path, metadata={"Date": None} if path.suffix == ".svg" else None)
    pyplot.close(figure)


def title(kept: dict, name: str, sweep: bool = False) -> str:
    """The sizes of a workload."""
    work = kept["workloads"][name]
    tokens = "" if sweep else f"T={work['tokens']} "
    return f"{name}: {tokens}H={work['hidden']} K={work['top_k']} E={work['experts']}"


def bars(axis, kept: dict, name: str) -> None:
    """Medians of one workload, and the floors of ours."""
    rows = [kept["results"][name][row] for row in BARS]
    medians = [row["median_us"] for row in rows]
    colours = ["C0"] * OURS + ["C7"] * (len(rows) - OURS)
    drawn = axis.barh(range(len(rows)), medians, color=colours)
    axis.bar_label(drawn, [f"{us:.0f}" for us in medians], padding=3, fontsize=8)
    for place, row in enumerate(rows[:OURS]):
        floor = dict(color="black", lw=1.5, label="byte floor" if place == 0 else None)
        axis.plot([row["floor_us"]] * 2, [place - 0.4, place + 0.4], **floor)
    axis.set_yticks(range(len(rows)), list(BARS.values()), fontsize=9)
    axis.set(
        xscale="log", xlim=(10, 8 * max(medians)), xlabel="median (us)", title=title(kept, name)
    )
    axis.invert_yaxis()
    axis.legend(fontsize=8, loc="upper right")


def tokens(axis, kept: dict) -> None:
    """Medians of small batches against tokens."""
    sizes = sorted(int(row.partition("T=")[2]) for row in kept["results"]["decode"] if "T=" in row)
    sizes = sorted(set(sizes))
    for what in LINES:
        rows = [kept["results"]["decode"][f"{what}, T={n}"] for n in sizes]
        (line,) = axis.plot(sizes, [row["median_us"] for row in rows], marker="o", label=BARS[what])
        axis.plot(sizes, [row["floor_us"] for row in rows], ":", color=line.get_color())
    empty = kept["results"]["decode"]["empty loop"]["median_us"]
    axis.axhline(empty, color="C7", lw=1, label="a turn of XLA's empty loop")
    axis.set(xscale="log", yscale="log", xlabel="tokens per rank; dotted: byte floors")
    axis.set_xticks(sizes, [str(n) for n in sizes])
    axis.set(ylabel="median (us)", title=title(kept, "decode", sweep=True))
    axis.legend(fontsize=8)


if __name__ == "__main__":
    main()
