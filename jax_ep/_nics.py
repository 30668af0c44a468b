# SPDX-License-Identifier: Apache-2.0
"""RDMA NICs of this host and what lets GPUs use them, as the kernel's files say it."""

import pathlib
import re
from typing import NamedTuple


class Nic(NamedTuple):
    """One port of a NIC."""

    name: str  # as NVSHMEM takes it: "mlx5_0:1"
    link: str  # "InfiniBand" or "Ethernet"
    state: str  # "ACTIVE" if it can be used
    rate: str  # "400 Gb/sec (4X NDR)"

    def __str__(self):
        return f"{self.name} {self.link} {self.state}, {self.rate}"


def nics(root: str = "/") -> list[Nic]:
    """Ports of the host's RDMA NICs."""
    found = pathlib.Path(root, "sys/class/infiniband")
    return [
        Nic(
            f"{port.parent.parent.name}:{port.name}",
            _read(port / "link_layer"),
            _read(port / "state").split(": ")[-1],
            _read(port / "rate"),
        )
        for port in sorted(found.glob("*/ports/*"))
    ]


def gpu_access(root: str = "/") -> list[str]:
    """What of this host lets NICs read GPU memory, and GPUs drive NICs: one line each."""
    host = pathlib.Path(root)
    options = _read(host / "proc/driver/nvidia/params")
    stream = re.search(r"EnableStreamMemOPs: (\d+)", options)
    mapping = re.search(r'RegistryDwords: "(.*)"', options)
    lines = {
        "nvidia_peermem": "loaded"
        if (host / "sys/module/nvidia_peermem").exists()
        else "not loaded",
        "gdrcopy": "loaded" if (host / "dev/gdrdrv").exists() else "not loaded",
        "driver's EnableStreamMemOPs": stream[1] if stream else "unknown",
        "driver's RegistryDwords": f'"{mapping[1]}"' if mapping else "unknown",
    }
    return [f"{name}: {value}" for name, value in lines.items()]


def _read(path: pathlib.Path) -> str:
    try:
        return path.read_text().strip()
    except OSError:
        return ""
