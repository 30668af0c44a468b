# SPDX-License-Identifier: Apache-2.0
"""What the demo prints and draws."""

import dataclasses
import shutil
import sys

import jax
import numpy as np
from flax import nnx
from matplotlib.cm import ScalarMappable
from matplotlib.colors import TwoSlopeNorm
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator

RECENT = 20  # steps that the printed loads are means over


@dataclasses.dataclass
class History:
    """What happened at each training step."""

    losses: list[float] = dataclasses.field(default_factory=list)
    loads: list[np.ndarray] = dataclasses.field(default_factory=list)  # [layers, E] pairs
    held_out: list[tuple[int, float]] = dataclasses.field(default_factory=list)  # (step, loss)

    @property
    def steps(self) -> int:
        """Steps taken so far."""
        return len(self.losses)

    def add(self, loss: float, load: np.ndarray) -> None:
        """Note one step."""
        self.losses.append(loss)
        self.loads.append(load)

    def recent_load(self) -> np.ndarray:
        """Loads `[layers, E]` over the last steps, 1 for an equal share."""
        return relative(np.sum(self.loads[-RECENT:], axis=0))


def relative(load: np.ndarray) -> np.ndarray:
    """Loads over their mean."""
    return load / load.mean(-1, keepdims=True)


class Progress:
    """A bar that redraws itself on a terminal; elsewhere a line every twentieth of the run."""

    def __init__(self, seconds: float, steps: int | None):
        self.seconds, self.steps = seconds, steps
        self.done = False
        self.redraws = sys.stdout.isatty()
        self.part = 0

    def update(self, elapsed_s: float, history: History, rate: float) -> bool:
        """Show the state after a step; True at every twentieth of the run."""
        fraction = elapsed_s / self.seconds
        if self.steps is not None:
            fraction = max(fraction, history.steps / self.steps)
        self.done = fraction >= 1
        reached, before = int(20 * min(fraction, 1.0)), self.part
        self.part = reached
        if self.redraws or reached > before:
            line = (
                f"[{'#' * (reached // 2):-<10}] {min(fraction, 1):4.0%} {elapsed_s:3.0f} s  "
                f"step {history.steps:<5} loss {np.mean(history.losses[-RECENT:]):.3f}  "
                f"{rate:,.0f} tokens/s  imbalance {history.recent_load().max():.2f}"
            )
            if self.redraws:
                line = f"\r{line[: shutil.get_terminal_size().columns - 1]}\x1b[K"
            print(line, end="" if self.redraws and not self.done else "\n", flush=True)
        return reached > before and not self.done


def heading(text, unigram: float, mesh, model, batch_shape) -> None:
    """What is trained, on what, where."""
    devices = mesh.devices.flat
    kind = "host devices" if devices[0].platform == "cpu" else devices[0].device_kind
    sequences, length = batch_shape
    config = model.blocks[0].moe.config
    parameters = sum(p.size for p in jax.tree.leaves(nnx.state(model, nnx.Param)))
    rows = {
        "text": f"{text.num_files:,} files of Python's standard library: "
        f"{len(text.train) / 1e6:.1f} MB to train on, {len(text.held_out) / 1e6:.1f} MB held out",
        "unigram entropy": f"{unigram:.4f} nats/byte",
        "devices": f"{mesh.size} x {kind}",
        "model": f"{parameters:,} parameters, {len(model.blocks)} layers, hidden {config.hidden}; "
        f"top {config.top_k} of {config.num_experts} experts ({config.num_experts // mesh.size} "
        "on each device) and a shared one",
        "batch": f"{sequences} sequences x {length} bytes = {sequences * length:,} tokens",
    }
    for name, value in rows.items():
        print(f"{name:>16}  {value}")
    print("compiling ...", flush=True)


def result(history: History, unigram: float, criterion: float, passed: bool | None) -> None:
    """The held-out loss against the criterion; `passed` is None for a run too short to judge."""
    verdict = {True: "PASS", False: "FAIL", None: "not judged: the run was cut short"}[passed]
    steps, loss = history.held_out[-1]
    print(
        f"\nheld-out loss {loss:.4f} nats/byte after {steps} steps = {loss / unigram:.3f} x "
        f"unigram entropy {unigram:.4f}\ncriterion: below {criterion}: {verdict}"
    )


