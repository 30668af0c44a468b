# SPDX-License-Identifier: Apache-2.0
"""Decode steps with random routing in jitted loops, each checked where it runs.

A step draws rows, routing (some of it -1) and weights on the device, dispatches, multiplies every row
by a number that its expert owns, and combines. Every rank then works out for itself, with plain XLA
operations on what all ranks drew, which rows it must have received and what must have come back::

    python benchmarks/decode_steps.py --json decode_steps.json

Rows are compared in order, by a checksum of each, with their weights, experts and counts; results bit
for bit. A step whose rows, or whose sums, differ anywhere on a rank is a mismatch of that rank; any
makes the exit status 1. The time is that of all this, not of the exchange.
"""

import argparse
import dataclasses
import functools
import json
import os
import shlex
import sys
import time
from pathlib import Path

os.environ.setdefault("NPROC", "64")  # before JAX starts: see docs/sharp_bits.md
if "xla_force_host_platform_device_count" not in os.environ.get("XLA_FLAGS", ""):
    flags = os.environ.get("XLA_FLAGS", "")
    os.environ["XLA_FLAGS"] = f"{flags} --xla_force_host_platform_device_count=8".strip()

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jax.sharding import AxisType
from jax.sharding import PartitionSpec as P

import jax_ep

PATHS = ("whole", "halves", "direct")


@dataclasses.dataclass(frozen=True)
class Sizes:
    """One step: T tokens of H channels on each of R ranks, K of E experts each."""

    R: int
    T: int
    H: int
    K: int
    E: int


def bf16(x):
    """Rounded to bfloat16, but in float32: XLA may leave out a conversion there and back."""
    return lax.reduce_precision(x, exponent_bits=8, mantissa_bits=7)


def noise(step, stream: int, shape):
    """Random uint32 numbers: an integer hash, which compiles in a tenth of `jax.random`'s time."""

    def mix(n):
        n = (n ^ (n >> 16)) * jnp.uint32(0x7FEB352D)
        n = (n ^ (n >> 15)) * jnp.uint32(0x846CA68B)
        return n ^ (n >> 16)

    seed = mix(mix(step.astype(jnp.uint32)) + jnp.uint32(stream))
    return mix(jnp.arange(np.prod(shape), dtype=jnp.uint32) + seed).reshape(shape)


def draw(step, sizes: Sizes):
    """`x [R, T, H]` that bfloat16 holds, `idx` and `weights` `[R, T, K]`, the same on all ranks."""
    R, T, H, K, E = dataclasses.astuple(sizes)
    x = bf16(noise(step, 1, (R, T, H)).astype(jnp.float32) * 2.0**-31 - 1)
    idx = lax.top_k((noise(step, 2, (R, T, E)) >> 1).astype(jnp.int32), K)[1].astype(jnp.int32)
    idx = jnp.where(noise(step, 3, (R, T, K)) % 16 == 0, -1, idx)
    # 16 bits: products with a bfloat16 are exact, so it does not matter how XLA adds them.
    weights = ((noise(step, 4, (R, T, K)) >> 16).astype(jnp.float32) + 1) * 2.0**-16
    return x, idx, weights


def checksums(rows):
    """`[..., H]` bfloat16 to a uint32 for each row."""
    channel = jnp.arange(rows.shape[-1], dtype=jnp.uint32)
    bits = lax.bitcast_convert_type(rows, jnp.uint16).astype(jnp.uint32)
    return jnp.sum(bits * (2 * channel + 1) * jnp.uint32(0x9E3779B1), -1, dtype=jnp.uint32)


def by_expert(e, sizes: Sizes):
    """What expert `e` multiplies its rows by."""
    return 1 + e.astype(jnp.float32) / sizes.E


