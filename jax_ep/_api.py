# SPDX-License-Identifier: Apache-2.0
"""The public `dispatch` and `combine`."""

import jax
from jax import Array, lax
from jax.ad_checkpoint import checkpoint_name

from . import _arguments, _grad, _ops, _slots, _view
from ._types import REMAT_NAMES, Config, Dispatched, Handle, Implementation, Layout, Spec

_PLAN, _DISPATCH, _COMBINE = REMAT_NAMES


@jax.named_scope("jax_ep.dispatch")
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
        config: how the CUDA kernels use the device, and which batches are small for them.
        batch_axes: global view on Auto meshes only: mesh axes, major to the group's, over which
            the batch is split too; each slice of them is a group of its own. Explicit meshes read
            it from the type of `x`.

    Returns:
        A `Dispatched`.

    Raises:
        TypeError, ValueError: while tracing, naming the argument, with expected and got.

    Source: the row order is that of MegaBlocks (Gale et al. 2022) with DeepEP's exchange.

    Example:
        >>> mesh = jax.make_mesh((2,), ("expert",), axis_types=(jax.sharding.AxisType.Auto,))
        >>> @jax.jit
        ... @functools.partial(jax.shard_map, mesh=mesh, in_specs=P("expert"), out_specs=P("expert"))
        ... def exchange(x, idx):
        ...     d = jax_ep.dispatch(x, idx, num_experts=4)
        ...     return d.group_sizes, jax_ep.combine(d.tokens, d.handle)
        >>> x = jnp.arange(6.0)[:, None]  # 3 tokens on each of 2 ranks
        >>> idx = jnp.array([[0], [3], [0], [2], [-1], [3]])
        >>> sizes, out = exchange(x, idx)
        >>> sizes.tolist(), out[:, 0].tolist()  # token 4 chose nobody
        ([2, 0, 1, 2], [0.0, 1.0, 2.0, 3.0, 0.0, 5.0])
    """
    values, topk_idx, spec, wire = _arguments.dispatch(
        x,
        topk_idx,
        topk_weights,
        num_experts=num_experts,
        axis_name=axis_name,
        capacity=capacity,
        capacity_factor=capacity_factor,
        expert_alignment=expert_alignment,
        zero_tail=zero_tail,
        wire_dtype=wire_dtype,
        scale_format=scale_format,
        deliver=deliver,
        layout=layout,
        implementation=implementation,
        config=config,
        batch_axes=batch_axes,
    )
    tokens = values["tokens"]
    topk_idx = lax.stop_gradient(topk_idx)
    stopped = {name: lax.stop_gradient(value) for name, value in values.items()}
    if _slots.path(spec, tokens.shape[-1], tokens.dtype.itemsize) == "slots":
        rows, planned = _view.slot_dispatch(stopped, topk_idx, spec=spec, wire=wire)
        planned = checkpoint_name(planned, _PLAN)
    else:
        planned = checkpoint_name(_view.plan(topk_idx, spec=spec), _PLAN)
        plan, _ = _ops.split_plan(planned)
        rows = _view.dispatch(stopped, plan, spec=spec, wire=wire, forward=True)
    rows = checkpoint_name(rows, _DISPATCH)
    return delivered(_with_gradient(rows, values, planned, spec), planned, spec)


def _with_gradient(rows: dict[str, Array], values: dict[str, Array], planned, spec: Spec):
    """Rows that were made from stopped values, with the gradient of the values."""
    plan, _ = _ops.split_plan(planned)
    if "scales" in rows:
        rows["tokens"] = _grad.refuse_gradient(rows["tokens"], values["tokens"])
        differentiable = {"scalars": "scalars"}
    else:
        differentiable = {"tokens": "rows", "scalars": "scalars"}
    names = {name: kind for name, kind in differentiable.items() if name in rows}
    if not names:
        return rows
    got, given = ({kind: d[name] for name, kind in names.items()} for d in (rows, values))
    attached = _grad.attach(spec, got, given, plan)
    return rows | {name: attached[kind] for name, kind in names.items()}


def delivered(rows: dict[str, Array], planned, spec: Spec) -> Dispatched:
    """What the user gets: rows and the results of the plan, in the shapes of the layout."""

    def shaped(rows: Array) -> Array:
        lead = rows.shape[:1] if spec.is_global else ()
        return rows.reshape(*lead, *spec.row_shape, *rows.shape[len(lead) + 1 :])

    plan, (expert_ids, counts, group_sizes, num_dropped) = _ops.split_plan(planned)
    rows = {name: shaped(value) for name, value in rows.items()}
    return Dispatched(
        tokens=rows["tokens"],
        scales=rows.get("scales"),
        group_sizes=group_sizes,
        counts=counts,
        expert_ids=shaped(expert_ids),
        weights=rows.get("scalars"),
        num_dropped=num_dropped,
        handle=Handle(plan, spec),
    )


@jax.named_scope("jax_ep.combine")
def combine(
    y: Array,
    handle: Handle,
    weights: Array | None = None,
    *,
    wire_dtype=None,
    scale_format: str = "float32",
) -> Array:
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
        wire_dtype: `jnp.float8_e4m3fn` to quantise, one scale per 128 channels, every rank's sum
            on its way to another rank (docs/decode.md has the error). Gradients pass straight
            through. On CUDA, where a group spans nodes, small batches only.
        scale_format: "float32", or "e8m0" for scales that are powers of two.

    Returns:
        [..., H] of `y.dtype`, with the leading dimensions that `dispatch` saw.

    Raises:
        TypeError, ValueError: while tracing, naming the argument, with expected and got.

    Example:
        >>> mesh = jax.make_mesh((2,), ("expert",), axis_types=(jax.sharding.AxisType.Auto,))
        >>> @jax.jit
        ... @functools.partial(jax.shard_map, mesh=mesh, in_specs=P("expert"), out_specs=P("expert"))
        ... def mixture(x, idx, weights):
        ...     d = jax_ep.dispatch(x, idx, weights, num_experts=4)
        ...     y = 10.0 * d.tokens  # what the experts make of their rows
        ...     return jax_ep.combine(y, d.handle, weights=d.weights)
        >>> idx, weights = jnp.array([[0, 3], [1, 2]]), jnp.array([[0.75, 0.25], [0.5, 0.25]])
        >>> mixture(jnp.array([[1.0], [2.0]]), idx, weights).tolist()
        [[10.0], [15.0]]
    """
    values, plan, spec, wire = _arguments.combine(
        y, handle, weights, wire_dtype=wire_dtype, scale_format=scale_format
    )
    out = _grad.combine(spec, wire, values["rows"], values.get("weights"), plan)
    return combined(checkpoint_name(out, _COMBINE), spec)


def combined(out: Array, spec: Spec) -> Array:
    """Sums of tokens, in the leading dimensions that `dispatch` saw."""
    return out.reshape(*spec.batch_shape, out.shape[-1])
