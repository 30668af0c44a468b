# SPDX-License-Identifier: Apache-2.0
"""Between nodes, the host's side: settings, checks before NVSHMEM starts, the arena, the library."""

import dataclasses
import itertools
import os
import re

import jax
import numpy as np
import pytest
from jax.sharding import Mesh

import jax_ep
from jax_ep import _ffi, _nics, _rdma_checks, _rdma_environment, _rdma_library
from jax_ep._arena import ALIGNMENT, Arena


@pytest.mark.parametrize(
    "wrong",
    [
        dict(service_level=16),
        dict(service_level=True),
        dict(traffic_class=-1),
        dict(gid_index="3"),
        dict(nics=["mlx5_0:1"]),
        dict(nics=("mlx5_0",)),
        dict(nic_map=("mlx5_0:1",)),
        dict(nics=("mlx5_0:1",), nic_map=("mlx5_0:1:2",)),
        dict(transport="tcp"),
        dict(arena_bytes=0),
        dict(ring_slots=0),
        dict(ring_slot_bytes=1000),
        dict(ring_slot_bytes=2**31),
    ],
)
def test_settings_that_are_none(wrong):
    with pytest.raises(ValueError, match=f"Rdma.{next(iter(wrong))}.*expected.*got"):
        jax_ep.Rdma(**wrong)


def test_config_carries_them():
    config = jax_ep.Config(gpus_per_node=2, rdma=jax_ep.Rdma(service_level=3))
    assert hash(config) == hash(dataclasses.replace(config))
    with pytest.raises(ValueError, match="Config.gpus_per_node: expected None or a positive int"):
        jax_ep.Config(gpus_per_node=0)
    with pytest.raises(ValueError, match="Config.rdma: expected a jax_ep.Rdma"):
        jax_ep.Config(rdma=dict(service_level=3))  # pyright: ignore[reportArgumentType]


def test_gpus_per_node_divides_the_group():
    mesh = Mesh(np.array(jax.devices()[:4]), ("expert",))
    with pytest.raises(ValueError, match="gpus_per_node to divide the 4 ranks of a group, got 3"):
        jax_ep.initialize(mesh, config=jax_ep.Config(gpus_per_node=3))


ALWAYS = {
    "NVSHMEM_SYMMETRIC_SIZE": str(2**29 + 2**27),
    "NVSHMEM_HEAP_KIND": "DEVICE",
    "NVSHMEM_DISABLE_P2P": "0",
    "NVSHMEM_DISABLE_NVLS": "1",
}


@pytest.mark.parametrize(
    "settings, num_hosts, want",
    [
        (dict(), 1, {"NVSHMEM_REMOTE_TRANSPORT": "none"}),
        (dict(), 2, {"NVSHMEM_IB_ENABLE_IBGDA": "1"}),
        (dict(transport=None), 2, {}),
        (
            dict(transport="ibrc"),
            2,
            {"NVSHMEM_IB_ENABLE_IBGDA": "0", "NVSHMEM_REMOTE_TRANSPORT": "ibrc"},
        ),
        (
            dict(transport=None, service_level=0, traffic_class=106, gid_index=3),
            2,
            {
                "NVSHMEM_IB_SL": "0",
                "NVSHMEM_IB_TRAFFIC_CLASS": "106",
                "NVSHMEM_IB_GID_INDEX": "3",
            },
        ),
        (
            dict(transport=None, nics=("^mlx5_4:1", "^mlx5_5:1")),
            2,
            {"NVSHMEM_HCA_LIST": "^mlx5_4:1,^mlx5_5:1", "NVSHMEM_ENABLE_NIC_PE_MAPPING": "1"},
        ),
        (
            dict(transport=None, nic_map=("mlx5_0:1:2", "mlx5_1:1:2")),
            2,
            {
                "NVSHMEM_HCA_PE_MAPPING": "mlx5_0:1:2,mlx5_1:1:2",
                "NVSHMEM_ENABLE_NIC_PE_MAPPING": "1",
            },
        ),
    ],
)
def test_environment(settings, num_hosts, want):
    assert _rdma_environment.wanted(jax_ep.Rdma(**settings), num_hosts) == ALWAYS | want