def exchange(x, idx, weights, *, sizes: Sizes, path: str):
    """`Dispatched` and what comes back, by jax_ep."""
    config = jax_ep.Config(decode_tokens=0) if path == "direct" else None
    options = dict(num_experts=sizes.E, config=config)
    if path == "halves":
        d = jax_ep.dispatch_done(jax_ep.dispatch_start(x, idx, weights, **options))
    else:
        d = jax_ep.dispatch(x, idx, weights, **options)
    e = lax.axis_index("expert") * (sizes.E // sizes.R) + jnp.maximum(d.expert_ids, 0)
    y = (d.tokens.astype(jnp.float32) * by_expert(e, sizes)[:, None]).astype(d.tokens.dtype)
    if path == "halves":
        return d, jax_ep.combine_done(jax_ep.combine_start(y, d.handle, d.weights))
    return d, jax_ep.combine(y, d.handle, d.weights)


def rows_differ(d, x, idx, weights, *, sizes: Sizes):
    """Whether this rank received other rows than those of the pairs of its experts, in order."""
    local, pairs = sizes.E // sizes.R, idx.size
    e = idx.reshape(-1) - lax.axis_index("expert") * local
    mine = (e >= 0) & (e < local)
    order = jnp.sort(jnp.where(mine, e, local) * pairs + jnp.arange(pairs))  # by expert, then pair
    e, pair = order[: d.expert_ids.size] // pairs, order[: d.expert_ids.size] % pairs
    kept, token = e < local, pair // sizes.K
    sums = checksums(x.astype(jnp.bfloat16)).reshape(-1)[token]
    counts = jnp.bincount(order // pairs, length=local)
    return (
        (kept & (checksums(d.tokens) != sums)).any()
        | (d.weights != jnp.where(kept, weights.reshape(-1)[pair], 0)).any()
        | (d.expert_ids != jnp.where(kept, e, -1)).any()
        | (d.counts != counts).any()
        | (d.num_dropped != 0).any()
    )


def sums_differ(out, x, idx, weights, *, sizes: Sizes):
    """Whether `out` is not the sum, in the documented order, of rows times weights, bit for bit."""
    order = jnp.argsort(idx, -1)
    e = jnp.take_along_axis(idx, order, -1)
    weights = jnp.take_along_axis(weights, order, -1)
    total = jnp.zeros_like(x)
    for rank in range(sizes.R):
        partial = jnp.zeros_like(x)
        for k in range(sizes.K):
            product = weights[:, k, None] * bf16(x * by_expert(e[:, k, None], sizes))
            is_here = (e[:, k] >= 0) & (e[:, k] // (sizes.E // sizes.R) == rank)
            partial = jnp.where(is_here[:, None], partial + product, partial)
        total += bf16(partial)
    bits = functools.partial(lax.bitcast_convert_type, new_dtype=jnp.uint16)
    return (bits(out) != bits(total.astype(jnp.bfloat16))).any()


def program(mesh, sizes: Sizes, path: str, steps: int):
    """A jitted function: first step -> `[R, 2]` steps whose rows, whose sums differ."""

    def step(i, wrong, first):
        x, idx, weights = draw(first + i, sizes)
        rank = lax.axis_index("expert")
        mine = (x[rank], idx[rank], weights[rank])
        d, out = exchange(mine[0].astype(jnp.bfloat16), *mine[1:], sizes=sizes, path=path)
        rows = rows_differ(d, x, idx, weights, sizes=sizes)
        sums = sums_differ(out, *mine, sizes=sizes)
        return wrong + jnp.stack([rows, sums]).astype(jnp.int32)

    def steps_on_a_rank(first):
        none = jnp.zeros((1, 2), jnp.int32) + 0 * lax.axis_index("expert")
        return lax.fori_loop(0, steps, lambda i, n: step(i, n, first), none)

    return jax.jit(jax.shard_map(steps_on_a_rank, mesh=mesh, in_specs=P(), out_specs=P("expert")))


def measure(mesh, sizes: Sizes, path: str, steps: int, in_a_run: int) -> dict:
    """Run at least `steps` steps, and count those that differ, on each rank."""
    in_a_run = min(steps, in_a_run)
    runs = -(-steps // in_a_run)
    start = time.perf_counter()
    run = program(mesh, sizes, path, in_a_run).lower(jnp.int32(0)).compile()
    compiled = time.perf_counter()
    results = []
    for i in range(runs):
        results.append(run(jnp.int32(i * in_a_run)))
        jax.block_until_ready(results[-1])
        jax_ep.check()
    seconds = time.perf_counter() - compiled
    wrong = np.sum(results, (0, 1))
    return dict(
        dataclasses.asdict(sizes),
        path=path,
        steps=runs * in_a_run,
        wrong_rows=int(wrong[0]),
        wrong_sums=int(wrong[1]),
        seconds=round(seconds, 2),
        step_us=round(seconds / (runs * in_a_run) * 1e6, 1),
        compile_seconds=round(compiled - start, 1),
    )


def main(argv=None) -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--steps", type=int, default=100_000, help="of all sizes together")
    parser.add_argument("--tokens", type=int, nargs="+", default=[1, 8, 32, 128], metavar="T")
    parser.add_argument("--hidden", type=int, default=7168)
    parser.add_argument("--top-k", type=int, default=8)
    parser.add_argument("--experts", type=int, default=256)
    parser.add_argument("--paths", nargs="+", default=["whole"], choices=PATHS)
    parser.add_argument("--in-a-run", type=int, default=1000, help="steps of one jitted loop")
    parser.add_argument("--json", type=Path)
    options = parser.parse_args(argv)
    devices = jax.devices()
    mesh = jax.make_mesh((len(devices),), ("expert",), axis_types=(AxisType.Auto,))
    jax_ep.initialize(mesh)
    each = -(-options.steps // (len(options.tokens) * len(options.paths)))
    rows = []
    print(f"jax {jax.__version__}, {len(devices)} x {devices[0].device_kind}")
    for path in options.paths:
        for T in options.tokens:
            sizes = Sizes(len(devices), T, options.hidden, options.top_k, options.experts)
            rows.append(measure(mesh, sizes, path, each, options.in_a_run))
            print(
                f"{path:7} T={T:<4} {rows[-1]['steps']:7} steps, {rows[-1]['wrong_rows']} wrong in rows, "
                f"{rows[-1]['wrong_sums']} in sums, "
                f"{rows[-1]['seconds']:.1f} s ({rows[-1]['step_us']:.0f} us a step with its check)",
                flush=True,
            )
    steps = sum(row["steps"] for row in rows)
    mismatches = sum(row["wrong_rows"] + row["wrong_sums"] for row in rows)
    print(f"{steps} steps, {mismatches} mismatches")
    if options.json:
        facts = dict(
            jax=jax.__version__,
            devices=[d.device_kind for d in devices],
            command=shlex.join(["python", "benchmarks/decode_steps.py", *(argv or sys.argv[1:])]),
            steps=steps,
            mismatches=mismatches,
            results=rows,
        )
        options.json.write_text(json.dumps(facts, indent=1) + "\n")
    return int(mismatches > 0)


if __name__ == "__main__":
    sys.exit(main())
