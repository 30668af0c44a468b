# SPDX-License-Identifier: Apache-2.0
"""`python -m jax_ep bench`: dispatch and combine beside XLA's collectives, on all devices here.

Each figure is a jitted loop of operations whose routing (dispatch) or weights (combine) change with
the loop, so that nothing is hoisted: wall-clock time of the loop over its length, plan included in
dispatch. It takes in what XLA runs between operations, printed as "empty loop". Floors come from a
link and a memory ceiling measured in the same run, results are compared with `implementation="xla"`.
"""

import dataclasses
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

from . import _info

FP8 = jnp.float8_e4m3fn
CONDITIONS = "default capacity, tail not zeroed, plan within dispatch, loops of 10 under jit"
LOOP, REPEATS = 10, 100  # operations in one timed program, and how often it runs


@dataclasses.dataclass(frozen=True)
class Workload:
    """Sizes of one exchange, per rank."""

    tokens: int
    hidden: int
    top_k: int
    experts: int


WORKLOADS = {
    "prefill": Workload(4096, 7168, 8, 256),
    "decode": Workload(128, 7168, 8, 256),
    "training": Workload(4096, 2048, 6, 64),
    "smoke": Workload(64, 256, 4, 16),
}


def routing(work: Workload, num_ranks: int, *, skew: float, seed: int) -> np.ndarray:
    """`topk_idx [R, T, K]`: distinct experts, uniform, or `skew` nats from the first to the last."""
    rng = np.random.default_rng(seed)
    score = rng.gumbel(size=(num_ranks, work.tokens, work.experts)).astype(np.float32)
    score -= np.linspace(0, skew, work.experts, dtype=np.float32)
    return np.argpartition(-score, work.top_k - 1, -1)[..., : work.top_k].astype(np.int32)


@dataclasses.dataclass(frozen=True)
class Traffic:
    """What one rank must move at least, of the busiest rank: counts of rows."""

    sent: int  # copies to other ranks, one per token and rank
    arrived: int  # copies from other ranks
    rows: int  # rows of this rank's experts

    @classmethod
    def of(cls, idx: np.ndarray, work: Workload) -> "Traffic":
        """Count the copies and rows of `topk_idx [R, T, K]`."""
        num_ranks = idx.shape[0]
        owner = idx // (work.experts // num_ranks)
        named = np.stack([(owner == r).any(-1).sum(-1) for r in range(num_ranks)], 1)  # [from, to]
        np.fill_diagonal(named, 0)
        rows = np.bincount(owner.reshape(-1), minlength=num_ranks)
        return cls(int(named.sum(1).max()), int(named.sum(0).max()), int(rows.max()))

    def dispatch_bytes(self, work: Workload, wire_row: float, delivered_row: float):
        """`(link, memory)` bytes: x is read, what arrived is read, every row is written."""
        read = work.tokens * work.hidden * 2 + self.arrived * wire_row
        return self.sent * wire_row, read + self.rows * delivered_row

    def combine_bytes(self, work: Workload):
        """`(link, memory)` bytes: rows and partials are read, partials and sums written."""
        row = work.hidden * 2
        memory = (self.rows + 2 * self.sent + work.tokens) * row
        return self.arrived * row, memory


