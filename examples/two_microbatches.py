# SPDX-License-Identifier: Apache-2.0
"""Prefill in two micro-batches: one computes while the other's rows travel.

    python -m jax_ep.examples.two_microbatches      # all GPUs, or 8 host devices with small sizes

A micro-batch goes through four stages a layer, and the second is one stage behind the first:

first     attend   dispatch  experts   combine   attend  ...
second    combine  attend    dispatch  experts   combine ...

So at any time one computes and one communicates. `Config(overlap=True)` lets XLA run the two at
once, and `num_sms` leaves the other most of the GPU; docs/overlap.md has the rest. "attend" stands
for attention and is a dense block of two products. Measured are

one batch      all tokens at once, nothing beside communication
in turn        the two micro-batches one after the other
side by side   the two as above
one stream     the same program without `overlap`: the same bits, or the exit status is 1
compute alone  as side by side, with rows and sums that are there already instead of communication

and the share of communication that is hidden, of what "in turn" takes longer than "compute alone".
"""

import argparse
import collections
import dataclasses
import functools
import gzip
import itertools
import json
import os
import sys
from collections.abc import Callable, Generator
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array, lax
from jax.sharding import AxisType, Mesh, NamedSharding
from jax.sharding import PartitionSpec as P

import jax_ep
from jax_ep import _demo, _info
from jax_ep._bench import timing

CAPACITY = 1.25  # rows of a rank over its T*K
Stages = Generator[Any, Any, Array]  # of a micro-batch


@dataclasses.dataclass(frozen=True)
class Sizes:
    """Of one micro-batch on one rank, and of the model."""

    tokens: int
    hidden: int
    experts: int
    top_k: int
    intermediate: int  # hidden size of an expert
    attention: int  # inner size of the block in place of attention
    layers: int
    dtype: str = "bfloat16"


GPU = Sizes(4096, 7168, 64, 8, intermediate=1024, attention=4096, layers=3)
HOST = Sizes(16, 64, 16, 4, intermediate=32, attention=32, layers=2, dtype="float32")


class Exchange(NamedTuple):
    """What carries rows: `dispatch(x, idx, weights) -> (rows, rest)`, `combine(y, rest) -> sums`."""

    dispatch: Callable[..., tuple[Array, Any]]
    combine: Callable[[Array, Any], Array]


def by_jax_ep(sizes: Sizes, config: jax_ep.Config) -> Exchange:
    """Dispatch and combine."""

    def dispatch(x, idx, weights):
        d = jax_ep.dispatch(
            x,
            idx,
            weights,
            num_experts=sizes.experts,
            layout="batched",
            capacity_factor=CAPACITY,
            config=config,
        )
        return d.tokens, d

    return Exchange(dispatch, lambda y, d: jax_ep.combine(y, d.handle, weights=d.weights))


def without_communication(rows: Array) -> Exchange:
    """In place of what arrives, `rows`, and in place of sums the first rows of the result."""

    def dispatch(x, idx, weights):
        arrived, *rest = lax.optimization_barrier((rows, x, idx, weights))
        return arrived, rest

    def combine(y, rest):
        y, x, idx, weights = lax.optimization_barrier((y, *rest))
        used = (idx.sum(-1, keepdims=True) + weights.sum(-1, keepdims=True)).astype(x.dtype)
        return y.reshape(-1, y.shape[-1])[: len(x)] + used

    return Exchange(dispatch, combine)


def microbatch(sizes: Sizes, params: dict, exchange: Exchange, x: Array) -> Stages:
    """The stages of `x [T, H]`: each is yielded and comes back, perhaps behind a barrier."""
    for layer in range(sizes.layers):
        p = {name: values[layer] for name, values in params.items()}
        x = yield x + jax.nn.silu(normed(x) @ p["w_a"]) @ p["w_b"]
        rows, rest = yield exchange.dispatch(normed(x), *route(sizes, x, p["router"]))
        y = yield experts(rows, p["w_in"], p["w_out"])
        sums = yield exchange.combine(y, rest)
        x = x + sums
    return x


def normed(x: Array) -> Array:
    """Each token over its root mean square."""
    square = jnp.square(x.astype(jnp.float32)).mean(-1, keepdims=True)
    return (x * lax.rsqrt(square + 1e-6)).astype(x.dtype)


