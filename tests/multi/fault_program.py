# SPDX-License-Identifier: Apache-2.0
"""`fault_program.py SCENARIO`: one of two processes, one GPU each, of which rank 1 misbehaves.

Rank 0 prints "survived" when everything went as it must: an error that names rank and operation
within twice the timeout, this process alive, and (where rank 1 lives) the group usable again.
"""

import os
import signal
import sys
import time

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jax.sharding import AxisType, Mesh, NamedSharding
from jax.sharding import PartitionSpec as P

import jax_ep

# XLA's processes wait for each other's autotuning, for ever where their programs differ.
os.environ["XLA_FLAGS"] = os.environ.get("XLA_FLAGS", "") + " --xla_gpu_shard_autotuning=false"

TIMEOUT_S, E, H, K = 3.0, 8, 256, 3


def program(mesh, tokens, seed):
    """A jitted program of 60 operations on `tokens` tokens per rank, and its operands."""
    rng = np.random.default_rng(seed)
    x = rng.standard_normal((2 * tokens, H)).astype(np.float32)
    idx = rng.integers(0, E, (2 * tokens, K)).astype(np.int32)

    def layers(x, idx):
        def step(x, _):
            d = jax_ep.dispatch(x, idx, num_experts=E, zero_tail=True)
            return jax_ep.combine(d.tokens, d.handle) / K, None

        return lax.scan(step, x, None, length=20)[0]

    sharding = NamedSharding(mesh, P("expert"))
    put = lambda a: jax.make_array_from_callback(a.shape, sharding, lambda i: a[i])
    f = jax.jit(jax.shard_map(layers, mesh=mesh, in_specs=P("expert"), out_specs=P("expert")))
    return f, (put(x), put(idx)), x


def works(mesh):
    f, args, x = program(mesh, 64, 0)
    out = jax.block_until_ready(f(*args))
    for shard in out.addressable_shards:
        np.testing.assert_allclose(shard.data, x[shard.index], rtol=1e-3, atol=1e-4)


def fails(call, words):
    """`call()` and then `check` end in an error with `words`, in time."""
    start = time.monotonic()
    try:
        jax.block_until_ready(call())
        jax_ep.check()
    except Exception as error:
        took, said = time.monotonic() - start, str(error)
    else:
        raise AssertionError("expected an error")
    print(f"after {took:.2f} s: {said}", flush=True)
    assert took < 2 * TIMEOUT_S, f"expected less than {2 * TIMEOUT_S} s, took {took}"
    assert all(word in said for word in words), f"expected {words} in: {said}"
    assert int(jnp.arange(10).sum()) == 45  # the process and its GPU are alive


def main(scenario):
    jax.distributed.initialize(
        num_processes=int(os.environ["JAX_NUM_PROCESSES"]),
        process_id=int(os.environ["JAX_PROCESS_ID"]),
        initialization_timeout=60,
    )
    rank = jax.process_index()
    mesh = Mesh(np.array(jax.devices()), ("expert",), axis_types=(AxisType.Auto,))
    jax_ep.initialize(mesh, timeout_s=TIMEOUT_S)
    works(mesh)
    f, args, _ = program(mesh, 64, 1)
    jax.block_until_ready(f(*args))
    if scenario == "killed":
        if rank == 1:
            f(*args)
            os.kill(os.getpid(), signal.SIGKILL)

        def until_it_fails():
            for _ in range(1000):
                jax.block_until_ready(f(*args))
                jax_ep.check()

        fails(until_it_fails, ["rank 0 gave up on rank 1"])
        print("survived", flush=True)
        os._exit(0)
    if scenario == "late":
        if rank == 1:
            time.sleep(2 * TIMEOUT_S)
        fails(lambda: f(*args), ["rank 0", "rank 1", "jax_ep."])
    if scenario == "shapes":
        other, others, _ = program(mesh, 64 if rank == 0 else 48, 2)
        fails(lambda: other(*others), ["rank 0", "rank 1", "jax_ep."])
    time.sleep(1.0)
    jax_ep.initialize(mesh, timeout_s=TIMEOUT_S)
    works(mesh)
    print("survived", flush=True)


if __name__ == "__main__":
    main(sys.argv[1])
