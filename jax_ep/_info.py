# SPDX-License-Identifier: Apache-2.0
"""`python -m jax_ep info`: versions, devices, and what this installation can do."""

import json
import os
import pathlib
import platform
import re
from importlib import metadata

import jax

from . import _ffi, _nics, _rdma_library, _slots, _sms
from ._types import Config


def facts() -> dict:
    """Everything `info` prints, as plain values."""
    import jax_ep

    devices = jax.devices()
    return {
        "jax_ep": jax_ep.__version__,
        "python": platform.python_version(),
        "jax": jax.__version__,
        "jaxlib": metadata.version("jaxlib"),
        "driver": driver(),
        "build": _ffi.build_facts(),
        "devices": [f"{d.platform}:{d.id} {d.device_kind}" for d in devices],
        "implementations": [*(["cuda"] if _ffi.has_cuda() else []), "xla"],
        "control_block": control_block(num_ranks=max(2, len(devices))),
        "between_nodes": between_nodes(Config(), node_ranks=max(1, len(devices))),
        "small_batches": small_batches(Config(), num_ranks=max(2, len(devices))),
        "default_sms": default_sms(devices),
        "rdma": rdma(),
        "p2p": p2p(devices),
        "groups": _ffi.describe_groups(),
        "missing": _ffi.missing(),
    }


def driver() -> str | None:
    """Version of the NVIDIA driver that is loaded; None without one."""
    path = pathlib.Path("/proc/driver/nvidia/version")
    found = re.search(r" (\d+(\.\d+)+) ", path.read_text()) if path.exists() else None
    return found[1] if found else None


def control_block(num_ranks: int) -> list[str]:
    """The memory that each rank of a group of `num_ranks` keeps for its peers, field by field."""
    return _fields(_ffi.control_layout(num_ranks), f"{num_ranks} ranks")


def between_nodes(config: Config, node_ranks: int) -> list[str]:
    """What each rank of two nodes of `node_ranks` has behind its control block, field by field."""
    rings = config.rdma.ring_slots, config.rdma.ring_slot_bytes
    slots = config.decode_tokens, config.decode_row_bytes
    fields = _ffi.piece_layout(2 * node_ranks, node_ranks, rings, slots)
    return _fields(fields, f"2 nodes of {node_ranks} ranks")


def _fields(fields: list[tuple[str, str, int, int]], where: str) -> list[str]:
    lines = [f"{name}: {size} bytes at {at}, by {writer}" for name, writer, at, size in fields]
    total = sum(size for _, _, _, size in fields)
    return [f"{total} bytes on each of {where}", *lines] if fields else []


def small_batches(config: Config, num_ranks: int) -> list[str]:
    """Which operations go through slots on CUDA, and the memory that these take."""
    lines = [_slots.rule(config)]
    sizes = config.decode_tokens, config.decode_row_bytes
    count = _ffi.slot_bytes(num_ranks, *sizes)
    return lines if count is None else [*lines, f"{count} bytes on each of {num_ranks} ranks"]


def default_sms(devices: list) -> list[str]:
    """SMs that operations take by default: the rule, then each kind of GPU here in one group."""
    lines = _sms.rule()
    gpus = [d for d in devices if d.platform == "gpu"] if _ffi.has_cuda() else []
    local = {d.device_kind: d for d in gpus if d.process_index == jax.process_index()}
    for kind, device in sorted(local.items()):
        speeds = _ffi.device_speeds(device.local_hardware_id)
        lines.append(_sms.of_gpu(kind, speeds, max(2, len(gpus)), 8, 14336))
    return lines


def rdma() -> list[str]:
    """What groups that span nodes would run on here: library, NVSHMEM, NICs. Starts nothing."""
    nics = [f"NIC {nic}" for nic in _nics.nics()] or ["no RDMA NIC"]
    variables = [f"{k}={v}" for k, v in sorted(os.environ.items()) if k.startswith("NVSHMEM_")]
    return [*_rdma_library.describe(), *nics, *_nics.gpu_access(), *variables]


def p2p(devices: list) -> list[str]:
    """Which GPUs of this process address each other's memory."""
    ids = [d.local_hardware_id for d in devices if d.process_index == jax.process_index()]
    on_gpus = _ffi.has_cuda() and all(d.platform == "gpu" for d in devices)
    lines = []
    for a in ids if on_gpus and len(ids) > 1 else []:
        reached = [str(b) for b in ids if b != a and _ffi.can_access_peer(a, b)]
        lines.append(f"GPU {a} reaches {', '.join(reached) or 'none'}")
    return lines


def main(as_json: bool) -> int:
    """Print the facts."""
    values = facts()
    if as_json:
        print(json.dumps(values, indent=2))
        return 0
    for key, value in values.items():
        if isinstance(value, dict):
            value = ", ".join(f"{k} {v}" for k, v in value.items())
        elif isinstance(value, list):
            value = ("\n" + " " * 18).join(value) or "-"
        print(f"{key:>16}  {value}")
    return 0