def route(sizes: Sizes, x: Array, router: Array) -> tuple[Array, Array]:
    """Experts and weights of each token."""
    logits = (normed(x) @ router).astype(jnp.float32)
    weights, idx = jax_ep.routing.top_k(logits, sizes.top_k)
    return idx, weights


def experts(rows: Array, w_in: Array, w_out: Array) -> Array:
    """SwiGLU of batched rows, `[E/R, C, H]` to the same."""
    gate, up = jnp.split(jnp.einsum("ech,ehf->ecf", rows, w_in), 2, -1)
    return jnp.einsum("ecf,efh->ech", jax.nn.silu(gate) * up, w_out)


def in_turn(*batches: Stages) -> list[Array]:
    """Results of micro-batches, one after the other."""

    def finish(batch):
        value = None
        while True:
            try:
                value = batch.send(value)
            except StopIteration as end:
                return end.value

    return [finish(batch) for batch in batches]


def side_by_side(*batches: Stages) -> list[Array]:
    """Results of micro-batches, each a stage behind the one before it.

    The barriers keep the stages of one turn together: nothing of the next begins before them.
    """
    held, results = [None] * len(batches), {}
    for turn in itertools.count():
        for i, batch in enumerate(batches[: turn + 1]):
            if i not in results:
                try:
                    held[i] = batch.send(held[i])
                except StopIteration as end:
                    held[i] = results[i] = end.value
        if len(results) == len(batches):
            return [results[i] for i in range(len(batches))]
        held = list(lax.optimization_barrier(tuple(held)))
    raise AssertionError("unreachable")


def make_params(sizes: Sizes, mesh: Mesh) -> dict[str, Array]:
    """Random matrices of every layer, those of experts split over the ranks."""
    h, f, a, e = sizes.hidden, sizes.intermediate, sizes.attention, sizes.experts
    shapes = dict(w_a=(h, a), w_b=(a, h), router=(h, e), w_in=(e, h, 2 * f), w_out=(e, f, h))
    specs = param_specs()

    @functools.partial(jax.jit, out_shardings={n: NamedSharding(mesh, s) for n, s in specs.items()})
    def make():
        keys = jax.random.split(jax.random.key(0), len(shapes))
        return {
            name: jax.random.normal(key, (sizes.layers, *shape), sizes.dtype) / shape[-2] ** 0.5
            for key, (name, shape) in zip(keys, shapes.items(), strict=True)
        }

    return make()


def param_specs() -> dict[str, P]:
    """How `make_params` are split."""
    whole, by_expert = P(), P(None, "expert")
    return dict(w_a=whole, w_b=whole, router=whole, w_in=by_expert, w_out=by_expert)


def program(sizes: Sizes, mesh: Mesh, schedule: Callable, config=None, parts: int = 2) -> Callable:
    """A jitted `(params, x) -> y`, `x [R * 2 * T, H]`, in so many micro-batches a rank.

    `config`: of the operations; None for `without_communication`, of a third operand, the rows.
    """

    def on_rank(params, x, *rows):
        exchange = without_communication(*rows) if config is None else by_jax_ep(sizes, config)
        made = [microbatch(sizes, params, exchange, batch) for batch in jnp.split(x, parts)]
        return jnp.concatenate(schedule(*made))

    split = P("expert")
    return jax.jit(
        lambda params, x, *rows: jax.shard_map(
            on_rank,
            mesh=mesh,
            in_specs=(param_specs(), split, *(split for _ in rows)),
            out_specs=split,
        )(params, x, *rows)
    )


def programs(sizes: Sizes, mesh: Mesh, sms: list[int | None]) -> dict[str, Callable]:
    """Name to program: those to compare, and side by side for each number of SMs."""
    plain = jax_ep.Config()
    capacity = int(CAPACITY * sizes.tokens * sizes.top_k) // (sizes.experts // mesh.size)
    rows = normal(mesh, (sizes.experts, capacity, sizes.hidden), sizes.dtype)
    alone = program(sizes, mesh, side_by_side)
    made = {
        "one batch": program(sizes, mesh, in_turn, plain, parts=1),
        "in turn": program(sizes, mesh, in_turn, plain),
        "compute alone": lambda params, x: alone(params, x, rows),
        "one stream": program(sizes, mesh, side_by_side, plain),
    }
    for n in sms:
        config = jax_ep.Config(num_sms=n, overlap=True)
        made[named(n)] = program(sizes, mesh, side_by_side, config)
    return made


