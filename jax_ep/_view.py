# SPDX-License-Identifier: Apache-2.0
"""The two views of one operation: a rank's block inside `shard_map`, or global arrays under jit.

Global arrays carry the ranks in front: tokens `[G*R*T, H]`, rows `[G*R, rows, H]`, where G groups
stand side by side over the other mesh axes that split the batch. On a mesh with Auto axes the
operation partitions itself by a Shardy rule of compound factors, on Explicit axes by `shard_map`:

    (g t) h, (g t) k  ->  g r h        g = rank, the one factor that is sharded with h
"""

import dataclasses
import functools

import jax
from jax.experimental.custom_partitioning import custom_partitioning
from jax.sharding import AxisType, NamedSharding
from jax.sharding import PartitionSpec as P

from . import _jax_compat, _ops
from ._types import SCALE_BLOCK, Plan, Spec, Wire

_COPY = Wire()

_PLAN = ("pair", "pair", "row", "source", "slot")
_PLANNED = (*_PLAN, "row", "expert", "expert", "one")
_VALUES = {"tokens": "hidden", "scales": "scale", "scalars": "scalar"}
_ROWS = {"rows": "row_hidden", "weights": "row", "scalars": "row"}
_HALVES = (
    *(_ops.dispatch_start_p, _ops.dispatch_done_p),
    *(_ops.combine_start_p, _ops.combine_done_p),
)


def plan(topk_idx, *, spec: Spec):
    """`_ops.plan_p` in the view of `spec`."""
    return _run(_ops.plan_p, ("pair",), _PLANNED, (topk_idx,), spec=spec)


def dispatch(values: dict, plan: Plan, *, spec: Spec, wire: Wire = _COPY, forward: bool):
    """`_ops.dispatch_p` in the view of `spec`; values named tokens, scales, scalars, in this order.

    Returns rows named alike; with a quantising wire also scales.
    """
    names = _row_names(values, wire)
    results = (*names.values(),)
    rows = _exchange(
        *(_ops.dispatch_p, values, plan, results), spec=spec, wire=wire, forward=forward
    )
    return dict(zip(names, rows, strict=True))


def slot_dispatch(values: dict, topk_idx, *, spec: Spec, wire: Wire, ticket=None):
    """`_ops.slot_dispatch_p` in the view of `spec`, or with a ticket `_ops.dispatch_done_p`.

    Returns rows by name as `dispatch` does, and the results of `plan`.
    """
    names = _row_names(values, wire)
    results = (*names.values(), *_PLANNED)
    prim = _ops.slot_dispatch_p if ticket is None else _ops.dispatch_done_p
    got = _exchange(prim, values, topk_idx, results, spec=spec, wire=wire, ticket=ticket)
    return dict(zip(names, got, strict=False)), got[len(names) :]


def dispatch_start(values: dict, topk_idx, *, spec: Spec, wire: Wire):
    """The ticket with which `slot_dispatch` finishes what this begins."""
    return _exchange(_ops.dispatch_start_p, values, topk_idx, ("one",), spec=spec, wire=wire)[0]


def combine(values: dict, plan: Plan, *, spec: Spec, wire: Wire = _COPY, ticket=None):
    """`_ops.combine_p` in the view of `spec`, or with a ticket `_ops.combine_done_p`.

    Values named rows, weights, scalars, in this order. Returns tokens named "rows" and scalars of
    pairs named "scalars", as far as given.
    """
    sums = {"rows": "hidden", "scalars": "scalar"}
    names = [kind for kind in values if kind in sums]
    results = tuple(sums[name] for name in names)
    prim = _ops.combine_p if ticket is None else _ops.combine_done_p
    got = _exchange(prim, values, plan, results, spec=spec, wire=wire, ticket=ticket)
    return dict(zip(names, got, strict=True))


def combine_start(values: dict, plan: Plan, *, spec: Spec, wire: Wire):
    """The ticket with which `combine` finishes what this begins."""
    return _exchange(_ops.combine_start_p, values, plan, ("one",), spec=spec, wire=wire)[0]


def _row_names(values: dict, wire: Wire) -> dict[str, str]:
    """Names of the rows that dispatch delivers, and their dimensions."""
    names = {"tokens": "row_hidden"}
    if "scales" in values or wire.kind == "quantized":
        names["scales"] = "row_scale"
    if "scalars" in values:
        names["scalars"] = "row"
    return names


def _exchange(prim, values: dict, routing, results, *, spec, wire: Wire, ticket=None, **params):
    """Run a primitive on the ticket, if any, the values, and a plan or the `topk_idx` of one."""
    of_values = _VALUES if "tokens" in values else _ROWS
    maps = routing.arrays() if isinstance(routing, Plan) else (routing,)
    tickets = () if ticket is None else (ticket,)
    return _run(
        prim,
        (
            *("one" for _ in tickets),
            *(of_values[name] for name in values),
            *(_PLAN if isinstance(routing, Plan) else ("pair",)),
        ),
        results,
        (*tickets, *values.values(), *maps),
        spec=spec,
        in_blocks="scales" in values or wire.kind != "copy",
        whole_hidden=prim in _HALVES,
        wire=wire,
        kinds=tuple(values),
        **params,
    )


def _run(
    prim, of_operands, of_results, operands, *, spec, in_blocks=False, whole_hidden=False, **params
):
    """Results of a primitive in the view of `spec`; `of_...` name dimensions, see `_DIMENSIONS`."""
    op = functools.partial(_ops.bind, prim, **params)
    if not spec.is_global:
        return op(*operands, spec=spec)
    return _run_global(op, spec, of_operands, of_results, operands, in_blocks, whole_hidden)


