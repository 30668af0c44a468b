# SPDX-License-Identifier: Apache-2.0
"""Under `tests/launch.py` this process is one of several; without it, one with all devices."""

import os
import sys

import jax
from conftest import LAUNCHED

if LAUNCHED:
    jax.config.update("jax_cpu_collectives_implementation", "gloo")
    jax.distributed.initialize(  # the coordinator's address: JAX_COORDINATOR_ADDRESS
        num_processes=int(os.environ["JAX_NUM_PROCESSES"]),
        process_id=int(os.environ["JAX_PROCESS_ID"]),
        initialization_timeout=60,
    )


def pytest_sessionfinish(session, exitstatus):
    session.config.exit_status = int(exitstatus)


def pytest_unconfigure(config):
    """A rank that failed leaves at once: JAX's own shutdown waits for ranks that wait for it."""
    status = getattr(config, "exit_status", 0)
    if LAUNCHED and status:
        sys.stdout.flush()
        os._exit(status)