def normal(mesh: Mesh, shape: tuple[int, ...], dtype) -> Array:
    """Random values, split over the ranks."""
    make = functools.partial(jax.random.normal, shape=shape, dtype=dtype)
    return jax.jit(make, out_shardings=NamedSharding(mesh, P("expert")))(jax.random.key(1))


def named(sms: int | None) -> str:
    """Of the program side by side with so many SMs."""
    return "side by side" + (f", {sms} SMs" if sms else "")


def hidden_share(in_turn_s: float, beside_s: float, alone_s: float) -> float:
    """Share of the communication time that does not lengthen the whole."""
    return (in_turn_s - beside_s) / (in_turn_s - alone_s)


def pairs_of(compiled_text: str) -> tuple[int, int]:
    """Asynchronous pairs of our calls in compiled HLO, and how many have products between."""
    pairs = compute_between = 0
    open_pairs: dict[str, int] = {}
    products = 0
    for line in compiled_text.splitlines():
        name, _, rest = line.strip().removeprefix("ROOT ").partition(" = ")
        if " call-start(" in rest and "_xla_stream_annotation" in rest:
            open_pairs[name] = products
        elif " call-done(" in rest:
            start = rest.split(" call-done(")[1].split(")")[0].split(" ")[-1]
            if start in open_pairs:
                pairs += 1
                compute_between += products > open_pairs.pop(start)
        elif "gemm" in rest or "cublas" in rest or " dot(" in rest:
            products += 1
    return pairs, compute_between


def measure(made: dict[str, Callable], args: tuple) -> dict[str, float]:
    """Median seconds of each program, which take turns."""
    runs = [functools.partial(f, *args) for f in made.values()]
    times = timing.take_turns(*runs)
    return {name: float(np.median(t)) for name, t in zip(made, times, strict=True)}


def report(seconds: dict[str, float]) -> dict[str, dict[str, float]]:
    """Print the table; name to its columns."""
    turn, alone, rows = seconds["in turn"], seconds["compute alone"], {}
    print(f"\n{'':24}{'ms':>10}{'hidden':>10}{'of one batch':>14}")
    for name, s in seconds.items():
        rows[name] = dict(ms=round(1e3 * s, 4))
        line = f"{name:24}{1e3 * s:10.3f}"
        if name.startswith("side by side"):
            hidden, share = hidden_share(turn, s, alone), s / seconds["one batch"]
            rows[name] |= dict(hidden=round(hidden, 3), of_one_batch=round(share, 3))
            line += f"{hidden:10.0%}{share:14.2f}"
        print(line)
    print(f"communication: {1e3 * (turn - alone):.3f} ms of {1e3 * turn:.3f} in turn")
    return rows


class Span(NamedTuple):
    """Something that ran on a stream of a GPU, in microseconds."""

    stream: str
    start: float
    length: float
    ours: bool


def read_trace(directory: str) -> list[Span]:
    """What the first GPU ran, from the newest trace that `jax.profiler.trace` wrote there."""
    files = sorted(Path(directory).rglob("*.trace.json.gz"), key=lambda file: file.stat().st_mtime)
    if not files:
        raise FileNotFoundError(f"{directory}: expected a *.trace.json.gz, got none")
    with gzip.open(files[-1], "rt") as file:
        events = json.load(file)["traceEvents"]
    events = [e for e in events if "ph" in e]  # the last one may be empty
    names = {
        (e["pid"], e.get("tid"), e["name"]): e["args"].get("name")
        for e in events
        if e["ph"] == "M" and "args" in e
    }
    gpus = sorted(
        pid
        for (pid, _, kind), name in names.items()
        if kind == "process_name" and "GPU:" in str(name)
    )
    spans = []
    for e in events:
        stream = str(names.get((e["pid"], e.get("tid"), "thread_name")))
        if e["ph"] == "X" and e["pid"] in gpus[:1] and stream.startswith("Stream"):
            about = e["name"] + json.dumps(e.get("args", {}))
            spans.append(Span(stream, e["ts"], e["dur"], "jax_ep" in about))
    return spans