# The dimensions of each kind of array in the sharding rule. Only g (the rank) and the hidden size
# may be sharded. The first four have the rank inside their leading dimension.
_DIMENSIONS = {
    "pair": "(g t) k",
    "scalar": "(g p)",
    "hidden": "(g t) H",
    "scale": "(g t) s",
    "row": "g r",
    "row_hidden": "g r H",
    "row_scale": "g r s",
    "source": "g u k",
    "slot": "g u",
    "expert": "g l",
    "one": "g o",
}
_FLAT = ("pair", "scalar", "hidden", "scale")
_HIDDEN = ("hidden", "scale", "row_hidden", "row_scale")


def _run_global(op, spec: Spec, kinds, result_kinds, operands, in_blocks: bool, whole_hidden: bool):
    """Run one rank's `op` on every rank's block of global operands.

    `in_blocks`: the op takes H in blocks of `SCALE_BLOCK` channels, so no shard may cut one.
    `whole_hidden`: H may not be sharded on Auto axes, as two halves of one operation must agree.
    """
    mesh = _jax_compat.context_mesh()
    on_rank = functools.partial(op, spec=dataclasses.replace(spec, groups=None, mesh_axes=()))

    def block(*blocks):
        results = on_rank(*(b if k in _FLAT else b[0] for b, k in zip(blocks, kinds, strict=True)))
        return tuple(
            r if k in _FLAT else r[None] for r, k in zip(results, result_kinds, strict=True)
        )

    def specs(of, hidden_axes):
        return tuple(_partition_spec(kind, spec.mesh_axes, hidden_axes) for kind in of)

    mapped = jax.shard_map(
        block,
        mesh=mesh,
        in_specs=specs(kinds, spec.hidden_axes),
        out_specs=specs(result_kinds, spec.hidden_axes),
        check_vma=False,  # scalars are alike over the axes that split H; not differentiated
    )
    types = _jax_compat.axis_types(mesh)
    if any(types[axis] == AxisType.Explicit for axis in spec.mesh_axes):
        return mapped(*operands)

    def partition(_, operand_types, result_types):
        del result_types
        hidden = ()
        if not whole_hidden:
            hidden = _hidden_axes(kinds, operand_types, spec.mesh_axes, in_blocks)
        shardings = (
            tuple(NamedSharding(mesh, s) for s in specs(of, hidden)) for of in (result_kinds, kinds)
        )
        return mesh, block, *shardings

    partitioned = custom_partitioning(mapped)
    rule = _sharding_rule(spec, kinds, result_kinds, operands, whole_hidden)
    partitioned.def_partition(partition=partition, **rule)
    return partitioned(*operands)


def _partition_spec(kind: str, mesh_axes, hidden_axes) -> P:
    rank_axes = tuple(mesh_axes)
    if kind not in _HIDDEN:
        return P(rank_axes)
    between = () if kind in _FLAT else (None,)
    return P(rank_axes, *between, tuple(hidden_axes) or None)


def _hidden_axes(kinds, types, mesh_axes, in_blocks) -> tuple[str, ...]:
    """Axes that split H of the operands as the partitioner propagated them; they may stay."""
    for kind, type_ in zip(kinds, types, strict=True):
        if kind in ("hidden", "row_hidden"):
            if not isinstance(type_.sharding, NamedSharding):
                return ()  # unsharded operands: nobody named a mesh
            entries = tuple(type_.sharding.spec)
            last = entries[-1] if len(entries) == len(type_.shape) else None
            axes = (last,) if isinstance(last, str) else tuple(last or ())
            parts = 1
            for axis in axes:
                parts *= type_.sharding.mesh.shape[axis]
            whole_blocks = not in_blocks or type_.shape[-1] % (parts * SCALE_BLOCK) == 0
            return axes if whole_blocks and not set(axes) & set(mesh_axes) else ()
    return ()


def _sharding_rule(spec: Spec, kinds, result_kinds, operands, whole_hidden: bool) -> dict:
    """Arguments of `def_partition`: the rule as text, and the sizes inside compound factors."""
    with_scales = "scale" in kinds or "row_scale" in result_kinds
    hidden = [x.shape[-1] for x, kind in zip(operands, kinds, strict=True) if "hidden" in kind]
    sizes = {
        "g": (spec.groups or 1) * spec.num_ranks,
        "t": spec.num_tokens,
        "p": spec.num_tokens * spec.top_k,
        "s": max(hidden, default=0) // SCALE_BLOCK,
        "c": SCALE_BLOCK,
    }

    def factors(dimensions):
        dimensions = dimensions.replace("H", "(s c)" if with_scales else "h")
        for major, minor in ("gt", "gp", "sc"):  # Shardy refuses a factor of size 1 beside another
            if 1 in (sizes[major], sizes[minor]):
                left = minor if sizes[major] == 1 and sizes[minor] != 1 else major
                dimensions = dimensions.replace(f"({major} {minor})", left)
        return dimensions

    text = [", ".join(factors(_DIMENSIONS[kind]) for kind in of) for of in (kinds, result_kinds)]
    rule = " -> ".join(text)
    sizes = {minor: sizes[minor] for minor in "tpc" if f" {minor})" in rule}
    in_order = dict.fromkeys(factor for factor in rule if factor.isalpha())  # as Shardy numbers
    whole = tuple(f for f in in_order if f not in ("g" if whole_hidden else "ghs"))
    return dict(sharding_rule=rule, need_replication_factors=whole, **sizes)
