# SPDX-License-Identifier: Apache-2.0
"""libjax_ep_rdma.so and the NVSHMEM it runs with: where they are and whether they fit.

NVSHMEM's device code is inside the library, its host code in the wheel. Version 3.5 changed the
state that they share (`nvshmemi_ibgda_device_state_t`, as its release notes say of IBGDA), 3.8 made
it longer (`nvshmemi_device_host_state_t`); NVSHMEM itself only demands a host that is not older.
"""

import importlib.util
import pathlib
from typing import Any, NamedTuple

from . import _ffi

Version = tuple[int, int, int]

LIBRARY = "libjax_ep_rdma.so"
_HOST_LIBRARY = "libnvshmem_host.so.3"

#: First versions whose host code no longer fits older device code.
_BREAKS: tuple[Version, ...] = ((3, 5, 0), (3, 8, 0))


class Library(NamedTuple):
    """The RDMA library, open, and its NVSHMEM."""

    built: Version  # NVSHMEM whose device code it holds
    found: Version  # NVSHMEM that is loaded
    path: str  # of that
    cuda: int  # inside the library: 1000 major + 10 minor
    status: int  # of NVSHMEM: 0 not started, 1 bootstrapped, 2 and more in use


def fits(built: Version, found: Version) -> bool:
    """Whether device code of NVSHMEM `built` runs with the host library `found`."""
    return found[0] == built[0] and built <= found and _series(built) == _series(found)


def _series(version: Version) -> int:
    return sum(version >= first for first in _BREAKS)


def range_of(built: Version) -> str:
    """The versions that fit, as pip takes them."""
    newer = [first for first in _BREAKS if first > built]
    end = "{}.{}".format(*newer[0]) if newer else str(built[0] + 1)
    return ">={}.{}.{},<{}".format(*built, end)


def open_library() -> Library:
    """The RDMA library with its NVSHMEM; loads both, starts nothing.

    Raises:
        RuntimeError: one of them is missing, or they do not fit: says what to install.
    """
    ext, extra = _ffi.rdma(), _extra()
    if ext is None:
        raise RuntimeError("this build of jax_ep has no CUDA kernels")
    library = _ffi.beside_extension(LIBRARY)
    if not library.exists():
        raise RuntimeError(
            f"this build of jax_ep has no {LIBRARY}: install it with JAX_EP_RDMA={extra} in the "
            "environment, as docs/multi_node.md shows"
        )
    wheel = _wheel()
    if ext.loaded_nvshmem() is None and wheel is None:
        raise RuntimeError(f'NVSHMEM is not installed: pip install "jax-ep[{extra}]"')
    path, found, status = ext.load_nvshmem(str(wheel))
    ext.rdma_open(str(library))
    facts = ext.rdma_facts()
    built = facts["built"]
    if not fits(built, found):
        raise RuntimeError(
            f"NVSHMEM: expected {range_of(built)}, as {LIBRARY} holds device code of "
            f"{_dotted(built)}, got {_dotted(found)} of {path}"
        )
    return Library(built, found, path, facts["cuda"], status)


def describe() -> list[str]:
    """The library and its NVSHMEM, or what is missing, in a line or two; starts nothing."""
    try:
        library = open_library()
    except RuntimeError as error:
        return [str(error)]
    cuda = f"{library.cuda // 1000}.{library.cuda % 1000 // 10}"
    return [
        f"{LIBRARY}: device code of NVSHMEM {_dotted(library.built)}, CUDA {cuda}",
        f"NVSHMEM {_dotted(library.found)}, {library.path}",
    ]


def _dotted(version: Version) -> str:
    return ".".join(map(str, version))


def _extra() -> str:
    """The extra of pyproject.toml that fits this build."""
    cuda = _ffi.build_facts().get("cuda") or "13"
    return f"cuda{cuda.split('.')[0]}"


def _wheel() -> pathlib.Path | None:
    """The host library of the NVSHMEM wheel of this environment."""
    spec: Any = importlib.util.find_spec("nvidia")
    for folder in spec.submodule_search_locations if spec else ():
        library = pathlib.Path(folder, "nvshmem", "lib", _HOST_LIBRARY)
        if library.exists():
            return library
    return None
