# SPDX-License-Identifier: Apache-2.0
"""Training with experts in FP8: rows cross the link and enter the grouped products as e4m3.

`deliver="quantized"` has no gradient for x, as an fp8 row would get an fp8 cotangent. So one
`jax.custom_vjp` holds the dispatch and the products of the experts:

forward    x --dispatch--> e4m3 rows --product--> hidden --SwiGLU, quantised--> --product--> y
backward   products in x's type, rows dequantised; x's gradient comes back by `combine`, the
           transpose of dispatch; weights are those of the caller, not their e4m3 roundings

What is emulated: JAX has no grouped FP8 product on every device, so `fp8_ragged_dot` dequantises
and multiplies in float32. Its results are those of FP8 operands accumulated in float32 (Hopper's
tensor cores keep fewer bits), its speed is not. A kernel with the same arguments can replace it;
DeepGEMM's takes these blocks, whose scales stay put for 128 steps of the sum.
"""

import functools

import jax
import jax.numpy as jnp
from jax import Array, lax

import jax_ep

FP8 = jnp.float8_e4m3fn
BLOCK = 128
ALIGNMENT = 128  # rows of a segment: what grouped FP8 kernels ask for
_SMALLEST = 448 * float(jnp.finfo(jnp.float32).tiny)  # below it a scale would be denormal


def fp8_experts(x, topk_idx, weights, w_in, w_out, *, num_experts: int, **options) -> Array:
    """Dispatch, SwiGLU experts in FP8, and combine, inside `jax.shard_map`.

    Args:
        x: [..., H] bfloat16, float16 or float32.
        topk_idx: [..., K] integer, -1 for none.
        weights: [..., K] float32 of the router.
        w_in: [E/R, H, 2F] of this rank's experts, gate before up.
        w_out: [E/R, F, H].
        num_experts: E, over the whole group.
        **options: more of `jax_ep.dispatch`, such as `axis_name` or `capacity_factor`.

    Returns:
        [..., H] of x's type; differentiable in x, weights, w_in and w_out.

    Raises:
        ValueError: if H or F is not a multiple of 128.
    """
    if w_out.shape[1] % BLOCK or w_out.shape[2] % BLOCK:
        raise ValueError(f"w_out: expected [E/R, F, H], F and H in 128s, got {w_out.shape}")
    fixed = dict(wire_dtype=FP8, deliver="quantized", expert_alignment=ALIGNMENT, layout="ragged")
    options = dict(num_experts=num_experts, **fixed, **options)
    operands = _vary_alike(x, topk_idx, weights, w_in, w_out)
    y, row_weights, handle = _rows(options, *operands)  # pyright: ignore
    return jax_ep.combine(y, handle, weights=row_weights)


def _vary_alike(*arrays):
    """So that slices of the batch that share an expert's weights add up their gradients."""
    varying = [jax.typeof(a).manual_axis_type.varying for a in arrays]
    missing = [tuple(frozenset[str]().union(*varying) - axes) for axes in varying]
    return [lax.pcast(a, axes, to="varying") for a, axes in zip(arrays, missing, strict=True)]


@functools.partial(jax.custom_vjp, nondiff_argnums=(0,))
def _rows(options: dict, x, topk_idx, weights, w_in, w_out) -> tuple:
    """What the experts make of the rows, the rows' weights, and the handle."""
    return _forward(options, x, topk_idx, weights, w_in, w_out)[0]


def _forward(options, x, topk_idx, weights, w_in, w_out):
    def dispatch(weights):
        d = jax_ep.dispatch(x, topk_idx, weights, **options)
        return d.weights, d

    row_weights, weights_back, d = jax.vjp(dispatch, weights, has_aux=True)
    product = fp8_ragged_dot(d.tokens, d.scales, *quantize_weights(w_in), d.group_sizes)
    hidden = _owned(product, d)
    activated = quantize_rows(_swiglu(hidden))
    y = fp8_ragged_dot(*activated, *quantize_weights(w_out), d.group_sizes)
    saved = (hidden.astype(x.dtype), w_in, w_out, d, weights_back)
    return (y.astype(x.dtype), row_weights, d.handle), saved


