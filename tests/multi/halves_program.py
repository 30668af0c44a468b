# SPDX-License-Identifier: Apache-2.0
"""`halves_program.py`: one of two processes, one GPU each, of which rank 1 dies after its start.

Rank 0 prints "survived" when its done delivered what rank 1 had sent, its next one ended in an error
that names rank and operation within twice the timeout, and this process is alive.
"""

import os
import signal

import jax
import numpy as np
from fault_program import TIMEOUT_S, E, fails, works
from jax.sharding import AxisType, Mesh, NamedSharding
from jax.sharding import PartitionSpec as P

import jax_ep


def main():
    jax.distributed.initialize(
        num_processes=int(os.environ["JAX_NUM_PROCESSES"]),
        process_id=int(os.environ["JAX_PROCESS_ID"]),
        initialization_timeout=60,
    )
    mesh = Mesh(np.array(jax.devices()), ("expert",), axis_types=(AxisType.Auto,))
    jax_ep.initialize(mesh, timeout_s=TIMEOUT_S)
    works(mesh)

    def mapped(f):
        return jax.jit(jax.shard_map(f, mesh=mesh, in_specs=P("expert"), out_specs=P("expert")))

    start = mapped(lambda x, idx: jax_ep.dispatch_start(x, idx, num_experts=E))
    done = mapped(lambda sent: jax_ep.dispatch_done(sent).tokens)
    x = np.arange(2 * 8 * 128, dtype=np.float32).reshape(16, 128)
    idx = np.arange(16, dtype=np.int32)[:, None] % E
    sharding = NamedSharding(mesh, P("expert"))
    put = lambda a: jax.make_array_from_callback(a.shape, sharding, lambda i: a[i])
    args = put(x), put(idx)
    want = np.asarray(done(start(*args)).addressable_shards[0].data)
    sent = jax.block_until_ready(start(*args))
    if jax.process_index() == 1:
        os.kill(os.getpid(), signal.SIGKILL)
    got = np.asarray(done(sent).addressable_shards[0].data)
    np.testing.assert_array_equal(got[:8], want[:8])  # of 16 rows, half are of each rank's experts
    jax_ep.check()
    fails(lambda: done(start(*args)), ["jax_ep.dispatch_done: rank 0 gave up on rank 1"])
    print("survived", flush=True)
    os._exit(0)


if __name__ == "__main__":
    main()
