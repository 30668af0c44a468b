# SPDX-License-Identifier: Apache-2.0
"""Weights and gradients between the slots of a placement, over `dispatch` and `combine`."""

import functools
from collections.abc import Callable

import jax
import jax.numpy as jnp
from jax import Array, lax

from . import _check, _jax_compat
from ._api import combine, dispatch
from ._placement import Placement, check_one_layer
from ._types import Config, Implementation

_WIDTH = 4096  # elements of a row that moves weights
_ROWS = 32  # rows of a slot in one operation, at most
_PAIRS = 2**14  # pairs of a rank in one operation, about at most
_TOP_K = 32  # experts of a token, at most: what the CUDA kernels take


def move(
    weights,
    old: Placement,
    new: Placement,
    axis_name: str | tuple[str, ...] = "expert",
    *,
    implementation: Implementation | None = None,
    config: Config | None = None,
):
    """Weights of slots under `old` to those under `new`, inside `shard_map`; the same bits.

    Equivalent code, on global arrays: `w[old.slots[new.experts, 0]]`. One `dispatch` for each block
    of `_ROWS * _WIDTH` elements of a slot: its tokens are rows of my slots, and its experts the slots
    that want them. A rank that has the expert already copies it; else one replica sends it, once to
    each rank. So on CUDA a rank receives at most its own slots; `xla` gathers all slots of a block.

    Args:
        weights: pytree of [P/R, ...] bfloat16, float16 or float32: this rank's slots. Moments of an
            optimizer move in the same way.
        old: the placement of `weights`, of one layer.
        new: of as many experts, slots and ranks.
        axis_name: mesh axis of the group, or a tuple of axes.
        implementation: as for `dispatch`.
        config: as for `dispatch`.

    Returns:
        A pytree as `weights`.

    Raises:
        TypeError, ValueError: while tracing, naming the argument, with expected and got.

    Example:
        >>> old = jax_ep.balance.round_robin(2, num_slots=2, num_ranks=2)
        >>> new = jax_ep.balance.placement([1, 0], num_experts=2, num_ranks=2)
        >>> mesh = jax.make_mesh((2,), ("expert",), axis_types=(jax.sharding.AxisType.Auto,))
        >>> @jax.jit
        ... @functools.partial(jax.shard_map, mesh=mesh, in_specs=P("expert"), out_specs=P("expert"))
        ... def moved(weights):
        ...     return jax_ep.balance.move(weights, old, new)
        >>> moved(jnp.array([[1.0], [2.0]])).tolist()
        [[2.0], [1.0]]
    """
    size = _fits("old", old, axis_name)
    _fits("new", new, axis_name)
    if (old.num_experts, old.num_slots) != (new.num_experts, new.num_slots):
        raise ValueError(
            f"new: expected {old.num_experts} experts in {old.num_slots} slots as in old, got "
            f"{new.num_experts} in {new.num_slots}"
        )
    destinations, lead = _routes(old, new, axis_name)
    send = functools.partial(
        dispatch,
        num_experts=new.num_slots,
        axis_name=axis_name,
        layout="batched",
        implementation=implementation,
        config=config,
    )

    def block(x):
        rows = len(x) // size
        arrived = jnp.zeros_like(x, shape=(size, rows, x.shape[1]))
        for k in range(0, destinations.shape[1], _TOP_K):
            wanted = jnp.repeat(destinations[:, k : k + _TOP_K], rows, 0)
            d = send(x, wanted, capacity=size * rows)
            arrived = jnp.where((d.counts > 0)[:, None, None], d.tokens, arrived)
        return arrived[lead].reshape(x.shape)

    return _by_blocks(block, weights, "weights", size, min(destinations.shape[1], _TOP_K))


def sum_replica_gradients(
    grads,
    placement: Placement,
    axis_name: str | tuple[str, ...] = "expert",
    *,
    implementation: Implementation | None = None,
    config: Config | None = None,
):
    """Each expert's gradient, the sum over its replicas, in all of them; inside `shard_map`.

    Every replica gets the same bits, so replicas that were equal stay so. Equivalent code, on global
    arrays: `segment_sum(g, placement.experts, E)[placement.experts]`. Experts with one slot keep their
    gradient as it is. The others are dispatched to their first slot, added there in float32 in the
    order of slots, and combined back: on CUDA P-E slots' bytes each way over all ranks together, while
    `xla` moves all slots.

    Args:
        grads: pytree of [P/R, ...] bfloat16, float16 or float32: this rank's slots.
        placement: of one layer.
        axis_name: mesh axis of the group, or a tuple of axes.
        implementation: as for `dispatch`.
        config: as for `dispatch`.

    Returns:
        A pytree as `grads`.

    Raises:
        TypeError, ValueError: while tracing, naming the argument, with expected and got.

    Example:
        >>> placement = jax_ep.balance.placement([0, 1, 0, 2], num_experts=3, num_ranks=2)
        >>> mesh = jax.make_mesh((2,), ("expert",), axis_types=(jax.sharding.AxisType.Auto,))
        >>> @jax.jit
        ... @functools.partial(jax.shard_map, mesh=mesh, in_specs=P("expert"), out_specs=P("expert"))
        ... def summed(grads):
        ...     return jax_ep.balance.sum_replica_gradients(grads, placement)
        >>> summed(jnp.array([[1.0], [2.0], [3.0], [4.0]])).tolist()
        [[4.0], [2.0], [4.0], [4.0]]
    """
    size = _fits("placement", placement, axis_name)
    extra = placement.num_slots - placement.num_experts
    if extra == 0:
        return jax.tree.map(functools.partial(_slots_of_a_rank, "grads", size), grads)
    experts = _my_slots(placement.experts, size, axis_name)
    replicated = jnp.asarray(placement.replicas)[experts] > 1
    first = jnp.where(replicated, jnp.asarray(placement.slots)[experts, 0], -1)

    def block(x):
        rows = len(x) // size
        d = dispatch(
            x,
            jnp.repeat(first, rows)[:, None],
            num_experts=placement.num_slots,
            axis_name=axis_name,
            capacity=(extra + min(size, extra)) * rows,
            implementation=implementation,
            config=config,
        )
        # Rows of a slot: all of one replica, then all of the next.
        start, ends = jnp.cumsum(d.counts) - d.counts, d.counts // rows
        nth = start[:, None] + jnp.arange(rows)

        def add(replica, total):
            taken = d.tokens.at[nth + replica * rows].get(mode="clip").astype(jnp.float32)
            return total + jnp.where((replica < ends)[:, None, None], taken, 0)

        total = lax.fori_loop(1, ends.max(), add, add(0, jnp.float32(0))).astype(x.dtype)
        chunk = jnp.arange(len(d.expert_ids)) % rows
        back = combine(total[d.expert_ids, chunk], d.handle)
        return jnp.where(jnp.repeat(replicated, rows)[:, None], back, x)

    return _by_blocks(block, grads, "grads", size, 1)


