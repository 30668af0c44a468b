# SPDX-License-Identifier: Apache-2.0
"""The semantics of `dispatch` and `combine`, in NumPy, for a whole group at once.

This page is the specification: every implementation equals it bit for bit. Arrays carry a leading
rank axis `[R, ...]`; nothing here is fast. Three steps:

1. A *pair* is one (token, k) choice. Sort all pairs of the group by (expert, source rank, token, k).
2. Give every expert a segment of its rank's buffer, as long as `grant` allows, and keep the first
   pairs that fit. A kept pair's place is its *row*.
3. `dispatch` copies token to row; `combine` adds rows back to tokens in a fixed order.
"""

import dataclasses

import ml_dtypes
import numpy as np

from ._layout import num_rows
from ._types import SCALE_BLOCK, Layout

_F32, _F8 = np.float32, ml_dtypes.float8_e4m3fn


@dataclasses.dataclass(frozen=True)
class Plan:
    """Where each pair goes. `row_pair[r][i]` is the (source rank, token, k) of row i, or -1s."""

    row_pair: np.ndarray  # [R, rows, 3]
    pair_rank: np.ndarray  # [R, T, K]; -1: no expert
    pair_row: np.ndarray  # [R, T, K]; -1: no expert, or dropped
    expert_ids: np.ndarray  # [R, rows] local expert; -1 on padding and tail
    counts: np.ndarray  # [R, E/R] kept pairs
    group_sizes: np.ndarray  # [R, E/R] kept pairs rounded up to the alignment
    num_dropped: np.ndarray  # [R, 1]


@dataclasses.dataclass(frozen=True)
class Dispatched:
    """As `jax_ep.Dispatched`, rows flat in both layouts: `tokens [R, rows, H]`."""

    tokens: np.ndarray
    scales: np.ndarray | None
    weights: np.ndarray | None
    plan: Plan


