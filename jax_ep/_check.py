# SPDX-License-Identifier: Apache-2.0
"""Trace-time checks of arguments: every error names the argument, what was expected, what came."""

import math

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import AxisType

from . import _fp8, _jax_compat
from ._types import SCALE_BLOCK, Config, Spec

TOKEN_DTYPES = (jnp.bfloat16, jnp.float16, jnp.float32)
_FP8 = jnp.dtype(jnp.float8_e4m3fn)


def axis_tuple(axis_name) -> tuple[str, ...]:
    """`axis_name` as a tuple of distinct names."""
    axes = (axis_name,) if isinstance(axis_name, str) else axis_name
    if not isinstance(axes, tuple) or not axes or not all(isinstance(a, str) for a in axes):
        raise TypeError(f"axis_name: expected a name or a tuple of names, got {axis_name!r}")
    if len(set(axes)) != len(axes):
        raise ValueError(f"axis_name: expected distinct axes, got {axis_name!r}")
    return axes


def find_view(axes: tuple[str, ...]) -> bool:
    """True for the global view, False inside `shard_map`; else an error."""
    mesh = _jax_compat.context_mesh()
    types = _jax_compat.axis_types(mesh)
    manual = [axis for axis in axes if types.get(axis) == AxisType.Manual]
    if len(manual) == len(axes):
        auto = {
            axis: mesh.shape[axis]
            for axis, type_ in types.items()
            if type_ != AxisType.Manual and mesh.shape[axis] > 1
        }
        if auto:
            raise ValueError(
                "axis_name: expected every mesh axis larger than 1 to be manual inside shard_map, "
                f"got automatic axes {auto}. Drop axis_names= from shard_map, or name them all."
            )
        return False
    if manual:
        raise ValueError(
            f"axis_name: expected all of {axes} to be manual inside shard_map, got only {manual}"
        )
    if mesh.empty:
        raise ValueError(
            f"axis_name: the axis {axes} is not bound. Call inside jax.shard_map over a mesh that "
            "has it, or set a mesh with jax.set_mesh and pass global arrays."
        )
    unknown = [axis for axis in axes if axis not in types]
    if unknown:
        raise ValueError(
            f"axis_name: expected axes of the mesh {mesh.axis_names}, got {unknown}; call inside "
            "jax.shard_map over a mesh that has them, or set such a mesh"
        )
    return True


def one_of(name: str, value, options) -> None:
    """Raise unless `value` is one of `options`."""
    if value not in options:
        raise ValueError(f"{name}: expected one of {list(options)}, got {value!r}")


def array(name: str, value, *, dtypes=None, kind=None):
    """`value` as an array of one of `dtypes`, or whose dtype is a sub-type of `kind`."""
    if not isinstance(value, (jax.Array, np.ndarray)):
        raise TypeError(f"{name}: expected an array, got {type(value).__name__}")
    dtype = jnp.dtype(value.dtype)
    if dtypes is not None and dtype not in [jnp.dtype(d) for d in dtypes]:
        names = [jnp.dtype(d).name for d in dtypes]
        raise TypeError(f"{name}: expected dtype {' or '.join(names)}, got {dtype.name}")
    if kind is not None and not jnp.issubdtype(dtype, kind):
        raise TypeError(f"{name}: expected a dtype of kind {kind.__name__}, got {dtype.name}")
    return jnp.asarray(value)


def wire(wire_dtype, scale_format) -> None:
    """Check what rows travel as."""
    one_of("scale_format", scale_format, _fp8.SCALE_FORMATS)
    if wire_dtype is not None and jnp.dtype(wire_dtype) != _FP8:
        raise ValueError(
            f"wire_dtype: expected None or {_FP8.name}, got {jnp.dtype(wire_dtype).name}"
        )


