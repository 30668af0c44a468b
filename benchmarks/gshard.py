# SPDX-License-Identifier: Apache-2.0
"""The portable `xla` implementation beside a capacity-padded all-to-all exchange (GShard style).

Both send every token to its experts, which change nothing, and add up what comes back times its
weight: the exchange of one MoE layer without its matrix products, jitted whole, on host devices::

    NPROC=64 python benchmarks/gshard.py

GShard here is one-hot free: sort the pairs by expert, put the first C of each into [E, C, H],
all-to-all, and back. `gather` builds [E, C, H] by taking rows, `scatter` by putting them; the
scatter is how it is usually written, the gather is faster on CPUs.

Correctness is checked in the same run, on the same inputs: ours against `jax_ep.reference`, bit
for bit; GShard against the float64 sum of the pairs it kept.
"""

import argparse
import dataclasses
import functools
import json
import os
import platform
import shlex
import statistics
import sys
import time
from pathlib import Path

os.environ.setdefault("NPROC", "64")  # before JAX starts: see docs/sharp_bits.md
if "xla_force_host_platform_device_count" not in os.environ.get("XLA_FLAGS", ""):
    flags = os.environ.get("XLA_FLAGS", "")
    os.environ["XLA_FLAGS"] = f"{flags} --xla_force_host_platform_device_count=8".strip()

import jax
import jax.numpy as jnp
import jaxlib
import ml_dtypes
import numpy as np
from jax import lax
from jax.sharding import AxisType, NamedSharding
from jax.sharding import PartitionSpec as P

import jax_ep

RESULTS = Path(__file__).parent / "results" / "gshard_cpu.json"
DTYPES = {"bfloat16": ml_dtypes.bfloat16, "float32": np.float32}


@dataclasses.dataclass(frozen=True)
class Sizes:
    """One exchange; T tokens of H channels on each of R ranks, K of E experts each."""

    R: int = 8
    T: int = 1024
    H: int = 512
    K: int = 8
    E: int = 64
    capacity_factor: float = 1.25

    @property
    def capacity(self) -> int:
        """C: GShard's rows for each (source rank, expert)."""
        return max(1, int(self.capacity_factor * self.T * self.K / self.E))