def grant(counts: np.ndarray, rows: int, alignment: int) -> np.ndarray:
    """Rows granted to each expert of one rank: water-filling in blocks of `alignment` rows."""
    blocks = -(-counts // alignment)
    budget, level = rows // alignment, 0
    while level < blocks.max(initial=0) and np.minimum(blocks, level + 1).sum() <= budget:
        level += 1
    granted = np.minimum(blocks, level)
    left = budget - granted.sum()
    more = np.flatnonzero(blocks > level)[:left]  # one block each, lowest id first
    granted[more] += 1
    return granted * alignment


def plan(topk_idx, *, num_experts, expert_alignment=1, layout: Layout = "ragged", **bounds) -> Plan:
    """Rows for `topk_idx [R, T, K]`; entries outside [0, E) name no expert.

    Args:
        topk_idx: integer array; -1 means no expert.
        num_experts: E.
        expert_alignment: A.
        layout: "ragged", or "batched": expert e's rows start at e*C.
        **bounds: `capacity` or `capacity_factor`, as in `jax_ep.dispatch`.
    """
    R, T, K = topk_idx.shape
    local, A = num_experts // R, expert_alignment
    rows = num_rows(
        T, K, num_experts=num_experts, num_ranks=R, expert_alignment=A, layout=layout, **bounds
    )
    row_pair = np.full((R, rows, 3), -1, np.int32)
    pair_rank = np.where((topk_idx >= 0) & (topk_idx < num_experts), topk_idx // local, -1)
    pair_row = np.full((R, T, K), -1, np.int32)
    expert_ids = np.full((R, rows), -1, np.int32)
    counts, sizes = np.zeros((2, R, local), np.int32)
    dropped = np.zeros((R, 1), np.int32)
    for r in range(R):
        pairs = [np.argwhere(topk_idx == r * local + e) for e in range(local)]  # in stable order
        asked = np.array([len(p) for p in pairs])
        if layout == "ragged":
            room = grant(asked, rows, A)
            start = np.cumsum(room) - room
        else:
            room = np.full(local, rows // local)
            start = np.arange(local) * (rows // local)
        for e in range(local):
            kept = pairs[e][: room[e]]
            where = start[e] + np.arange(len(kept))
            row_pair[r, where] = kept
            pair_row[tuple(kept.T)] = where
            expert_ids[r, where] = e
            counts[r, e] = len(kept)
            sizes[r, e] = min(-(-len(kept) // A) * A, room[e])
        dropped[r, 0] = asked.sum() - counts[r].sum()
    return Plan(row_pair, pair_rank.astype(np.int32), pair_row, expert_ids, counts, sizes, dropped)


def quantize(x, scale_format="float32"):
    """`x [..., H]` to e4m3 values and one float32 scale per 128 channels."""
    blocks = x.astype(_F32).reshape(*x.shape[:-1], x.shape[-1] // SCALE_BLOCK, SCALE_BLOCK)
    amax = np.abs(blocks).max(-1, initial=0)
    tiny = np.finfo(_F32).tiny
    scale = np.where(amax < tiny, _F32(1), np.maximum(amax * _F32(1 / 448), tiny))
    if scale_format == "e8m0":  # up to a power of two
        scale = ((scale.view(np.int32) + 0x7FFFFF) & 0x7F800000).view(_F32)
    scaled = np.clip(blocks * (_F32(1) / scale)[..., None], -448, 448)
    return scaled.astype(_F8).reshape(x.shape), scale


def dequantize(q, scales, dtype):
    """The inverse of `quantize`: the float32 product, rounded once to `dtype`."""
    blocks = q.astype(_F32).reshape(*scales.shape, SCALE_BLOCK)
    return (blocks * scales[..., None]).astype(dtype).reshape(q.shape)


def dispatch(
    x,
    topk_idx,
    topk_weights=None,
    *,
    num_experts,
    wire_dtype=None,
    scale_format="float32",
    deliver="dequantized",
    **placement,
) -> Dispatched:
    """`x [R, T, H]` (or a pair of e4m3 values and scales) to rows `[R, rows, H]`.

    Rows that no pair owns are zero here; in `jax_ep`, rows after the last segment are unspecified.
    `placement` goes to `plan`.
    """
    p = plan(topk_idx, num_experts=num_experts, **placement)
    if isinstance(x, tuple):
        q, s = x
    elif wire_dtype is not None:
        q, s = quantize(x, scale_format)
        if deliver == "dequantized":
            x = dequantize(q, s, x.dtype)
    weights = None if topk_weights is None else gather(topk_weights, p.row_pair)
    if deliver == "quantized":
        source = p.row_pair[..., :2]
        return Dispatched(gather(q, source), gather(s, source), weights, p)
    return Dispatched(gather(x, p.row_pair[..., :2]), None, weights, p)


def gather(values, index):
    """`values[index]` row by row, zero where the index is -1."""
    owned = index[..., 0] >= 0
    taken = np.zeros(owned.shape + values.shape[index.shape[-1] :], values.dtype)
    taken[owned] = values[tuple(index[owned].T)]
    return taken


def combine(
    y, p: Plan, weights=None, *, ranks_per_node=None, wire_dtype=None, scale_format="float32"
):
    """Rows `y [R, rows, H]` back to tokens `[R, T, H]`, each times its row's weight.

    Products are rounded to float32, then added in row order; each rank's partial is rounded to
    `y.dtype`; partials are added in float32 in rank order and rounded once at the end. With a
    `wire_dtype` the partial of another rank is quantised and counts as the float32 product of value
    and scale. Between nodes, a node's partials are added first and their sum rounded, then nodes in
    order.
    """
    R, T, _ = p.pair_rank.shape
    per_node = ranks_per_node or R
    total = np.zeros((R, T, y.shape[-1]), _F32)
    for node in range(0, R, per_node):
        node_sum = np.zeros_like(total)
        for r in range(node, node + per_node):
            partial = np.zeros_like(total)
            for row in np.flatnonzero(p.row_pair[r, :, 0] >= 0):  # in row order
                value = y[r, row].astype(_F32)
                if weights is not None:
                    value = weights[r, row].astype(_F32) * value
                partial[tuple(p.row_pair[r, row, :2])] += value
            partial = partial.astype(y.dtype)
            arrived = partial.astype(_F32)
            if wire_dtype is not None:
                arrived = dequantize(*quantize(partial, scale_format), _F32)
                arrived[r] = partial[r]  # the own tokens' stays here
            node_sum += arrived
        total += node_sum if per_node == R else node_sum.astype(y.dtype).astype(_F32)
    return total.astype(y.dtype)
