# SPDX-License-Identifier: Apache-2.0
"""`Recorder`: the statistics of one run, collected while it goes on, in bounded memory."""

import dataclasses
import datetime
import math
import os
from importlib import metadata
from typing import Any

import jax
import numpy as np
from jax.sharding import Mesh

from . import _stats, _stats_file
from ._check import axis_tuple
from ._group import groups_of
from ._stats import Timings
from ._stats_file import Header, Run

WINDOWS = 256  # rows that loads are kept in; more steps share a row
_DRAIN = 2048  # operations of a device after which its timings are read


class Recorder:
    """Loads, drops and timings of a training run, for `python -m jax_ep report`.

    ::

        recorder = jax_ep.Recorder(mesh, num_experts=64, num_layers=12, name="my model")
        for batch in batches:
            state, load, dropped = train_step(state, batch)
            recorder.add(load, dropped)
        recorder.write("run.npz")

    Nothing waits for a device before `write`: arrays are kept until they are there. Timings come
    from `jax_ep.stats()`, if `initialize(mesh, stats=True)` switched them on; those of
    operations before the recorder was made are not counted. Memory does not grow with the
    number of steps: loads are summed over windows of as many steps as give at most 256 windows,
    durations are counted in buckets of 2 %.

    Each process of several writes a file of its own, and `report` takes all of them.

    Args:
        mesh: what `initialize` took.
        axis_name: likewise.
        num_experts: E.
        num_layers: MoE layers of which `add` gets loads.
        name: of the run, shown by the report, and the same in all processes.

    Raises:
        TypeError, ValueError: naming the argument, with expected and got.
    """

    def __init__(
        self,
        mesh: Mesh,
        axis_name: str | tuple[str, ...] = "expert",
        *,
        num_experts: int,
        num_layers: int = 1,
        name: str = "run",
    ):
        if not isinstance(mesh, Mesh):
            raise TypeError(f"mesh: expected a jax.sharding.Mesh, got {type(mesh).__name__}")
        for what, size in (("num_experts", num_experts), ("num_layers", num_layers)):
            if not isinstance(size, int) or size < 1:
                raise ValueError(f"{what}: expected a positive integer, got {size!r}")
        axes = axis_tuple(axis_name)
        if not set(axes) <= set(mesh.axis_names):
            raise ValueError(
                f"axis_name: expected axes of the mesh {mesh.axis_names}, got {axis_name!r}"
            )
        groups = groups_of(mesh, axes)
        if num_experts % len(groups[0]):
            raise ValueError(
                f"num_experts: expected a multiple of the group's {len(groups[0])} ranks, got "
                f"{num_experts}"
            )
        devices = [device for group in groups for device in group]
        kinds = sorted({"host devices" if d.platform == "cpu" else d.device_kind for d in devices})
        self._header = Header(
            run=name,
            num_layers=num_layers,
            num_experts=num_experts,
            num_ranks=len(groups[0]),
            num_groups=len(groups),
            process=jax.process_index(),
            devices=f"{len(devices)} x {', '.join(kinds)}",
            started=datetime.datetime.now(datetime.UTC).isoformat(timespec="milliseconds"),
            jax_ep=metadata.version("jax-ep"),
        )
        shapes = self._header.shapes()
        self._load = Windows(shapes["load"][1:])
        self._dropped = Windows(shapes["dropped"][1:])
        names = ("durations", "waits", "longest", "lost")
        self._sums = {name: np.zeros(shapes[name], np.int64) for name in names}
        self._device = {d.id: n for n, d in enumerate(devices)}
        self._pending: list[tuple] = []
        self._read: dict[int, int] = {}  # number of the last operation of each device
        self._undrained, self._drain_after = 0, 1  # adds since the last drain, until the next
        self._new_timings()

    def add(self, load, num_dropped=None) -> None:
        """Note one step, or several.

        Args:
            load: [layers, E] integer, pairs of each expert: `routing.expert_load`, or
                `Dispatched.counts` where nothing drops. [E] of one layer; [steps, layers, E] of a
                `lax.scan` over steps. A jax.Array of which this process has a part is fine.
            num_dropped: [layers, N] integer, or as `load`: `Dispatched.num_dropped` of all devices,
                groups one after the other; None for no drops.

        Raises:
            ValueError: another shape.
        """
        load = _checked("load", load, self._load.shape)
        steps = load.size // math.prod(self._load.shape)
        if num_dropped is None:
            num_dropped = np.zeros((steps, *self._dropped.shape), np.int64)
        num_dropped = _checked("num_dropped", num_dropped, self._dropped.shape)
        got = num_dropped.size // math.prod(self._dropped.shape)
        if got != steps:
            raise ValueError(f"num_dropped: expected {steps} steps, as load has, got {got}")
        for array in (load, num_dropped):
            if isinstance(array, jax.Array):
                array.copy_to_host_async()
        self._pending.append((load, num_dropped))
        while self._pending and all(map(_is_there, self._pending[0])):
            self._settle()
        self._undrained += 1
        if self._undrained >= self._drain_after:
            self._drain()

    def run(self) -> Run:
        """What was recorded so far; waits for the steps that were added."""
        while self._pending:
            self._settle()
        self._drain()
        return Run(
            self._header_now(),
            load=self._load.rows.copy(),
            dropped=self._dropped.rows.copy(),
            **{name: array.copy() for name, array in self._sums.items()},
        )

    def write(self, path: str | os.PathLike, *, replace: bool = False) -> None:
        """Write what was recorded so far, atomically; it may be called again with more.

        Args:
            path: by convention `.npz`.
            replace: also replace a file that is not an earlier state of this run.

        Raises:
            FileExistsError: there is a file of something else, and not `replace`.
        """
        _stats_file.write(path, self.run(), replace=replace)

    def _header_now(self) -> Header:
        return dataclasses.replace(self._header, steps=self._load.steps, window=self._load.window)

    def _settle(self) -> None:
        """Count the oldest pending arrays."""
        for windows, array in zip((self._load, self._dropped), self._pending.pop(0), strict=True):
            for step in _on_host(array).reshape(-1, *windows.shape):
                windows.add(step)

    def _drain(self) -> None:
        """Count the timings that are new, and choose when to look again."""
        timings = self._new_timings()
        self._count(timings)
        most = np.unique(timings.device, return_counts=True)[1].max(initial=1)
        self._drain_after = min(32, max(1, self._undrained * _DRAIN // int(most)))
        self._undrained = 0

    def _new_timings(self) -> Timings:
        """Those that were not there the last time; notes how many were lost between."""
        timings = _stats.stats()
        timings = timings[timings.num_ranks == self._header.num_ranks]
        is_new = np.zeros(len(timings), bool)
        for device, n in self._device.items():
            mine = timings.device == device
            if not mine.any():
                continue
            newest, last = timings.number[mine].max(), self._read.get(device, -1)
            if newest < last:  # another generation of the group counts anew
                last = -1
            new = mine & (timings.number > last)
            if last >= 0:
                self._sums["lost"][n] += newest - last - new.sum()
            self._read[device] = newest
            is_new |= new
        return timings[is_new]

    def _count(self, timings: Timings) -> None:
        if not len(timings):
            return
        n = np.array([self._device[device] for device in timings.device], int)
        phases = (timings.wait_ns, timings.push_ns, timings.work_ns, timings.total_ns)
        for phase, ns in enumerate(phases):
            counts = self._sums["durations"][:, phase]
            np.add.at(counts, (timings.operation, n, _stats_file.bucket(ns)), 1)
        waits = timings.waits_ns[:, : self._header.num_ranks]
        np.add.at(self._sums["waits"], (timings.operation, n), waits)
        np.maximum.at(self._sums["longest"], (timings.operation, n), waits)


class Windows:
    """Sums of arrays over windows of as many steps each; when there are too many, pairs merge."""

    def __init__(self, shape: tuple[int, ...]):
        self.shape = shape
        self._sums = np.zeros((WINDOWS, *shape), np.int64)
        self.steps, self.window = 0, 1

    @property
    def rows(self) -> np.ndarray:
        """The windows so far; the last one may have fewer steps."""
        return self._sums[: -(-self.steps // self.window)]

    def add(self, step: np.ndarray) -> None:
        """Note the array of one more step."""
        if self.steps == WINDOWS * self.window:
            half = WINDOWS // 2
            self._sums[:half] = self._sums[::2] + self._sums[1::2]
            self._sums[half:] = 0
            self.window *= 2
        self._sums[self.steps // self.window] += step
        self.steps += 1


def _checked(name: str, array, shape: tuple[int, ...]):
    """`array`, of one step or with leading steps; it stays where it is."""
    if not isinstance(array, jax.Array):
        array = np.asarray(array)
    if not np.issubdtype(array.dtype, np.integer):
        raise TypeError(f"{name}: expected integers, got {array.dtype}")
    allowed = [shape, (*array.shape[:1], *shape)] + ([shape[1:]] if shape[0] == 1 else [])
    if array.shape not in allowed:
        raise ValueError(
            f"{name}: expected shape {list(shape)}, or with leading steps, got {list(array.shape)}"
        )
    return array


def _is_there(array: Any) -> bool:
    return isinstance(array, np.ndarray) or array.is_ready()


def _on_host(array) -> np.ndarray:
    """What this process has of an array; the rest is zero."""
    if not isinstance(array, jax.Array) or array.is_fully_addressable or array.is_fully_replicated:
        return np.asarray(array)
    parts = np.zeros(array.shape, array.dtype)
    for shard in array.addressable_shards:
        parts[shard.index] = shard.data
    return parts
