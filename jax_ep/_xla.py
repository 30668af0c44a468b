# SPDX-License-Identifier: Apache-2.0
"""The portable implementation, in JAX's own collectives; runs inside `shard_map` on any platform.

    plan      sort my pairs by expert; all-gather the counts and the orders; the rest is arithmetic
    dispatch  all-gather the tokens (a padded all-to-all whose blocks are all alike), take my rows;
              some columns at a time
    combine   sum a token's rows into a partial; all-to-all the partials; sum in rank order;
              in at most eight blocks of tokens, so that the partials in flight stay small

Memory is linear in the tokens and rows that move; there is no one-hot and no mask of pairs by rows.
"""

import functools

import jax.numpy as jnp
from jax import Array, lax

from . import _fp8, _jax_compat
from ._types import Spec, Wire

# Work is done in pieces, to keep temporaries in cache and small (docs/performance.md).
_GATHERS = 4  # of dispatch, at most: all-gathers, each of some columns
_GATHER_BYTES = 2**23  # from which on there are several
_LANES = 128  # columns of a piece are a multiple
_BLOCKS = 8  # of combine, at most: blocks of tokens, each with one all-to-all
_BLOCK_BYTES = 2**21  # at least, of float32 sums over all ranks
_CHUNK_BYTES = 2**18  # of float32 sums added up at a time


