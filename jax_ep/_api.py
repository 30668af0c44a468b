# SPDX-License-Identifier: Apache-2.0
"""The public `dispatch` and `combine`."""

import math
from typing import cast

import jax.numpy as jnp
from jax import Array, lax
from jax.ad_checkpoint import checkpoint_name
from jax.sharding import AxisType

from . import _check, _grad, _group, _jax_compat, _view
from ._layout import num_rows
from ._types import (
    REMAT_NAMES,
    SCALE_BLOCK,
    Config,
    Dispatched,
    Handle,
    Implementation,
    Layout,
    Plan,
    Spec,
    Wire,
    WireKind,
)

_PLAN, _DISPATCH, _COMBINE = REMAT_NAMES


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
) -> Dispatched:
    """Send every token to the ranks that hold its experts; rows arrive sorted by expert.

    Call it inside `jax.shard_map` on per-device blocks, or under `jit` on global arrays with a mesh
    set by `jax.set_mesh`: results then carry a leading rank axis. Differentiable in `x` and
    `topk_weights`. Equivalent code on all ranks at once: `jax_ep.reference.dispatch`, in short::

        pairs = sorted((idx[r, t, k], r, t, k) for every pair with idx >= 0)
        tokens = [x[r, t] for (e, r, t, k) in pairs if e is mine]

    Args:
        x: [..., H] bfloat16, float16 or float32; leading dimensions flatten to T tokens, equal on
            all ranks. Or `(x_fp8 [..., H], scales [..., H/128] float32)`.
        topk_idx: [..., K] integer; experts of each token, -1 for none. Naming one twice makes
            two pairs.
        topk_weights: [..., K] float32, delivered as `weights` of the rows.
        num_experts: E, over the whole group; rank r owns experts [r*E/R, (r+1)*E/R).
        axis_name: mesh axis of the group, or a tuple of axes, major first.
        capacity: bound on this rank's rows. Pairs beyond it are dropped by water-filling: light
            experts lose nothing. The default never drops (but for experts named twice).
        capacity_factor: the bound as a multiple of T*K; not both.
        expert_alignment: every expert's segment is a multiple of this many rows, padded by zeros.
        zero_tail: zero the rows after the last segment too; otherwise they are unspecified.
        wire_dtype: `jnp.float8_e4m3fn` to quantise for the wire, one scale per 128 channels.
        scale_format: "float32", or "e8m0" for scales that are powers of two.
        deliver: "dequantized" rows of `x.dtype`, or "quantized" with `scales` (no gradient).
        layout: "ragged", or "batched": tokens [E/R, C, H] with C = R*T or capacity // (E/R).
        implementation: "cuda", "xla", or None: the best of the platform when lowering.
        config: how the CUDA kernels use the device.
        batch_axes: global view on Auto meshes only: mesh axes, major to the group's, over which
            the batch is split too; each slice of them is a group of its own. Explicit meshes read
            it from the type of `x`.

    Returns:
        A `Dispatched`.

    Raises:
        TypeError, ValueError: while tracing, naming the argument, with expected and got.

    Source: the row order is that of MegaBlocks (Gale et al. 2022) with DeepEP's exchange.
    """
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
        parts = _check.size(mesh, hidden_axes)
        if (wire_dtype is not None or scales is not None) and tokens.shape[-1] % (
            parts * SCALE_BLOCK
        ):
            raise ValueError(
                f"x: expected shards of H in multiples of {SCALE_BLOCK} channels for fp8, got "
                f"{tokens.shape[-1]} split {parts} ways over {hidden_axes}"
            )
    elif batch_axes is not None:
        raise ValueError(f"batch_axes: expected None inside shard_map, got {batch_axes!r}")
    batch_shape, top_k = tokens.shape[:-1], topk_idx.shape[-1]
    groups = _check.size(mesh, split) // num_ranks
    tokens, topk_idx = _flat(tokens), _flat(topk_idx)
    topk_weights = None if topk_weights is None else _flat(topk_weights)
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
    wire = Wire(kind, scale_format)
    return _dispatch(spec, tokens, scales, topk_idx, topk_weights, wire)


