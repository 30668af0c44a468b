# SPDX-License-Identifier: Apache-2.0
"""plan, dispatch and combine of one workload as operations to time, and a check of their results."""

import functools
import sys

import jax
import jax.numpy as jnp
import numpy as np

import jax_ep

from .. import _group, _view
from .._types import Plan, Spec
from .timing import LOOP, Operation, Timer
from .work import Moved, Traffic, Workload, routing

FP8 = jnp.float8_e4m3fn


class Exchange:
    """Operands of one workload, and operations on them.

    `pair` is two routings `[R, T, K]`, which take turns; `options` are those of `jax_ep.dispatch`.
    """

    def __init__(self, timer: Timer, work: Workload):
        self.timer, self.work = timer, work
        rng, shape = np.random.default_rng(0), (timer.R * work.tokens, work.hidden)
        x = timer.put(rng.standard_normal(shape, np.float32))
        self.x = {dtype: x.astype(dtype) for dtype in ("bfloat16", "float16", "float32")}
        self.weights = timer.put(rng.random((shape[0], work.top_k), np.float32))
        self.uniform = [routing(work, timer.R, skew=0.0, seed=s) for s in (1, 2)]
        self.skewed = [routing(work, timer.R, skew=3.0, seed=s) for s in (3, 4)]

    def on_device(self, idx):
        """A routing `[R, T, K]` as an operand."""
        return self.timer.put(idx.reshape(-1, self.work.top_k))

    def deliver(self, idx, x, weights, **options):
        """`jax_ep.dispatch` with this workload's experts, on one rank's block."""
        return jax_ep.dispatch(x, idx, weights, num_experts=self.work.experts, **options)

    def delivered(self, pair, dtype, **options) -> jax_ep.Dispatched:
        """What every rank gets by the first routing of `pair`."""
        f = self.timer.mapped(functools.partial(self.deliver, **options))
        return f(self.on_device(pair[0]), self.x[dtype], self.weights)

    def spec(self, **options) -> Spec:
        """The exchange as the primitives know it."""
        f = self.timer.mapped(functools.partial(self.deliver, **options))
        idx = self.on_device(self.uniform[0])
        return jax.eval_shape(f, idx, self.x["bfloat16"], self.weights).handle.spec

    def traffic(self, pair, **options) -> Traffic:
        """Rows that move by the first routing of `pair`, without those that a capacity drops."""
        spec, idx = self.spec(**options), pair[0]
        if "capacity_factor" in options:
            plan = self.timer.mapped(functools.partial(_view.plan, spec=spec))
            pair_row = plan(self.on_device(idx))[1]
            idx = np.where(np.asarray(pair_row).reshape(idx.shape) >= 0, idx, -1)
        return Traffic.of(idx, self.work, spec.alignment)

    def facts(self, dtype=None, **options) -> dict:
        """Facts of an operation for its row, as JSON has them."""
        plain = {k: v.__name__ if k == "wire_dtype" else v for k, v in options.items()}
        config = plain.pop("config", jax_ep.Config())
        rows = self.spec(**options).rows
        return dict(
            capacity_rows=rows, num_sms=config.num_sms or "default", dtype=dtype, options=plain
        )

    def nothing(self, pair) -> Operation:
        """What every loop does beside its operation: it takes one of two routings."""
        step = lambda i, a, b: jnp.where(i % 2 == 0, a, b)
        return Operation(step, tuple(map(self.on_device, pair)))

    def plan(self, pair, **options) -> Operation:
        """The plan alone."""
        spec = self.spec(**options)

        def step(i, a, b):
            return _view.plan(jnp.where(i % 2 == 0, a, b), spec=spec)

        return Operation(step, tuple(map(self.on_device, pair)), facts=self.facts(**options))

    def dispatch(self, pair, dtype="bfloat16", **options) -> Operation:
        """Dispatch, plan included."""

        def step(i, a, b, x, weights):
            return self.deliver(jnp.where(i % 2 == 0, a, b), x, weights, **options)

        operands = (*map(self.on_device, pair), self.x[dtype], self.weights)
        moved = self.dispatch_moves(pair, dtype, **options)
        return Operation(step, operands, moved, self.facts(dtype, **options))

    def dispatch_moves(self, pair, dtype, **options) -> Moved:
        """Bytes of a dispatch."""
        row = self.work.hidden * jnp.dtype(dtype).itemsize
        wire_row = self.work.hidden * 33 / 32 if "wire_dtype" in options else row  # with scales
        delivered_row = wire_row if options.get("deliver") == "quantized" else row
        return self.traffic(pair, **options).dispatch(self.work, row, wire_row, delivered_row)

    def dispatch_known(self, pair, dtype="bfloat16", **options) -> Operation:
        """Dispatch by a plan that is there already."""
        handle = self.delivered(pair, dtype, **options).handle

        def step(_, x, weights, *plan):
            values = {"tokens": x, "scalars": weights.reshape(-1)}
            return _view.dispatch(values, Plan(*plan), spec=handle.spec, forward=True)

        operands = (self.x[dtype], self.weights, *handle.plan.arrays())
        moved = self.dispatch_moves(pair, dtype, **options)
        return Operation(step, operands, moved, self.facts(dtype, **options))

    def combine(self, pair, dtype="bfloat16", **options) -> Operation:
        """Weighted combine of what a dispatch delivered."""
        d = self.delivered(pair, dtype, **options)

        def step(_, tokens, handle, weights):
            return jax_ep.combine(tokens, handle, weights=weights)

        row = self.work.hidden * jnp.dtype(dtype).itemsize
        moved = self.traffic(pair, **options).combine(self.work, row)
        operands = (d.tokens, d.handle, d.weights)
        return Operation(step, operands, moved, self.facts(dtype, **options))

    def check(self, **options):
        """Rows and sums against `xla`: bit for bit, with FP8 within a step of e4m3."""

        def run(idx, x, weights, implementation):
            d = self.deliver(idx, x, weights, implementation=implementation, **options)
            rows = jnp.where((d.expert_ids >= 0)[:, None], d.tokens, 0)
            return rows, jax_ep.combine(d.tokens, d.handle, weights=d.weights)

        def compare(idx, x, weights):
            ours, theirs = (run(idx, x, weights, name) for name in (None, "xla"))
            same = [(a == b).mean() for a, b in zip(ours, theirs, strict=True)]
            a, b = ours[0].astype(jnp.float32), theirs[0].astype(jnp.float32)
            # XLA may contract x * (1 / scale): the next e4m3 value, 1/8 off, or 2^-9 of the scale
            # where values are denormal; scales of normal rows stay below 1/64.
            close = (jnp.abs(a - b) <= 0.13 * jnp.abs(b) + 2.0**-15).all()
            return jnp.array([*same, close])[None]

        operands = (self.on_device(self.uniform[0]), self.x["bfloat16"], self.weights)
        rows, sums, close = np.asarray(self.timer.mapped(compare)(*operands)).min(0)
        _group.check()  # a failure has filled the results, and a name
        print(
            f"check, {'fp8' if options else 'bf16'}: {rows:.6f} of rows, {sums:.6f} of sums equal"
        )
        if not close or (not options and min(rows, sums) < 1):
            sys.exit("jax_ep bench: results differ from implementation='xla'")


