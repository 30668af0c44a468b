# SPDX-License-Identifier: Apache-2.0
"""The one module that imports the compiled extension, which is optional.

An installation from source has all of it in `jax_ep`. Of wheels, `jax-ep` has the part without CUDA,
and `jax-ep-cuda13` or `jax-ep-cuda12` the whole extension, in a package of its own.
"""

import functools
import importlib
import importlib.util
import pathlib
from typing import Any

import jax

from jax_ep import __version__

NOT_BUILT = (
    "not built: `pip install` found no working C++ compiler or the build failed (`pip install -v` "
    "shows it), or this checkout was never installed"
)
NO_CUDA = (
    "not in this build, which found no nvcc; wheels have them: "
    '`pip install "jax-ep[cuda13]"` (or cuda12)'
)
CUDA_PARTS = ("jax_ep_cuda13", "jax_ep_cuda12")


def _load(package: str) -> tuple[Any, str | None]:
    """The extension in a package, if it has a good one, else what is wrong; neither without one."""
    if not (importlib.util.find_spec(package) and importlib.util.find_spec(f"{package}._ext")):
        return None, None
    try:
        ext = importlib.import_module(f"{package}._ext")
    except ImportError as error:
        return None, f"built but not loadable: {error}"
    version = ext.build_facts()["version"]
    if version != __version__:
        return None, f"expected version {__version__}, as jax-ep has it, got {version}"
    return ext, None


def _choose() -> tuple[Any, tuple[str, ...]]:
    """The extension to use, with CUDA kernels if any has them; what is missing, a line each."""
    own, wrong = _load("jax_ep")
    if hasattr(own, "handlers"):
        return own, ()
    missing = []
    for part in CUDA_PARTS:
        ext, wrong_part = _load(part)
        if ext is not None:
            return ext, tuple(missing)
        if wrong_part:
            missing.append(f"{part.replace('_', '-')}: {wrong_part}")
    if own is None:
        missing.append(f"compiled extension: {wrong or NOT_BUILT}")
    return own, (*missing, f"CUDA kernels: {NO_CUDA}")


_ext, _missing = _choose()


def missing() -> tuple[str, ...]:
    """What this installation lacks, and why; a line each."""
    return _missing


def build_facts() -> dict:
    """What the extension says of itself, and the package it is in; or that there is none."""
    if _ext is None:
        return {"extension": False}
    return {"extension": True, "package": _ext.__package__, **_ext.build_facts()}


def has_cuda() -> bool:
    """Whether the extension holds CUDA kernels; registers their FFI targets the first time."""
    return _register()


@functools.cache
def _register() -> bool:
    if _ext is None or not hasattr(_ext, "handlers"):
        return False
    for name, handler in _ext.handlers().items():
        jax.ffi.register_ffi_target(name, handler, platform="CUDA")
    return True


def plan_scratch_words(num_ranks: int, num_experts: int, num_tokens: int, top_k: int) -> int:
    """32-bit words of scratch that the plan kernel wants."""
    return _ext.plan_scratch_words(num_ranks, num_experts, num_tokens, top_k)


def make_group(key: str, devices: list[int], slot_tokens: int, slot_row_bytes: int) -> bool:
    """Make the group `key`: the CUDA device of each rank, -1 for ranks of other processes.

    Its slots take `slot_tokens` tokens from each rank, of `slot_row_bytes` a row.
    """
    return _ext.make_group(key, devices, slot_tokens, slot_row_bytes)


def make_node_group(
    key: str,
    devices: list[int],
    address: int,
    node_ranks: int,
    elements: list[int],
    rings: tuple[int, int],
    slots: tuple[int, int],
) -> bool:
    """Make the group `key`, which spans nodes of `node_ranks`; `devices` as in `make_group`.

    Its control block, slots for so many tokens of so many bytes, and rings, of so many slots of so
    many bytes, are at `address` of the arena; `elements`: NVSHMEM's rank of each rank.
    """
    return _ext.make_node_group(key, devices, address, node_ranks, elements, rings, slots)


