# SPDX-License-Identifier: Apache-2.0
"""`python -m jax_ep demo`: train a small MoE language model on Python's own sources.

    text -> batches -> train until the time is up -> held-out loss, stage times, loads, a picture

On all GPUs present, else on eight host devices.
"""

import dataclasses
import json
import os
import statistics
import sys
import time
from pathlib import Path

import jax
import numpy as np
from jax import Array
from jax.sharding import AxisType, Mesh, NamedSharding
from jax.sharding import PartitionSpec as P

from . import _demo_text, _report
from ._group import initialize
from ._stats_recorder import Recorder

CRITERION = 0.75  # held-out loss over the text's unigram entropy
SECONDS = 60.0  # of training; a shorter run is not judged
HOST_DEVICES = 8


@dataclasses.dataclass(frozen=True)
class Sizes:
    """What fits a minute on the devices at hand."""

    hidden: int
    expert_hidden: int
    length: int  # bytes a sequence
    sequences: int  # in a batch; rounded up to a multiple of the devices
    learning_rate: float
    layers: int = 2
    num_experts: int = 8  # likewise
    top_k: int = 2


#: Small for host devices, large for GPUs, unless asked otherwise.
SIZES = {
    "small": Sizes(hidden=64, expert_hidden=64, length=64, sequences=32, learning_rate=5e-3),
    "large": Sizes(hidden=256, expert_hidden=256, length=256, sequences=64, learning_rate=2e-3),
}


def use_host_devices(environ) -> None:
    """Ask for eight host devices, before JAX starts; GPUs, where present, are used all the same.

    NPROC gives XLA:CPU enough threads that as many devices on few cores cannot starve.
    """
    option = "xla_force_host_platform_device_count"
    flags = environ.get("XLA_FLAGS", "")
    if option not in flags:
        environ["XLA_FLAGS"] = f"{flags} --{option}={HOST_DEVICES}".strip()
    environ.setdefault("NPROC", "64")


def main(
    seconds: float = SECONDS,
    steps: int | None = None,
    out: str = "demo.png",
    size: str | None = None,
    json_path: str | None = None,
    with_report: bool = True,
) -> int:
    """Train, report, draw, keep losses if asked; returns the exit status."""
    use_host_devices(os.environ)
    try:
        from jax_ep.examples import byte_transformer  # noqa: F401

        from . import _demo_report as report
    except ModuleNotFoundError as error:
        print(_what_is_missing(error), file=sys.stderr)
        return 2
    for option, path in (("--out", out), ("--json", json_path)):
        if path is not None and not Path(path).absolute().parent.is_dir():
            print(
                f"{option}: expected a file in an existing directory, got {path!r}", file=sys.stderr
            )
            return 2

    text = _demo_text.standard_library()
    unigram = text.unigram_entropy
    mesh = jax.make_mesh((jax.device_count(),), ("expert",), axis_types=(AxisType.Auto,))
    initialize(mesh, stats=with_report)
    sizes = SIZES[size or ("small" if jax.default_backend() == "cpu" else "large")]
    model, optimizer = build(mesh, sizes)
    batches = Batches(mesh, sizes)
    held_out = [batches.random(text.held_out, seed) for seed in range(32)]
    report.heading(text, unigram, mesh, model, batches.shape)
    num_experts = _multiple(sizes.num_experts, mesh.size)
    recorder = Recorder(mesh, num_experts=num_experts, num_layers=sizes.layers, name="jax_ep demo")
    progress = report.Progress(seconds, steps)
    history = train(model, optimizer, batches, text, held_out, progress, recorder)
    if with_report:
        recorder.write(Path(out).with_suffix(".npz"), replace=True)

    ratio = history.held_out[-1][1] / unigram
    judged = steps is None and seconds >= SECONDS
    passed = ratio < CRITERION
    report.result(history, unigram, CRITERION, passed if judged else None)
    report.stages(stage_times(mesh, model, held_out[0][:, :-1]), mesh)
    report.loads(history)
    report.plot(out, history, unigram, CRITERION)
    if json_path:
        facts = dict(
            devices=[d.device_kind for d in mesh.devices.flat],
            sizes=dataclasses.asdict(sizes),
            losses=history.losses,
            loads=[load.tolist() for load in history.loads],
            held_out=history.held_out,
        )
        Path(json_path).write_text(json.dumps(facts, indent=1))
    print(f"\nwrote {out}")
    if with_report:
        print("statistics: ", end="")
        _report.main([str(Path(out).with_suffix(".npz"))], None, png=False)
    return int(judged and not passed)


