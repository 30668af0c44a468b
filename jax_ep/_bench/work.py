# SPDX-License-Identifier: Apache-2.0
"""Workloads, their routing, and the bytes that an exchange must move at least."""

import dataclasses
from typing import NamedTuple

import numpy as np


@dataclasses.dataclass(frozen=True)
class Workload:
    """Sizes of one exchange, per rank."""

    tokens: int
    hidden: int
    top_k: int
    experts: int
    expert_hidden: int | None = None  # of the experts of a whole MoE layer; None: no layer is timed


WORKLOADS = {
    "prefill": Workload(4096, 7168, 8, 256),
    "decode": Workload(128, 7168, 8, 256),
    "training": Workload(4096, 2048, 6, 64, expert_hidden=1408),
    "smoke": Workload(64, 256, 4, 16, expert_hidden=128),
}


def routing(work: Workload, num_ranks: int, *, skew: float, seed: int) -> np.ndarray:
    """`topk_idx [R, T, K]`: distinct experts, uniform, or `skew` nats from the first to the last."""
    rng = np.random.default_rng(seed)
    score = rng.gumbel(size=(num_ranks, work.tokens, work.experts)).astype(np.float32)
    score -= np.linspace(0, skew, work.experts, dtype=np.float32)
    return np.argpartition(-score, work.top_k - 1, -1)[..., : work.top_k].astype(np.int32)


class Moved(NamedTuple):
    """Bytes that one rank must move at least."""

    link: float  # to or from other ranks
    memory: float  # read and written in its own memory
    deepep: float  # what DeepEP divides by the time: all copies received, its own tokens' too
    mostly_reads: bool  # memory: reads, as combine does, or writes, as dispatch does


@dataclasses.dataclass(frozen=True)
class Traffic:
    """Counts of rows, each of the rank that has most."""

    sent: int  # copies to other ranks, one per token and rank
    arrived: int  # copies from other ranks
    received: int  # those and the rank's own tokens that it keeps: DeepEP's `recv_x`
    rows: int  # rows of this rank's experts, with the padding inside segments

    @classmethod
    def of(cls, idx: np.ndarray, work: Workload, alignment: int = 1) -> "Traffic":
        """Count the copies and rows of `topk_idx [R, T, K]`; -1 is no expert, or a dropped pair."""
        num_ranks = idx.shape[0]
        local = work.experts // num_ranks
        owner = idx // local
        named = np.stack([(owner == r).any(-1).sum(-1) for r in range(num_ranks)], 1)  # [from, to]
        away = named - np.diag(np.diag(named))
        counts = np.bincount(idx[idx >= 0], minlength=work.experts).reshape(num_ranks, local)
        rows = (-(-counts // alignment) * alignment).sum(1)
        per_rank = (away.sum(1), away.sum(0), named.sum(0), rows)
        return cls(*(int(count.max()) for count in per_rank))

    def dispatch(self, work: Workload, row: float, wire_row: float, delivered_row: float) -> Moved:
        """Tokens and what arrived are read, every row is written; sizes of a row in bytes."""
        memory = work.tokens * row + self.arrived * wire_row + self.rows * delivered_row
        return Moved(self.sent * wire_row, memory, self.received * wire_row, mostly_reads=False)

    def combine(self, work: Workload, row: float) -> Moved:
        """Rows and partial sums are read, partial sums and tokens written."""
        memory = (self.rows + 2 * self.sent + work.tokens) * row
        return Moved(self.arrived * row, memory, self.received * row, mostly_reads=True)
