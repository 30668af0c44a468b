# SPDX-License-Identifier: Apache-2.0
"""The CUDA implementation: one XLA FFI custom call per operation, on one rank's block.

The calls are pure and carry everything static as attributes; the handlers find the group that
`jax_ep.initialize` made by its signature and the device they run on.
"""

import math
from typing import Any, Literal, get_args

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array

from . import _ffi, _jax_compat, _slots
from ._types import SCALE_BLOCK, Plan, Spec, Wire

MAX_RANKS, MAX_TOP_K, MAX_EXPERTS, MAX_PAIRS = 64, 32, 3072, 65536
_WIRE_KINDS = {"copy": 0, "quantized": 1, "dequantized": 2}
Phase = Literal["whole", "start", "done"]  # of an operation in slots, numbered from 0
_PHASES = get_args(Phase)
Type = tuple[tuple[int, ...], Any]
_TICKET: list[Type] = [((1,), jnp.int32)]


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
    words = _ffi.plan_scratch_words(spec.num_ranks, spec.num_experts, spec.num_tokens, spec.top_k)
    scratch = [((words,), jnp.int32)]
    return _call("jax_ep_plan", _plan_types(spec), (topk_idx,), spec, scratch=scratch)


def dispatch(values: dict[str, Array], maps: Plan, *, spec: Spec, wire: Wire) -> tuple[Array, ...]:
    """Values named tokens, scales, scalars, to my rows."""
    return _call(
        "jax_ep_dispatch",
        _row_types(values, spec, wire),
        (*values.values(), *maps.arrays()),
        spec,
        **_dispatch_attributes(values, spec, wire),
    )


def combine(values: dict[str, Array], maps: Plan, *, spec: Spec, wire: Wire) -> tuple[Array, ...]:
    """Values named rows, weights, scalars, to tokens and scalars of pairs."""
    if "scalars" not in values and _rows_path(values["rows"], spec) == "slots":
        return slot_combine((), values, maps, spec=spec, wire=wire, phase="whole")
    types: list[Type] = []
    if "rows" in values:
        rows = values["rows"]
        hidden = rows.shape[-1]
        _check_row_bytes("y", hidden * rows.dtype.itemsize)
        types.append(((spec.num_tokens, hidden), rows.dtype))
    if "scalars" in values:
        types.append(((spec.num_tokens * spec.top_k,), jnp.float32))
    slots = min(spec.num_ranks - 1, spec.top_k)
    scratch: list[Type] = []
    if "rows" in values and slots:  # peers push their partial sums here
        fp8 = wire.kind == "quantized"
        width, dtype = (_fp8_bytes(hidden), jnp.uint8) if fp8 else (hidden, rows.dtype)
        scratch.append(((spec.num_tokens, slots, width), dtype))
    return _call(
        "jax_ep_combine",
        types,
        (*values.values(), *maps.arrays()),
        spec,
        scratch=scratch,
        has_rows=np.bool_("rows" in values),
        has_weights=np.bool_("weights" in values),
        has_scalars=np.bool_("scalars" in values),
        **_wire_attributes(wire),
    )


def slot_dispatch(
    ticket, values: dict[str, Array], topk_idx: Array, *, spec: Spec, wire: Wire, phase: Phase
) -> tuple[Array, ...]:
    """`plan` and `dispatch` in one: rows, then the results of `plan`; "start" gives a ticket [1].

    `ticket`: what "start" gave, in front of the operands of "done", else nothing.
    """
    tokens = values["tokens"]
    if phase != "whole":
        _require_slots(f"dispatch_{phase}", tokens, spec)
    types = [*_row_types(values, spec, wire), *_plan_types(spec)]
    return _call(
        "jax_ep_slot_dispatch",
        _TICKET if phase == "start" else types,
        (*ticket, *values.values(), topk_idx),
        spec,
        phase=np.int64(_PHASES.index(phase)),
        **_dispatch_attributes(values, spec, wire),
    )


def slot_combine(
    ticket, values: dict[str, Array], maps: Plan, *, spec: Spec, wire: Wire, phase: Phase
) -> tuple[Array, ...]:
    """`combine` of rows and, or not, weights, in one flight; `ticket` as in `slot_dispatch`."""
    rows = values["rows"]
    if phase != "whole":
        _require_slots(f"combine_{phase}", rows, spec)
    _check_row_bytes("y", rows.shape[-1] * rows.dtype.itemsize)
    return _call(
        "jax_ep_slot_combine",
        _TICKET if phase == "start" else [((spec.num_tokens, rows.shape[-1]), rows.dtype)],
        (*ticket, *values.values(), *maps.arrays()),
        spec,
        phase=np.int64(_PHASES.index(phase)),
        has_weights=np.bool_("weights" in values),
        **_wire_attributes(wire),
    )


