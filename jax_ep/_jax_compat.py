# SPDX-License-Identifier: Apache-2.0
"""The one module that knows JAX versions (0.10.2 and newer)."""

import itertools
from typing import Any

import jax
import jax.extend.core
import jax.numpy as jnp
from jax import lax
from jax._src import distributed
from jax.experimental.xla_metadata import set_xla_metadata
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


def on_collective_stream(name: str, function, operands) -> list:
    """`function(*operands)` as one call `name` that XLA:GPU runs on the stream of its collectives.

    The annotation is that of `jax.experimental.compute_on` for "gpu_stream:collective", which was a
    context before JAX 0.11 and takes a function since. From 0.11.1 on XLA takes the annotation of a
    call with several results for one of each result that is used alone, and runs that after it on
    the same stream. So int32 results, which are small, leave the call as one array, and a barrier
    uses the others together.
    """
    types = jax.eval_shape(function, *operands)
    maps = [i for i, x in enumerate(types) if x.dtype == jnp.int32]

    def call(*arrays):
        results = function(*arrays)
        flat = [results[i].reshape(-1) for i in maps]
        rest = [x for i, x in enumerate(results) if i not in maps]
        return [*rest, *([jnp.concatenate(flat)] if flat else [])]

    call.__name__ = name
    with set_xla_metadata(_xla_stream_annotation="collective", inlineable="false"):
        results = jax.jit(call)(*operands)
    results = list(lax.optimization_barrier(results) if len(results) > 1 else results)
    if maps:
        ends = list(itertools.accumulate(types[i].size for i in maps))
        parts = jnp.split(results.pop(), ends[:-1])
        for i, part in zip(maps, parts, strict=True):
            results.insert(i, part.reshape(types[i].shape))
    return results


def trace_state() -> Any:
    """What is being traced here: equal to itself within one trace, or outside of any."""
    return jax.extend.core.get_opaque_trace_state()


def key_value_client() -> Any:
    """The key-value store of `jax.distributed.initialize`; None before it."""
    return distributed.global_state.client