def slot_bytes(num_ranks: int, tokens: int, row_bytes: int) -> int | None:
    """Bytes of the slots on each rank of a group; None if this build has none."""
    function = getattr(_ext, "slot_bytes", None)
    return None if function is None else function(num_ranks, tokens, row_bytes)


def export_rank(key: str, rank: int, in_pool: int) -> list[tuple[int, int]]:
    """Descriptor and bytes of the memory around `in_pool`, and of a rank's control block.

    The latter unless it is in the arena, as in a group that spans nodes.
    """
    return _ext.export_rank(key, rank, in_pool)


def attach_rank(key: str, rank: int, exported: list[tuple[int, int]]) -> None:
    """Map a rank of another process: what `export_rank` gave there."""
    _ext.attach_rank(key, rank, exported)


def start_group(signature: str, key: str, generation: int, timeout_s: float, sharing: int) -> None:
    """Start a generation of the group `key`; `sharing` of its ranks are on one GPU."""
    _ext.start_group(signature, key, generation, timeout_s, sharing)


def is_broken(signature: str) -> bool:
    """Whether a rank of this process failed, or was told of a failure, in these groups."""
    return _ext.is_broken(signature)


def device_bus_id(device: int) -> str:
    """PCI bus id of a CUDA device: the same in every process."""
    return _ext.device_bus_id(device)


def default_sms_numbers() -> tuple[float, float, float, float, int] | None:
    """The numbers of the rule, or None without the extension.

    GB/s through memory of an SM in dispatch and in combine, us that each sum takes it besides, the
    factor for spare SMs, and SMs left to others.
    """
    return getattr(_ext, "default_sms_numbers", None)


def default_sms(
    speeds: tuple[int, float, float], num_ranks: int, top_k: int, row_bytes: int
) -> dict[str, int]:
    """SMs of dispatch and combine on a GPU of `(SMs, GB/s of memory, of links)`."""
    return _ext.default_sms(*speeds, num_ranks, top_k, row_bytes)


def device_speeds(device: int) -> tuple[int, float, float]:
    """SMs, and GB/s of memory and links, of a CUDA device; 0 where it does not say."""
    return _ext.device_speeds(device)


def finalize_groups() -> None:
    """Take all groups out of use."""
    if has_cuda():
        _ext.finalize_groups()


def describe_faults() -> str:
    """What went wrong first on the devices of this process; empty if nothing did."""
    return _ext.describe_faults() if has_cuda() else ""


def describe_groups() -> list[str]:
    """One line for each group in use."""
    return _ext.describe_groups() if has_cuda() else []


def record_stats(signature: str, on: bool) -> None:
    """Whether operations of the groups under a signature record timings from now on."""
    _ext.record_stats(signature, on)


def read_stats() -> list[tuple[int, int, int, bytes]]:
    """CUDA device, rank, uint64 words of a record, and records, of each rank that records."""
    function = getattr(_ext, "read_stats", None)
    return [] if function is None else function()


def control_layout(num_ranks: int) -> list[tuple[str, str, int, int]]:
    """Name, writer, offset and bytes of each field of a rank's control block."""
    return _ext.control_layout(num_ranks) if has_cuda() else []


def piece_layout(
    num_ranks: int, node_ranks: int, rings: tuple[int, int], slots: tuple[int, int]
) -> list[tuple[str, str, int, int]]:
    """The same of what lies behind it in a group of nodes of `node_ranks`; as `make_node_group`."""
    return _ext.piece_layout(num_ranks, node_ranks, rings, slots) if has_cuda() else []


def can_access_peer(device: int, peer: int) -> bool:
    """Whether a CUDA device addresses the memory of another one of this process."""
    return _ext.can_access_peer(device, peer)


def rdma() -> Any:
    """The extension's functions around NVSHMEM and the RDMA library; None if it has none."""
    return _ext if hasattr(_ext, "rdma_open") else None


def beside_extension(name: str) -> pathlib.Path:
    """A file of the package's compiled part."""
    return pathlib.Path(_ext.__file__).with_name(name)
