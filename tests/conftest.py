# SPDX-License-Identifier: Apache-2.0
"""Eight host devices, set before JAX starts; meshes and a runner shared by the tests."""

import os

os.environ.setdefault("NPROC", "64")  # XLA:CPU can starve with many devices on few cores
if "xla_force_host_platform_device_count" not in os.environ.get("XLA_FLAGS", ""):
    flags = os.environ.get("XLA_FLAGS", "")
    os.environ["XLA_FLAGS"] = f"{flags} --xla_force_host_platform_device_count=8".strip()

import jax
import numpy as np
import pytest
from jax.sharding import AxisType

IMPLEMENTATIONS = ["xla"]


def make_mesh(shape=(8,), names=("expert",), axis_type=AxisType.Auto):
    """A mesh over the first devices."""
    count = int(np.prod(shape))
    return jax.make_mesh(
        shape, names, axis_types=(axis_type,) * len(names), devices=jax.devices()[:count]
    )


@pytest.fixture(autouse=True)
def few_compiled_programs():
    """Host memory: random shapes compile a program each."""
    yield
    jax.clear_caches()
