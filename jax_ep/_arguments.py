# SPDX-License-Identifier: Apache-2.0
"""Arguments of dispatch and combine, checked and in one form, for whole operations and halves."""

import math
from typing import NamedTuple, cast

import jax.numpy as jnp
from jax import Array
from jax.sharding import AxisType

from . import _check, _group, _jax_compat
from ._layout import num_rows
from ._types import Config, Handle, Implementation, Layout, Plan, Spec, Wire, WireKind


class ToDispatch(NamedTuple):
    """What `dispatch` was called with."""

    values: dict[str, Array]  # tokens [T, H], then as given scales [T, H/128], scalars [T*K]
    topk_idx: Array  # [T, K] int32
    spec: Spec
    wire: Wire


class ToCombine(NamedTuple):
    """What `combine` was called with."""

    values: dict[str, Array]  # rows [rows, H], then as given weights [rows]
    plan: Plan
    spec: Spec
    wire: Wire


def dispatch(
    x: Array | tuple[Array, Array],
    topk_idx: Array,
    topk_weights: Array | None = None,
    *,
    num_experts: int,
    axis_name: str | tuple[str, ...] = "expert",
    capacity: int | None = None,
    capacity_factor: float | None = None,
    expert_alignment: int = 1,
    zero_tail: bool = False,
    wire_dtype=None,
    scale_format: str = "float32",
    deliver: str = "dequantized",
    layout: Layout = "ragged",
    implementation: Implementation | None = None,
    config: Config | None = None,
    batch_axes: str | tuple[str, ...] | None = None,
) -> ToDispatch:
    """Arguments as `jax_ep.dispatch` documents them."""
    axes = _check.axis_tuple(axis_name)
    in_global_view = _check.find_view(axes)
    _check.one_of("implementation", implementation, (None, "cuda", "xla"))
    if not isinstance(zero_tail, bool):
        raise TypeError(f"zero_tail: expected a bool, got {zero_tail!r}")
    tokens, scales = _check.tokens(
        x, wire_dtype=wire_dtype, scale_format=scale_format, deliver=deliver
    )
    topk_idx, topk_weights = _check.routing(tokens, topk_idx, topk_weights)
    mesh = _jax_compat.context_mesh()
    num_ranks = _check.size(mesh, axes)
    split, hidden_axes = (axes, ())
    if in_global_view:
        split, hidden_axes = _split_axes(tokens, axes, batch_axes, mesh)
        if wire_dtype is not None or scales is not None:
            parts = _check.size(mesh, hidden_axes)
            _check.whole_blocks("x", tokens.shape[-1], hidden_axes, parts)
    elif batch_axes is not None:
        raise ValueError(f"batch_axes: expected None inside shard_map, got {batch_axes!r}")
    batch_shape, top_k = tokens.shape[:-1], topk_idx.shape[-1]
    groups = _check.size(mesh, split) // num_ranks
    tokens, topk_idx = _flat(tokens), _flat(topk_idx)
    topk_weights = None if topk_weights is None else topk_weights.reshape(-1)
    scales = None if scales is None else _flat(scales)
    blocks = groups * num_ranks if in_global_view else 1
    if tokens.shape[0] % blocks or (in_global_view and batch_shape[0] % blocks):
        raise ValueError(
            f"x: expected a leading dimension that is a multiple of the {blocks} ranks along "
            f"{split}, got shape {(*batch_shape, tokens.shape[-1])}"
        )
    num_tokens = tokens.shape[0] // blocks
    rows = num_rows(
        num_tokens,
        top_k,
        num_experts=num_experts,
        num_ranks=num_ranks,
        capacity=capacity,
        capacity_factor=capacity_factor,
        expert_alignment=expert_alignment,
        layout=layout,
    )
    _check.fits_int32("pairs", num_ranks * num_tokens * top_k)
    spec = Spec(
        axis=axes,
        num_ranks=num_ranks,
        num_experts=num_experts,
        num_tokens=num_tokens,
        top_k=top_k,
        rows=rows,
        alignment=expert_alignment,
        layout=layout,
        zero_tail=zero_tail,
        implementation=implementation,
        config=_check.config(config),
        group=_group.signature(mesh, axes),
        batch_shape=batch_shape,
        groups=groups if in_global_view else None,
        mesh_axes=split if in_global_view else (),
        hidden_axes=hidden_axes,
    )
    topk_idx = _as_int32(topk_idx, num_experts)
    if not in_global_view:
        tokens, topk_idx, topk_weights, scales = _vary_alike(
            spec, tokens, topk_idx, topk_weights, scales
        )
    kind = cast(WireKind, deliver if wire_dtype is not None and scales is None else "copy")
    values = {"tokens": tokens, "scales": scales, "scalars": topk_weights}
    return ToDispatch(_given(values), topk_idx, spec, Wire(kind, scale_format))


