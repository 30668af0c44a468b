# SPDX-License-Identifier: Apache-2.0
"""`nodes_program.py --gpus-per-node L STEP...`: dispatch and combine between virtual nodes.

One of N * L processes, one rank each, on GPUs that reach each other: NVSHMEM's puts go by NVLink.
A step is a group of checks; each check's outcome is agreed on by all processes and printed as "ok"
or "FAILED", and a group that broke is started anew, so that the others still tell something. The
last line is "all N checks passed", or how many did not.
"""

import argparse
import ctypes
import dataclasses
import functools
import os
import signal
import sys
import time
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from cases import FP8, assert_same_bits, flat, inputs, program, put
from jax import lax
from jax.sharding import PartitionSpec as P
from nodes_checks import (
    E_LOCAL,
    TIMEOUT_S,
    Checks,
    from_last_rank,
    quantized,
    raises,
    to_first_node,
)
from nodes_decode import decode
from nodes_timing import timing, timing_decode

import jax_ep
from jax_ep import _ffi


def exchange(checks: Checks):
    R, E = checks.R, E_LOCAL * checks.R
    sizes: dict[str, Any] = dict(R=R, T=40, H=256, K=3, E=E, none=0.2)

    def case(name, dtype="bfloat16", change=None, weights=True, **changes):
        options: dict[str, Any] = {
            k: v for k, v in changes.items() if k not in sizes and k != "skew"
        }
        drawn = {k: v for k, v in changes.items() if k in sizes or k == "skew"}
        x, idx, w = inputs(checks.done, dtype=dtype, **(sizes | drawn))
        if change:
            x, idx = change(checks, x, idx)
        options = dict(num_experts=E) | options
        checks(name, lambda: checks.exchange(x, idx, w if weights else None, **options))

    case("bf16")
    case("f32, drops, aligned", "float32", capacity=24, expert_alignment=4, skew=0.5)
    case("fp8, dequantized", wire_dtype=FP8)
    case(
        "fp8, quantized, e8m0", "float16", wire_dtype=FP8, deliver="quantized", scale_format="e8m0"
    )
    case("x quantized", change=quantized, deliver="quantized")
    case("batched", "float16", layout="batched", capacity=48, skew=0.3)
    case("all to the first node", change=to_first_node)
    case("from one rank only", "float32", change=from_last_rank, weights=False)
    case("one token", T=1, K=2)
    case("nobody sends", change=lambda _, x, idx: (x, np.full_like(idx, -1)))
    case("rings turn over", T=600, H=1024, K=4, none=0.0)
    for seed in range(4):
        rng = np.random.default_rng(seed)
        drawn: dict[str, Any] = dict(
            T=int(rng.integers(2, 200)), K=int(rng.integers(1, 9)), skew=rng.choice([0, 2])
        )
        drawn |= dict(expert_alignment=int(rng.choice([1, 8])), zero_tail=bool(rng.integers(2)))
        case(f"random {seed}", H=16 * int(rng.integers(1, 60)), **drawn)


def gradients(checks: Checks):
    R, E, layers = checks.R, E_LOCAL * checks.R, 5
    x, idx, weights = inputs(90, R=R, T=70, H=256, K=3, E=E, none=0.1)
    weights = np.abs(weights) * 0.5
    factors = np.linspace(0.5, 1.5, E).astype(np.float32)
    g = np.random.default_rng(91).standard_normal(x.shape).astype(np.float32)

    def layer(x, idx, weights, factors):
        d = jax_ep.dispatch(x, idx, weights, num_experts=E, config=checks.config)
        mine = jnp.where(d.expert_ids >= 0, factors[d.expert_ids], 0)
        y = jnp.where((d.expert_ids >= 0)[:, None], d.tokens * mine[:, None], 0)
        return jax_ep.combine(y, d.handle, weights=d.weights)

    def body(x, idx, weights, factors, g):
        def loss(x, weights):
            step = lambda x, _: (layer(x, idx, weights, factors), None)
            return jnp.sum(lax.scan(step, x, None, length=layers)[0] * g)

        return jax.grad(loss, argnums=(0, 1))(x, weights)

    spec = P("expert")
    mapped = jax.shard_map(body, mesh=checks.mesh, in_specs=spec, out_specs=spec, check_vma=False)
    args = [put(flat(a), checks.mesh, spec) for a in (x, idx, weights)]
    args += [put(factors, checks.mesh, spec), put(flat(g), checks.mesh, spec)]
    # Each token is scaled by the sum of its experts' factors, in every layer.
    c = np.where(idx >= 0, factors[idx], 0).astype(float)
    f = (weights * c).sum(-1, keepdims=True)
    want_x = f**layers * g
    want_w = layers * f ** (layers - 1) * (g * x.astype(float)).sum(-1, keepdims=True) * c

    def check():
        ready = checks.compiled(jax.jit(mapped), *args)
        runs = [ready(*args) for _ in range(10)]
        for name, i, want in (("dx", 0, want_x), ("dweights", 1, want_w)):
            want = flat(want)
            for shard in runs[0][i].addressable_shards:
                np.testing.assert_allclose(
                    shard.data,
                    want[shard.index],
                    rtol=2e-4,
                    atol=2e-4 * np.abs(want).max(),
                    err_msg=name,
                )
            for run in runs[1:]:
                for a, b in zip(
                    run[i].addressable_shards, runs[0][i].addressable_shards, strict=True
                ):
                    assert_same_bits(f"{name} once more", np.asarray(a.data), np.asarray(b.data))

    checks("scan and gradients, ten runs alike", check)


