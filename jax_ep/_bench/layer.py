# SPDX-License-Identifier: Apache-2.0
"""Communication time of a whole MoE layer, forward and backward: the layer less its experts.

The layer: dispatch, two products of every expert with SwiGLU between, combine with the router's
weights; then gradients of x, of the weights and of both matrices. "Experts alone" is the same
forward and backward pass of the experts on rows, and cotangents of rows, that are there already:
operands of the same shapes. They cost nothing, so all that dispatch, combine and their transposes
do is communication time, the writing of rows and the products with weights included.

Rows are batched with a capacity of 1.25 T*K, tail zeroed, for plain batched products: XLA rewrites
`lax.ragged_dot`'s gradient for the matrices on GPUs as a dense product of every row with every expert
(openxla/xla#40189), which would drown the rest.
"""

import functools
import sys

import jax
import jax.numpy as jnp
import numpy as np

import jax_ep

from .exchange import Exchange
from .timing import Operation, take_turns

_OPTIONS = dict(layout="batched", capacity_factor=1.25, zero_tail=True)
_LENGTH = 4
_BETWEEN = 0.02  # largest difference between the implementations, of the largest gradient


def experts(tokens, w_in, w_out):
    """SwiGLU experts on batched rows: `[E/R, C, H]` to the same."""
    gate, up = jnp.split(jnp.einsum("ech,ehf->ecf", tokens, w_in), 2, -1)
    return jnp.einsum("ecf,efh->ech", jax.nn.silu(gate) * up, w_out)


def operations(ex: Exchange, expert_hidden: int) -> dict[str, Operation]:
    """The layer in both implementations, and its experts alone."""
    timer, E, H, F = ex.timer, ex.work.experts, ex.work.hidden, expert_hidden
    rng = np.random.default_rng(5)

    def normal(*shape):
        values = rng.standard_normal(shape, np.float32) / np.float32(np.sqrt(shape[1]))
        return timer.put(values).astype(jnp.bfloat16)

    matrices = normal(E, H, 2 * F), normal(E, F, H)
    idx, x = ex.on_device(ex.uniform[0]), ex.x["bfloat16"]

    def layer(implementation):
        def forward(idx, x, weights, w_in, w_out):
            d = ex.deliver(idx, x, weights, implementation=implementation, **_OPTIONS)
            return jax_ep.combine(experts(d.tokens, w_in, w_out), d.handle, weights=d.weights)

        def step(_, idx, g, *operands):
            out, pull = jax.vjp(functools.partial(forward, idx), *operands)
            return out, pull(g)

        facts = ex.facts("bfloat16", **_OPTIONS) | dict(implementation=implementation or "default")
        return Operation(step, (idx, x, x, ex.weights, *matrices), facts=facts)

    def alone(_, rows, *matrices):
        y, pull = jax.vjp(experts, rows, *matrices)
        return y, pull(rows)

    rows = ex.delivered(ex.uniform, "bfloat16", **_OPTIONS).tokens
    return {
        "layer fwd+bwd": layer(None),
        "layer fwd+bwd, xla": layer("xla"),
        "layer fwd+bwd, experts alone": Operation(alone, (rows, *matrices)),
    }


def check(ex: Exchange, ours: Operation, xla: Operation) -> None:
    """Outputs and gradients of the two implementations are alike."""

    def compare(*operands):
        pairs = zip(*(jax.tree.leaves(op.step(0, *operands)) for op in (ours, xla)), strict=True)
        far = [jnp.abs(a - b).max() / jnp.abs(b).max() for a, b in pairs]
        return jnp.stack([f.astype(jnp.float32) for f in far])[None]

    worst = float(np.asarray(ex.timer.mapped(compare)(*ours.operands)).max())
    print(f"check, layer: outputs and gradients within {worst:.1e} of the largest")
    if not worst <= _BETWEEN:
        sys.exit("jax_ep bench: the layer's gradients differ from implementation='xla'")


def time_layer(ex: Exchange, expert_hidden: int) -> None:
    """Rows of the layer, of its experts alone, and of the differences."""
    timer, ops = ex.timer, operations(ex, expert_hidden)
    ours, xla, _ = ops.values()
    check(ex, ours, xla)
    times = take_turns(*(timer.looped(op, _LENGTH) for op in ops.values()))
    for (name, op), seconds in zip(ops.items(), times, strict=True):
        timer.keep(name, op, seconds / _LENGTH, length=_LENGTH)
    alone = timer.rows["layer fwd+bwd, experts alone"]["median_us"]
    communication = [
        round(timer.rows[name]["median_us"] - alone, 3)
        for name in ("layer fwd+bwd", "layer fwd+bwd, xla")
    ]
    for name, op, us in zip(("", ", xla"), (ours, xla), communication, strict=True):
        timer.rows[f"layer communication{name}"] = dict(median_us=us, **op.facts)
        print(f"{'layer communication' + name:44}{us:10.1f}")
    smaller = communication[1] / communication[0]
    timer.rows["layer communication"]["times_smaller_than_xla"] = round(smaller, 2)
    print(f"communication of the layer: {smaller:.1f} times less than with implementation='xla'")