@pytest.mark.parametrize(
    "environment, expected",
    [
        ({}, None),
        ({"NVSHMEM_IB_SL": "3", "NVSHMEM_DISABLE_NVLS": "true", "NVSHMEM_DEBUG": "INFO"}, None),
        ({"NVSHMEM_IB_SL": "4"}, "NVSHMEM_IB_SL: expected unset or '3'.*got '4'"),
        ({"NVSHMEM_DISABLE_P2P": "yes"}, "NVSHMEM_DISABLE_P2P: expected unset or '0'"),
        ({"NVSHMEM_SYMMETRIC_SIZE": "1.5G"}, None),
        ({"NVSHMEM_SYMMETRIC_SIZE": "512m"}, "NVSHMEM_SYMMETRIC_SIZE"),
        ({"NVSHMEM_SYMMETRIC_SIZE": "lots"}, "NVSHMEM_SYMMETRIC_SIZE"),
    ],
)
def test_environment_that_contradicts(environment, expected):
    variables = _rdma_environment.wanted(jax_ep.Rdma(service_level=3), 2)
    found = _rdma_environment.conflicts(variables, environment)
    assert len(found) == (expected is not None)
    if expected:
        assert re.search(expected, found[0]), found[0]


NIC = _nics.Nic("mlx5_0:1", "InfiniBand", "ACTIVE", "400 Gb/sec (4X NDR)")
LIBRARY = _rdma_library.Library((3, 3, 20), (3, 4, 5), "/lib/nvshmem.so", 13000, 0)
HERE = _rdma_checks.Here(
    num_gpus=1,
    library=LIBRARY,
    missing="",
    driver_cuda=13000,
    free_bytes=2**34,
    open_files=1024,
    shared_memory_bytes=2**26,
    nics=(NIC,),
    conflicts=(),
)


def problems(rdma=None, ranks=16, hosts=2, **changes):
    here = dataclasses.replace(HERE, **changes)
    return _rdma_checks.problems(here, rdma or jax_ep.Rdma(), ranks, hosts)


def test_nothing_is_wrong():
    assert problems() == []
    assert problems(hosts=1, nics=()) == []
    assert problems(jax_ep.Rdma(transport=None), nics=()) == []
    assert problems(open_files=-1) == []  # unlimited


@pytest.mark.parametrize(
    "changes, expected",
    [
        (dict(library=None, missing="no library"), "no library"),
        (dict(num_gpus=4), "one process for each GPU, got 4 in one process"),
        (dict(library=LIBRARY._replace(status=2)), "not to be in use.*status 2, /lib/nvshmem.so"),
        (dict(library=LIBRARY._replace(status=1)), "not to be in use"),
        (dict(driver_cuda=12080), "a driver for CUDA 13 or newer, got one for 12.8"),
        (dict(free_bytes=2**29), f"expected {2**30} bytes of free GPU memory.*MEM_FRACTION"),
        (dict(open_files=256), "at least 384 open files.*got 256"),
        (dict(shared_memory_bytes=0), "/dev/shm, got 0"),
        (dict(nics=()), "an active RDMA NIC, got none"),
        (dict(nics=(NIC._replace(state="DOWN"),)), "an active RDMA NIC, got mlx5_0:1 .* DOWN"),
        (dict(rdma=jax_ep.Rdma(nics=("mlx5_1:1",))), r"NICs of \['mlx5_0:1'\], got mlx5_1:1"),
        (dict(rdma=jax_ep.Rdma(nic_map=("mlx5_1:1:2",))), "got mlx5_1:1"),
        (dict(conflicts=("NVSHMEM_IB_SL: wrong",)), "NVSHMEM_IB_SL: wrong"),
    ],
)
def test_one_thing_is_wrong(changes, expected):
    (problem,) = problems(**changes)
    assert re.search(expected, problem), problem


def test_the_error_names_every_rank_that_has_a_problem():
    said = {"process 0 on a": [], "process 1 on b": ["no NIC", "no memory"]}
    with pytest.raises(RuntimeError) as error:
        _rdma_checks.raise_if_any(said)
    assert str(error.value).splitlines()[1:] == [
        "  process 1 on b: no NIC",
        "  process 1 on b: no memory",
    ]
    _rdma_checks.raise_if_any({"process 0 on a": []})


def test_ranks_must_be_alike():
    facts = {"a": {"NVSHMEM": "3.4", "x": 1}, "b": {"NVSHMEM": "3.3", "x": 1}}
    assert _rdma_checks.differing(facts) == {"b": ["NVSHMEM: expected '3.4', as on a, got '3.3'"]}


@pytest.mark.parametrize(
    "built, found, fit",
    [
        ("3.3.20", "3.3.20", True),
        ("3.3.20", "3.4.5", True),
        ("3.4.5", "3.3.20", False),  # NVSHMEM refuses device code that is newer
        ("3.3.20", "3.3.9", False),
        ("3.3.20", "3.5.21", False),  # another state of IBGDA
        ("3.5.21", "3.7.2", True),
        ("3.5.21", "3.8.0", False),  # a longer state
        ("3.8.0", "3.9.1", True),
        ("3.8.0", "4.0.0", False),
    ],
)
def test_which_nvshmem_fits(built, found, fit):
    versions = [tuple(map(int, v.split("."))) for v in (built, found)]
    assert _rdma_library.fits(*versions) == fit