def errors(checks: Checks):
    E = E_LOCAL * checks.R

    def wrong(words, H=256, config=None, **options):
        x, idx, weights = inputs(95, R=checks.R, T=4, H=H, K=2, E=E)
        config = config or checks.config
        made = program(x, idx, weights, mesh=checks.mesh, config=config, num_experts=E, **options)
        return functools.partial(raises, words, *[made[0], *made[1]])

    words = ["float8_e4m3fn", "between nodes"]
    checks("combine of a large batch in fp8", wrong(words, combine=dict(wire_dtype=FP8)))
    checks("halves of a large batch", wrong(["is for small batches"], halves=True))
    larger = dataclasses.replace(checks.by_size, decode_row_bytes=2**17)
    checks("too small slots", wrong(["give jax_ep.initialize the Config"], H=2**15, config=larger))
    checks("too small rings", wrong(["Rdma.ring_slot_bytes", "got 32768"], H=2**15))

    def config(words, **changes):
        config = dataclasses.replace(checks.by_size, **changes)
        raises(words, lambda: jax_ep.initialize(checks.mesh, "expert", config=config))

    checks("other nodes", lambda: config(["another gpus_per_node"], gpus_per_node=checks.R))
    checks("other rings", lambda: config(["another rdma"], rdma=jax_ep.Rdma()))
    x, idx, weights = inputs(96, R=checks.R, T=40, H=256, K=3, E=E, dtype="bfloat16")
    checks("after errors", lambda: checks.exchange(x, idx, weights, num_experts=E))


def faults(checks: Checks):
    a_late_rank(checks, checks.config, "")
    a_late_rank(checks, checks.by_size, ", small batch")


def a_late_rank(checks: Checks, config, label):
    E = E_LOCAL * checks.R
    x, idx, weights = inputs(97, R=checks.R, T=40, H=256, K=3, E=E, dtype="bfloat16")
    options: dict[str, Any] = dict(num_experts=E, config=config)
    f, args = program(x, idx, weights, mesh=checks.mesh, **options)
    ready = checks.compiled(f, *args)

    def late():
        if jax.process_index() == 1:
            time.sleep(2 * TIMEOUT_S)
        began = time.monotonic()

        def call():
            jax.block_until_ready(ready(*args))
            jax_ep.check()

        raises(["jax_ep.", "rank"], call)
        took = time.monotonic() - began
        assert took < 2 * TIMEOUT_S, f"expected an error within {2 * TIMEOUT_S} s, took {took}"
        checks.agree("everybody has failed")
        print("   here:", _ffi.describe_faults(), flush=True)
        jax_ep.initialize(checks.mesh, "expert", timeout_s=TIMEOUT_S, config=checks.by_size)

    checks(f"a late rank{label}", late)
    checks(f"after it{label}", lambda: checks.exchange(x, idx, weights, **options))


def again(checks: Checks):
    """After `finalize` NVSHMEM does not start in this process any more. It is the last step."""

    def anew():
        jax_ep.finalize()
        jax.clear_caches()
        checks.started.clear()
        raises(["expected a new process"], lambda: checks.initialize("expert"))

    checks("finalize, initialize", anew)


def killed(checks: Checks):
    """The last rank dies; the others get an error in time, and end. It is the last step."""
    checks.conclude()
    E = E_LOCAL * checks.R
    x, idx, weights = inputs(99, R=checks.R, T=40, H=256, K=3, E=E, dtype="bfloat16")
    options: dict[str, Any] = dict(num_experts=E, config=checks.config)
    f, args = program(x, idx, weights, mesh=checks.mesh, **options)
    ready = checks.compiled(f, *args)
    jax.block_until_ready(ready(*args))
    if jax.process_index() == checks.R - 1:
        os.kill(os.getpid(), signal.SIGKILL)
    began = time.monotonic()

    def until_it_fails():
        for _ in range(10000):
            jax.block_until_ready(ready(*args))
            jax_ep.check()

    raises(["jax_ep."], until_it_fails)
    print(f"   failed after {time.monotonic() - began:.2f} s: {_ffi.describe_faults()}", flush=True)
    jax_ep.finalize()
    print(f"survived, {time.monotonic() - began:.2f} s", flush=True)
    ctypes.CDLL(None).exit(0)  # with NVSHMEM's handlers; JAX's own would wait for the dead process


STEPS = (exchange, gradients, decode, errors, timing, timing_decode, faults, again, killed)


def main():
    parser = argparse.ArgumentParser()
    parser.add_argument("--gpus-per-node", type=int, required=True)
    parser.add_argument("--tokens", type=int, default=4096, help="of a rank, in timings")
    names = [step.__name__ for step in STEPS]
    parser.add_argument("steps", nargs="+", choices=names)
    args = parser.parse_args()
    jax.distributed.initialize(
        num_processes=int(os.environ["JAX_NUM_PROCESSES"]),
        process_id=int(os.environ["JAX_PROCESS_ID"]),
        initialization_timeout=60,
    )
    began = time.monotonic()
    checks = Checks(args.gpus_per_node, args.tokens)
    checks("initialize", lambda: checks.initialize("expert"))
    if "initialize" in checks.failed:
        sys.exit("not started")
    print(f"started within {time.monotonic() - began:.1f} s", *_ffi.describe_groups(), flush=True)
    for name in args.steps:
        STEPS[names.index(name)](checks)
    checks.conclude()
    jax_ep.finalize()
    sys.exit(bool(checks.failed))


if __name__ == "__main__":
    main()
