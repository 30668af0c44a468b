# SPDX-License-Identifier: Apache-2.0
"""Times of operations, without the gaps of launching them from the host.

An operation runs in a jitted loop. Operands of one turn pass a barrier together with what the turn
before computed, so that nothing is hoisted, and results pass one before a few elements are read, so
that all of them are written: on GPUs XLA resolves these barriers after fusing, on CPUs before. A
run costs the host up to a millisecond before and after, so the loop has many turns there. A row's
median and p99 are over runs of the loop, so p99 is one of means over its turns; the slowest rank
ends a run. Programs that are compared take turns, so that drifting clocks touch both alike.
"""

import dataclasses
import functools
import time
from collections.abc import Callable

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jax.sharding import AxisType, NamedSharding
from jax.sharding import PartitionSpec as P

import jax_ep

from .work import Moved

LOOP = 10  # turns of a loop
LONG_LOOP = {"gpu": 100, "cpu": LOOP}  # of one whose turns are short
MOST, FEWEST = 100, 3  # runs of a program: as many as fit the seconds
BUDGET_S = {"gpu": 0.4, "cpu": 0.02}
COLUMNS = ("median us", "p99 us", "wire MB", "wire GB/s", "floor us", "ratio")


@dataclasses.dataclass(frozen=True)
class Operation:
    """`step(i, *operands) -> arrays` on each rank's blocks, what it must move, facts to keep."""

    step: Callable
    operands: tuple
    moved: Moved | None = None
    facts: dict = dataclasses.field(default_factory=dict)


NOTHING = Operation(lambda i: i, ())


@dataclasses.dataclass(frozen=True)
class Ceilings:
    """GB/s of one rank, measured in this run; no link with one rank."""

    ppermute: float | None
    copies: float | None
    read_1_write_4: float
    read_4_write_1: float
    read_1_write_1: float

    @property
    def link(self) -> float | None:
        """The faster of the two ways over the link."""
        return None if self.ppermute is None else max(self.ppermute, self.copies or 0)

    def floor_us(self, moved: Moved) -> float:
        """The larger of the link's time and the memory's, at the mixture nearest to the operation's."""
        link = moved.link / self.link / 1e3 if self.link else 0.0
        memory = self.read_4_write_1 if moved.mostly_reads else self.read_1_write_4
        return max(link, moved.memory / memory / 1e3)


def take_turns(*runs: Callable) -> list[np.ndarray]:
    """Sorted seconds of each of `runs`, which return arrays; the first of each, unmeasured, compiles."""

    def seconds(run):
        start = time.perf_counter()
        jax.block_until_ready(run())
        return time.perf_counter() - start

    for run in runs:
        seconds(run)
    once = sum(seconds(run) for run in runs)
    budget_s = BUDGET_S.get(jax.default_backend(), BUDGET_S["gpu"])
    repeats = int(np.clip(budget_s / once, FEWEST, MOST))
    return list(np.sort([[seconds(run) for run in runs] for _ in range(repeats)], 0).T)


class Timer:
    """The devices of this process as one group, and a row of facts for each operation timed."""

    def __init__(self):
        self.devices = jax.devices()
        self.R, self.on_gpu = len(self.devices), jax.default_backend() == "gpu"
        self.mesh = jax.make_mesh((self.R,), ("expert",), axis_types=(AxisType.Auto,))
        jax_ep.initialize(self.mesh, timeout_s=20)
        self.rows: dict[str, dict] = {}
        self.ceilings: Ceilings | None = None
        # More than any L2 holds; and some 1.2 ms of products.
        self.flush = 2**26 if self.on_gpu else 2**12  # float32s
        square = jnp.zeros((4096, 4096) if self.on_gpu else (64, 64), jnp.bfloat16)
        self.square = jax.device_put(square, self.devices[-1])

    def put(self, array):
        """An array split over the ranks."""
        return jax.device_put(array, NamedSharding(self.mesh, P("expert")))

    def mapped(self, f):
        """`f` jitted on each rank's blocks."""
        spec = P("expert")
        return jax.jit(
            jax.shard_map(f, mesh=self.mesh, in_specs=spec, out_specs=spec, check_vma=False)
        )

    def looped(self, op: Operation, length: int = LOOP, *, cold: bool = False):
        """A program of `length` turns; `cold`: L2 is overwritten before each."""

        def loop(*operands):
            def turn(i, last):
                written = jnp.broadcast_to(last, (self.flush,)) if cold else last
                held, written = lax.optimization_barrier((operands, written))
                results = jax.tree.leaves(lax.optimization_barrier(op.step(i, *held)))
                return written[:1] + sum(r.reshape(-1)[:1].astype(jnp.float32) for r in results)

            return lax.fori_loop(0, length, turn, jnp.zeros(1, jnp.float32))

        return functools.partial(self.mapped(loop), *op.operands)

    def time(self, name: str, op: Operation, *, length: int | None = None):
        """Time an operation in a loop; L2 holds what the turn before left there."""
        length = length or LONG_LOOP.get(jax.default_backend(), LOOP)
        (times,) = take_turns(self.looped(op, length))
        self.keep(name, op, times / length, length=length)

    def time_cold(self, name: str, op: Operation):
        """The same with L2 overwritten before every turn, less a loop that only overwrites."""
        times, alone = take_turns(self.looped(op, cold=True), self.looped(NOTHING, cold=True))
        self.keep(name, op, (times - np.median(alone)) / LOOP, flushed_mb=self.flush * 4 / 2**20)

    def time_late(self, name: str, op: Operation):
        """One operation at a time, with the last rank's GPU busy for about a millisecond first.

        Launching is over by the time that rank arrives, while the others have long waited. Less the
        same without an operation, so what is left is the operation's own time after the last arrival.
        """
        busy = jax.jit(lambda a: lax.fori_loop(0, 6, lambda _, a: a @ a, a))
        ours, nothing = self.looped(op, 1), self.looped(NOTHING, 1)
        times, alone = take_turns(
            lambda: (busy(self.square), ours()), lambda: (busy(self.square), nothing())
        )
        late_us = np.median(alone) * 1e6
        self.keep(name, op, times - np.median(alone), length=1, late_us=round(float(late_us), 1))

    def keep(self, name: str, op: Operation, times: np.ndarray, *, length: int = LOOP, **more):
        """Print the row of sorted `times` in seconds and keep its facts."""
        median, p99 = (float(np.quantile(times, q)) * 1e6 for q in (0.5, 0.99))
        columns = [median, p99]
        facts: dict = dict(median_us=median, p99_us=p99, runs=len(times), length=length)
        if op.moved is not None and self.ceilings is not None:
            floor = self.ceilings.floor_us(op.moved)
            wire_mb, wire_gbs = op.moved.link / 1e6, op.moved.link / median / 1e3
            columns += [wire_mb, wire_gbs, floor, median / floor]
            facts |= dict(wire_mb=wire_mb, wire_gbs=wire_gbs, floor_us=floor, ratio=median / floor)
            facts |= dict(
                memory_mb=op.moved.memory / 1e6, deepep_gbs=op.moved.deepep / median / 1e3
            )
        facts = {k: round(v, 3) if isinstance(v, float) else v for k, v in facts.items()}
        self.rows[name] = facts | op.facts | more
        print(f"{name:44}" + "".join(f"{value:10.1f}" for value in columns[:5]), end="")
        print(f"{columns[5]:8.2f}" if len(columns) > 5 else "", flush=True)
