# SPDX-License-Identifier: Apache-2.0
"""The step of nodes_program.py for small batches: whole, in halves, in loops with changing routing."""

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from cases import FP8, assert_same_bits, flat, inputs, put, reference
from jax import lax
from jax.sharding import PartitionSpec as P
from nodes_checks import E_LOCAL, Checks, from_last_rank, quantized, to_first_node

import jax_ep


def decode(checks: Checks):
    R, E = checks.R, E_LOCAL * checks.R
    most = 8192 // (R * 8)  # tokens of top-8 that take the slots

    def case(
        name, *, T=8, H=256, K=3, dtype="bfloat16", none=0.2, skew=0.0, change=None, **options
    ):
        x, idx, w = inputs(checks.done, R=R, T=T, H=H, K=K, E=E, dtype=dtype, none=none, skew=skew)
        if change:
            x, idx = change(checks, x, idx)
        how: dict[str, Any] = dict(num_experts=E, config=checks.by_size) | options
        checks(f"small: {name}", lambda: checks.exchange(x, idx, w, **how))

    for halves in (False, True):
        how: dict[str, Any] = dict(halves=halves)
        of = ", halves" if halves else ""
        case(f"bf16{of}", **how)
        case(f"fp8{of}", wire_dtype=FP8, **how)
        case(f"as many as may be{of}", T=min(128, most), H=1024, K=8, none=0.0, **how)
        if jax.default_backend() == "gpu":  # `xla` knows no nodes, whose sums are rounded
            case(f"combine in fp8{of}", combine=dict(wire_dtype=FP8), **how)
    case("f32, drops, aligned", dtype="float32", capacity=24, expert_alignment=4, skew=0.5)
    case("fp8, e8m0", dtype="float16", wire_dtype=FP8, deliver="quantized", scale_format="e8m0")
    case("x quantized", change=quantized, deliver="quantized")
    case("batched", dtype="float16", layout="batched", capacity=48, zero_tail=True)
    case("one token", T=1, K=2)
    case("to the first node", change=to_first_node)
    case("from one rank only", dtype="float32", change=from_last_rank)
    case("nobody sends", change=lambda _, x, idx: (x, np.full_like(idx, -1)))
    changing_routing(checks)
    against_large(checks)


def changing_routing(checks: Checks, steps=12, T=8, H=256, K=3):
    """A scan, one step in flight while the next begins, each with other choices."""
    R, E = checks.R, E_LOCAL * checks.R
    drawn = [inputs(700 + i, R=R, T=T, H=H, K=K, E=E, dtype="bfloat16") for i in range(steps)]
    x, weights = drawn[0][0], drawn[0][2]
    every = np.stack([idx for _, idx, _ in drawn], 1)  # [R, steps, T, K]
    options: dict[str, Any] = dict(num_experts=E, config=checks.by_size)

    def layer(d):
        return jax_ep.combine_done(jax_ep.combine_start(d.tokens, d.handle, d.weights))

    def body(x, every, weights):
        def step(sent, idx):
            out = layer(jax_ep.dispatch_done(sent))
            x_too = x + 0 * out[:1, :1]  # the next start after this done
            return jax_ep.dispatch_start(x_too, idx, weights, **options), out

        first = jax_ep.dispatch_start(x, every[0, 0], weights, **options)
        sent, outs = lax.scan(step, first, every[0, 1:])
        return jnp.concatenate([outs, layer(jax_ep.dispatch_done(sent))[None]])[None]

    def check():
        spec = P("expert")
        mapped = jax.shard_map(body, mesh=checks.mesh, in_specs=spec, out_specs=spec)
        args = [put(flat(x), checks.mesh, spec), put(every, checks.mesh, spec)]
        args.append(put(flat(weights), checks.mesh, spec))
        ready = checks.compiled(jax.jit(mapped), *args)
        by_node = dict(ranks_per_node=checks.node_ranks)
        want = [
            reference(x, every[:, i], weights, combine=by_node, num_experts=E)[1]
            for i in range(steps)
        ]
        for _ in range(3):
            assert_same_bits("sums", ready(*args), np.stack(want, 1))

    checks("small: a scan with changing routing", check)


def against_large(checks: Checks, steps=300, T=16, H=512, K=4):
    """Many steps of random routing on the device, on both paths: their bits are the same."""
    E = E_LOCAL * checks.R

    def run(x, idx, weights, config):
        d = jax_ep.dispatch(x, idx, weights, num_experts=E, zero_tail=True, config=config)
        return d.tokens, jax_ep.combine(d.tokens, d.handle, weights=d.weights)

    def body(seed):
        def step(wrong, key):
            keys = jax.random.split(key, 3)
            x = jax.random.normal(keys[0], (T, H), jnp.bfloat16)
            idx = jax.random.randint(keys[1], (T, K), -1, E)
            weights = jax.random.uniform(keys[2], (T, K))
            small = run(x, idx, weights, checks.by_size)
            # A stream's operations take turns; XLA orders the calls by data.
            x = x + 0 * small[1][:1, :1]
            large = run(x, idx, weights, checks.config)
            bits = lambda a: lax.bitcast_convert_type(a, jnp.uint16)
            differ = [jnp.sum(bits(a) != bits(b)) for a, b in zip(small, large, strict=True)]
            return wrong + sum(differ), None

        keys = jax.random.split(jax.random.key(seed[0]), steps)
        return lax.scan(step, seed[:1] * 0, keys)[0]

    def check():
        spec = P("expert")
        mapped = jax.shard_map(
            body, mesh=checks.mesh, in_specs=spec, out_specs=spec, check_vma=False
        )
        seeds = put(np.arange(checks.R, dtype=np.int32), checks.mesh, spec)
        wrong = checks.compiled(jax.jit(mapped), seeds)(seeds)
        for shard in wrong.addressable_shards:
            assert int(shard.data[0]) == 0, f"{int(shard.data[0])} elements differ"

    checks(f"small: {steps} steps as the large path has them", check)