def _dispatch(spec, x, scales, topk_idx, topk_weights, wire):
    *maps, expert_ids, counts, sizes, dropped = checkpoint_name(
        _view.plan(lax.stop_gradient(topk_idx), spec=spec), _PLAN
    )
    plan = Plan(*maps)
    sources = {"tokens": x, "scales": scales}
    if topk_weights is not None:
        sources["scalars"] = topk_weights.reshape(-1)
    sources = {name: value for name, value in sources.items() if value is not None}
    stopped = {name: lax.stop_gradient(value) for name, value in sources.items()}
    rows = _view.dispatch(stopped, plan, spec=spec, wire=wire, forward=True)
    rows = checkpoint_name(rows, _DISPATCH)
    tokens, row_scales, weights = (rows.get(name) for name in ("tokens", "scales", "scalars"))
    if row_scales is not None:
        tokens = _grad.refuse_gradient(tokens, x)
        if weights is not None:
            source = {"scalars": sources["scalars"]}
            weights = _grad.attach(spec, {"scalars": weights}, source, plan)["scalars"]
    else:
        given = {"rows": x, "scalars": sources.get("scalars")}
        got = {"rows": tokens, "scalars": weights}
        given, got = ({k: v for k, v in d.items() if v is not None} for d in (given, got))
        attached = _grad.attach(spec, got, given, plan)
        tokens, weights = attached["rows"], attached.get("scalars")

    def shaped(rows):
        lead = rows.shape[:1] if spec.is_global else ()
        return rows.reshape(*lead, *spec.row_shape, *rows.shape[len(lead) + 1 :])

    return Dispatched(
        tokens=shaped(tokens),
        scales=None if row_scales is None else shaped(row_scales),
        group_sizes=sizes,
        counts=counts,
        expert_ids=shaped(expert_ids),
        weights=None if weights is None else shaped(weights),
        num_dropped=dropped,
        handle=Handle(plan, spec),
    )


def combine(y: Array, handle: Handle, weights: Array | None = None) -> Array:
    """Bring rows back to their tokens and add them up; the transpose of `dispatch`.

    Differentiable in `y` and `weights`. Equivalent code: `jax_ep.reference.combine`, in short::

        out[r, t] = sum(weights[row] * y[row] for row in the rows of token (r, t))

    Sums are in float32, first over a token's rows within a rank in row order, rounded to `y.dtype`,
    then over ranks in order: the same bits on every run.

    Args:
        y: rows as `dispatch` delivered them: [rows, H] (batched: [E/R, C, H]; global view: a
            leading rank axis) of bfloat16, float16 or float32; H may differ from dispatch's.
        handle: `Dispatched.handle`.
        weights: float32, one per row (`Dispatched.weights`); None adds the rows as they are.

    Returns:
        [..., H] of `y.dtype`, with the leading dimensions that `dispatch` saw.

    Raises:
        TypeError, ValueError: while tracing, naming the argument, with expected and got.
    """
    if not isinstance(handle, Handle):
        raise TypeError(f"handle: expected a jax_ep handle, got {type(handle).__name__}")
    spec, plan = handle.spec, handle.plan
    in_global_view = _check.find_view(spec.axis)
    if in_global_view != spec.is_global:
        views = {True: "on global arrays", False: "inside shard_map"}
        raise ValueError(
            f"handle: made {views[spec.is_global]}, used {views[in_global_view]}; dispatch and "
            "combine belong to one view"
        )
    y = _check.array("y", y, dtypes=_check.TOKEN_DTYPES)
    lead = () if spec.groups is None else (spec.groups * spec.num_ranks,)
    expected = (*lead, *spec.row_shape)
    if y.ndim != len(expected) + 1 or y.shape[:-1] != expected:
        raise ValueError(f"y: expected shape {expected} + [H], got {y.shape}")
    y = y.reshape(*lead, spec.rows, y.shape[-1])
    if weights is not None:
        weights = _check.array("weights", weights, dtypes=(jnp.float32,))
        if weights.shape != expected:
            raise ValueError(f"weights: expected shape {expected}, got {weights.shape}")
        weights = weights.reshape(*lead, spec.rows)
    if not spec.is_global:
        y, weights, *maps = _vary_alike(spec, y, weights, *plan.arrays())
        plan = Plan(*maps)
    out = checkpoint_name(_grad.combine(spec, y, weights, plan), _COMBINE)
    return out.reshape(*spec.batch_shape, out.shape[-1])


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