def _backward(options, saved, cotangents):
    hidden, w_in, w_out, d, weights_back = saved
    g, g_weights, _ = cotangents
    rows = _owned(dequantize_rows(d.tokens, d.scales, g.dtype), d)

    def product(rows, w):
        return lax.ragged_dot(rows, w.astype(rows.dtype), d.group_sizes)

    activated, swiglu_back = jax.vjp(_swiglu, hidden)
    d_activated, d_w_out = jax.vjp(product, activated, w_out)[1](_owned(g, d))
    (d_hidden,) = swiglu_back(_owned(d_activated, d))
    d_rows, d_w_in = jax.vjp(product, rows, w_in)[1](d_hidden)
    return jax_ep.combine(d_rows, d.handle), None, *weights_back(g_weights), d_w_in, d_w_out


_rows.defvjp(_forward, _backward)


def fp8_ragged_dot(rows, row_scales, w_fp8, w_scales, group_sizes) -> Array:
    """Rows of each group times its expert's weights, `[rows, F]` float32; emulated.

    Args:
        rows: [rows, H] e4m3, `group_sizes` of them for each expert in turn.
        row_scales: [rows, H/128] float32.
        w_fp8: [E/R, H, F] e4m3.
        w_scales: [E/R, H/128, F/128] float32.
        group_sizes: [E/R] int32; rows beyond their sum may hold anything, results there, too.
    """
    w = w_fp8.astype(jnp.float32) * w_scales.repeat(BLOCK, 1).repeat(BLOCK, 2)
    exact = dequantize_rows(rows, row_scales, jnp.float32)
    return lax.ragged_dot(exact, w, group_sizes, precision=lax.Precision.HIGHEST)  # not TF32


def quantize_weights(w: Array) -> tuple[Array, Array]:
    """`w [E/R, H, F]` to e4m3 and a float32 scale per 128x128 block, `[E/R, H/128, F/128]`.

    Square blocks, as DeepSeek-V3 has: a kernel scales a partial sum once for 128 products, and the
    transposed weights are quantised already, should the backward products move to FP8, too.
    """
    experts, h, f = w.shape
    blocks = w.reshape(experts, h // BLOCK, BLOCK, f // BLOCK, BLOCK)
    q, scales = _quantize(blocks, (2, 4))
    return q.reshape(w.shape), scales.squeeze((2, 4))


def quantize_rows(x: Array) -> tuple[Array, Array]:
    """`x [rows, F]` to e4m3 and float32 scales `[rows, F/128]`, like those of dispatch."""
    q, scales = _quantize(x.reshape(len(x), x.shape[1] // BLOCK, BLOCK), (2,))
    return q.reshape(x.shape), scales.squeeze(2)


def dequantize_rows(q: Array, scales: Array, dtype) -> Array:
    """`q [rows, H]`, `scales [rows, H/128]` to rows of `dtype`."""
    blocks = q.astype(jnp.float32).reshape(*scales.shape, BLOCK)
    return (blocks * scales[..., None]).reshape(q.shape).astype(dtype)


def _quantize(blocks, axes):
    blocks = blocks.astype(jnp.float32)
    amax = jnp.abs(blocks).max(axes, keepdims=True)
    scale = jnp.where(amax < _SMALLEST, 1, amax / 448)
    return (blocks / scale).astype(FP8), scale


def _swiglu(hidden):
    gate, up = jnp.split(hidden, 2, axis=-1)
    return jax.nn.silu(gate) * up


def _owned(rows, d):
    """Zeros where a row has no pair: what lies behind the segments is unspecified, perhaps NaN."""
    return jnp.where((d.expert_ids >= 0)[:, None], rows, 0)