def plan(topk_idx: Array, *, spec: Spec) -> tuple[Array, ...]:
    """`topk_idx [T, K]` to the arrays of `Plan`, then expert_ids, counts, group_sizes, dropped."""
    R, E, T, K = spec.num_ranks, spec.num_experts, spec.num_tokens, spec.top_k
    local = spec.local_experts
    if T == 0:  # collectives refuse empty arrays
        none = jnp.full((spec.rows,), -1, jnp.int32)
        empty, zeros = jnp.zeros((0, K), jnp.int32), jnp.zeros(local, jnp.int32)
        no_slot = jnp.zeros(0, jnp.int32)
        return empty, empty, none, empty, no_slot, none, zeros, zeros, jnp.zeros(1, jnp.int32)
    me = lax.axis_index(spec.axis)
    expert = topk_idx.reshape(-1)
    named = (expert >= 0) & (expert < E)
    expert = jnp.where(named, expert, E)

    order = jnp.argsort(expert, stable=True).astype(jnp.int32)  # my pairs, by expert
    bounds = jnp.searchsorted(expert[order], jnp.arange(E + 1, dtype=jnp.int32)).astype(jnp.int32)
    mine = jnp.diff(bounds)  # [E] my pairs of each expert
    counts, orders, firsts = lax.all_gather((mine, order, bounds[:-1]), spec.axis)
    asked = counts.sum(0)
    kept, start, size = _segments(asked.reshape(R, local), spec)

    # My pairs' rows: behind the earlier ranks' pairs of the expert and my own earlier ones.
    before = (jnp.cumsum(counts, 0) - counts)[me]
    place = (
        jnp.zeros(T * K, jnp.int32)
        .at[order]
        .set(jnp.arange(T * K, dtype=jnp.int32), unique_indices=True)
    )
    safe = jnp.minimum(expert, E - 1)
    position = place - bounds[safe] + before[safe]
    fits = named & (position < kept.reshape(-1)[safe])
    pair_row = jnp.where(fits, start.reshape(-1)[safe] + position, -1).reshape(T, K)
    pair_rank = jnp.where(named, expert // local, -1).reshape(T, K)

    # My rows' pairs: which segment, which source rank in it, which of that rank's pairs.
    my_kept, my_start, my_size = kept[me], start[me], size[me]
    row = jnp.arange(spec.rows, dtype=jnp.int32)
    e = _last_at_most(my_start, row)
    position = row - my_start[e]
    owned = position < my_kept[e]
    from_rank = lax.dynamic_slice_in_dim(counts, me * local, local, 1).T.reshape(-1)  # [E/R * R]
    ends = jnp.cumsum(from_rank)
    before_e = (jnp.cumsum(asked) - asked).reshape(R, local)[me]
    dense = before_e - before_e[0]  # pairs of my experts before expert e
    segment = jnp.searchsorted(ends, dense[e] + position, side="right").astype(jnp.int32)
    segment = jnp.minimum(segment, local * R - 1)
    source = segment % R
    nth = dense[e] + position - (ends - from_rank)[segment]
    pair = orders[source, jnp.clip(firsts[source, me * local + e] + nth, 0, max(T * K - 1, 0))]
    row_pair = jnp.where(owned, source * (T * K) + pair, -1)
    expert_ids = jnp.where(owned, e, -1)

    # What each source token finds here: its rows in ascending order.
    ranks = jnp.arange(R, dtype=jnp.int32)[:, None, None]
    there = jnp.where(pair_rank == ranks, pair_row, -1)  # [R, T, K]
    here = lax.all_to_all(there, spec.axis, 0, 0, tiled=True).reshape(R * T, K)
    last = jnp.iinfo(jnp.int32).max
    ascending = jnp.sort(jnp.where(here < 0, last, here), axis=-1)
    token_rows = jnp.where(ascending == last, -1, ascending)

    # How many other ranks below each rank a token names: its place among the token's partials.
    named_ranks = jnp.zeros((T, R), jnp.int32).at[jnp.arange(T)[:, None], pair_rank]
    named_ranks = named_ranks.set(1, mode="drop", wrap_negative_indices=False).at[:, me].set(0)
    slots = (jnp.cumsum(named_ranks, 1) - named_ranks).T
    token_slot = lax.all_to_all(slots, spec.axis, 0, 0, tiled=True).reshape(R * T)

    dropped = (asked.reshape(R, local)[me] - my_kept).sum(keepdims=True)
    plan_arrays = (pair_rank, pair_row, row_pair, token_rows, token_slot)
    return tuple(a.astype(jnp.int32) for a in (*plan_arrays, expert_ids, my_kept, my_size, dropped))


def _last_at_most(starts: Array, row: Array) -> Array:
    """Index of the last segment that starts at or before each row (empty ones are skipped)."""
    return (jnp.searchsorted(starts, row, side="right") - 1).astype(jnp.int32)


def _segments(asked: Array, spec: Spec) -> tuple[Array, Array, Array]:
    """Kept pairs, first rows and aligned sizes of all experts, `[R, E/R]` each."""
    A = spec.alignment
    if spec.layout == "batched":
        C = spec.rows // spec.local_experts
        kept = jnp.minimum(asked, C)
        start = jnp.broadcast_to(jnp.arange(spec.local_experts, dtype=jnp.int32) * C, asked.shape)
        return kept, start, jnp.minimum(-(-kept // A) * A, C)
    blocks = -(-asked // A)
    room = _fill(blocks, spec.rows // A) * A
    start = jnp.cumsum(room, 1) - room
    return jnp.minimum(asked, room), start, room


def _fill(blocks: Array, budget: int) -> Array:
    """Water-filling: the highest level that fits, then one block each, lowest id first."""

    def halve(_, bounds):
        low, high = bounds  # the level is in [low, high)
        middle = (low + high) // 2
        fits = jnp.minimum(blocks, middle[:, None]).sum(1) <= budget
        return jnp.where(fits, middle, low), jnp.where(fits, high, middle)

    top = blocks.max(1) + 1
    low, _ = lax.fori_loop(0, 32, halve, (jnp.zeros_like(top), top))
    level = low[:, None]
    granted = jnp.minimum(blocks, level)
    left = budget - granted.sum(1, keepdims=True)
    wants = blocks > level
    return granted + (wants & (jnp.cumsum(wants, 1) <= left)).astype(blocks.dtype)


def dispatch(values: tuple[Array, ...], row_pair: Array, *, spec: Spec) -> tuple[Array, ...]:
    """Each of `values`, `[T, ...]` per token or `[T, K]` per pair, to my rows; padding is zero.

    A value of rank 1 is `[T*K]`: one scalar per pair.
    """
    rows = []
    for value in values:
        if spec.num_tokens == 0:
            rows.append(jnp.zeros((spec.rows, *value.shape[1:]), value.dtype))
            continue
        index = row_pair if value.ndim == 1 else row_pair // spec.top_k
        owned = (row_pair >= 0).reshape(-1, *(1,) * (value.ndim - 1))
        take = functools.partial(_take_rows, index=index, owned=owned, spec=spec)
        rows.append(_from_bits(_by_columns(take, _bits(value), spec), value.dtype))
    return tuple(rows)


def _take_rows(value: Array, *, index: Array, owned: Array, spec: Spec) -> Array:
    """My rows of everybody's `value`; zero where not owned."""
    source = lax.all_gather(value, spec.axis, tiled=True)
    taken = source.at[jnp.maximum(index, 0)].get(mode="promise_in_bounds")
    return jnp.where(owned, taken, jnp.zeros((), taken.dtype))


def _by_columns(take, value: Array, spec: Spec) -> Array:
    """`take(value)`, some columns at a time where all would gather too many bytes at once."""
    gathered = spec.num_ranks * value.size * value.dtype.itemsize
    pieces = min(_GATHERS, -(-gathered // _GATHER_BYTES))
    columns = value.shape[-1]
    size = -(-columns // (pieces * _LANES)) * _LANES
    if value.ndim == 1 or size >= columns:
        return take(value)

    def piece(c, out):
        first = jnp.minimum(c * size, columns - size)  # the last piece may repeat some columns
        taken = take(lax.dynamic_slice_in_dim(value, first, size, 1))
        return lax.dynamic_update_slice_in_dim(out, taken, first, 1)

    start = _zeros(value, (spec.rows, columns), value.dtype)
    return lax.fori_loop(0, -(-columns // size), piece, start)


def combine(y: Array, weights: Array | None, token_rows: Array, *, spec: Spec, wire: Wire) -> Array:
    """Rows `[rows, H]` to tokens `[T, H]`: partial sums here, then sums in rank order there.

    In blocks of every rank's tokens, so that the partials in flight stay small.
    """
    R, T, H = spec.num_ranks, spec.num_tokens, y.shape[1]
    if y.shape[0] == 0 or T == 0 or H == 0:
        return jnp.zeros_like(y, shape=(T, H))
    size = min(T, max(-(-T // _BLOCKS), _BLOCK_BYTES // (4 * R * H)))
    by_source = token_rows.reshape(R, T, -1)
    zero = _opaque_zero(token_rows)

    def block(b, out):
        first = jnp.minimum(b * size, T - size)  # the last block may repeat some tokens
        asked = lax.dynamic_slice_in_dim(by_source, first, size, 1)
        partial = _partials(y, weights, asked.reshape(R * size, -1))
        partials = _from_bits(partial.reshape(R, size, H), y.dtype)
        partials = _exchange_partials(partials, zero, spec=spec, wire=wire)
        # From 0, not from the first partial: negative zeros must not survive. XLA would drop a
        # literal 0.
        total = lax.bitcast_convert_type(zero, jnp.float32)
        for r in range(R):
            total = total + partials[r].astype(jnp.float32)
        return lax.dynamic_update_slice_in_dim(out, _bits(total.astype(y.dtype)), first, 0)

    out = lax.fori_loop(0, -(-T // size), block, _bits(_zeros(y, (T, H), y.dtype)))
    return _from_bits(out, y.dtype)


def _exchange_partials(partials: Array, zero: Array, *, spec: Spec, wire: Wire) -> Array:
    """Partials for each rank `[R, T, H]` to those from each rank.

    A quantising wire takes e4m3, which come out as float32, and leaves the own partial as it is.
    """
    swap = functools.partial(
        lax.all_to_all, axis_name=spec.axis, split_axis=0, concat_axis=0, tiled=True
    )
    if wire.kind == "copy":
        return _from_bits(swap(_bits(partials)), partials.dtype)
    q, scales = _fp8.quantize(partials, wire.scale_format)
    q = _from_bits(swap(lax.bitcast_convert_type(q, jnp.uint8)), q.dtype)
    arrived = _rounded(_fp8.dequantize(q, swap(scales), jnp.float32), zero)
    own = lax.axis_index(spec.axis) == jnp.arange(spec.num_ranks)[:, None, None]
    return jnp.where(own, partials.astype(jnp.float32), arrived)


def _opaque_zero(index: Array) -> Array:
    """0 as int32, though the compiler cannot know; `index` is at least -1."""
    return (index.max() + 1) >> 31


def _partials(y: Array, weights: Array | None, token_rows: Array) -> Array:
    """My rows of every token `[N, K]` added in row order: `[N, H]` of `y.dtype`, as `_bits`.

    In chunks of tokens that stay in a core's cache, each as many steps long as its longest token.
    """
    N, H = token_rows.shape[0], y.shape[1]
    size = min(N, max(8, _CHUNK_BYTES // (4 * H)))
    zero = _opaque_zero(token_rows)
    columns, values = token_rows.T, _bits(y)

    def chunk(c, partials):
        first = jnp.minimum(c * size, N - size)
        mine = lax.dynamic_slice_in_dim(columns, first, size, 1)

        def add(k, acc):
            row = lax.dynamic_index_in_dim(mine, k, keepdims=False)
            at = jnp.maximum(row, 0)
            value = _from_bits(values.at[at].get(mode="promise_in_bounds"), y.dtype)
            value = value.astype(jnp.float32)
            if weights is not None:
                scale = weights.at[at].get(mode="promise_in_bounds")[:, None]
                value = _rounded(scale * value, zero)
            return acc + jnp.where((row >= 0)[:, None], value, jnp.float32(0))

        longest = (mine >= 0).sum(0).max()
        total = lax.fori_loop(0, longest, add, _zeros(y, (size, H), jnp.float32))
        return lax.dynamic_update_slice_in_dim(partials, _bits(total.astype(y.dtype)), first, 0)

    return lax.fori_loop(0, -(-N // size), chunk, _bits(_zeros(y, (N, H), y.dtype)))


def _zeros(like: Array, shape, dtype) -> Array:
    """Zeros typed as varying over the axes that `like` varies over."""
    zeros = jnp.zeros_like(like, shape=shape, dtype=dtype)
    return _jax_compat.cast_to_varying(zeros, _jax_compat.varying_axes(like))


def _rounded(product: Array, zero: Array) -> Array:
    """`product` rounded to float32: integer work between keeps XLA from a fused multiply-add."""
    bits = lax.bitcast_convert_type(product, jnp.int32)
    return lax.bitcast_convert_type(bits ^ zero, jnp.float32)


def _bits(array: Array) -> Array:
    """16-bit floats as integers: XLA:CPU may widen a whole array of them to move one row."""
    return lax.bitcast_convert_type(array, jnp.uint16) if array.dtype.itemsize == 2 else array


def _from_bits(array: Array, dtype) -> Array:
    return lax.bitcast_convert_type(array, dtype) if array.dtype != dtype else array


def return_scalars(scalars: Array, row_pair: Array, *, spec: Spec) -> Array:
    """One float32 per row back to the pairs `[T*K]` that own the rows; others get zero."""
    R, pairs = spec.num_ranks, spec.num_tokens * spec.top_k
    if pairs == 0:
        return jnp.zeros(0, scalars.dtype)
    owner = jnp.where(row_pair < 0, R * pairs, row_pair)
    by_pair = jnp.zeros_like(scalars, shape=(R * pairs,)).at[owner].set(scalars, mode="drop")
    mine = lax.all_to_all(by_pair.reshape(R, pairs), spec.axis, 0, 0, tiled=True)
    return mine.sum(0)  # one rank at most holds a pair's row
