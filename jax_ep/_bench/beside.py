# SPDX-License-Identifier: Apache-2.0
"""An operation and products of matrices in one program: what each loses to the other.

The products are independent of the operation and depend on each other, so they run one after another
and could hide all of it. Two programs hold both. In the first the products last at least as long as
the operation alone, and what is asked is how much longer they take together than the products alone;
in the second they end well before it, and what is asked is how much longer than the operation alone.
Every time is less that of the empty loop.
"""

import functools
import math

import jax.numpy as jnp
import numpy as np

import jax_ep

from .exchange import Exchange
from .timing import LOOP, Operation, take_turns

LONG, SHORT, WIDTH = 8192, 1024, 4096  # rows of a product that hides, of one that is hidden
SHARE = 0.6  # of the operation, for the products of the second program
MOST = 64  # products in a program
COLUMNS = ("alone us", "GEMMs us", "both us", "GEMM + %", "hidden %", "op + %")


class Beside:
    """Products to run beside the operations of one exchange."""

    def __init__(self, ex: Exchange):
        self.ex, timer = ex, ex.timer
        scale = 1 if timer.on_gpu else 16
        rng, width = np.random.default_rng(7), WIDTH // scale
        b = rng.standard_normal((timer.R * width, width), np.float32) / np.float32(np.sqrt(width))
        self.b = timer.put(b).astype(jnp.bfloat16)
        self.a = {}
        for rows in (LONG, SHORT):
            a = rng.standard_normal((timer.R * rows // scale, width), np.float32)
            self.a[rows] = timer.put(a).astype(jnp.bfloat16)
        self.empty = timer.looped(ex.nothing(ex.uniform))
        self.products = functools.cache(
            lambda rows, count: timer.looped(Operation(self._chain(count), (self.a[rows], self.b)))
        )
        self.unit_us = {rows: self._us(self.products(rows, 8))[0] / 8 for rows in (LONG, SHORT)}

    @staticmethod
    def _chain(count: int):
        def step(_, a, b):
            for _ in range(count):
                a = a @ b
            return a

        return step

    def _us(self, *programs) -> list[float]:
        """Medians of programs that take turns, less the empty loop."""
        empty, *times = (np.median(t) for t in take_turns(self.empty, *programs))
        return [max(float(t - empty) / LOOP * 1e6, 0.1) for t in times]

    def both(self, op: Operation, rows: int, count: int):
        """The program of an operation and `count` products, neither of which needs the other."""
        chain, n = self._chain(count), len(op.operands)

        def step(i, *operands):
            return op.step(i, *operands[:n]), chain(i, *operands[n:])

        operands = (*op.operands, self.a[rows], self.b)
        return self.ex.timer.looped(Operation(step, operands))

    def time(self, name: str, op: Operation):
        """Print and keep the row of one operation."""
        alone = self.ex.timer.looped(op)
        long, short = counts(self._us(alone)[0], self.unit_us[LONG], self.unit_us[SHORT])
        programs = [alone, self.products(LONG, long), self.both(op, LONG, long)]
        if short:
            programs += [self.both(op, SHORT, short)]
        alone_us, gemm_us, both_us, *op_us = self._us(*programs)
        row = shares(alone_us, gemm_us, both_us, *op_us) | dict(products=[long, short])
        self.ex.timer.rows[name] = op.facts | row
        values = (alone_us, gemm_us, both_us, row["gemm_slower"], row["hidden"], row["op_slower"])
        percent = ["-" if v is None else f"{100 * v:.1f}" for v in values[3:]]
        print(f"{name:44}" + "".join(f"{v:10.1f}" for v in values[:3]), end="")
        print("".join(f"{p:>10}" for p in percent), flush=True)


def counts(alone_us: float, long_us: float, short_us: float) -> tuple[int, int]:
    """Products that last at least as long as the operation, and products that end well before it."""
    long = math.ceil(alone_us / long_us)
    return min(max(long, 1), MOST), min(int(SHARE * alone_us / short_us), MOST)


def shares(alone_us: float, gemm_us: float, both_us: float, op_us: float | None = None) -> dict:
    """What a row says: times, and the shares that follow from them.

    `both_us` is of the operation beside longer products, `op_us` of it beside shorter ones.
    """
    row = dict(alone_us=alone_us, gemm_us=gemm_us, both_us=both_us)
    row |= dict(gemm_slower=both_us / gemm_us - 1, hidden=(alone_us + gemm_us - both_us) / alone_us)
    row |= dict(op_slower=None if op_us is None else op_us / alone_us - 1)
    return {k: v if v is None else round(v, 3) for k, v in row.items()}


def names(num_sms: int) -> dict[str, str]:
    """The operations of a sweep's row and the names of their rows."""
    return {op: f"{op} bf16 beside GEMMs, {num_sms} SMs" for op in ("dispatch", "combine")}


def config(num_sms: int) -> jax_ep.Config:
    """The operation as it runs beside compute."""
    return jax_ep.Config(num_sms=num_sms, overlap=True)


def time_beside(ex: Exchange, sms: list[int]) -> None:
    """One row for each operation and number of SMs."""
    beside = Beside(ex)
    print(f"{'':44}" + "".join(f"{column:>10}" for column in COLUMNS))
    for num_sms in sms:
        for op, name in names(num_sms).items():
            beside.time(name, getattr(ex, op)(ex.uniform, config=config(num_sms)))
