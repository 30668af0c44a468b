# SPDX-License-Identifier: Apache-2.0
"""`jax_ep.stats()`: when the last operations ran on this process's devices, and whom they awaited."""

import dataclasses

import jax
import numpy as np

from . import _ffi

#: Names of `Timings.operation`; a start and a done are halves of an operation on a small batch.
OPERATIONS = (
    *("plan", "dispatch", "combine"),
    *("dispatch_start", "dispatch_done", "combine_start", "combine_done"),
    "exchange_routing",  # between nodes, before a plan
)
#: Columns of a record as the extension gives it, before what was waited for each rank.
_COLUMNS = ("number", "operation", "begin", "ready", "pushed", "arrived", "end")


@dataclasses.dataclass(frozen=True)
class Timings:
    """Operations of this process's devices, oldest first on each; all arrays have one entry each.

    Times are integers in nanoseconds. The phases follow each other, as seen from the whole GPU:
    `wait`, until the peers have lent their buffers, or all that they sent has arrived; `push`,
    until the last row or partial is on its way; `work`, the rest: numbering rows (plan), expanding
    (dispatch), adding up (combine). On large batches rows that peers push are awaited during `work`;
    on small ones nothing is lent, and `push` comes first.

    Attributes:
        device: [n] id of the JAX device.
        rank: [n] of the device in its group.
        num_ranks: [n] R of the group.
        operation: [n] which one, a number; `names` has words.
        number: [n] of the operation, counted by the device; a gap is what was overwritten unread.
        begin_ns: [n] on the clock of the device, which is not that of another one.
        wait_ns, push_ns, work_ns: [n] the phases.
        total_ns: [n] from the first block's begin to the last one's end.
        waits_ns: [n, ranks] longest that anything waited for each rank; 0 beyond R.
    """

    device: np.ndarray
    rank: np.ndarray
    num_ranks: np.ndarray
    operation: np.ndarray
    number: np.ndarray
    begin_ns: np.ndarray
    wait_ns: np.ndarray
    push_ns: np.ndarray
    work_ns: np.ndarray
    total_ns: np.ndarray
    waits_ns: np.ndarray

    def __len__(self) -> int:
        """How many operations."""
        return len(self.number)

    @property
    def names(self) -> np.ndarray:
        """[n] such as "plan", "dispatch", "combine_done"."""
        return np.array(OPERATIONS)[self.operation]

    def __getitem__(self, chosen) -> "Timings":
        """Those operations that an index array, a mask or a slice chooses."""
        return Timings(*(getattr(self, field.name)[chosen] for field in dataclasses.fields(self)))


def stats() -> Timings:
    """The last operations on this process's devices, 4032 on each; nothing waits for a device.

    Only CUDA devices of groups that `initialize(..., stats=True)` set up record any: elsewhere the
    result is empty. Reading changes nothing; take what is new by `number`, as `Recorder` does.

    Returns:
        `Timings`.
    """
    ids = {d.local_hardware_id: d.id for d in jax.local_devices() if d.platform in ("gpu", "cuda")}
    parts = [
        _decode(ids[device], rank, np.frombuffer(records, np.uint64).reshape(-1, row))
        for device, rank, row, records in _ffi.read_stats()
    ]
    return _joined(parts)


def _decode(device: int, rank: int, records: np.ndarray) -> Timings:
    """The records of one device, a row each: `_COLUMNS`, then a wait for each rank."""
    order = np.argsort(records[:, 0], kind="stable")
    signed = records[order].astype(np.int64)
    of = dict(zip(_COLUMNS, signed.T, strict=False))
    begin, end = of["begin"], of["end"]
    slots = (of["ready"] < begin) | (of["ready"] > end)  # nothing was lent in this operation
    first = np.clip(np.where(slots, of["pushed"], of["ready"]), begin, end)
    second = np.clip(np.where(slots, of["arrived"], of["pushed"]), first, end)
    count = len(signed)
    return Timings(
        device=np.full(count, device),
        rank=np.full(count, rank),
        num_ranks=np.full(count, records.shape[1] - len(_COLUMNS)),
        operation=of["operation"] - 1,
        number=of["number"],
        begin_ns=begin,
        wait_ns=np.where(slots, second - first, first - begin),
        push_ns=np.where(slots, first - begin, second - first),
        work_ns=end - second,
        total_ns=end - begin,
        waits_ns=signed[:, len(_COLUMNS) :],
    )


def _joined(parts: list[Timings]) -> Timings:
    """All parts as one, with as many waits as the largest group has ranks."""
    ranks = max((part.waits_ns.shape[1] for part in parts), default=0)

    def column(name: str) -> np.ndarray:
        columns = [getattr(part, name) for part in parts]
        if name == "waits_ns":
            none = np.zeros((0, ranks), np.int64)
            columns = [np.hstack([c, np.zeros((len(c), ranks - c.shape[1]), int)]) for c in columns]
        else:
            none = np.zeros(0, np.int64)
        return np.concatenate([none, *columns])

    return Timings(**{field.name: column(field.name) for field in dataclasses.fields(Timings)})
