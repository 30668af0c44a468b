# SPDX-License-Identifier: Apache-2.0
"""Life of a group: `initialize`, `finalize`, `check`.

Without CUDA kernels there is nothing to set up; what can be wrong is checked all the same, so that
a program written on a laptop is right on GPUs.
"""

from jax.sharding import Mesh

from ._check import axis_tuple

_groups: dict[tuple[tuple[str, int], ...], Mesh] = {}


def initialize(mesh: Mesh, axis_name="expert", *, timeout_s: float = 60.0) -> None:
    """Set up the group of every line of devices along `axis_name`; once, outside jit.

    Idempotent. Needed before the first operation on CUDA; elsewhere it only checks its arguments.

    Args:
        mesh: a concrete `jax.sharding.Mesh` of all devices that take part.
        axis_name: the mesh axis, or tuple of axes, along which devices exchange tokens.
        timeout_s: seconds after which a wait for a peer ends in an error.

    Raises:
        TypeError: `mesh` is not a concrete mesh.
        ValueError: an unknown axis; a timeout that is not positive; a mesh of the same axes and
            sizes but another order of devices than an earlier one.
    """
    if not isinstance(mesh, Mesh):
        raise TypeError(f"mesh: expected a jax.sharding.Mesh, got {type(mesh).__name__}")
    axes = axis_tuple(axis_name)
    for axis in axes:
        if axis not in mesh.axis_names:
            raise ValueError(
                f"axis_name: expected axes of the mesh {mesh.axis_names}, got {axis_name!r}"
            )
    if not isinstance(timeout_s, (int, float)) or not 0 < timeout_s < float("inf"):
        raise ValueError(f"timeout_s: expected a positive number of seconds, got {timeout_s!r}")
    signature = (*mesh.shape.items(), *((axis, 0) for axis in axes))
    known = _groups.get(signature)
    if known is not None and list(known.devices.flat) != list(mesh.devices.flat):
        raise ValueError(
            f"mesh: a group over {dict(mesh.shape)} exists with another device order: expected "
            f"{[d.id for d in known.devices.flat]}, got {[d.id for d in mesh.devices.flat]}. "
            "Call jax_ep.finalize() first."
        )
    _groups[signature] = mesh


def finalize() -> None:
    """Release every group; `initialize` makes new ones. Call it when no operation runs."""
    _groups.clear()


def check() -> None:
    """Raise the error that an operation recorded on the device, naming the slow rank, if any.

    The `xla` implementation records none: its errors are XLA's own.
    """
