# SPDX-License-Identifier: Apache-2.0
"""Training with experts in FP8: rows cross the link and enter the grouped products as e4m3.

`deliver="quantized"` has no gradient for x, as an fp8 row would get an fp8 cotangent. So the experts'
products are a `jax.custom_vjp` that stands for the dispatch of x too: forward takes the fp8 rows, with a
scale per 128 channels, and fp8 weights with a scale per 128x128 block, as DeepSeek-V3 trains; backward
works in x's type on the rows dequantised, and brings x's gradient back by `combine`, the transpose of
dispatch. The router's weights keep their own gradient.

`fp8_ragged_dot` stands for a grouped FP8 matrix product with float32 accumulation. It computes what
such a kernel computes, from dequantised operands; a faster one can take its place.
"""

import jax
import jax.numpy as jnp
from jax import Array, lax

import jax_ep

FP8 = jnp.float8_e4m3fn
BLOCK = 128
ALIGNMENT = 128  # rows of a segment: what grouped FP8 products ask for


def quantize_weights(w: Array) -> tuple[Array, Array]:
    """`w [E/R, H, F]` to e4m3 and a float32 scale per 128x128 block `[E/R, H/128, F/128]`."""
    experts, rows, columns = w.shape
    blocks = w.astype(jnp.float32).reshape(experts, rows // BLOCK, BLOCK, columns // BLOCK, BLOCK)
    amax = jnp.abs(blocks).max((2, 4), keepdims=True)
    scale = jnp.where(amax > 0, amax / 448, 1)
    return (blocks / scale).astype(FP8).reshape(w.shape), scale[:, :, 0, :, 0]


def dequantize_rows(q: Array, scales: Array, dtype) -> Array:
    """`q [rows, H]`, `scales [rows, H/128]` to rows of `dtype`."""
    blocks = q.astype(jnp.float32).reshape(*scales.shape, BLOCK)
    return (blocks * scales[..., None]).reshape(q.shape).astype(dtype)


def quantize_rows(x: Array) -> tuple[Array, Array]:
    """`x [rows, F]` to e4m3 and scales `[rows, F/128]`, as dispatch does on the wire."""
    blocks = x.astype(jnp.float32).reshape(x.shape[0], x.shape[1] // BLOCK, BLOCK)
    amax = jnp.abs(blocks).max(-1, keepdims=True)
    scale = jnp.where(amax > 0, amax / 448, 1)
    return (blocks / scale).astype(FP8).reshape(x.shape), scale[..., 0]


def fp8_ragged_dot(q: Array, scales: Array, w: Array, w_scales: Array, group_sizes: Array) -> Array:
    """Rows `q [rows, H]` times their expert's `w [E/R, H, F]`, both fp8 with scales: float32."""
    by_row = jnp.repeat(jnp.repeat(w_scales, BLOCK, 1), BLOCK, 2)
    rows = dequantize_rows(q, scales, jnp.float32)
    return lax.ragged_dot(rows, w.astype(jnp.float32) * by_row, group_sizes)


def _swiglu(hidden: Array) -> Array:
    gate, up = jnp.split(hidden, 2, axis=-1)
    return jax.nn.silu(gate) * up


def fp8_experts(x, topk_idx, weights, w_in, w_out, *, num_experts: int, **options) -> Array:
    """Dispatch, SwiGLU experts in FP8, and combine; inside `jax.shard_map` over "expert".

    Args:
        x: [T, H] bfloat16 or float32, H a multiple of 128.
        topk_idx: [T, K] int32.
        weights: [T, K] float32 of the router.
        w_in: [E/R, H, 2F], the experts of this rank; F a multiple of 128.
        w_out: [E/R, F, H].
        num_experts: E, over the whole group.
        **options: of `jax_ep.dispatch`.

    Returns:
        [T, H] of x's type; differentiable in x, weights, w_in and w_out.
    """
    d = jax_ep.dispatch(
        lax.stop_gradient(x),  # its gradient is `_products`' business
        topk_idx,
        weights,
        num_experts=num_experts,
        wire_dtype=FP8,
        deliver="quantized",
        expert_alignment=ALIGNMENT,
        **options,
    )
    y = _products(x, w_in, w_out, d)
    return jax_ep.combine(y, d.handle, weights=d.weights)


@jax.custom_vjp
def _products(x: Array, w_in: Array, w_out: Array, d: jax_ep.Dispatched) -> Array:
    """The experts on the rows that `d` holds of x: `[rows, H]` of x's type."""
    return _forward(x, w_in, w_out, d)[0]


def _forward(x, w_in, w_out, d):
    hidden = fp8_ragged_dot(d.tokens, d.scales, *quantize_weights(w_in), d.group_sizes)
    hidden = jnp.where(
        (d.expert_ids >= 0)[:, None], hidden, 0
    )  # whatever the product left elsewhere
    q, scales = quantize_rows(_swiglu(hidden))
    y = fp8_ragged_dot(q, scales, *quantize_weights(w_out), d.group_sizes)
    return y.astype(x.dtype), (hidden, w_in, w_out, d)


def _backward(saved, g):
    hidden, w_in, w_out, d = saved
    owned = (d.expert_ids >= 0)[:, None]
    # What the buffer's tail holds, here and in the cotangent, is unspecified, NaN included.
    rows = jnp.where(owned, dequantize_rows(d.tokens, d.scales, g.dtype), 0)
    g = jnp.where(owned, g, 0)

    def first(rows, w_in):
        return lax.ragged_dot(rows, w_in.astype(rows.dtype), d.group_sizes)

    def second(hidden, w_out):
        return lax.ragged_dot(_swiglu(hidden), w_out.astype(hidden.dtype), d.group_sizes)

    d_hidden, d_w_out = jax.vjp(second, hidden.astype(g.dtype), w_out)[1](g)
    d_rows, d_w_in = jax.vjp(first, rows, w_in)[1](d_hidden)
    return jax_ep.combine(d_rows, d.handle), d_w_in, d_w_out, None


_products.defvjp(_forward, _backward)
