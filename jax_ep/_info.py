# SPDX-License-Identifier: Apache-2.0
"""`python -m jax_ep info`: versions, devices, and what this installation can do."""

import json
import platform
from importlib import metadata

import jax

from . import _ffi


def facts() -> dict:
    """Everything `info` prints, as plain values."""
    import jax_ep

    devices = jax.devices()
    build = _ffi.build_facts()
    missing = []
    if not build["extension"]:
        missing.append(f"compiled extension: {build['missing']}")
    if not build.get("cuda"):
        missing.append("CUDA kernels: not in this build")
    return {
        "jax_ep": jax_ep.__version__,
        "python": platform.python_version(),
        "jax": jax.__version__,
        "jaxlib": metadata.version("jaxlib"),
        "build": build,
        "devices": [f"{d.platform}:{d.id} {d.device_kind}" for d in devices],
        "implementations": ["xla"],
        "missing": missing,
    }


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
            value = "; ".join(value) or "-"
        print(f"{key:>16}  {value}")
    return 0
