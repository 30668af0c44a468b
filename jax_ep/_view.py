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
from ._types import SCALE_BLOCK, Spec


def plan(topk_idx, *, spec: Spec):
    """`_ops.plan` in the view of `spec`."""
    if not spec.is_global:
        return _ops.plan(topk_idx, spec=spec)
    results = ("pair", "pair", "row", "source", "row", "expert", "expert", "one")
    return _run_global(_ops.plan, spec, ("pair",), results, topk_idx)


def dispatch(*operands, spec: Spec, forward: bool):
    """`_ops.dispatch` in the view of `spec`; values are tokens, scales, scalars, in this order."""
    if not spec.is_global:
        return _ops.dispatch(*operands, spec=spec, forward=forward)
    kinds = tuple(
        "scalar" if value.ndim == 1 else "scale" if i else "hidden"
        for i, value in enumerate(operands[:-1])
    )
    results = tuple("row" if kind == "scalar" else f"row_{kind}" for kind in kinds)
    op = functools.partial(_ops.dispatch, forward=forward)
    return _run_global(op, spec, (*kinds, "row"), results, *operands)


def combine(*operands, spec: Spec, kinds: tuple[str, ...]):
    """`_ops.combine` in the view of `spec`."""
    if not spec.is_global:
        return _ops.combine(*operands, spec=spec, kinds=kinds)
    takes = {"rows": "row_hidden", "weights": "row", "scalars": "row"}
    gives = {"rows": "hidden", "scalars": "scalar"}
    results = tuple(gives[kind] for kind in kinds if kind in gives)
    op = functools.partial(_ops.combine, kinds=kinds)
    operand_kinds = (*(takes[kind] for kind in kinds), "row", "source")
    return _run_global(op, spec, operand_kinds, results, *operands)


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
    "expert": "g l",
    "one": "g o",
}
_FLAT = ("pair", "scalar", "hidden", "scale")
_HIDDEN = ("hidden", "scale", "row_hidden", "row_scale")


def _run_global(op, spec: Spec, kinds, result_kinds, *operands):
    """Run one rank's `op` on every rank's block of global operands."""
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
        hidden = _hidden_axes(kinds, operand_types, spec.mesh_axes)
        shardings = (
            tuple(NamedSharding(mesh, s) for s in specs(of, hidden)) for of in (result_kinds, kinds)
        )
        return mesh, block, *shardings

    partitioned = custom_partitioning(mapped)
    partitioned.def_partition(
        partition=partition, **_sharding_rule(spec, kinds, result_kinds, operands)
    )
    return partitioned(*operands)


def _partition_spec(kind: str, mesh_axes, hidden_axes) -> P:
    rank_axes = tuple(mesh_axes)
    if kind not in _HIDDEN:
        return P(rank_axes)
    between = () if kind in _FLAT else (None,)
    return P(rank_axes, *between, tuple(hidden_axes) or None)


def _hidden_axes(kinds, types, mesh_axes) -> tuple[str, ...]:
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
            whole_blocks = "scale" not in kinds or type_.shape[-1] % (parts * SCALE_BLOCK) == 0
            return axes if whole_blocks and not set(axes) & set(mesh_axes) else ()
    return ()


def _sharding_rule(spec: Spec, kinds, result_kinds, operands) -> dict:
    """Arguments of `def_partition`: the rule as text, and the sizes inside compound factors."""
    with_scales = "scale" in kinds
    dims = {k: d.replace("H", "(s c)" if with_scales else "h") for k, d in _DIMENSIONS.items()}
    text = [", ".join(dims[kind] for kind in of) for of in (kinds, result_kinds)]
    rule = " -> ".join(text)
    sizes = {}
    if "(g t)" in rule:
        sizes["t"] = spec.num_tokens
    if "(g p)" in rule:
        sizes["p"] = spec.num_tokens * spec.top_k
    if with_scales:
        sizes["c"] = SCALE_BLOCK
    in_order = dict.fromkeys(factor for factor in rule if factor.isalpha())  # as Shardy numbers
    whole = tuple(factor for factor in in_order if factor not in "ghs")
    return dict(sharding_rule=rule, need_replication_factors=whole, **sizes)
