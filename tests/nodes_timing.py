# SPDX-License-Identifier: Apache-2.0
"""The steps of nodes_program.py that time between nodes and inside one, on the same GPUs."""

import functools
import time
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from cases import FP8
from jax import lax
from jax.sharding import NamedSharding
from jax.sharding import PartitionSpec as P
from nodes_checks import Checks

import jax_ep


def times(
    checks: Checks, name, T, *, wire_dtype=None, capacity_factor=None, H=7168, K=8, E=256, loop=100
):
    """Microseconds of each operation of group `name`, and what it gave: a Dispatched and sums."""
    mesh, spec = checks.meshes[name], P(name)
    options: dict[str, Any] = dict(
        num_experts=E,
        axis_name=name,
        capacity_factor=capacity_factor,
        config=checks.configs[name],
        wire_dtype=wire_dtype,
    )

    def draw():
        keys = jax.random.split(jax.random.key(0), 3)
        x = jax.random.normal(keys[0], (checks.R * T, H), jnp.bfloat16)
        idx = lax.top_k(jax.random.uniform(keys[1], (checks.R * T, E)), K)[1]
        return x, idx, jax.random.uniform(keys[2], (checks.R * T, K))

    def mapped(f, *args):
        f = jax.shard_map(f, mesh=mesh, in_specs=spec, out_specs=spec, check_vma=False)
        return checks.compiled(jax.jit(f), *args)

    def turns(step):
        def run(*operands):
            def turn(_, carry):
                operands, read = lax.optimization_barrier(carry)
                rows = lax.optimization_barrier(step(*operands))
                return operands, read + rows[:1, :1].astype(jnp.float32)

            return lax.fori_loop(0, loop, turn, (operands, jnp.zeros((1, 1))))[1]

        return run

    def median_us(f, *args):
        jax.block_until_ready(f(*args))
        took = []
        for _ in range(9):
            checks.agree("run")
            began = time.perf_counter()
            jax.block_until_ready(f(*args))
            took.append((time.perf_counter() - began) / loop * 1e6)
        return float(max(checks.agree(float(np.median(took))).values()))

    x, idx, w = jax.jit(draw, out_shardings=NamedSharding(mesh, spec))()
    dispatch = lambda x, idx, w: jax_ep.dispatch(x, idx, w, **options)
    d = mapped(dispatch, x, idx, w)(x, idx, w)
    tokens = mapped(turns(lambda *a: dispatch(*a).tokens), x, idx, w)
    us, out = {"dispatch with plan": median_us(tokens, x, idx, w)}, None
    if wire_dtype is None:  # combine of large batches has no other between nodes
        combine = lambda y, handle, w: jax_ep.combine(y, handle, weights=w)
        rows = d.tokens, d.handle, d.weights
        out = mapped(combine, *rows)(*rows)
        us["combine"] = median_us(mapped(turns(combine), *rows), *rows)
    print(
        f"timing {name} {checks.R // checks.node_ranks}x{checks.node_ranks} T={T} H={H} K={K} "
        f"E={E} {'fp8' if wire_dtype else 'bf16'}:",
        ", ".join(f"{what} {took:.1f} us" for what, took in us.items()),
        flush=True,
    )
    return us, d, out


def compare(kept):
    """Rows of the same bits on both paths, sums within a rounding or two."""
    (near_us, near, near_out), (us, d, out) = kept["near"], kept["timed"]
    for a, b in zip(near.tokens.addressable_shards, d.tokens.addressable_shards, strict=True):
        rows = int(np.sum(np.asarray(near.group_sizes.addressable_shards[0].data)))
        a, b = (lax.bitcast_convert_type(s.data[:rows], jnp.uint16) for s in (a, b))
        assert bool(jnp.all(a == b)), "rows differ"
    shards = ([] if o is None else o.addressable_shards for o in (near_out, out))
    for a, b in zip(*shards, strict=True):
        a, b = a.data.astype(jnp.float32), b.data.astype(jnp.float32)
        most = float(jnp.max(jnp.abs(a - b)))
        assert most < 0.05 * float(jnp.max(jnp.abs(a))), f"sums differ by {most}"
    ratios = (f"{what} {us[what] / near_us[what]:.2f}" for what in us)
    print("timing ratio to inside a node:", ", ".join(ratios), flush=True)


def both(checks: Checks, label, T, **options):
    checks("initialize two more groups", lambda: checks.initialize("timed", "near"))
    for wire, wire_dtype in (("bf16", None), ("fp8", FP8)):
        kept = {}

        def take(name, wire_dtype=wire_dtype, kept=kept):
            kept[name] = times(checks, name, T, wire_dtype=wire_dtype, **options)

        for name in ("near", "timed"):
            checks(f"{wire} {name}{label}", functools.partial(take, name))
        checks(f"{wire} alike{label}", functools.partial(compare, kept))


def timing(checks: Checks):
    both(checks, " at full size", checks.timed_tokens, capacity_factor=1.25)


def timing_decode(checks: Checks):
    for T in (1, 128):
        both(checks, f" of {T} tokens", T)
