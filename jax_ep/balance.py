# SPDX-License-Identifier: Apache-2.0
"""Expert load balancing: hot experts in several slots, slots on ranks so that all have alike to do.

::

    placement = balance.solve(loads, num_slots=288, num_ranks=32)             # on the host
    idx = routing.place(topk_idx, placement, "expert")                        # inside shard_map
    d = jax_ep.dispatch(x, idx, weights, num_experts=placement.num_slots)
    grads = balance.sum_replica_gradients(grads, placement)                   # each step
    params = balance.move(params, old, placement)                             # each rebalancing

A slot is what dispatch knows as an expert: rank r owns slots [r*P/R, (r+1)*P/R) of P, and each holds
the weights of one expert. docs/balance.md has a whole layer.
"""

import numpy as np

from . import _check, _packing
from ._placement import Placement, check_sizes, count, divides, placement, round_robin
from ._replicas import move, sum_replica_gradients

__all__ = [
    "Placement",
    "imbalance",
    "move",
    "placement",
    "rank_loads",
    "round_robin",
    "solve",
    "sum_replica_gradients",
]


def solve(
    loads,
    *,
    num_slots: int,
    num_ranks: int,
    num_nodes: int = 1,
    num_groups: int = 1,
    policy: str | None = None,
) -> Placement:
    """Replicas for hot experts, and slots on ranks so that the busiest rank has little to do.

    Hierarchical: groups of consecutive experts are packed to nodes, experts replicated within their
    node, replicas packed to its ranks; with `group_limited_top_k` a token then visits few nodes.
    Global: as if there were one node and one group. Packing is greedy, heaviest first, as published;
    then slots of the busiest rank are swapped with others as long as that helps, so that no layer is
    worse than the published algorithm's result, and none of a global placement than `round_robin`.

    Args:
        loads: [E] or [layers, E], finite and not negative: pairs of each expert (`expert_load`),
            best a sum or a moving average over many steps. Copied to the host.
        num_slots: P, at least E.
        num_ranks: R, divides P.
        num_nodes: divides R; consecutive ranks are a node.
        num_groups: divides E.
        policy: "hierarchical", "global", or None: hierarchical where nodes divide groups.

    Returns:
        A `Placement`, with a leading [layers] as `loads` has it; the same for the same arguments.

    Raises:
        ValueError: for loads or sizes that do not fit, naming the argument, expected and got.

    Source: DeepSeek's EPLB (2025) for replication and greedy packing; the swaps are ours.

    Example:
        >>> p = jax_ep.balance.solve([90, 30, 30, 10], num_slots=6, num_ranks=2)
        >>> p.replicas.tolist(), jax_ep.balance.rank_loads([90, 30, 30, 10], p).tolist()
        ([3, 1, 1, 1], [90.0, 70.0])
    """
    every = _checked_loads(loads)
    num_experts = every.shape[-1]
    check_sizes(num_experts, num_slots, num_ranks)
    _check.one_of("policy", policy, (None, "hierarchical", "global"))
    divides("num_nodes", num_nodes, "ranks", num_ranks)
    divides("num_groups", num_groups, "experts", num_experts)
    if policy == "hierarchical":
        divides("num_nodes", num_nodes, "groups", num_groups)
    if policy == "global" or num_groups % num_nodes:
        num_nodes = num_groups = 1
    by_layer = np.atleast_2d(every)
    groups = by_layer.reshape(len(by_layer), num_groups, -1).sum(-1)
    packed = _packing.pack(groups, num_nodes)
    candidates = [
        _packing.within_nodes(by_layer, nodes, num_slots, num_ranks)
        for nodes in ([packed] if num_nodes == 1 else [packed, _packing.swap(groups, packed)])
    ]
    if num_nodes == 1:
        candidates.append(np.broadcast_to(np.arange(num_slots) % num_experts, candidates[0].shape))
    replicas = [count(c, num_experts) for c in candidates]
    ranks = [
        _of_ranks(by_layer / n, c, num_ranks) for n, c in zip(replicas, candidates, strict=True)
    ]
    best = np.argmin(np.max(ranks, -1), 0)
    experts = np.stack(candidates)[best, np.arange(len(by_layer))]
    experts = experts.reshape(*every.shape[:-1], num_slots)
    return placement(experts, num_experts=num_experts, num_ranks=num_ranks)


def rank_loads(loads, placement: Placement) -> np.ndarray:
    """What each rank has to do where the pairs of an expert spread evenly over its replicas.

    Args:
        loads: [E], or [layers, E] for a placement of as many layers.
        placement: a `Placement` on the host.

    Returns:
        [R], or [layers, R], float64.

    Raises:
        ValueError: for loads of another shape, not finite, or negative.

    Example:
        >>> p = jax_ep.balance.placement([0, 1, 0, 2], num_experts=3, num_ranks=2)
        >>> jax_ep.balance.rank_loads([8, 1, 3], p).tolist()
        [5.0, 7.0]
    """
    every = _checked_loads(loads)
    if every.shape != placement.replicas.shape:
        raise ValueError(f"loads: expected shape {placement.replicas.shape}, got {every.shape}")
    return _of_ranks(every / placement.replicas, np.asarray(placement.experts), placement.num_ranks)


def imbalance(loads, placement: Placement) -> np.ndarray:
    """The busiest rank's load over the mean: 1 is perfect, R the worst; 1 where there is no load.

    Args:
        loads: [E], or [layers, E] for a placement of as many layers.
        placement: a `Placement` on the host.

    Returns:
        A float64 scalar, or [layers].

    Raises:
        ValueError: as `rank_loads`.

    Example:
        >>> p = jax_ep.balance.round_robin(4, num_slots=4, num_ranks=2)
        >>> float(jax_ep.balance.imbalance([3, 3, 1, 1], p))
        1.5
    """
    ranks = rank_loads(loads, placement)
    mean = ranks.mean(-1)
    return np.where(mean > 0, ranks.max(-1) / np.where(mean > 0, mean, 1), 1.0)


def _of_ranks(each: np.ndarray, experts: np.ndarray, num_ranks: int) -> np.ndarray:
    """Load of each rank, `[..., R]`, where a slot of expert e has `each[..., e]`."""
    slots = np.take_along_axis(each, experts, -1)
    return slots.reshape(*experts.shape[:-1], num_ranks, -1).sum(-1)


def _checked_loads(loads) -> np.ndarray:
    """Loads as float64 on the host."""
    every = np.asarray(loads, np.float64)
    if every.ndim not in (1, 2) or not every.size:
        raise ValueError(f"loads: expected shape [E] or [layers, E], got {every.shape}")
    wrong = ~(np.isfinite(every) & (every >= 0))
    if wrong.any():
        at = tuple(map(int, np.argwhere(wrong)[0]))
        raise ValueError(f"loads: expected finite numbers of at least 0, got {every[at]} at {at}")
    return every
