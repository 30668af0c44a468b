# SPDX-License-Identifier: Apache-2.0
"""For the sparse path of MaxText's `RoutedMoE`: tokens to experts and back, inside its `shard_map`.

::

    rows, group_sizes, expert_ids, routed = permute(x, topk_idx, topk_weights, num_experts=E, ...)
    y = experts(rows, group_sizes, expert_ids)  # grouped products, psum_scatter over "tensor"
    out = unpermute(y, routed)                  # [B, S, D], or its shard of D

Source: the call sites in AI-Hypercomputer/maxtext, `layers/moe.py`, `RoutedMoE.sparse_matmul`.
"""

import jax.numpy as jnp
from jax import Array, lax

from .. import _check, _jax_compat
from .._api import combine, dispatch
from .._types import Config, Dispatched, Implementation


def permute(
    x: Array,
    topk_idx: Array,
    topk_weights: Array | None = None,
    *,
    num_experts: int,
    is_batch_sharded_by_expert: bool,
    axis_name: str | tuple[str, ...] = "expert",
    ragged_buffer_factor: float = -1.0,
    expert_alignment: int = 1,
    zero_tail: bool = False,
    wire_dtype=None,
    implementation: Implementation | None = None,
    config: Config | None = None,
) -> tuple[Array, Array, Array, Dispatched]:
    """Send the tokens of a batch to the ranks of their experts; rows arrive sorted by expert.

    In place of MaxText's sort, `ragged_all_to_all` and local sort. Equivalent code::

        d = jax_ep.dispatch(x, topk_idx, topk_weights, num_experts=num_experts)
        return d.tokens, d.group_sizes, d.expert_ids, d

    Args:
        x: [B, S, D], this rank's part of the batch; whole in D, or one shard of it.
        topk_idx: [B, S, K] integer, experts of each token.
        topk_weights: [B, S, K] floating; `unpermute` multiplies by them, in float32. None where
            the tokens were scaled before (Llama 4): rows are then added as they are.
        num_experts: E, over the whole group.
        is_batch_sharded_by_expert: MaxText's variable of this name; must be True.
        axis_name: axis of the group, or a tuple: MaxText's `_expert_parallelism_name`.
        ragged_buffer_factor: bound on rows as a multiple of B*S*K; not positive: never drops.
        expert_alignment: every expert's segment is a multiple of this many rows, padded by zeros.
        zero_tail: zero the rows after the last segment too; wanted where experts have biases.
        wire_dtype: as in `jax_ep.dispatch`.
        implementation: as in `jax_ep.dispatch`.
        config: as in `jax_ep.dispatch`.

    Returns:
        rows [rows, D]; group_sizes [E/R] int32 of the local experts; expert_ids [rows] int32, the
        local expert of each row, -1 on padding and tail; the `Dispatched` that `unpermute` takes,
        whose `num_dropped` counts what a bound has cost.

    Raises:
        TypeError, ValueError: while tracing, naming the argument, with expected and got; for a
            batch that is replicated over the group, too.
    """
    _check_batch(x, _check.axis_tuple(axis_name), is_batch_sharded_by_expert)
    if topk_weights is not None:
        weights = _check.array("topk_weights", topk_weights, kind=jnp.floating)
        topk_weights = weights.astype(jnp.float32)
    d = dispatch(
        x,
        topk_idx,
        topk_weights,
        num_experts=num_experts,
        axis_name=axis_name,
        capacity_factor=ragged_buffer_factor if ragged_buffer_factor > 0 else None,
        expert_alignment=expert_alignment,
        zero_tail=zero_tail,
        wire_dtype=wire_dtype,
        implementation=implementation,
        config=config,
    )
    return d.tokens, d.group_sizes, d.expert_ids, d


def unpermute(rows: Array, routed: Dispatched, *, wire_dtype=None) -> Array:
    """Bring the experts' rows back to their tokens and add them up, times weights if there are any.

    In place of MaxText's local unsort, `ragged_all_to_all` and weighted sum. Equivalent code:
    `jax_ep.combine(rows, routed.handle, routed.weights)`.

    Args:
        rows: [rows, D], or [rows, D/N] of each of N tensor-parallel ranks.
        routed: the last result of `permute`.
        wire_dtype: as in `jax_ep.combine`.

    Returns:
        [B, S, D] of `rows.dtype`, or [B, S, D/N].

    Raises:
        TypeError, ValueError: while tracing, naming the argument, with expected and got.
    """
    if not isinstance(routed, Dispatched):
        raise TypeError(f"routed: expected the last result of permute, got {type(routed).__name__}")
    ids = routed.expert_ids
    if routed.weights is None and jnp.shape(rows)[:-1] == ids.shape:
        rows = jnp.where(ids[:, None] >= 0, rows, 0)  # nothing unspecified goes back to biases
    return combine(rows, routed.handle, routed.weights, wire_dtype=wire_dtype)


def _check_batch(x: Array, axes: tuple[str, ...], is_sharded: bool) -> None:
    """Raise unless each rank has tokens [B, S, D] of its own."""
    if jnp.ndim(x) != 3:
        raise ValueError(f"x: expected shape [B, S, D], got {jnp.shape(x)}")
    if _check.find_view(axes):
        raise ValueError(f"permute: expected a call inside jax.shard_map over {axes}, got none")
    mesh = _jax_compat.context_mesh()
    split = {axis for axis in axes if mesh.shape[axis] > 1}
    typed = _jax_compat.varying_axes(lax.axis_index(axes))  # none with check_vma=False
    replicated = split & (typed - _jax_compat.varying_axes(x))
    if split and (replicated or not is_sharded):
        raise ValueError(
            f"x: expected a batch that is sharded over the group's axes {axes}, got one that is "
            f"replicated over {tuple(sorted(replicated or split))} (MaxText replicates a batch of 1 "
            "when it decodes): every rank would send the same tokens. Shard batch or sequence "
            "over these axes, or leave such batches to MaxText's own path."
        )