def picture(path: str, spans: list[Span]) -> None:
    """Streams of a GPU over time: our operations and what else ran."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    total: dict[str, float] = collections.defaultdict(float)
    for span in spans:
        total[span.stream] += span.length
    streams = sorted(total, key=lambda stream: -total[stream])[:4]
    first = min(span.start for span in spans)
    figure, axis = pyplot.subplots(figsize=(12, 0.8 + 0.6 * len(streams)))
    for i, stream in enumerate(streams):
        for ours, color in ((False, "tab:gray"), (True, "tab:blue")):
            bars = [
                ((s.start - first) / 1e3, s.length / 1e3)
                for s in spans
                if s.stream == stream and s.ours == ours
            ]
            axis.broken_barh(bars, (i - 0.4, 0.8), facecolors=color, edgecolor="white", lw=0.2)
    axis.set(xlabel="ms; blue: dispatch, combine and plans", ylim=(len(streams) - 0.5, -0.5))
    axis.set_yticks(range(len(streams)), [stream.split("(")[0] for stream in streams])
    figure.tight_layout()
    figure.savefig(path, dpi=120)
    pyplot.close(figure)


def parse(argv: list[str] | None, sizes: Sizes) -> argparse.Namespace:
    """The command line; its defaults are `sizes`."""
    parser = argparse.ArgumentParser(prog="python -m jax_ep.examples.two_microbatches")
    for field in dataclasses.fields(Sizes):
        kind, value = type(getattr(sizes, field.name)), getattr(sizes, field.name)
        parser.add_argument(f"--{field.name.replace('_', '-')}", type=kind, default=value)
    parser.add_argument("--sms", type=int, nargs="*", default=[], help="also with so many SMs")
    parser.add_argument("--json", help="write what was measured here")
    parser.add_argument("--profile", help="write a trace of the last program into this directory")
    parser.add_argument("--picture", help="draw that trace into this file")
    parser.add_argument("--hlo", help="write the compiled HLO of the last program here")
    args = parser.parse_args(argv)
    if args.picture and not args.profile:
        parser.error("--picture: expected --profile, too, got none")
    if args.profile and jax.default_backend() != "gpu":
        parser.error(f"--profile: expected GPUs, got {jax.default_backend()}")
    return args


def main(argv: list[str] | None = None) -> int:
    """Check, measure, print, and keep what was measured; returns the exit status."""
    _demo.use_host_devices(os.environ)
    on_gpus = jax.default_backend() == "gpu"
    args = parse(argv, GPU if on_gpus else HOST)
    sizes = Sizes(**{field.name: getattr(args, field.name) for field in dataclasses.fields(Sizes)})
    mesh = jax.make_mesh((jax.device_count(),), ("expert",), axis_types=(AxisType.Auto,))
    jax_ep.initialize(mesh)
    print(f"{mesh.size} ranks on {jax.devices()[0].device_kind}, {sizes}")

    params = make_params(sizes, mesh)
    x = normal(mesh, (mesh.size * 2 * sizes.tokens, sizes.hidden), sizes.dtype)
    operands = params, x
    made = programs(sizes, mesh, [None, *args.sms])
    last = made[named(args.sms[-1] if args.sms else None)]
    want, got = (np.asarray(f(*operands), np.float32) for f in (made["one stream"], last))
    same = float((want == got).mean())
    print(f"side by side: {same:.4%} of the values are those of the same program on one stream")
    text = last.lower(*operands).compile().as_text()
    pairs, between = pairs_of(text)
    print(f"compiled: {pairs} operations run asynchronously, {between} with products meanwhile")
    if args.hlo:
        Path(args.hlo).write_text(text)

    rows = report(measure(made, operands))
    if args.profile:
        with jax.profiler.trace(args.profile):
            jax.block_until_ready(last(*operands))
    if args.picture:
        picture(args.picture, read_trace(args.profile))
    if args.json:
        facts = dict(ranks=mesh.size, same=same, pairs=pairs, pairs_with_products=between)
        facts |= dict(sizes=dataclasses.asdict(sizes), device=jax.devices()[0].device_kind)
        facts |= dict(jax=_info.facts()["jax"], xla_flags=os.environ.get("XLA_FLAGS", ""))
        Path(args.json).write_text(json.dumps(facts | dict(rows=rows), indent=1) + "\n")
    jax_ep.check()
    return 0 if same == 1 else 1


if __name__ == "__main__":
    sys.exit(main())