class Bench:
    """One workload on the devices of this process."""

    def __init__(self, name: str):
        self.work, devices = WORKLOADS[name], jax.devices()
        self.R, self.results = len(devices), {}
        self.mesh = jax.make_mesh((self.R,), ("expert",), axis_types=(AxisType.Auto,))
        jax_ep.initialize(self.mesh, timeout_s=20)
        rng = np.random.default_rng(0)
        work = self.work
        self.x = self.put(rng.standard_normal((self.R * work.tokens, work.hidden), np.float32))
        self.x = self.x.astype(jnp.bfloat16)
        self.weights = self.put(rng.random((self.R * work.tokens, work.top_k), np.float32))
        self.uniform = [routing(work, self.R, skew=0.0, seed=s) for s in (1, 2)]
        self.skewed = [routing(work, self.R, skew=3.0, seed=s) for s in (3, 4)]
        self.link_gbs = self.hbm_gbs = float("nan")

    def put(self, array):
        """An array split over the ranks."""
        return jax.device_put(array, NamedSharding(self.mesh, P("expert")))

    def on_device(self, pair):
        """Two routings `[R, T, K]` as operands."""
        return [self.put(idx.reshape(-1, self.work.top_k)) for idx in pair]

    def mapped(self, f, count):
        """`f` jitted on each rank's blocks of `count` operands."""
        specs = (P("expert"),) * count
        return jax.jit(
            jax.shard_map(f, mesh=self.mesh, in_specs=specs, out_specs=P("expert"), check_vma=False)
        )

    def seconds(self, step, operands, *, length=LOOP, repeats=REPEATS):
        """Sorted seconds of one `step(i, carry [1], *operands) -> carry`, over loops of `length`."""

        def loop(*operands):
            start = jnp.zeros(1, jnp.float32)
            return lax.fori_loop(0, length, lambda i, c: step(i, c, *operands), start)

        f = self.mapped(loop, len(operands))
        jax.block_until_ready([f(*operands) for _ in range(2)])
        times = []
        for _ in range(repeats):
            start = time.perf_counter()
            jax.block_until_ready(f(*operands))
            times.append((time.perf_counter() - start) / length)
        return np.sort(times)

    def time(self, name, step, *operands, moved=None, **how):
        """Time a step, print its row, keep its facts; `moved`: (link, memory) bytes."""
        times = self.seconds(step, operands, **how) * 1e6
        facts = dict(median_us=float(np.median(times)), p99_us=float(np.quantile(times, 0.99)))
        if moved is not None:
            link, memory = moved
            floors = (link / self.link_gbs / 1e3, memory / self.hbm_gbs / 1e3)
            facts |= dict(
                wire_mb=link / 1e6,
                wire_gbs=link / facts["median_us"] / 1e3,
                floor_us=float(np.nanmax(floors)),
                ratio=facts["median_us"] / float(np.nanmax(floors)),
            )
        self.results[name] = {k: round(v, 3) for k, v in facts.items()}
        columns = [f"{v:10.1f}" for v in list(facts.values())[:5]]
        ratio = f"{facts['ratio']:7.2f}" if "ratio" in facts else ""
        print(f"{name:44}{''.join(columns)}{ratio}", flush=True)

    def measure_ceilings(self, megabytes: int):
        """Link: a ring of `ppermute`. Memory: read one array, write four."""
        n = megabytes * 2**20 // 4
        big = self.put(np.ones(self.R * n, np.float32))
        ring = [(r, (r + 1) % self.R) for r in range(self.R)]

        def permute(_, carry, x):
            return carry + lax.ppermute(x + carry[0] * 0, "expert", ring)[:1]

        def add(_, carry, x):
            return carry + lax.optimization_barrier(x + carry[0] * 0)[:1]

        def write(_, carry, x):
            copies = lax.optimization_barrier([x + carry[0] + i for i in range(4)])
            return carry + sum(c[:1] for c in copies) * 0

        few = dict(length=4, repeats=7)
        if self.R > 1:
            both, alone = (np.median(self.seconds(f, [big], **few)) for f in (permute, add))
            self.link_gbs = 4 * n / max(both - alone, 1e-9) / 1e9
        self.hbm_gbs = 5 * 4 * n / np.median(self.seconds(write, [big], **few)) / 1e9
        self.results["ceilings"] = dict(link_gbs=self.link_gbs, hbm_1read_4writes_gbs=self.hbm_gbs)
        print(
            f"ceilings: link {self.link_gbs:.0f} GB/s (ppermute less an add), memory "
            f"{self.hbm_gbs:.0f} GB/s (1 read, 4 writes)"
        )

    def dispatch(self, idx, x, weights, **options):
        """`jax_ep.dispatch` with this workload's experts."""
        return jax_ep.dispatch(x, idx, weights, num_experts=self.work.experts, **options)

    def time_dispatch(self, name, pair, **options):
        """Dispatch, plan included, the routings of `pair` in turn."""
        work, quantized = self.work, options.get("deliver") == "quantized"
        wire_row = work.hidden * (33 / 32 if "wire_dtype" in options else 2)
        row = wire_row if quantized else work.hidden * 2

        def step(i, carry, a, b, x, weights):
            d = self.dispatch(jnp.where(i % 2 == 0, a, b), x, weights, **options)
            row_weights = jnp.asarray(d.weights)
            return carry + d.tokens[:1, 0].astype(jnp.float32) + row_weights[:1]

        moved = Traffic.of(pair[0], work).dispatch_bytes(work, wire_row, row)
        self.time(name, step, *self.on_device(pair), self.x, self.weights, moved=moved)

    def time_combine(self, name, pair, **options):
        """Weighted combine of what a dispatch delivered."""

        def deliver(idx, x, weights):
            return self.dispatch(idx, x, weights, **options)

        def step(_, carry, d):
            weights = d.weights + jnp.where(carry[0] > 1e30, 1.0, 0.0)
            out = jax_ep.combine(d.tokens, d.handle, weights=weights)
            return carry + out[:1, 0].astype(jnp.float32) * 0

        d = self.mapped(deliver, 3)(self.on_device(pair)[0], self.x, self.weights)
        moved = Traffic.of(pair[0], self.work).combine_bytes(self.work)
        self.time(name, step, d, moved=moved)

    def check(self, **options):
        """Rows and sums against `xla`: bit for bit, with FP8 within a step of e4m3."""

        def run(idx, x, weights, implementation):
            d = self.dispatch(idx, x, weights, implementation=implementation, **options)
            rows = jnp.where((d.expert_ids >= 0)[:, None], d.tokens, 0)
            return rows, jax_ep.combine(d.tokens, d.handle, weights=d.weights)

        def compare(idx, x, weights):
            ours, theirs = (run(idx, x, weights, name) for name in (None, "xla"))
            same = [(a == b).mean() for a, b in zip(ours, theirs, strict=True)]
            a, b = ours[0].astype(jnp.float32), theirs[0].astype(jnp.float32)
            close = (jnp.abs(a - b) <= 0.13 * jnp.abs(b) + 1e-6).all()
            return jnp.array([*same, close])[None]

        operands = (self.on_device(self.uniform)[0], self.x, self.weights)
        rows, sums, close = np.asarray(self.mapped(compare, 3)(*operands)).min(0)
        print(
            f"check, {'fp8' if options else 'bf16'}: {rows:.6f} of rows, {sums:.6f} of sums equal"
        )
        if not close or (not options and min(rows, sums) < 1):
            sys.exit("jax_ep bench: results differ from implementation='xla'")

    def time_peers(self):
        """The same work through XLA's own collectives."""
        work, R = self.work, self.R
        T, K, H = work.tokens, work.top_k, work.hidden
        copies = jnp.repeat(self.x, K, 0)
        copies = jax.device_put(copies, NamedSharding(self.mesh, P("expert")))
        split = T * K // R * R

        def add(_, carry, copies):
            moved = lax.optimization_barrier(copies + carry[0].astype(copies.dtype))
            return carry + moved[:1, 0].astype(jnp.float32) * 0

        def all_to_all(_, carry, copies):
            blocks = (copies + carry[0].astype(copies.dtype))[:split].reshape(R, -1, H)
            return carry + lax.all_to_all(blocks, "expert", 0, 0)[0, :1, 0].astype(jnp.float32) * 0

        self.time("lax.all_to_all of the K copies, with an add", all_to_all, copies, repeats=10)
        self.time("the add alone", add, copies, repeats=10)
        if jax.default_backend() != "gpu":
            print("sort and lax.ragged_all_to_all: XLA has none on this platform")
            return
        local = work.experts // R

        def ragged(_, carry, idx, x):
            owner = (jnp.where(carry[0] > 1e30, 0, idx) // local).reshape(-1)
            order = jnp.argsort(owner)
            sizes = jnp.bincount(owner, length=R).astype(jnp.int32)
            all_sizes, me = lax.all_gather(sizes, "expert"), lax.axis_index("expert")
            starts, offsets = (jnp.cumsum(all_sizes, 0) - all_sizes)[me], jnp.cumsum(sizes) - sizes
            out = jnp.zeros((int(T * K * 1.25), H), x.dtype)
            moved = lax.ragged_all_to_all(
                x[order // K], out, offsets, sizes, starts, all_sizes[:, me], axis_name="expert"
            )
            return carry + moved[:1, 0].astype(jnp.float32) * 0

        operands = (self.on_device(self.uniform)[0], self.x)
        self.time("sort and lax.ragged_all_to_all", ragged, *operands, length=2, repeats=3)

    def run(self, sms: list[int]):
        """Everything of this workload."""
        header = ("median us", "p99 us", "wire MB", "wire GB/s", "floor us")
        self.measure_ceilings(8 if self.work.tokens * self.work.hidden < 2**20 else 256)
        self.check()
        self.check(wire_dtype=FP8)
        print(f"{'':44}{''.join(f'{h:>10}' for h in header)}  ratio")
        empty = lambda i, c, a, b: c + jnp.where(i % 2 == 0, a, b)[:1, 0]
        self.time("empty loop", empty, *self.on_device(self.uniform))
        self.time_dispatch("dispatch bf16", self.uniform)
        self.time_dispatch("dispatch bf16, skewed routing", self.skewed)
        fp8 = dict(wire_dtype=FP8)
        self.time_dispatch("dispatch fp8, quantised", self.uniform, deliver="quantized", **fp8)
        self.time_dispatch("dispatch fp8, delivered bf16", self.uniform, **fp8)
        self.time_combine("combine bf16", self.uniform)
        self.time_combine("combine bf16, skewed routing", self.skewed)
        for num_sms in sms:
            config = jax_ep.Config(num_sms=num_sms)
            self.time_dispatch(f"dispatch bf16, {num_sms} SMs", self.uniform, config=config)
            self.time_combine(f"combine bf16, {num_sms} SMs", self.uniform, config=config)
        self.time_dispatch("dispatch bf16, xla", self.uniform, implementation="xla")
        self.time_combine("combine bf16, xla", self.uniform, implementation="xla")
        self.time_peers()
        jax_ep.check()


def plot(path: str, results: dict, sms: list[int]) -> None:
    """Time against the number of SMs, for each workload."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    figure, axes = pyplot.subplots(1, len(results), figsize=(6 * len(results), 4), squeeze=False)
    for axis, (name, rows) in zip(axes[0], results.items(), strict=True):
        for what in ("dispatch", "combine"):
            times = [rows[f"{what} bf16, {n} SMs"]["median_us"] for n in sms]
            axis.plot(sms, times, marker="o", label=f"{what} bf16")
        axis.set(title=name, xlabel="SMs", ylabel="median (us)", ylim=(0, None))
        axis.grid(alpha=0.3)
        axis.legend()
    figure.tight_layout()
    figure.savefig(path, dpi=120)


def main(workloads: list[str], sms: list[int], json_path: str | None, plot_path: str | None) -> int:
    """Run the workloads, print tables, keep JSON and a plot if asked."""
    devices = [d.device_kind for d in jax.devices()]
    versions = {key: _info.facts()[key] for key in ("jax_ep", "python", "jax", "jaxlib", "build")}
    results = {}
    for name in workloads:
        bench = Bench(name)
        print(f"\n{name}: {bench.work}, {bench.R} ranks on {', '.join(sorted(set(devices)))}")
        print(f"jax {versions['jax']}, {CONDITIONS}")
        bench.run(sms)
        results[name] = bench.results
    if json_path:
        facts = dict(
            command=" ".join(["python -m jax_ep", *sys.argv[1:]]),
            devices=devices,
            versions=versions,
            workloads={name: dataclasses.asdict(WORKLOADS[name]) for name in workloads},
            conditions=CONDITIONS,
            results=results,
        )
        with open(json_path, "w") as file:
            json.dump(facts, file, indent=1)
    if plot_path:
        plot(plot_path, results, sms)
    return 0
