# SPDX-License-Identifier: Apache-2.0
"""What the report says, as numbers: pure functions of a run's statistics."""

import dataclasses

import numpy as np

from ._stats import OPERATIONS
from ._stats_file import PHASES, Header, Run, quantile_ns

#: What an operation does in the phase `work`, by the first word of its name.
WORK = {"plan": "place", "dispatch": "expand", "combine": "reduce", "exchange": "work"}
MEASURABLE_US = 0.005  # a phase whose p99 is less does not exist
STANDS_OUT = 2.0  # a slow rank is awaited so many times as long as the others are
WORTH_NAMING = 0.05  # and for such a part of an operation's time, at least


@dataclasses.dataclass(frozen=True)
class Slow:
    """The rank that the others wait for."""

    device: int  # group-major
    wait_us: float  # that each other rank of its group waits for it, mean over all operations
    others_us: float  # the same for the other ranks, median


@dataclasses.dataclass(frozen=True)
class Phase:
    """How long a phase of an operation took, in µs, over all devices."""

    name: str
    p50: float
    p99: float
    by_device: np.ndarray  # [N, 2] p50 and p99


@dataclasses.dataclass(frozen=True)
class Operation:
    """Timings of one kind of operation."""

    name: str
    count: int  # over all devices
    phases: tuple[Phase, ...]
    waits_us: np.ndarray  # [N, R] mean wait of device n for rank r of its group
    longest_us: np.ndarray  # [N, R]


@dataclasses.dataclass(frozen=True)
class Summary:
    """What the report shows.

    Attributes:
        header: whose.
        experts: [windows, layers, E] load over an equal share; 1 where a layer has no load.
        ranks: [windows, layers, R] likewise of the experts of a rank together.
        dropped: [windows] share of pairs that were dropped.
        dropped_by_device: [N] pairs in all.
        pairs: in all.
        operations: those that ran.
        slow: the rank that stands out, if one does.
        lost: operations whose timings were overwritten unread.
    """

    header: Header
    experts: np.ndarray
    ranks: np.ndarray
    dropped: np.ndarray
    dropped_by_device: np.ndarray
    pairs: int
    operations: tuple[Operation, ...]
    slow: Slow | None
    lost: int

    @property
    def imbalance(self) -> np.ndarray:
        """[windows, layers] busiest rank over the mean."""
        return self.ranks.max(-1)


def summarise(run: Run) -> Summary:
    """The numbers of a run.

    Raises:
        ValueError: nothing was recorded.
    """
    header = run.header
    if not len(run.load) and not run.durations.any():
        raise ValueError(
            "expected statistics of at least one step or operation, got an empty run: "
            "`Recorder.add` was never called, and no device recorded timings"
        )
    local = header.num_experts // header.num_ranks
    by_rank = run.load.reshape(*run.load.shape[:2], header.num_ranks, local).sum(-1)
    pairs = run.load.sum((1, 2))
    return Summary(
        header=header,
        experts=_shares(run.load),
        ranks=_shares(by_rank),
        dropped=run.dropped.sum((1, 2)) / np.maximum(pairs, 1),
        dropped_by_device=run.dropped.sum((0, 1)),
        pairs=int(pairs.sum()),
        operations=tuple(
            _operation(run, kind) for kind in range(len(OPERATIONS)) if run.durations[kind].any()
        ),
        slow=_slow(run),
        lost=int(run.lost.sum()),
    )


def _shares(load: np.ndarray) -> np.ndarray:
    mean = load.mean(-1, keepdims=True)
    return np.where(mean > 0, load / np.where(mean > 0, mean, 1), 1.0)


def _operation(run: Run, kind: int) -> Operation:
    name = OPERATIONS[kind]
    work = WORK[name.split("_")[0]]
    phases = []
    for phase, phase_name in enumerate(PHASES):
        counts = run.durations[kind, phase]
        p50, p99 = (1e-3 * quantile_ns(counts.sum(0), q) for q in (0.5, 0.99))
        each = np.stack([1e-3 * quantile_ns(counts, q) for q in (0.5, 0.99)], -1)
        shown = work if phase_name == "work" else phase_name
        phases.append(Phase(shown, float(p50), float(p99), each))
    counts = _counts(run)[kind]
    mean = run.waits[kind] / np.maximum(counts, 1)[:, None]
    return Operation(name, int(counts.sum()), tuple(phases), 1e-3 * mean, 1e-3 * run.longest[kind])


def _counts(run: Run) -> np.ndarray:
    """[operations, N] how many ran."""
    return run.durations[:, PHASES.index("total")].sum(-1)


def _slow(run: Run) -> Slow | None:
    """The rank that the others of its group wait for much longer than for each other."""
    header, counts = run.header, _counts(run).sum(0)
    if header.num_ranks < 2 or not counts.any():
        return None
    waits = 1e-3 * run.waits.sum(0) / np.maximum(counts, 1)[:, None]  # [N, R] µs an operation
    by_group = waits.reshape(header.num_groups, header.num_ranks, header.num_ranks)
    awaited = by_group.sum(1) / (header.num_ranks - 1)  # by the others: nobody awaits itself
    group, rank = np.unravel_index(awaited.argmax(), awaited.shape)
    most = awaited[group, rank]
    others = float(np.median(np.delete(awaited[group], rank)))
    totals = run.durations[:, PHASES.index("total")].sum((0, 1))
    worth = WORTH_NAMING * 1e-3 * quantile_ns(totals, 0.5)
    if most < STANDS_OUT * others or most < worth:
        return None
    return Slow(int(group * header.num_ranks + rank), float(most), others)