def whole_blocks(name: str, hidden: int, axes: tuple[str, ...] = (), parts: int = 1) -> None:
    """Check that rows of fp8 have whole blocks, also where `axes` of a mesh split them in parts."""
    if parts == 1 and hidden % SCALE_BLOCK:
        raise ValueError(
            f"{name}: expected a hidden size that is a multiple of {SCALE_BLOCK} for fp8, got "
            f"{hidden}"
        )
    if hidden % (parts * SCALE_BLOCK):
        raise ValueError(
            f"{name}: expected shards of H in multiples of {SCALE_BLOCK} channels for fp8, got "
            f"{hidden} split {parts} ways over {axes}"
        )


def view_of(name: str, spec: Spec) -> None:
    """Check that what was made in one view is used in it."""
    in_global_view = find_view(spec.axis)
    if in_global_view != spec.is_global:
        views = {True: "on global arrays", False: "inside shard_map"}
        raise ValueError(
            f"{name}: made {views[spec.is_global]}, used {views[in_global_view]}; dispatch and "
            "combine, start and done belong to one view"
        )


def tokens(x, *, wire_dtype, scale_format, deliver):
    """Check `x` and the FP8 options together; returns `(x, scales)`, scales None unless given."""
    one_of("deliver", deliver, ("dequantized", "quantized"))
    wire(wire_dtype, scale_format)
    scales = None
    if isinstance(x, tuple):
        if len(x) != 2:
            raise TypeError(f"x: expected an array or (x_fp8, scales), got a tuple of {len(x)}")
        x, scales = array("x[0]", x[0], dtypes=(_FP8,)), array("x[1]", x[1], dtypes=(jnp.float32,))
        if deliver != "quantized":
            raise ValueError(
                f"deliver: expected 'quantized' for an x of (x_fp8, scales), got {deliver!r}"
            )
    else:
        x = array("x", x, dtypes=TOKEN_DTYPES)
        if deliver == "quantized" and wire_dtype is None:
            raise ValueError(f"wire_dtype: expected {_FP8.name} with deliver='quantized', got None")
    if x.ndim < 2:
        raise ValueError(f"x: expected shape [..., H] with at least two dimensions, got {x.shape}")
    hidden = x.shape[-1]
    if wire_dtype is not None or scales is not None:
        whole_blocks("x", hidden)
    if scales is not None and scales.shape != (*x.shape[:-1], hidden // SCALE_BLOCK):
        raise ValueError(
            f"x[1]: expected shape {(*x.shape[:-1], hidden // SCALE_BLOCK)}, got {scales.shape}"
        )
    return x, scales


def routing(x, topk_idx, topk_weights):
    """Check `topk_idx` and `topk_weights` against `x`."""
    topk_idx = array("topk_idx", topk_idx, kind=jnp.integer)
    if topk_idx.ndim != x.ndim or topk_idx.shape[:-1] != x.shape[:-1] or not topk_idx.shape[-1]:
        raise ValueError(
            f"topk_idx: expected shape {x.shape[:-1]} + [K], K at least 1, for x of shape "
            f"{x.shape}, got {topk_idx.shape}"
        )
    if topk_weights is not None:
        topk_weights = array("topk_weights", topk_weights, dtypes=(jnp.float32,))
        if topk_weights.shape != topk_idx.shape:
            raise ValueError(
                f"topk_weights: expected the shape of topk_idx {topk_idx.shape}, got "
                f"{topk_weights.shape}"
            )
    return topk_idx, topk_weights


def config(value) -> Config:
    """`value`, or the default `Config`."""
    if value is None:
        return Config()
    if not isinstance(value, Config):
        raise TypeError(f"config: expected a jax_ep.Config or None, got {type(value).__name__}")
    return value


def fits_int32(name: str, count: int) -> None:
    """Pairs and rows are numbered in int32."""
    if count > 2**31 - 1:
        raise ValueError(f"{name}: expected at most 2**31 - 1 in the group, got {count}")


def size(mesh, axes) -> int:
    """Number of devices along `axes`."""
    return math.prod(mesh.shape[axis] for axis in axes)