def _rows_path(rows: Array, spec: Spec) -> _slots.Path:
    return _slots.path(spec, rows.shape[-1], rows.dtype.itemsize)


def _require_slots(what: str, rows: Array, spec: Spec) -> None:
    why = _slots.why_direct(spec, rows.shape[-1], rows.dtype.itemsize)
    if why is not None:
        raise ValueError(
            f"jax_ep.{what} is for small batches on CUDA: {why}. Valid here: plain dispatch and "
            "combine, which take any size, or implementation='xla'."
        )


def _row_types(values: dict[str, Array], spec: Spec, wire: Wire) -> list[Type]:
    tokens, quantized = values["tokens"], wire.kind == "quantized"
    hidden = tokens.shape[-1]
    dtype = jnp.float8_e4m3fn if quantized else tokens.dtype
    _check_row_bytes("x", hidden * jnp.dtype(dtype).itemsize)
    types: list[Type] = [((spec.rows, hidden), dtype)]
    if "scales" in values or quantized:
        types.append(((spec.rows, hidden // SCALE_BLOCK), jnp.float32))
    if "scalars" in values:
        types.append(((spec.rows,), jnp.float32))
    return types


def _plan_types(spec: Spec) -> list[Type]:
    pairs, by_source = (spec.num_tokens, spec.top_k), spec.num_ranks * spec.num_tokens
    experts, rows = (spec.local_experts,), (spec.rows,)
    shapes = (
        *(pairs, pairs, rows, (by_source, spec.top_k), (by_source,)),
        *(rows, experts, experts, (1,)),
    )
    return [(shape, jnp.int32) for shape in shapes]


def _dispatch_attributes(values: dict[str, Array], spec: Spec, wire: Wire) -> dict:
    return dict(
        **_wire_attributes(wire),
        zero_tail=np.bool_(spec.zero_tail),
        has_scales=np.bool_("scales" in values),
        has_scalars=np.bool_("scalars" in values),
    )


def _wire_attributes(wire: Wire) -> dict:
    return dict(
        wire=np.int64(_WIRE_KINDS[wire.kind]), power_of_two=np.bool_(wire.scale_format == "e8m0")
    )


def _fp8_bytes(hidden: int) -> int:
    """Bytes of a partial sum as FP8: values and float32 scales, up to a multiple of 128."""
    return hidden + -(-hidden // (32 * 128)) * 128


def _check_row_bytes(name: str, row_bytes: int) -> None:
    if row_bytes % 16:
        raise ValueError(
            f"{name}: expected rows of a multiple of 16 bytes for implementation='cuda', got "
            f"{row_bytes} bytes. Valid here: a hidden size that is, or implementation='xla'."
        )


def _call(
    target: str, types: list[Type], operands, spec: Spec, *, scratch=(), **attributes
) -> tuple[Array, ...]:
    """Results of these types; `scratch` are the types of more that only the kernels use."""
    results = [_jax_compat.like(operands[0], shape, dtype) for shape, dtype in (*types, *scratch)]
    sizes = dict(
        num_ranks=spec.num_ranks,
        num_experts=spec.num_experts,
        num_tokens=spec.num_tokens,
        top_k=spec.top_k,
        rows=spec.rows,
        alignment=spec.alignment,
        num_sms=spec.config.num_sms or 0,
    )

    def call(*arrays):
        every = jax.ffi.ffi_call(target, results)(
            *arrays,
            group=spec.group,
            batched=np.bool_(spec.layout == "batched"),
            **{name: np.int64(value) for name, value in sizes.items()},
            **attributes,
        )
        return tuple(every[: len(types)])

    if spec.config.overlap:
        return tuple(_jax_compat.on_collective_stream(target, call, operands))
    return call(*operands)


def over_batch(function, batch: int, operands):
    """`function(*operands)` for each element of `batch` leading dimensions, results stacked."""
    if batch == 0:
        return function(*operands)
    lead = operands[0].shape[:batch]
    flat = [x.reshape(math.prod(lead), *x.shape[batch:]) for x in operands]
    each = [function(*(x[i] for x in flat)) for i in range(math.prod(lead))]
    stacked = [jnp.stack(parts) for parts in zip(*each, strict=True)]
    return tuple(x.reshape(*lead, *x.shape[1:]) for x in stacked)
