# SPDX-License-Identifier: Apache-2.0
"""`Rdma` as NVSHMEM's environment variables, which it reads once, when it starts."""

from collections.abc import Mapping

from ._types import Rdma

_SIZE_UNITS = {"": 1, "K": 2**10, "M": 2**20, "G": 2**30, "T": 2**40}

#: NVSHMEM's own part of its heap.
_HEAP_RESERVE_BYTES = 2**27


def wanted(rdma: Rdma, num_hosts: int) -> dict[str, str]:
    """The variables that start NVSHMEM as `rdma` says, between processes of `num_hosts` hosts."""
    variables = {
        "NVSHMEM_SYMMETRIC_SIZE": str(rdma.arena_bytes + _HEAP_RESERVE_BYTES),
        "NVSHMEM_HEAP_KIND": "DEVICE",
        "NVSHMEM_DISABLE_P2P": "0",
        "NVSHMEM_DISABLE_NVLS": "1",  # NVLink multicast, which nothing here uses
    }
    numbers = {
        "NVSHMEM_IB_SL": rdma.service_level,
        "NVSHMEM_IB_TRAFFIC_CLASS": rdma.traffic_class,
        "NVSHMEM_IB_GID_INDEX": rdma.gid_index,
    }
    variables |= {name: str(n) for name, n in numbers.items() if n is not None}
    if rdma.nics or rdma.nic_map:
        name = "NVSHMEM_HCA_LIST" if rdma.nics else "NVSHMEM_HCA_PE_MAPPING"
        variables[name] = ",".join(rdma.nics or rdma.nic_map)
        variables["NVSHMEM_ENABLE_NIC_PE_MAPPING"] = "1"  # without it, both are ignored
    if num_hosts == 1:
        variables["NVSHMEM_REMOTE_TRANSPORT"] = "none"  # all by P2P
    elif rdma.transport == "ibgda":
        variables["NVSHMEM_IB_ENABLE_IBGDA"] = "1"
    elif rdma.transport == "ibrc":
        variables["NVSHMEM_IB_ENABLE_IBGDA"] = "0"
        variables["NVSHMEM_REMOTE_TRANSPORT"] = "ibrc"
    return variables


def conflicts(variables: Mapping[str, str], environment: Mapping[str, str]) -> list[str]:
    """What `environment` has that contradicts `variables`."""
    lines = []
    for name, value in variables.items():
        got = environment.get(name)
        if got is None or _same(got, value):
            continue
        if name == "NVSHMEM_SYMMETRIC_SIZE" and _bytes(got) >= int(value):
            continue
        lines.append(f"{name}: expected unset or {value!r}, as Config has it, got {got!r}")
    return lines


def _same(a: str, b: str) -> bool:
    truths = {"true": "1", "yes": "1", "on": "1", "false": "0", "no": "0", "off": "0"}
    a, b = a.strip().lower(), b.strip().lower()
    return truths.get(a, a) == truths.get(b, b)


def _bytes(text: str) -> int:
    """A size as NVSHMEM takes it, "1.5G"; -1 if it is none."""
    number = text.strip().rstrip("kKmMgGtT")
    unit = text.strip()[len(number) :][:1].upper()
    try:
        return int(float(number) * _SIZE_UNITS[unit])
    except ValueError:
        return -1
