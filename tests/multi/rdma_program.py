# SPDX-License-Identifier: Apache-2.0
"""`rdma_program.py SCENARIO`: the life of NVSHMEM in processes of one GPU each, on one host.

A process prints "survived" when everything went as it must. Rank 1 misbehaves, where one does.
"""

import ctypes
import os
import signal
import sys
import time

import jax
import jax.numpy as jnp

from jax_ep import _ffi, _rdma, _rendezvous
from jax_ep._types import Rdma

STEP_TIMEOUT_S = 10.0
RDMA = Rdma(arena_bytes=2**26)


def start(rdma=RDMA):
    hosts = {d.process_index: _rendezvous.host() for d in jax.devices()}
    return _rdma.start(jax.devices(), hosts, rdma)


def jax_works():
    assert int(jnp.arange(10).sum()) == 45


def works():
    began = time.monotonic()
    world = start()
    print(
        f"started within {time.monotonic() - began:.2f} s", *world.describe(), sep="\n", flush=True
    )
    assert world.rank == jax.process_index() and all(world.direct)
    assert world.arena.free_bytes > 0.99 * RDMA.arena_bytes and start() is world
    began = time.monotonic()
    _rdma.quiet()
    print(f"quiet within {time.monotonic() - began:.4f} s", flush=True)
    jax_works()
    try:
        start(Rdma(arena_bytes=2**27))
    except RuntimeError as error:
        assert "started with another Config" in str(error), error
    else:
        raise AssertionError("expected an error")
    _rdma.stop()
    assert _rdma.world() is None and _ffi.rdma().loaded_nvshmem()[2] < 2
    jax_works()
    try:
        start()
    except RuntimeError as error:
        assert "expected a new process" in str(error), error
    else:
        raise AssertionError("expected an error")
    _rdma.stop()  # nothing to do


def refused():
    """A process that cannot start is named in all of them, and nothing was started."""
    if jax.process_index() == 1:
        os.environ["NVSHMEM_IB_SL"] = "5"
    try:
        start(Rdma(service_level=3, arena_bytes=2**26))
    except RuntimeError as error:
        print(error, flush=True)
        assert "process 1 on" in str(error) and "got '5'" in str(error)
        assert "process 0 on" not in str(error)
    else:
        raise AssertionError("expected an error")
    os.environ.pop("NVSHMEM_IB_SL", None)
    start()
    _rdma.stop()


def killed():
    """The others leave NVSHMEM as it is, in time, and the process ends."""
    start()
    if jax.process_index() == 1:
        os.kill(os.getpid(), signal.SIGKILL)
    began = time.monotonic()
    _rdma.stop()
    took = time.monotonic() - began
    assert took < STEP_TIMEOUT_S + 5, took
    jax_works()
    try:
        start()
    except RuntimeError as error:
        print(error, flush=True)
    else:
        raise AssertionError("expected an error")
    leave()


def killed_at_start():
    """A process dies after the checks and before it starts: the others get an error in time."""
    if jax.process_index() == 1:
        _ffi.rdma().rdma_start = lambda *_: os.kill(os.getpid(), signal.SIGKILL)
    began = time.monotonic()
    try:
        start()
    except RuntimeError as error:
        print(f"after {time.monotonic() - began:.2f} s: {error}", flush=True)
    else:
        raise AssertionError("expected an error")
    jax_works()
    leave()


def leave():
    """End by C's exit, which runs NVSHMEM's handlers; JAX's own would wait for the dead process."""
    print("survived", flush=True)
    ctypes.CDLL(None).exit(0)


if __name__ == "__main__":
    jax.distributed.initialize(
        num_processes=int(os.environ["JAX_NUM_PROCESSES"]),
        process_id=int(os.environ["JAX_PROCESS_ID"]),
        initialization_timeout=60,
    )
    _rdma.STEP_TIMEOUT_S = STEP_TIMEOUT_S
    globals()[sys.argv[1]]()
    print("survived", flush=True)
