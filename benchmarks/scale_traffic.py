# SPDX-License-Identifier: Apache-2.0
"""What ranks send each other, counted from routing that `jax_ep.routing` draws."""

import dataclasses
import math

import jax
import jax.numpy as jnp
import numpy as np

from jax_ep import routing as routers


@dataclasses.dataclass(frozen=True)
class Work:
    """T tokens of H channels on each rank, K of E experts each, on nodes of 8 ranks."""

    nodes: int
    tokens: int
    routing: str  # "uniform", "grouped", "skewed"
    hidden: int = 7168
    top_k: int = 8
    local: int = 8

    @property
    def ranks(self) -> int:
        return self.nodes * self.local

    @property
    def experts(self) -> int:
        """256, rounded up to as many for each rank."""
        return math.ceil(256 / self.ranks) * self.ranks

    def row_bytes(self, dtype: str) -> int:
        """fp8: 1 byte for each channel and a float32 scale for each 128."""
        return self.hidden * 2 if dtype == "bf16" else self.hidden + self.hidden // 128 * 4


# Routing and what it makes ranks send


def draw(work: Work, seed: int) -> np.ndarray:
    """Experts [T, K] of the tokens of one rank, `seed`.

    uniform: the best K of E. grouped: out of at most 4 nodes, as DeepSeek-V3 routes. skewed: the
    first expert is named about e^3 times as often as the last.
    """
    T, K, E = work.tokens, work.top_k, work.experts
    logits = jax.random.gumbel(jax.random.key(seed), (T, E))
    if work.routing == "skewed":
        logits += 3 * (1 - jnp.arange(E) / E)
    if work.routing == "grouped":
        _, idx = routers.group_limited_top_k(
            logits, K, num_groups=work.nodes, topk_groups=min(4, work.nodes)
        )
    else:
        _, idx = routers.top_k(logits, K)
    return np.asarray(idx)


@dataclasses.dataclass(frozen=True)
class Traffic:
    """What each source rank has for each rank and node, counted from drawn routing."""

    work: Work
    pairs: np.ndarray  # [R, R] (token, expert) pairs
    copies: np.ndarray  # [R, R] tokens that visit a rank
    node_copies: np.ndarray  # [R, nodes] tokens that visit a node

    @property
    def by_node(self) -> np.ndarray:
        """[source node, source index, node, index] what `copies` has."""
        return self.copies.reshape(2 * (self.work.nodes, self.work.local))

    @property
    def nic_out(self) -> np.ndarray:
        """[R] tokens that a rank sends by RDMA: once for each other node."""
        own = np.arange(self.work.ranks) // self.work.local
        return self.node_copies.sum(1) - self.node_copies[np.arange(self.work.ranks), own]

    @property
    def nic_in(self) -> np.ndarray:
        """[R] tokens that arrive by RDMA, from the ranks with the same local index."""
        rails = self.node_copies.reshape(self.work.nodes, self.work.local, self.work.nodes)
        own = np.arange(self.work.nodes)
        return (rails.sum(0) - rails[own, :, own].T).T.reshape(-1)

    @property
    def link_out(self) -> np.ndarray:
        """[R] copies that a rank pushes to others of its node: own tokens and forwarded ones."""
        rails = np.einsum("nlml->ml", self.by_node)  # to itself: not over the link
        return (self.by_node.sum((0, 3)).T - rails).reshape(-1)

    @property
    def link_in(self) -> np.ndarray:
        rails = np.einsum("nlml->ml", self.by_node)
        return self.copies.sum(0) - rails.reshape(-1)


def count(work: Work, drawn_ranks: int = 128) -> Traffic:
    """Draw `drawn_ranks` ranks and count; where there are more, the others repeat them.

    A repeated rank's experts are shifted as it is, by whole nodes, so that no two ranks name the
    same (uniform and grouped routing do not tell nodes apart). Skewed routing is repeated as it is.
    """
    R, per_rank = work.ranks, work.experts // work.ranks
    pairs, copies = np.zeros((2, R, R), np.int64)
    node_copies = np.zeros((R, work.nodes), np.int64)
    for source in range(min(R, drawn_ranks)):
        to_rank = draw(work, source) // per_rank
        counted = [
            np.bincount(to_rank.reshape(-1), minlength=R),
            _distinct(to_rank, R),
            _distinct(to_rank // work.local, work.nodes),
        ]
        for shift in range(0, R - source, drawn_ranks):
            turn = 0 if work.routing == "skewed" else shift
            pairs[source + shift] = np.roll(counted[0], turn)
            copies[source + shift] = np.roll(counted[1], turn)
            node_copies[source + shift] = np.roll(counted[2], turn // work.local)
    return Traffic(work, pairs, copies, node_copies)


def _distinct(named: np.ndarray, size: int) -> np.ndarray:
    """[size] how many rows of `named [T, K]` have each value."""
    named = np.sort(named, 1)
    first = np.diff(named, axis=1, prepend=-1) > 0
    return np.bincount(named[first], minlength=size)