def time_exchanges(ex: Exchange, sms: list[int]) -> None:
    """One row for each operation of a workload: the base case, then one change at a time."""
    t, uniform, skewed = ex.timer, ex.uniform, ex.skewed
    fp8: dict = dict(wire_dtype=FP8)
    bounded: dict = dict(capacity_factor=1.25)

    t.time("empty loop", ex.nothing(uniform))
    t.time("plan", ex.plan(uniform))
    t.time("plan, skewed routing", ex.plan(skewed))

    base = ex.dispatch(uniform)
    t.time("dispatch bf16", base)
    t.time("dispatch bf16, without plan", ex.dispatch_known(uniform))
    t.time("dispatch bf16, skewed routing", ex.dispatch(skewed))
    t.time("dispatch f16", ex.dispatch(uniform, "float16"))
    t.time("dispatch f32", ex.dispatch(uniform, "float32"))
    t.time("dispatch fp8, quantised", ex.dispatch(uniform, deliver="quantized", **fp8))
    t.time("dispatch fp8, delivered bf16", ex.dispatch(uniform, **fp8))
    t.time("dispatch bf16, capacity factor 1.25", ex.dispatch(uniform, **bounded))
    t.time("dispatch bf16, capacity factor 1, drops", ex.dispatch(uniform, capacity_factor=1.0))
    t.time("dispatch bf16, alignment 128", ex.dispatch(uniform, expert_alignment=128))
    t.time("dispatch bf16, batched, factor 1.25", ex.dispatch(uniform, layout="batched", **bounded))

    sums = ex.combine(uniform)
    t.time("combine bf16", sums)
    t.time("combine bf16, skewed routing", ex.combine(skewed))
    t.time("combine f16", ex.combine(uniform, "float16"))
    t.time("combine f32", ex.combine(uniform, "float32"))
    t.time("combine bf16, batched, factor 1.25", ex.combine(uniform, layout="batched", **bounded))

    if t.R > 1:
        t.time_late("dispatch bf16, a rank late", base)
        t.time_late("combine bf16, a rank late", sums)
    if ex.work.tokens * ex.work.hidden < 2**21:  # what a larger workload moves overflows L2 anyway
        t.time_cold("plan, L2 cold", ex.plan(uniform))
        t.time_cold("dispatch bf16, L2 cold", base)
        t.time_cold("combine bf16, L2 cold", sums)
    for num_sms in sms:
        config = jax_ep.Config(num_sms=num_sms)
        t.time(f"dispatch bf16, {num_sms} SMs", ex.dispatch(uniform, config=config))
        t.time(f"combine bf16, {num_sms} SMs", ex.combine(uniform, config=config))
    t.time("plan, xla", ex.plan(uniform, implementation="xla"), length=LOOP)
    t.time("dispatch bf16, xla", ex.dispatch(uniform, implementation="xla"), length=LOOP)
    t.time("combine bf16, xla", ex.combine(uniform, implementation="xla"), length=LOOP)


def time_tokens(ex: Exchange) -> None:
    """The rows of one number of tokens in a sweep."""
    t, tokens = ex.timer, f"T={ex.work.tokens}"
    t.time(f"dispatch bf16, {tokens}", ex.dispatch(ex.uniform))
    fp8 = dict(wire_dtype=FP8, deliver="quantized")
    t.time(f"dispatch fp8, quantised, {tokens}", ex.dispatch(ex.uniform, **fp8))
    t.time(f"combine bf16, {tokens}", ex.combine(ex.uniform))