def stages(times_ms: dict[str, float], mesh) -> None:
    """The time of each stage of a MoE layer."""
    print(
        f"\none MoE layer, forward, on {mesh.size} devices: medians of four separately compiled "
        "programs\n(a training step fuses and overlaps them: they do not add up to its time)"
    )
    for name, ms in times_ms.items():
        print(f"{name:>16}  {ms:8.2f} ms  {'#' * round(30 * ms / max(times_ms.values()))}")


def loads(history: History) -> None:
    """Every expert's load at the end of the run."""
    recent = history.recent_load()
    count = min(RECENT, history.steps)
    print(f"\nload of each expert over the last {count} steps; 1.00 is an equal share")
    print(f"{'expert':>16} {''.join(f'{e:6}' for e in range(recent.shape[1]))}  imbalance (max)")
    for layer, load in enumerate(recent):
        print(f"{f'layer {layer}':>16} {''.join(f'{v:6.2f}' for v in load)} {load.max():10.2f}")


def plot(path: str, history: History, unigram: float, criterion: float) -> None:
    """Loss curve above, one heat map of loads for each layer below, as a PNG."""
    every_load = np.stack(history.loads)  # [steps, layers, E]
    steps, layers, num_experts = every_load.shape
    figure = Figure(figsize=(9, 4.2 + 1.9 * layers), layout="constrained")
    axes = figure.subplots(
        layers + 1, 1, sharex=True, height_ratios=[2.4] + [1] * layers, squeeze=False
    )[:, 0]
    _draw_losses(axes[0], history, unigram, criterion)

    width = -(-steps // 200)  # steps a column
    starts = np.arange(0, steps, width)
    shares = relative(np.add.reduceat(every_load, starts, axis=0))  # [columns, layers, E]
    edges = np.append(starts, steps) + 0.5
    colours = {"cmap": "RdBu_r", "norm": TwoSlopeNorm(1.0, 0.0, 2.0)}
    for layer, ax in enumerate(axes[1:]):
        rows = np.arange(num_experts + 1) - 0.5
        ax.pcolormesh(edges, rows, shares[:, layer].T, **colours)
        ax.set(title=f"Load of the experts of layer {layer}", ylabel="expert")
        ax.yaxis.set_major_locator(MaxNLocator(8, integer=True))
        ax.invert_yaxis()
    axes[-1].set_xlabel("training step")
    axes[-1].xaxis.set_major_locator(MaxNLocator(integer=True))
    axes[-1].set_xlim(0, edges[-1])
    bar = figure.colorbar(
        ScalarMappable(**colours), ax=axes[1:], extend="max", ticks=[0, 0.5, 1, 1.5, 2]
    )
    bar.set_label("load / equal share")
    figure.suptitle(
        f"jax_ep demo: a byte-level MoE transformer on {jax.device_count()} devices", fontsize=13
    )
    figure.savefig(path, format="png", dpi=120)


def _draw_losses(ax, history: History, unigram: float, criterion: float) -> None:
    losses = np.asarray(history.losses)
    x = np.arange(1, len(losses) + 1)
    ax.plot(x, losses, color="tab:blue", alpha=0.25, linewidth=0.8)
    window = max(1, len(losses) // 50)
    smooth = np.convolve(losses, np.ones(window) / window, mode="valid")
    middle = np.arange(len(smooth)) + (window + 1) / 2
    ax.plot(middle, smooth, color="tab:blue", label=f"training, mean of {window} steps")
    held_out = np.asarray(history.held_out).T
    ax.plot(*held_out, "o-", color="tab:orange", ms=4, clip_on=False, label="held out")
    ax.axhline(unigram, color="black", linestyle=":", label="unigram entropy of the text")
    target = f"criterion, {criterion} x unigram entropy"
    ax.axhline(criterion * unigram, color="tab:green", linestyle="--", label=target)
    final = history.held_out[-1]
    ax.annotate(f"{final[1]:.2f}", final, xytext=(-4, -14), textcoords="offset points", ha="right")
    ax.set(title="Loss", ylabel="cross entropy (nats per byte)", ylim=(0, None))
    ax.grid(alpha=0.3)
    ax.legend()
