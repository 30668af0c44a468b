# SPDX-License-Identifier: Apache-2.0
"""FP8 on the wire: one float32 scale per row and 128 channels, e4m3 values."""

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array, lax

from ._types import SCALE_BLOCK

SCALE_FORMATS = ("float32", "e8m0")
_TINY = np.float32(np.finfo(np.float32).tiny)
_MAX = np.float32(448.0)


def quantize(x: Array, scale_format: str) -> tuple[Array, Array]:
    """`x [..., H]` to `(q [..., H] float8_e4m3fn, scales [..., H/128] float32)`.

    `scale = amax * f32(1/448)`, `q = e4m3(x * (1/scale))`, saturating; a block whose amax is zero
    (or below the smallest normal float32) has scale 1; "e8m0" rounds the scale up to a power of 2.
    """
    if x.size == 0:  # XLA:CPU refuses fp8 arrays without elements
        shape = (*x.shape[:-1], x.shape[-1] // SCALE_BLOCK)
        return jnp.zeros_like(x, dtype=jnp.float8_e4m3fn), jnp.ones_like(x, jnp.float32, shape)
    blocks = x.astype(jnp.float32).reshape(*x.shape[:-1], x.shape[-1] // SCALE_BLOCK, SCALE_BLOCK)
    amax = jnp.max(jnp.abs(blocks), axis=-1, initial=0.0)
    scale = jnp.maximum(amax * np.float32(1 / 448), _TINY)
    scale = jnp.where(amax < _TINY, np.float32(1), scale)
    if scale_format == "e8m0":
        bits = lax.bitcast_convert_type(scale, jnp.int32)
        scale = lax.bitcast_convert_type((bits + 0x7FFFFF) & 0x7F800000, jnp.float32)
    scaled = blocks * lax.optimization_barrier(1 / scale)[..., None]
    q = jnp.clip(scaled, -_MAX, _MAX).astype(jnp.float8_e4m3fn)
    return q.reshape(x.shape), scale


def dequantize(q: Array, scales: Array, dtype: jax.typing.DTypeLike) -> Array:
    """`(q [..., H], scales [..., H/128])` to rows of `dtype`: the float32 product, rounded once."""
    blocks = q.astype(jnp.float32).reshape(*scales.shape, SCALE_BLOCK)
    return (blocks * scales[..., None]).astype(dtype).reshape(q.shape)
