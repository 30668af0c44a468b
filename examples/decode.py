# SPDX-License-Identifier: Apache-2.0
"""Latency and tokens/s of decoding one layer of a large MoE, with a KV cache.

    python -m jax_ep.examples.decode            # all GPUs, or 8 host devices with small sizes

First batches of fixed size, on each rank: the host's clock around a step with its tokens read back,
which is what a serving loop sees, and a `lax.scan` of steps on the device. Then a loop whose number
of sequences changes at every step. One process; `decoder.py` has what is measured.
"""

import argparse
import dataclasses
import functools
import json
import os
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import AxisType
from jax.sharding import PartitionSpec as P

import jax_ep
from jax_ep import _demo, _info, _slots

from . import experts
from .decoder import Decoder, Request, Server, Sizes, build, serve

# 64 experts of 3 * 4096 * 1024 bfloat16 are 0.8 GB on each of two GPUs. A row of the cache is 4 MB,
# so that 256 are 1.1 GB.
GPU = Sizes(hidden=4096, experts=64, intermediate=1024, top_k=8, heads=32, kv_heads=8)
HOST = Sizes(64, 16, 32, 4, heads=4, kv_heads=2, length=64, dtype="float32")
WARM_UP, FEWEST, SCANS, COMPARED = 10, 50, 5, 32
COLUMNS = (
    "steps",
    "host p50 us",
    "host p99 us",
    "host tokens/s",
    "scan us",
    "scan tokens/s",
    "same",
)
NOTES = """\
host: the host's clock around each step, its tokens read back; steps: how many were timed
scan: a lax.scan of {scan} steps on the device, over {scan}, median of {scans}
same: of the first {compared} steps, tokens equal to those of the first implementation
on CUDA: the path that the batch takes there; the xla implementation has one for all"""


def main(argv: list[str] | None = None) -> int:
    """Measure, print, and keep what was measured; returns the exit status."""
    _demo.use_host_devices(os.environ)
    on_gpus = jax.default_backend() == "gpu"
    args = parse(argv, on_gpus)
    sizes = Sizes(**{field.name: getattr(args, field.name) for field in dataclasses.fields(Sizes)})
    mesh = jax.make_mesh((jax.device_count(),), ("expert",), axis_types=(AxisType.Auto,))
    row_bytes = sizes.hidden * jnp.dtype(sizes.dtype).itemsize
    config = jax_ep.Config(decode_tokens=max(*args.batch, args.rows), decode_row_bytes=row_bytes)
    jax_ep.initialize(mesh, config=config)
    model = build(sizes, mesh, config)
    facts = dict(
        device=jax.devices()[0].device_kind,
        ranks=mesh.size,
        jax=_info.facts()["jax"],
        overlap=args.overlap,
        scan_steps=args.scan,
        **dataclasses.asdict(sizes),
    )
    print("decode:", ", ".join(f"{name} {value}" for name, value in facts.items()))
    print(_slots.rule(config))
    decoders = {name: Decoder(model, name, overlap=args.overlap) for name in args.implementation}
    rows, results = [], facts
    for row in table(decoders, args):
        rows.append(row)
        results = facts | dict(fixed=rows)
        keep(results, args.json)
    decoder = Decoder(model, args.implementation[0], overlap=args.overlap)
    served = changing(Server(decoder, args.rows), args.changing_steps)
    keep(results | dict(changing=served), args.json)
    jax_ep.check()
    return 0


def keep(results: dict, file: str | None) -> None:
    """Write what there is, so that what fails later loses none of it."""
    if file:
        Path(file).write_text(json.dumps(results, indent=1) + "\n")


def parse(argv: list[str] | None, on_gpus: bool) -> argparse.Namespace:
    """The command line; its defaults are those of the platform."""
    sizes = GPU if on_gpus else HOST
    parser = argparse.ArgumentParser(
        prog="python -m jax_ep.examples.decode",
        description=__doc__,
        formatter_class=argparse.ArgumentDefaultsHelpFormatter,
    )
    for field in dataclasses.fields(Sizes):
        default = getattr(sizes, field.name)
        choices = ("ragged", "batched") if field.name == "layout" else None
        flag = f"--{field.name.replace('_', '-')}"
        parser.add_argument(flag, type=type(default), default=default, choices=choices, help=" ")

    def option(name, kind, default, text, **more):
        parser.add_argument(name, type=kind, default=default, help=text, **more)

    batches = [1, 8, 32, 128, 256] if on_gpus else [1, 8, 32]
    option("--batch", _positive, batches, "sequences of each rank", nargs="+")
    names = ["cuda", "xla"] if on_gpus else ["xla"]
    option("--implementation", str, names, "of dispatch and combine", nargs="+")
    option("--steps", _positive, 2000 if on_gpus else 30, "to time for each batch")
    option("--seconds", float, 10.0, "fewer steps, at least 50, where they would take longer")
    option("--scan", _positive, 100 if on_gpus else 5, "steps of a scan")
    option(
        "--rows",
        _power_of_two,
        64 if on_gpus else 8,
        "most sequences of a rank in the changing loop",
    )
    option("--changing-steps", _positive, 1000 if on_gpus else 40, "in which requests arrive there")
    option("--json", str, None, "keep the results in this file")
    text = "the shared expert between start and done of dispatch and of combine; slots only"
    parser.add_argument("--overlap", action="store_true", help=text)
    return parser.parse_args(argv)


def _positive(text: str) -> int:
    number = int(text)
    if number < 1:
        raise argparse.ArgumentTypeError(f"expected a positive integer, got {text}")
    return number


def _power_of_two(text: str) -> int:
    number = _positive(text)
    if number & (number - 1):
        raise argparse.ArgumentTypeError(f"expected a power of two, got {text}")
    return number


