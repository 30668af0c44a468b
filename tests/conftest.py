# SPDX-License-Identifier: Apache-2.0
"""Eight host devices, set before JAX starts; where portable tests run; meshes shared by the tests."""

import math
import os

os.environ.setdefault("NPROC", "64")  # XLA:CPU can starve with many devices on few cores
if "xla_force_host_platform_device_count" not in os.environ.get("XLA_FLAGS", ""):
    flags = os.environ.get("XLA_FLAGS", "")
    os.environ["XLA_FLAGS"] = f"{flags} --xla_force_host_platform_device_count=8".strip()

import jax
import numpy as np
import pytest
from jax.sharding import AxisType

import jax_ep

LAUNCHED = "JAX_PROCESS_ID" in os.environ  # by tests/launch.py, one of several processes
TIMEOUT_S = 20.0 if LAUNCHED else 10.0  # processes compile each for itself
_PLATFORMS = ["cpu", pytest.param("gpu", marks=pytest.mark.gpu)]
#: The `pytestmark` of files whose tests run on host devices and, marked `gpu`, on GPUs.
PORTABLE = [pytest.mark.parametrize("platform", _PLATFORMS, indirect=True, scope="session")]
if LAUNCHED:
    PORTABLE = []  # the launcher has chosen
_devices = None


def pytest_addoption(parser):
    parser.addoption(
        *("--devices", "-D"),
        type=int,
        default=8,
        metavar="N",
        help="portable tests take at most N host devices or GPUs (default: %(default)s)",
    )


@pytest.hookimpl(trylast=True)
def pytest_collection_modifyitems(items):
    """Where no chosen test needs a GPU, JAX and the programs that tests start leave them alone."""
    gpus = any(item.get_closest_marker(mark) for item in items for mark in ("gpu", "multi"))
    if not (gpus or LAUNCHED or os.environ.get("JAX_PLATFORMS")):
        os.environ["JAX_PLATFORMS"] = "cpu"
        jax.config.update("jax_platforms", "cpu")


@pytest.fixture(scope="session", autouse=True)
def platform(request):
    """Gives a portable test its devices, as many as a power of two; other tests have JAX's own."""
    global _devices
    name = getattr(request, "param", None)
    if name is None:
        yield
        return
    found = jax.devices(name)
    count = min(len(found), request.config.getoption("--devices"))
    _devices = found[: 2 ** int(math.log2(count))]
    elsewhere = None if name == jax.default_backend() else _devices[0]
    precision = "highest" if name == "gpu" else None  # no TF32
    with jax.default_device(elsewhere), jax.default_matmul_precision(precision):
        yield
    _devices = None


def devices():
    """Those of the running test."""
    return _devices or jax.devices()


def on_gpus():
    return devices()[0].platform == "gpu"


def fit(shape):
    """A mesh's shape, its largest axis halved until there are devices enough."""
    shape = list(shape)
    while math.prod(shape) > len(devices()):
        shape[shape.index(max(shape))] //= 2
    return tuple(shape)


def ranks(most=8):
    """The size of a group: `most` if there are as many devices."""
    return fit((most,))[0]


def make_mesh(shape=None, names=("expert",), axis_type=AxisType.Auto, group="expert"):
    """A mesh over the first devices, by default all in one group; its groups are initialized."""
    shape = shape or (ranks(),)
    mesh = jax.make_mesh(
        shape,
        names,
        axis_types=(axis_type,) * len(names),
        devices=devices()[: math.prod(shape)],
    )
    jax_ep.initialize(mesh, group, timeout_s=TIMEOUT_S)
    return mesh


def poison_memory():
    """What freed buffers hold is NaN, so that an unwritten row cannot pass for a right one."""
    poison = [jax.device_put(np.full(2**26, np.nan, np.float32), d) for d in devices()]
    jax.block_until_ready(poison)


@pytest.fixture(autouse=True)
def around_each_test(platform):
    """GPU memory poisoned before and no failure recorded after; few compiled programs in memory."""
    portable_on_gpus = _devices is not None and on_gpus()
    if portable_on_gpus:
        poison_memory()
    yield
    jax.clear_caches()  # random shapes compile a program each
    if portable_on_gpus:
        try:
            jax_ep.check()
        except RuntimeError:
            jax_ep.finalize()  # the next test starts anew
            raise