def _fits(name: str, placement: Placement, axis_name) -> int:
    """Slots of a rank, of a placement of one layer that fits the group."""
    check_one_layer(name, placement)
    axes = _check.axis_tuple(axis_name)
    if _check.find_view(axes):
        raise ValueError(
            f"axis_name: expected {axes} to be manual, inside shard_map, got global arrays"
        )
    ranks = _check.size(_jax_compat.context_mesh(), axes)
    if ranks != placement.num_ranks:
        raise ValueError(
            f"{name}: expected a placement on {ranks} ranks, got {placement.num_ranks}"
        )
    return placement.num_slots // ranks


def _my_slots(array, size: int, axis_name) -> Array:
    """This rank's part of `[P, ...]`."""
    return lax.dynamic_slice_in_dim(jnp.asarray(array), lax.axis_index(axis_name) * size, size)


def _routes(old: Placement, new: Placement, axis_name) -> tuple[Array, Array]:
    """New slots that each of my old slots feeds `[P/R, K]`, and where my new slots find theirs.

    Of the new slots of an expert on one rank the first is fed, the others copy it: `lead [P/R]`.
    """
    P, R = old.num_slots, old.num_ranks
    size, slot = P // R, jnp.arange(P)
    experts = jnp.asarray(new.experts)
    held = jnp.asarray(old.slots)[experts]  # [P, P-E+1]
    rank = slot // size
    here = (held >= 0) & (held // size == rank[:, None])
    turn = rank % jnp.asarray(old.replicas)[experts]  # ranks share the replicas that send
    at = jnp.where(here.any(1), here.argmax(1), turn)
    source = jnp.take_along_axis(held, at[:, None], 1)[:, 0]
    by_rank = experts.reshape(R, size)
    lead = (by_rank[:, :, None] == by_rank[:, None]).argmax(-1)
    fed = lead.reshape(-1) == slot % size
    mine = lax.axis_index(axis_name) * size + jnp.arange(size)
    wanted = jnp.where(fed & (source == mine[:, None]), slot, P)  # [P/R, P]
    most = min(R, P - old.num_experts + 1)
    destinations = jnp.sort(wanted, 1)[:, :most]
    destinations = jnp.where(destinations == P, -1, destinations).astype(jnp.int32)
    return destinations, _my_slots(lead.reshape(-1), size, axis_name)


def _by_blocks(function: Callable[[Array], Array], tree, name: str, size: int, top_k: int):
    """`function` of the leaves `[size, ...]`, in blocks of rows `[size * rows, width]`."""
    return jax.tree.map(functools.partial(_leaf_by_blocks, function, name, size, top_k), tree)


def _slots_of_a_rank(name: str, size: int, leaf) -> Array:
    leaf = _check.array(name, leaf, dtypes=_check.TOKEN_DTYPES)
    if leaf.ndim < 1 or leaf.shape[0] != size:
        raise ValueError(f"{name}: expected shape [{size}, ...], a rank's slots, got {leaf.shape}")
    return leaf


def _leaf_by_blocks(function, name: str, size: int, top_k: int, leaf: Array) -> Array:
    leaf = _slots_of_a_rank(name, size, leaf)
    flat = leaf.reshape(size, -1)
    columns = flat.shape[1]
    width = min(columns, _WIDTH)
    if width == 0:
        return leaf
    rows = min(-(-columns // width), _ROWS, max(1, _PAIRS // (size * top_k)))
    blocks = -(-columns // (rows * width))
    padded = jnp.pad(flat, ((0, 0), (0, blocks * rows * width - columns)))
    by_block = padded.reshape(size, blocks, rows * width).swapaxes(0, 1)
    done = lax.map(function, by_block.reshape(blocks, size * rows, width))
    done = done.reshape(blocks, size, -1).swapaxes(0, 1).reshape(size, -1)
    return done[:, :columns].reshape(leaf.shape)