# Batches of fixed size.


def table(decoders: dict[str, Decoder], args: argparse.Namespace) -> Iterator[dict]:
    """Print and give a row for each batch size and implementation."""
    print(NOTES.format(scan=args.scan, scans=SCANS, compared=COMPARED))
    print(f"{'batch':>5} {'implementation':14} {'on CUDA':7}", *(f"{c:>13}" for c in COLUMNS))
    for batch in args.batch:
        first = None
        for name, decoder in decoders.items():
            row, tokens = measure(decoder, batch, args)
            first = tokens if first is None else first
            common = min(len(first), len(tokens))
            row["same"] = float((first[:common] == tokens[:common]).mean())
            numbers = (f"{row[c]:13.6g}" for c in COLUMNS)
            taken = path(decoder, batch)
            print(f"{batch:5} {name:14} {taken:7}", *numbers, flush=True)
            yield dict(batch=batch, implementation=name, on_cuda=taken) | row


def measure(decoder: Decoder, batch: int, args: argparse.Namespace) -> tuple[dict, np.ndarray]:
    """A row of the table, and the tokens of the first steps `[steps, R*batch]`."""
    carry, state = start(decoder, batch), decoder.state
    times, tokens = [], []
    steps = args.steps + WARM_UP
    while len(times) < steps:
        begin = time.perf_counter()
        carry = decoder.step(state, *carry)
        new = np.asarray(carry[1])
        times.append(time.perf_counter() - begin)
        if len(tokens) < COMPARED:
            tokens.append(new)
        if len(times) == WARM_UP:
            affordable = int(args.seconds / np.median(times))
            steps = WARM_UP + min(args.steps, max(FEWEST, affordable))
    times = times[WARM_UP:]
    scan = scan_seconds(decoder, carry, args.scan)
    return row_of(times, scan, decoder.mesh.size * batch), np.stack(tokens)


def row_of(times: list[float], scan: float, sequences: int) -> dict:
    """Numbers from the seconds of steps of so many sequences."""
    p50, p99 = np.percentile(times, (50, 99))
    return {
        "steps": len(times),
        "host p50 us": 1e6 * p50,
        "host p99 us": 1e6 * p99,
        "host tokens/s": sequences / np.mean(times),
        "scan us": 1e6 * scan,
        "scan tokens/s": sequences / scan,
    }


def start(decoder: Decoder, batch: int) -> tuple:
    """An empty cache, and sequences at random positions: alike, they would choose alike."""
    rng, shape = np.random.default_rng(0), (decoder.mesh.size, batch)
    tokens, position = (rng.integers(0, n, shape, np.int32) for n in (256, decoder.length))
    return decoder.empty_cache(batch), decoder.put(tokens), decoder.put(position)


def scan_seconds(decoder: Decoder, carry: tuple, length: int) -> float:
    """Seconds of a step in a scan: the median of a few scans, after one that compiles."""
    times = []
    for _ in range(1 + SCANS):
        begin = time.perf_counter()
        carry = decoder.steps(decoder.state, *carry, length=length)
        np.asarray(carry[1])
        times.append(time.perf_counter() - begin)
    return float(np.median(times[1:])) / length


def path(decoder: Decoder, batch: int) -> str:
    """The path that a batch takes on CUDA: of dispatch, and of combine, whose rows are as long."""
    config, dtype = decoder.config, decoder.dtype
    ranks = P("expert")
    dispatch = functools.partial(experts.dispatch, config)
    mapped = jax.shard_map(dispatch, mesh=decoder.mesh, in_specs=ranks, out_specs=ranks)
    shapes = ((config.hidden, dtype), (config.top_k, jnp.int32), (config.top_k, jnp.float32))
    tokens = decoder.mesh.size * batch
    operands = (jax.ShapeDtypeStruct((tokens, size), of) for size, of in shapes)
    spec = jax.eval_shape(mapped, *operands).handle.spec
    return _slots.path(spec, config.hidden, dtype.itemsize)


# A changing number of sequences.


def changing(server: Server, steps: int) -> dict:
    """Serve requests that come in waves for so many steps; print and return what it took."""
    server.warm_up()
    compiled = server.decoder.programs()
    live, batches, seconds = zip(*serve(server, waves(server, steps)), strict=True)
    programs = server.decoder.programs()
    p50, p99 = 1e6 * np.percentile(seconds, (50, 99))
    print(
        f"changing: {len(live)} steps of {min(live)} to {max(live)} sequences on all ranks, in batches "
        f"of {sorted(set(batches))} on each\n"
        f"changing: {programs} programs, {programs - compiled} of them compiled while serving; bound "
        f"{server.most_programs} = log2({server.rows}) + 1\n"
        f"changing: host p50 {p50:.6g} us, p99 {p99:.6g} us, {sum(live) / sum(seconds):.6g} tokens/s"
    )
    return {
        "steps": len(live),
        "live": [min(live), max(live)],
        "programs": programs,
        "bound": server.most_programs,
        "host p50 us": p50,
        "host p99 us": p99,
        "host tokens/s": sum(live) / sum(seconds),
    }


def waves(server: Server, steps: int) -> list[list[Request]]:
    """Requests that arrive before each step; twice they fill all rows, and twice run dry."""
    rng, longest = np.random.default_rng(1), min(64, server.decoder.length)
    most = server.position.size / (longest / 2)  # arrivals that keep all rows taken
    rates = most * (1 - np.cos(np.linspace(0, 4 * np.pi, steps)))

    def request():
        token, count = rng.integers((256, longest))
        return Request(int(token), 1 + int(count))

    counts = rng.poisson(rates)
    counts[0] += 1  # at least one in all
    return [[request() for _ in range(count)] for count in counts]


if __name__ == "__main__":
    sys.exit(main())
