# SPDX-License-Identifier: Apache-2.0
"""The CUDA implementation: one XLA FFI custom call per operation, on one rank's block.

The calls are pure and carry everything static as attributes; the handlers find the group that
`jax_ep.initialize` made by its signature and the device they run on.
"""

import math
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array

from . import _ffi, _jax_compat
from ._types import SCALE_BLOCK, Plan, Spec, Wire

MAX_RANKS, MAX_TOP_K, MAX_EXPERTS, MAX_PAIRS = 64, 32, 3072, 65536
_WIRE_KINDS = {"copy": 0, "quantized": 1, "dequantized": 2}


def why_not(spec: Spec) -> str | None:
    """What keeps the CUDA kernels from this exchange; None if nothing does."""
    limits = (
        ("ranks", spec.num_ranks, MAX_RANKS),
        ("experts per token", spec.top_k, MAX_TOP_K),
        ("experts", spec.num_experts, MAX_EXPERTS),
        ("pairs (T*K) per rank", spec.num_tokens * spec.top_k, MAX_PAIRS),
    )
    for what, got, most in limits:
        if got > most:
            return f"expected at most {most} {what}, got {got}"
    return None


def plan(topk_idx: Array, *, spec: Spec) -> tuple[Array, ...]:
    """`topk_idx [T, K]` to the arrays of `Plan`, then expert_ids, counts, group_sizes, dropped."""
    pairs, by_source = (spec.num_tokens, spec.top_k), spec.num_ranks * spec.num_tokens
    experts = (spec.local_experts,)
    words = _ffi.plan_scratch_words(spec.num_ranks, spec.num_experts, spec.num_tokens, spec.top_k)
    shapes = (
        *(pairs, pairs, (spec.rows,), (by_source, spec.top_k), (by_source,)),
        *((spec.rows,), experts, experts, (1,), (words,)),
    )
    results = _call("jax_ep_plan", [(s, jnp.int32) for s in shapes], (topk_idx,), spec)
    return tuple(results[:-1])


def dispatch(values: dict[str, Array], maps: Plan, *, spec: Spec, wire: Wire) -> tuple[Array, ...]:
    """Values named tokens, scales, scalars, to my rows."""
    tokens = values["tokens"]
    hidden = tokens.shape[-1]
    quantized = wire.kind == "quantized"
    dtype = jnp.float8_e4m3fn if quantized else tokens.dtype
    _check_row_bytes("x", hidden * jnp.dtype(dtype).itemsize)
    types: list[tuple[tuple[int, ...], Any]] = [((spec.rows, hidden), dtype)]
    if "scales" in values or quantized:
        types.append(((spec.rows, hidden // SCALE_BLOCK), jnp.float32))
    if "scalars" in values:
        types.append(((spec.rows,), jnp.float32))
    return _call(
        "jax_ep_dispatch",
        types,
        (*values.values(), *maps.arrays()),
        spec,
        wire=np.int64(_WIRE_KINDS[wire.kind]),
        power_of_two=np.bool_(wire.scale_format == "e8m0"),
        zero_tail=np.bool_(spec.zero_tail),
        has_scales=np.bool_("scales" in values),
        has_scalars=np.bool_("scalars" in values),
    )


def combine(values: dict[str, Array], maps: Plan, *, spec: Spec) -> tuple[Array, ...]:
    """Values named rows, weights, scalars, to tokens and scalars of pairs."""
    slots = min(spec.num_ranks - 1, spec.top_k)
    types: list[tuple[tuple[int, ...], Any]] = []
    if "rows" in values:
        rows = values["rows"]
        hidden = rows.shape[-1]
        _check_row_bytes("y", hidden * rows.dtype.itemsize)
        types.append(((spec.num_tokens, hidden), rows.dtype))
    if "scalars" in values:
        types.append(((spec.num_tokens * spec.top_k,), jnp.float32))
    wanted = len(types)
    if "rows" in values and slots:  # peers push their partial sums here
        types.append(((spec.num_tokens, slots, hidden), rows.dtype))
    results = _call(
        "jax_ep_combine",
        types,
        (*values.values(), *maps.arrays()),
        spec,
        has_rows=np.bool_("rows" in values),
        has_weights=np.bool_("weights" in values),
        has_scalars=np.bool_("scalars" in values),
    )
    return tuple(results[:wanted])


def _check_row_bytes(name: str, row_bytes: int) -> None:
    if row_bytes % 16:
        raise ValueError(
            f"{name}: expected rows of a multiple of 16 bytes for implementation='cuda', got "
            f"{row_bytes} bytes. Valid here: a hidden size that is, or implementation='xla'."
        )


def _call(target: str, types, operands, spec: Spec, **attributes) -> tuple[Array, ...]:
    results = [_jax_compat.like(operands[0], shape, dtype) for shape, dtype in types]
    sizes = dict(
        num_ranks=spec.num_ranks,
        num_experts=spec.num_experts,
        num_tokens=spec.num_tokens,
        top_k=spec.top_k,
        rows=spec.rows,
        alignment=spec.alignment,
        num_sms=spec.config.num_sms or 0,
    )
    return tuple(
        jax.ffi.ffi_call(target, results)(
            *operands,
            group=spec.group,
            batched=np.bool_(spec.layout == "batched"),
            **{name: np.int64(value) for name, value in sizes.items()},
            **attributes,
        )
    )


def over_batch(function, batch: int, operands):
    """`function(*operands)` for each element of `batch` leading dimensions, results stacked."""
    if batch == 0:
        return function(*operands)
    lead = operands[0].shape[:batch]
    flat = [x.reshape(math.prod(lead), *x.shape[batch:]) for x in operands]
    each = [function(*(x[i] for x in flat)) for i in range(math.prod(lead))]
    stacked = [jnp.stack(parts) for parts in zip(*each, strict=True)]
    return tuple(x.reshape(*lead, *x.shape[1:]) for x in stacked)