def test_the_range_that_pip_is_told():
    assert _rdma_library.range_of((3, 3, 20)) == ">=3.3.20,<3.5"
    assert _rdma_library.range_of((3, 8, 0)) == ">=3.8.0,<4"


def test_arena():
    arena = Arena(10 * ALIGNMENT)
    assert [arena.take("a", 1), arena.take("b", 3 * ALIGNMENT)] == [0, ALIGNMENT]
    assert arena.take("c", 2 * ALIGNMENT + 1) == 4 * ALIGNMENT
    assert arena.free_bytes == 3 * ALIGNMENT
    with pytest.raises(MemoryError, match=f"a free stretch of {4 * ALIGNMENT} bytes for 'd', got"):
        arena.take("d", 4 * ALIGNMENT)
    arena.give_back("b")
    assert arena.take("d", 2 * ALIGNMENT) == ALIGNMENT  # the first that is long enough
    assert arena.take("e", 2 * ALIGNMENT) == 7 * ALIGNMENT
    assert arena.take("f", 0) == 3 * ALIGNMENT
    with pytest.raises(ValueError, match="expected a new piece, got 'a' again"):
        arena.take("a", 1)


def test_arenas_of_random_pieces_never_overlap():
    random, arena, taken = np.random.default_rng(0), Arena(64 * ALIGNMENT), {}
    for step in range(400):
        if taken and random.integers(2):
            key = random.choice(sorted(taken))
            arena.give_back(key)
            del taken[key]
        else:
            size = int(random.integers(1, 12 * ALIGNMENT))
            try:
                taken[f"{step}"] = arena.take(f"{step}", size), size
            except MemoryError:
                gaps = sorted([*taken.values(), (arena.num_bytes, 0)])
                ends = [0, *(-(-(at + n) // ALIGNMENT) * ALIGNMENT for at, n in gaps)]
                assert all(at - end < size for (at, _), end in zip(gaps, ends, strict=False))
        spans = sorted(taken.values())
        assert all(a + n <= b for (a, n), (b, _) in itertools.pairwise(spans))
        assert all(at % ALIGNMENT == 0 for at, _ in spans)
    assert arena.free_bytes < arena.num_bytes


def test_nics_of_a_host(tmp_path):
    files = {
        "sys/class/infiniband/mlx5_1/ports/1/state": "1: DOWN\n",
        "sys/class/infiniband/mlx5_0/ports/1/state": "4: ACTIVE\n",
        "sys/class/infiniband/mlx5_0/ports/1/link_layer": "InfiniBand\n",
        "sys/class/infiniband/mlx5_0/ports/1/rate": "400 Gb/sec (4X NDR)\n",
        "sys/module/nvidia_peermem/version": "580\n",
        "proc/driver/nvidia/params": 'EnableStreamMemOPs: 1\nRegistryDwords: "PeerMappingOverride=1"',
    }
    for name, text in files.items():
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_text(text)
    first, second = _nics.nics(str(tmp_path))
    assert first == NIC and str(first) == "mlx5_0:1 InfiniBand ACTIVE, 400 Gb/sec (4X NDR)"
    assert second == _nics.Nic("mlx5_1:1", "", "DOWN", "")
    assert _nics.gpu_access(str(tmp_path)) == [
        "nvidia_peermem: loaded",
        "gdrcopy: not loaded",
        "driver's EnableStreamMemOPs: 1",
        """driver's RegistryDwords: "PeerMappingOverride=1\"""",
    ]


def test_what_is_missing_is_said():
    """Whatever this installation has: a library that opens, or what to do about it."""
    lines = _rdma_library.describe()
    if _ffi.rdma() is None:
        assert lines == ["this build of jax_ep has no CUDA kernels"]
    elif not _ffi.beside_extension(_rdma_library.LIBRARY).exists():
        assert "JAX_EP_RDMA=cuda1" in lines[0]
    elif _rdma_library._wheel() is None:
        assert 'pip install "jax-ep[cuda1' in lines[0]
    else:
        assert lines[0].startswith("libjax_ep_rdma.so: device code of NVSHMEM 3.")
        assert lines[1].startswith("NVSHMEM 3.") and os.path.exists(lines[1].split(", ")[1])
        library = _rdma_library.open_library()
        assert library.status == 0  # nothing was started
        assert len(_ffi.rdma().rdma_unique_id()) == 128


def test_device_linking_reaches_the_library():
    """Where the library was built: its kernel calls NVSHMEM's device code, linked into it."""
    if _ffi.rdma() is None or not _ffi.beside_extension(_rdma_library.LIBRARY).exists():
        pytest.skip("this build has no RDMA library")
    code = _ffi.beside_extension(_rdma_library.LIBRARY).read_bytes()
    assert b"pass_a_word" in code and b"nvshmemi_transfer_put_signal" in code