def gshard(x, idx, weights, *, sizes: Sizes, build: str):
    """The exchange by two padded all-to-alls; `[T, H]` tokens, `[T, K]` experts and weights."""
    R, T, H, K, E, C = sizes.R, sizes.T, sizes.H, sizes.K, sizes.E, sizes.capacity
    expert = idx.reshape(-1)
    order = jnp.argsort(expert, stable=True).astype(jnp.int32)
    ranked = expert[order]
    place = jnp.arange(T * K, dtype=jnp.int32) - jnp.searchsorted(ranked, jnp.arange(E))[ranked]
    slot = jnp.where(place < C, ranked * C + place, E * C).astype(jnp.int32)  # E*C: dropped
    if build == "gather":
        token = jnp.full(E * C, T, jnp.int32).at[slot].set(order // K, mode="drop")
        buffer = x.at[token].get(mode="fill", fill_value=0)
    else:
        buffer = jnp.zeros((E * C, H), x.dtype).at[slot].set(x[order // K], mode="drop")
    sent = lax.all_to_all(buffer.reshape(R, E // R * C, H), "expert", 0, 0, tiled=True)
    rows = sent.reshape(R, E // R, C, H).swapaxes(0, 1)  # by expert, as a batched matmul takes it
    rows = lax.optimization_barrier(rows)  # the experts
    rows = rows.swapaxes(0, 1).reshape(R, E // R * C, H)
    back = lax.all_to_all(rows, "expert", 0, 0, tiled=True).reshape(E * C, H)
    pair_slot = jnp.zeros(T * K, jnp.int32).at[order].set(slot, unique_indices=True)
    taken = back.at[pair_slot.reshape(T, K)].get(mode="fill", fill_value=0)
    return jnp.einsum("tk,tkh->th", weights, taken.astype(jnp.float32)).astype(x.dtype)


def ours(x, idx, weights, *, sizes: Sizes):
    """The exchange by `jax_ep`, with the same number of rows in all."""
    d = jax_ep.dispatch(
        x,
        idx,
        weights,
        num_experts=sizes.E,
        capacity_factor=sizes.capacity_factor,
        implementation="xla",
    )
    rows = lax.optimization_barrier(d.tokens)  # the experts
    return jax_ep.combine(rows, d.handle, weights=d.weights)


def problem(sizes: Sizes, dtype: str):
    """`x [R, T, H]`, `idx [R, T, K]` of distinct experts, uniform, and weights that add up to 1."""
    rng = np.random.default_rng(0)
    x = rng.standard_normal((sizes.R, sizes.T, sizes.H)).astype(DTYPES[dtype])
    scores = rng.random((sizes.R, sizes.T, sizes.E))
    idx = np.argsort(-scores, -1)[..., : sizes.K].astype(np.int32)
    weights = rng.random(idx.shape).astype(np.float32)
    return x, idx, weights / weights.sum(-1, keepdims=True)


def programs(sizes: Sizes):
    """Name to jitted function of `[R*T, ...]` arrays, and the mesh they run on."""
    mesh = jax.make_mesh(
        (sizes.R,), ("expert",), axis_types=(AxisType.Auto,), devices=jax.devices()[: sizes.R]
    )
    bodies = {
        "jax_ep xla": ours,
        "GShard gather": functools.partial(gshard, build="gather"),
        "GShard scatter": functools.partial(gshard, build="scatter"),
    }
    whole = {}
    for name, body in bodies.items():
        on_rank = functools.partial(body, sizes=sizes)
        whole[name] = jax.jit(
            jax.shard_map(on_rank, mesh=mesh, in_specs=P("expert"), out_specs=P("expert"))
        )
    return whole, mesh


def check(name: str, got, sizes: Sizes, x, idx, weights) -> int:
    """Raise unless `got` is right; returns how many pairs were dropped."""
    got = np.asarray(got).reshape(x.shape)
    if name == "jax_ep xla":
        d = jax_ep.reference.dispatch(
            x, idx, weights, num_experts=sizes.E, capacity_factor=sizes.capacity_factor
        )
        want = jax_ep.reference.combine(d.tokens, d.plan, d.weights)
        if got.tobytes() != want.tobytes():
            raise AssertionError(f"{name}: not the bits of jax_ep.reference")
        return int(d.plan.num_dropped.sum())
    kept = _kept_by_gshard(sizes, idx)
    scale = np.where(kept, weights, 0).astype(np.float64)
    want = scale.sum(-1, keepdims=True) * x.astype(np.float64)
    error = np.abs(got.astype(np.float64) - want)
    rounding = float(ml_dtypes.finfo(x.dtype).eps)
    if not (error <= rounding * np.abs(want) + 1e-6 * np.abs(x).max()).all():
        raise AssertionError(f"{name}: off by {error.max()} from the float64 sum of kept pairs")
    return int((~kept).sum())


def _kept_by_gshard(sizes: Sizes, idx):
    """`[R, T, K]` bool: the first C pairs of each (source rank, expert)."""
    kept = np.zeros(idx.shape, bool)
    for r in range(sizes.R):
        for e in range(sizes.E):
            first = np.argwhere(idx[r] == e)[: sizes.capacity]
            kept[r][tuple(first.T)] = True
    return kept


def moved_gb(name: str, sizes: Sizes, itemsize: int) -> float:
    """GB of tokens that go from one device to another, both ways, all ranks together."""
    row = sizes.H * itemsize * sizes.R * (sizes.R - 1) / 1e9
    if name == "jax_ep xla":  # all tokens to all ranks; one partial for each token and rank
        return 2 * sizes.T * row
    return 2 * sizes.E // sizes.R * sizes.capacity * row


def measure(sizes: Sizes, dtype: str, repeats: int) -> dict:
    """Check every program, then time them in turn."""
    x, idx, weights = problem(sizes, dtype)
    whole, mesh = programs(sizes)
    sharding = NamedSharding(mesh, P("expert"))
    args = [jax.device_put(a.reshape(-1, a.shape[-1]), sharding) for a in (x, idx, weights)]
    rows = {}
    for name, f in whole.items():
        f = f.lower(*args).compile()
        rows[name] = dict(
            dropped_pairs=check(name, jax.block_until_ready(f(*args)), sizes, x, idx, weights),
            moved_gb=round(moved_gb(name, sizes, x.dtype.itemsize), 4),
            temp_mb_per_device=round(f.memory_analysis().temp_size_in_bytes / 1e6, 1),
        )
        whole[name] = f
    wall, cpu = ({name: [] for name in whole} for _ in range(2))
    for i in range(repeats):
        in_turn = list(whole.items())
        for name, f in in_turn[i % len(whole) :] + in_turn[: i % len(whole)]:
            start, cpu_start = time.perf_counter(), time.process_time()
            jax.block_until_ready(f(*args))
            wall[name].append((time.perf_counter() - start) * 1e3)
            cpu[name].append((time.process_time() - cpu_start) * 1e3)
    for name, row in rows.items():
        low, median, high = statistics.quantiles(wall[name], n=4)
        row |= dict(
            median_ms=round(median, 1),
            quartiles_ms=[round(low, 1), round(high, 1)],
            fastest_ms=round(min(wall[name]), 1),
            median_cpu_ms=round(statistics.median(cpu[name]), 1),
        )
    return rows


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--repeats", type=int, default=25)
    parser.add_argument("--out", type=Path, default=RESULTS)
    options = parser.parse_args()
    sizes = Sizes()
    run = dict(
        jax=jax.__version__,
        jaxlib=jaxlib.__version__,
        python=platform.python_version(),
        platform=jax.default_backend(),
        machine=platform.machine(),
        cpu_count=os.cpu_count(),
        load_before=[round(v, 2) for v in os.getloadavg()],
        command=shlex.join([Path(sys.executable).name, *sys.argv]),
        environment={name: os.environ[name] for name in ("NPROC", "XLA_FLAGS")},
        sizes=dataclasses.asdict(sizes),
        repeats=options.repeats,
        results={dtype: measure(sizes, dtype, options.repeats) for dtype in DTYPES},
    )
    run["load_after"] = [round(v, 2) for v in os.getloadavg()]
    print(f"jax {run['jax']}, {run['cpu_count']} CPUs, {sizes}, load {run['load_after'][0]}")
    print(
        f"{'':9}{'':15}{'median ms':>10}{'quartiles':>16}{'CPU ms':>8}{'GB moved':>10}{'temp MB':>9}"
    )
    for dtype, rows in run["results"].items():
        for name, r in rows.items():
            low, high = r["quartiles_ms"]
            print(
                f"{dtype:9}{name:15}{r['median_ms']:10.1f}{f'{low:.1f} to {high:.1f}':>16}"
                f"{r['median_cpu_ms']:8.1f}{r['moved_gb']:10.3f}{r['temp_mb_per_device']:9.1f}"
            )
    runs = json.loads(options.out.read_text()) if options.out.exists() else {}
    runs[f"jax {run['jax']}"] = run
    options.out.parent.mkdir(parents=True, exist_ok=True)
    options.out.write_text(json.dumps(runs, indent=1, sort_keys=True) + "\n")


if __name__ == "__main__":
    main()