def combine(
    y: Array,
    handle: Handle,
    weights: Array | None = None,
    *,
    wire_dtype=None,
    scale_format: str = "float32",
) -> ToCombine:
    """Arguments as `jax_ep.combine` documents them."""
    if not isinstance(handle, Handle):
        raise TypeError(f"handle: expected a jax_ep handle, got {type(handle).__name__}")
    spec, plan = handle.spec, handle.plan
    _check.view_of("handle", spec)
    _check.wire(wire_dtype, scale_format)
    y = _check.array("y", y, dtypes=_check.TOKEN_DTYPES)
    lead = () if spec.groups is None else (spec.groups * spec.num_ranks,)
    expected = (*lead, *spec.row_shape)
    if y.ndim != len(expected) + 1 or y.shape[:-1] != expected:
        raise ValueError(f"y: expected shape {expected} + [H], got {y.shape}")
    if wire_dtype is not None:
        parts = _check.size(_jax_compat.context_mesh(), spec.hidden_axes)
        _check.whole_blocks("y", y.shape[-1], spec.hidden_axes, parts)
    y = y.reshape(*lead, spec.rows, y.shape[-1])
    if weights is not None:
        weights = _check.array("weights", weights, dtypes=(jnp.float32,))
        if weights.shape != expected:
            raise ValueError(f"weights: expected shape {expected}, got {weights.shape}")
        weights = weights.reshape(*lead, spec.rows)
    if not spec.is_global:
        y, weights, *maps = _vary_alike(spec, y, weights, *plan.arrays())
        plan = Plan(*maps)
    wire = Wire("copy" if wire_dtype is None else "quantized", scale_format)
    return ToCombine(_given({"rows": y, "weights": weights}), plan, spec, wire)


def _given(values: dict) -> dict[str, Array]:
    return {name: value for name, value in values.items() if value is not None}


def _flat(array: Array) -> Array:
    """`[..., C]` to `[T, C]`."""
    return array.reshape(math.prod(array.shape[:-1]), array.shape[-1])


def _as_int32(topk_idx, num_experts: int):
    """Any integer type to int32; what is outside [-1, E) stays outside, as E."""
    if topk_idx.dtype == jnp.int32:
        return topk_idx
    valid = topk_idx < num_experts
    if jnp.issubdtype(topk_idx.dtype, jnp.signedinteger):
        valid &= topk_idx >= -1
    return jnp.where(valid, topk_idx, num_experts).astype(jnp.int32)


def _vary_alike(spec: Spec, *arrays):
    """Cast to the union of all varying axes and the group's, before any custom_vjp sees them."""
    present = [a for a in arrays if a is not None]
    axes = frozenset(spec.axis).union(*map(_jax_compat.varying_axes, present))
    return [a if a is None else _jax_compat.cast_to_varying(a, axes) for a in arrays]


def _split_axes(x, axes, batch_axes, mesh):
    """Mesh axes that split the tokens, and (Explicit meshes) those that split H."""
    types = _jax_compat.axis_types(mesh)
    if not any(types[axis] == AxisType.Explicit for axis in axes):
        outer = () if batch_axes is None else _check.axis_tuple(batch_axes)
        for axis in outer:
            if axis not in types or axis in axes:
                raise ValueError(
                    f"batch_axes: expected axes of the mesh {mesh.axis_names} outside the group "
                    f"{axes}, got {batch_axes!r}"
                )
        return (*outer, *axes), ()
    entries = _jax_compat.partition_of(x)
    split = entries[0]
    if split[len(split) - len(axes) :] != axes or any(entries[1:-1]):
        raise ValueError(
            f"x: expected its leading dimension, alone, to be sharded over the group's axes {axes} "
            f"as the minor ones, got {entries}"
        )
    return split, entries[-1]
