# SPDX-License-Identifier: Apache-2.0
"""What must hold before NVSHMEM starts, as it ends the process where it finds out itself."""

import dataclasses
import os
import shutil

from . import _ffi, _nics, _rdma_environment, _rdma_library
from ._types import Rdma

_CHUNK_BYTES = 2**29  # in which NVSHMEM takes device memory for its heap
_SHARED_MEMORY_BYTES = 2**24
_FILES = 256  # and a few for each rank: sockets, memory of peers


@dataclasses.dataclass(frozen=True)
class Here:
    """What a process knows of itself before."""

    num_gpus: int  # of the group, in this process
    library: _rdma_library.Library | None
    missing: str  # why there is none
    driver_cuda: int  # 1000 major + 10 minor
    free_bytes: int  # of the GPU
    open_files: int  # most
    shared_memory_bytes: int  # free in /dev/shm
    nics: tuple[_nics.Nic, ...]
    conflicts: tuple[str, ...]  # between the environment and Config


def look(devices: list[int], variables: dict[str, str]) -> Here:
    """The facts of this process, which drives the CUDA devices `devices` of the group."""
    try:
        library, missing = _rdma_library.open_library(), ""
    except RuntimeError as error:
        library, missing = None, str(error)
    import resource  # not on every platform

    ext = _ffi.rdma()
    shm = "/dev/shm"
    return Here(
        num_gpus=len(devices),
        library=library,
        missing=missing,
        driver_cuda=ext.driver_cuda() if ext else 0,
        free_bytes=ext.free_memory(devices[0])[0] if ext else 0,
        open_files=resource.getrlimit(resource.RLIMIT_NOFILE)[0],
        shared_memory_bytes=shutil.disk_usage(shm).free if os.path.isdir(shm) else 0,
        nics=tuple(_nics.nics()),
        conflicts=tuple(_rdma_environment.conflicts(variables, os.environ)),
    )


def problems(here: Here, rdma: Rdma, num_ranks: int, num_hosts: int):
    """What keeps this process from starting NVSHMEM, a sentence each.

    Args:
        here: facts of this process.
        rdma: as in `Config`.
        num_ranks: processes that start together.
        num_hosts: hosts that they are on.

    Returns:
        list[str], empty if all is well.
    """
    if here.library is None:
        return [here.missing]
    found = list(here.conflicts)
    if here.num_gpus != 1:
        found.append(f"expected one process for each GPU, got {here.num_gpus} in one process")
    status = here.library.status
    if status > 0:
        found.append(
            "expected NVSHMEM not to be in use in this process, got one of status "
            f"{status}, {here.library.path}: another library started it"
        )
    if here.driver_cuda // 1000 < here.library.cuda // 1000:
        found.append(
            f"expected a driver for CUDA {here.library.cuda // 1000} or newer, got one for "
            f"{here.driver_cuda // 1000}.{here.driver_cuda % 1000 // 10}"
        )
    heap = -(-rdma.arena_bytes // _CHUNK_BYTES) * _CHUNK_BYTES + _CHUNK_BYTES
    if here.free_bytes < heap:
        found.append(
            f"expected {heap} bytes of free GPU memory for an arena of {rdma.arena_bytes}, got "
            f"{here.free_bytes}: lower XLA_PYTHON_CLIENT_MEM_FRACTION or Rdma.arena_bytes"
        )
    if 0 <= here.open_files < _FILES + 8 * num_ranks:
        found.append(
            f"expected at least {_FILES + 8 * num_ranks} open files (ulimit -n), got "
            f"{here.open_files}"
        )
    if here.shared_memory_bytes < _SHARED_MEMORY_BYTES:
        found.append(
            f"expected {_SHARED_MEMORY_BYTES} free bytes in /dev/shm, got "
            f"{here.shared_memory_bytes}"
        )
    if num_hosts > 1 and rdma.transport is not None:
        found.extend(_of_nics(here.nics, rdma))
    return found


def _of_nics(nics: tuple[_nics.Nic, ...], rdma: Rdma) -> list[str]:
    active = [nic.name for nic in nics if nic.state == "ACTIVE"]
    if not active:
        return [f"expected an active RDMA NIC, got {', '.join(map(str, nics)) or 'none'}"]
    named = [*rdma.nics, *(entry.rpartition(":")[0] for entry in rdma.nic_map)]
    absent = [name for name in named if not name.startswith("^") and name not in active]
    return [f"Rdma: expected active NICs of {active}, got {name}" for name in absent]


def raise_if_any(by_rank: dict[str, list[str]]) -> None:
    """Raise one error, alike on every rank, for what ranks have said: their name, their problems.

    Raises:
        RuntimeError: a rank has a problem.
    """
    lines = [f"{name}: {problem}" for name, said in by_rank.items() for problem in said]
    if lines:
        raise RuntimeError(
            "jax_ep.initialize: a group that spans nodes could not be set up:\n  "
            + "\n  ".join(lines)
        )


def differing(by_rank: dict[str, dict]) -> dict[str, list[str]]:
    """Facts that every rank must have alike, where a rank's differ from the first one's."""
    (first, want), *others = by_rank.items()
    return {
        name: [
            f"{key}: expected {want[key]!r}, as on {first}, got {got[key]!r}"
            for key in want
            if got[key] != want[key]
        ]
        for name, got in others
    }
