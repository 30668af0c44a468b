# SPDX-License-Identifier: Apache-2.0
"""Time dispatch and combine beside XLA's own collectives on all GPUs of this process.

Each figure is a jitted loop of operations whose routing (dispatch) or weights (combine) change with
the loop, so that nothing is hoisted; wall-clock time of the loop over its length, which takes in what
XLA runs between operations, printed as "empty loop". Results are compared with `implementation="xla"`
in the same run, bit for bit. Plan is included in dispatch.

    python benchmarks/exchange.py [--tokens 4096] [--hidden 7168] [--experts 256] [--top-k 8] [--json F]
"""

import argparse
import json
import sys
import time

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jax.sharding import AxisType, NamedSharding
from jax.sharding import PartitionSpec as P

import jax_ep

FP8 = jnp.float8_e4m3fn


class Bench:
    """One workload on one mesh."""

    def __init__(self, args):
        devices = jax.devices()
        self.args, self.R = args, len(devices)
        self.mesh = jax.make_mesh((self.R,), ("expert",), axis_types=(AxisType.Auto,))
        jax_ep.initialize(self.mesh, timeout_s=20)
        rng = np.random.default_rng(0)
        n = self.R * args.tokens
        score = rng.random((2, n, args.experts), np.float32)
        idx = np.argpartition(score, args.top_k, -1)[..., : args.top_k].astype(np.int32)
        self.idx = [self.put(i) for i in idx]
        self.x = self.put(rng.standard_normal((n, args.hidden), np.float32).astype(jnp.bfloat16))
        self.weights = self.put(rng.random((n, args.top_k), np.float32))
        self.idx_host = idx
        self.results = {}

    def put(self, array):
        return jax.device_put(array, NamedSharding(self.mesh, P("expert")))

    def mapped(self, f, count, out_specs=P("expert")):
        specs = (P("expert"),) * count
        mapped = jax.shard_map(
            f, mesh=self.mesh, in_specs=specs, out_specs=out_specs, check_vma=False
        )
        return jax.jit(mapped)

    def time(self, name, step, *operands, length=20, repeats=12, **facts):
        """`step(i, carry, *operands) -> carry`, a float32 [1]: microseconds of one step."""

        def loop(*operands):
            start = jnp.zeros(1, jnp.float32)
            return lax.fori_loop(0, length, lambda i, c: step(i, c, *operands), start)

        f = self.mapped(loop, len(operands))
        for _ in range(2):
            jax.block_until_ready(f(*operands))
        times = []
        for _ in range(repeats):
            start = time.perf_counter()
            jax.block_until_ready(f(*operands))
            times.append((time.perf_counter() - start) / length * 1e6)
        median, worst = float(np.median(times)), float(np.max(times))
        self.results[name] = dict(median_us=round(median, 1), max_us=round(worst, 1), **facts)
        print(f"{name:46} {median:10.1f} {worst:10.1f}  {facts or ''}", flush=True)

    def dispatch(self, idx, x, weights, **options):
        return jax_ep.dispatch(x, idx, weights, num_experts=self.args.experts, **options)

    def time_dispatch(self, name, **options):
        def step(i, carry, a, b, x, weights):
            d = self.dispatch(jnp.where(i % 2 == 0, a, b), x, weights, **options)
            return carry + d.tokens[:1, 0].astype(jnp.float32) + d.weights[:1]

        self.time(name, step, *self.idx, self.x, self.weights, **self.wire(options))

    def wire(self, options):
        """Bytes that the busiest rank pushes: one row per token and other rank that it names."""
        owner = self.idx_host[0].reshape(self.R, self.args.tokens, -1) // (
            self.args.experts // self.R
        )
        copies = [
            sum(np.any(owner[s] == r, -1).sum() for r in range(self.R) if r != s)
            for s in range(self.R)
        ]
        row_bytes = self.args.hidden * (33 / 32 if options.get("wire_dtype") else 2)
        return dict(wire_mb=round(float(max(copies)) * row_bytes / 1e6, 2))

    def time_combine(self, name, implementation, **options):
        d = self.mapped(
            lambda i, x, w: self.dispatch(i, x, w, implementation=implementation, **options), 3
        )(self.idx[0], self.x, self.weights)

        def step(i, carry, d):
            weights = d.weights + jnp.where(carry[0] > 1e30, 1.0, 0.0)
            return carry + jax_ep.combine(d.tokens, d.handle, weights=weights)[:1, 0].astype(
                jnp.float32
            )

        self.time(name, step, d, **self.wire({}))

    def check(self, **options):
        """Rows of segments and combined tokens equal those of `xla`: bit for bit without FP8.

        With FP8 XLA's own conversions on GPUs may differ from NumPy's (ours do not, see the tests), so
        a value may be one step of e4m3 away.
        """

        def run(i, x, w, implementation):
            d = self.dispatch(i, x, w, implementation=implementation, **options)
            rows = jnp.where((d.expert_ids >= 0)[:, None], d.tokens, 0)
            return rows, jax_ep.combine(d.tokens, d.handle, weights=d.weights)

        def compare(i, x, w):
            ours, theirs = (run(i, x, w, name) for name in (None, "xla"))
            same = jnp.array([(a == b).mean() for a, b in zip(ours, theirs, strict=True)])
            a, b = ours[0].astype(jnp.float32), theirs[0].astype(jnp.float32)
            return same[None], (jnp.abs(a - b) <= 0.13 * jnp.abs(b) + 1e-6).all()[None]

        same, close = map(np.asarray, self.mapped(compare, 3)(self.idx[0], self.x, self.weights))
        print(f"check {options}: equal {same.min(0)} of rows and sums, all close: {close.all()}")
        if not close.all() or (not options and same.min() < 1):
            sys.exit("results differ from implementation='xla'")

    def time_peers(self):
        T, K, H, R = self.args.tokens, self.args.top_k, self.args.hidden, self.R
        copies = self.put(np.zeros((R * T * K, H), jnp.bfloat16)) + self.x[:1]

        def all_to_all(i, carry, copies):
            moved = lax.all_to_all(
                (copies + carry[0].astype(copies.dtype)).reshape(R, -1, H), "expert", 0, 0
            )
            return carry + moved[0, :1, 0].astype(jnp.float32) * 0

        def add(i, carry, copies):
            moved = lax.optimization_barrier(copies + carry[0].astype(copies.dtype))
            return carry + moved[:1, 0].astype(jnp.float32) * 0

        facts = dict(wire_mb=round(T * K * H * 2 * (R - 1) / R / 1e6, 1))
        self.time("lax.all_to_all of the K copies, with an add", all_to_all, copies, **facts)
        self.time("the add alone", add, copies)
        if jax.default_backend() != "gpu":
            return print("lax.ragged_all_to_all: not on this platform")
        local = self.args.experts // R

        def ragged(i, carry, idx, x):
            owner = (jnp.where(carry[0] > 1e30, 0, idx) // local).reshape(-1)
            order = jnp.argsort(owner)
            sizes = jnp.bincount(owner, length=R).astype(jnp.int32)
            all_sizes, me = lax.all_gather(sizes, "expert"), lax.axis_index("expert")
            starts = (jnp.cumsum(all_sizes, 0) - all_sizes)[me]
            out = jnp.zeros((int(T * K * 1.25), H), x.dtype)
            moved = lax.ragged_all_to_all(
                x[order // K], out, jnp.cumsum(sizes) - sizes, sizes, starts, all_sizes[:, me],
                axis_name="expert",
            )  # fmt: skip
            return carry + moved[:1, 0].astype(jnp.float32)

        operands = (self.idx[0], self.x)
        self.time("sort and lax.ragged_all_to_all", ragged, *operands, length=2, repeats=3)


def main():
    """Run everything and print a table; `--json` keeps it."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    for name, default in (("tokens", 4096), ("hidden", 7168), ("experts", 256), ("top-k", 8)):
        parser.add_argument(f"--{name}", type=int, default=default)
    parser.add_argument("--json", help="file for the results")
    args = parser.parse_args()
    b = Bench(args)
    print([str(d.device_kind) for d in jax.devices()], "jax", jax.__version__, vars(args))
    print(f"{'':46} {'median us':>10} {'max us':>10}")
    b.check()
    b.check(wire_dtype=FP8)
    b.time("empty loop", lambda i, c, a, b: c + jnp.where(i % 2 == 0, a, b)[:1, 0], *b.idx)
    quantized = dict(wire_dtype=FP8, deliver="quantized")
    for name, options in (
        ("bf16", {}),
        ("fp8, delivered quantised", quantized),
        ("fp8, delivered bf16", dict(wire_dtype=FP8)),
        ("bf16, 48 SMs", dict(config=jax_ep.Config(num_sms=48))),
    ):
        b.time_dispatch(f"dispatch {name}", **options)
    b.time_combine("combine bf16", None)
    b.time_combine("combine bf16, 48 SMs", None, config=jax_ep.Config(num_sms=48))
    b.time_dispatch("dispatch bf16, implementation='xla'", implementation="xla")
    b.time_peers()
    jax_ep.check()
    if args.json:
        facts = dict(
            command=" ".join(["python", *sys.argv]),
            devices=[d.device_kind for d in jax.devices()],
            jax=jax.__version__,
            workload={k: v for k, v in vars(args).items() if k != "json"},
            capacity="default (never drops), tail not zeroed",
            timing="wall clock of a jitted loop, plan included in dispatch; see benchmarks/exchange.py",
            build=jax_ep._ffi.build_facts(),
            results=b.results,
        )
        with open(args.json, "w") as file:
            json.dump(facts, file, indent=1)


if __name__ == "__main__":
    main()