def build(mesh: Mesh, sizes: Sizes):
    """The model and its optimizer, on the devices of the mesh."""
    import optax
    from flax import nnx

    from jax_ep.examples import byte_transformer
    from jax_ep.examples.experts import MoEConfig

    config = MoEConfig(
        sizes.hidden,
        sizes.expert_hidden,
        num_experts=_multiple(sizes.num_experts, mesh.size),
        top_k=sizes.top_k,
        shared_hidden=sizes.expert_hidden,
        bias_rate=1e-2,  # ten times the usual: a minute has few steps
    )
    model = byte_transformer.ByteTransformer(
        config, mesh, layers=sizes.layers, length=sizes.length, rngs=nnx.Rngs(0)
    )
    warm_up = optax.linear_schedule(0.0, sizes.learning_rate, 20)
    adam = optax.chain(optax.clip_by_global_norm(1.0), optax.adamw(warm_up))
    optimizer = nnx.Optimizer(model, adam, wrt=nnx.Param)
    byte_transformer.place(model, mesh)
    byte_transformer.place(optimizer, mesh)
    return model, optimizer


def train(
    model,
    optimizer,
    batches: "Batches",
    text: _demo_text.Text,
    held_out,
    progress,
    recorder: Recorder,
):
    """Steps until the time is up; returns the `History`."""
    from flax import nnx

    from jax_ep.examples import byte_transformer

    from . import _demo_report as report

    step = nnx.jit(byte_transformer.train_step)
    loss_of = nnx.jit(byte_transformer.loss_fn)

    def held_out_loss(count: int) -> float:
        return statistics.fmean(float(loss_of(model, batch)) for batch in held_out[:count])

    history = report.History()
    history.held_out.append((0, held_out_loss(4)))  # compiles
    num_tokens = batches.shape[0] * batches.shape[1]
    start, trained_s = time.perf_counter(), 0.0
    while not progress.done:
        before = time.perf_counter()
        loss, load, dropped = step(model, optimizer, batches.random(text.train, (history.steps, 1)))
        history.add(float(loss), np.asarray(load))  # waits for the step
        recorder.add(load, dropped)
        now = time.perf_counter()
        if history.steps == 1:
            print(f"compiled in {now - before:.0f} s", flush=True)
            start = now
        else:
            trained_s += now - before
        rate = (history.steps - 1) * num_tokens / max(trained_s, 1e-9)
        if progress.update(now - start, history, rate):
            history.held_out.append((history.steps, held_out_loss(4)))
    history.held_out.append((history.steps, held_out_loss(len(held_out))))
    return history


class Batches:
    """Random stretches of a text, split over the devices."""

    def __init__(self, mesh: Mesh, sizes: Sizes):
        self.shape = (_multiple(sizes.sequences, mesh.size), sizes.length)
        self.sharding = NamedSharding(mesh, P("expert"))

    def random(self, text: np.ndarray, seed) -> Array:
        """`[B, S+1]` int32; the same for the same seed."""
        count, length = self.shape
        starts = np.random.default_rng(seed).integers(0, len(text) - length, count)
        return jax.device_put(_demo_text.windows(text, starts, length + 1), self.sharding)


def stage_times(mesh: Mesh, model, text: Array, *, repeats: int = 10) -> dict[str, float]:
    """Median milliseconds of each stage of the first MoE layer, forward.

    On the activations of `text [B, S]`; every stage is a program of its own, waited for by itself.
    """
    from flax import nnx

    from jax_ep.examples import experts

    @nnx.jit
    def moe_input(model, text):
        block = model.blocks[0]
        return block.norm2(block.attend(model.embed(text)))

    split, whole = P("expert"), P()

    def program(stage, *in_specs):
        return jax.jit(jax.shard_map(stage, mesh=mesh, in_specs=in_specs, out_specs=split))

    moe = model.blocks[0].moe
    config = moe.config
    router, bias, w_in, w_out = (v[...] for v in (moe.router, moe.bias, moe.w_in, moe.w_out))
    times = {}

    def timed(name, stage, *args):
        result = jax.block_until_ready(stage(*args))  # compiles
        taken = []
        for _ in range(repeats):
            start = time.perf_counter()
            jax.block_until_ready(stage(*args))
            taken.append(1e3 * (time.perf_counter() - start))
        times[name] = statistics.median(taken)
        return result

    def routing(x, router, bias):
        return experts.route(config, x, router, bias)

    def dispatch(x, topk_idx, weights):
        return experts.dispatch(config, x, topk_idx, weights)

    x = moe_input(model, text)
    weights, topk_idx = timed("routing", program(routing, split, whole, whole), x, router, bias)
    d = timed("dispatch", program(dispatch, split, split, split), x, topk_idx, weights)
    y = timed("experts", program(experts.experts, split, split, split), d, w_in, w_out)
    timed("combine", program(experts.combine, split, split), y, d)
    return times


def _multiple(least: int, of: int) -> int:
    return -(-least // of) * of


def _what_is_missing(error: ModuleNotFoundError) -> str:
    if error.name is not None and error.name.startswith("jax_ep"):
        return (
            f"{error}: this is a checkout of jax_ep, not an installation. Run the demo from "
            'another directory, or install the checkout with pip install -e ".[demo]"'
        )
    return (
        f"{error}: the demo needs flax, optax and matplotlib. Install them with "
        'pip install "jax-ep[demo]", or pip install -e ".[demo]" in a checkout'
    )
