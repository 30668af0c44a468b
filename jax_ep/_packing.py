# SPDX-License-Identifier: Apache-2.0
"""Arithmetic of the load balancer on the host; every function works on many problems X at once.

replicate     slots for each expert
pack          items to packs of as many each, greedily
swap          packs made more even
within_nodes  the three together, for every node of every layer
"""

import numpy as np

_SWAPS = 512  # of one packing, at most; each lowers the busiest pack


def pack(weight: np.ndarray, packs: int) -> np.ndarray:
    """Items `[X, n]` to `[X, packs, n/packs]`, heaviest first, each to the lightest pack with room."""
    size, row = weight.shape[1] // packs, np.arange(len(weight))
    members = np.zeros((len(weight), packs, size), np.int64)
    total, count = np.zeros((len(weight), packs)), np.zeros((len(weight), packs), np.int64)
    for item in np.argsort(-weight, 1, kind="stable").T:
        pack = np.where(count < size, total, np.inf).argmin(1)
        members[row, pack, count[row, pack]] = item
        total[row, pack] += weight[row, item]
        count[row, pack] += 1
    return members


def swap(weight: np.ndarray, members: np.ndarray) -> np.ndarray:
    """Packs `[X, packs, size]` of items, after swaps that each lower the busiest pack."""
    members = members.copy()
    active = np.arange(len(members))
    for _ in range(_SWAPS):
        row = np.arange(len(active))
        held = weight[active[:, None, None], members[active]]
        total = held.sum(2)
        busiest = total.argmax(1)
        gap = total[row, busiest][:, None] - total
        # Swapped items that differ by d leave the heavier of the two packs lighter by the gain.
        d = held[row, busiest][:, :, None, None] - held[:, None]
        gain = np.minimum(d, gap[:, None, :, None] - d).reshape(len(active), -1)
        best = gain.argmax(1)
        helps = gain[row, best] > 1e-9 * total[row, busiest]
        if not helps.any():
            break
        mine, pack, other = (i[helps] for i in np.unravel_index(best, d.shape[1:]))
        active, busiest = active[helps], busiest[helps]
        here, there = (active, busiest, mine), (active, pack, other)
        members[here], members[there] = members[there], members[here]
    return members


def replicate(weight: np.ndarray, slots: int) -> np.ndarray:
    """How many of `slots` each item `[X, n]` gets: one more, again and again, for the heaviest."""
    copies, row = np.ones(weight.shape, np.int64), np.arange(len(weight))
    for _ in range(slots - weight.shape[1]):
        copies[row, (weight / copies).argmax(1)] += 1
    return copies


def within_nodes(
    loads: np.ndarray, groups: np.ndarray, num_slots: int, num_ranks: int
) -> np.ndarray:
    """Experts of slots `[layers, P]` where node n has the groups `groups[:, n]`."""
    layers, nodes, _ = groups.shape
    group = np.arange(loads.shape[1]).reshape(groups.shape[1] * groups.shape[2], -1)
    ids = group[groups].reshape(layers * nodes, -1)
    weight = np.repeat(loads, nodes, 0)[np.arange(len(ids))[:, None], ids]
    copies = replicate(weight, num_slots // nodes)
    every = np.broadcast_to(np.arange(ids.shape[1]), ids.shape)
    item = np.repeat(every.reshape(-1), copies.reshape(-1)).reshape(len(ids), -1)
    each = np.take_along_axis(weight / copies, item, 1)
    members = swap(each, pack(each, num_ranks // nodes)).reshape(len(ids), -1)
    experts = np.take_along_axis(ids, np.take_along_axis(item, members, 1), 1)
    return experts.reshape(layers, num_slots)
