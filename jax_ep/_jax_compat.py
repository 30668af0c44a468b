# SPDX-License-Identifier: Apache-2.0
"""The one module that knows JAX versions (0.10.2 and newer)."""

from typing import Any

import jax
import jax.extend.core
from jax import lax
from jax._src import distributed
from jax.sharding import AxisType

Device = Any  # what jax.devices() lists; jax.Device is a variable to type checkers


def varying_axes(x) -> frozenset[str]:
    """Mesh axes over which `x` may differ between devices, inside `shard_map`."""
    return jax.typeof(x).manual_axis_type.varying


def cast_to_varying(x, axes: frozenset[str]):
    """`x` typed as varying over `axes` too (the transpose sums the cotangent over them)."""
    missing = tuple(sorted(axes - varying_axes(x)))
    return lax.pcast(x, missing, to="varying") if missing else x


def like(x, shape, dtype):
    """The type of a result that lives where `x` lives: its mesh and its varying axes."""
    return jax.typeof(x).update(shape=shape, dtype=dtype, weak_type=False)


def context_mesh():
    """The abstract mesh in force: of the enclosing `shard_map`, or of `jax.set_mesh`."""
    return jax.sharding.get_abstract_mesh()


def axis_types(mesh) -> dict[str, AxisType]:
    """Axis name to axis type (Auto, Explicit or Manual) of a mesh."""
    return dict(zip(mesh.axis_names, mesh.axis_types, strict=True))


def partition_of(x) -> list[tuple[str, ...]]:
    """Mesh axes that split each dimension of `x`, from its type (Explicit meshes)."""
    spec = tuple(jax.typeof(x).sharding.spec)
    spec += (None,) * (x.ndim - len(spec))
    return [(e,) if isinstance(e, str) else tuple(e or ()) for e in spec]


def trace_state() -> Any:
    """What is being traced here: equal to itself within one trace, or outside of any."""
    return jax.extend.core.get_opaque_trace_state()


def key_value_client() -> Any:
    """The key-value store of `jax.distributed.initialize`; None before it."""
    return distributed.global_state.client
