# SPDX-License-Identifier: Apache-2.0
"""Wrong use raises while tracing, and the message names the argument, the expected and the got."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from conftest import make_mesh
from jax.sharding import AxisType
from jax.sharding import PartitionSpec as P

import jax_ep

X = np.zeros((16, 128), np.float32)
IDX = np.zeros((16, 2), np.int32)
WEIGHTS = np.zeros((16, 2), np.float32)


def trace(f, *args, mesh=None, spec=P("expert"), **kw):
    jax.eval_shape(
        jax.shard_map(f, mesh=mesh or make_mesh(), in_specs=spec, out_specs=spec, **kw), *args
    )


def dispatch(x=X, idx=IDX, weights=None, **options):
    options = dict(num_experts=16) | options
    args = (x, idx) if weights is None else (x, idx, weights)
    trace(lambda *a: jax_ep.dispatch(*a, **options), *args)


@pytest.mark.parametrize(
    "error, message, arguments",
    [
        (TypeError, "x: expected dtype bfloat16 or float16 or float32, got int32", dict(x=X.astype(np.int32))),
        (ValueError, r"x: expected shape \[..., H\]", dict(x=X[:, 0])),
        (ValueError, r"x: expected a hidden size that is a multiple of 128 for fp8, got 64", dict(x=X[:, :64], wire_dtype=jnp.float8_e4m3fn)),
        (TypeError, "topk_idx: expected a dtype of kind integer, got float32", dict(idx=WEIGHTS)),
        (ValueError, r"topk_idx: expected shape \(2,\) \+ \[K\]", dict(idx=IDX[:8])),
        (ValueError, r"topk_idx: expected shape", dict(idx=IDX[:, :0])),
        (TypeError, "topk_weights: expected dtype float32, got float16", dict(weights=WEIGHTS.astype(np.float16))),
        (ValueError, r"topk_weights: expected the shape of topk_idx \(2, 2\), got \(2, 1\)", dict(weights=WEIGHTS[:, :1])),
        (ValueError, "num_experts: expected a multiple of the group's 8 ranks, got 12", dict(num_experts=12)),
        (ValueError, "num_experts: expected an int of at least 1, got 0", dict(num_experts=0)),
        (ValueError, "num_experts: expected an int of at least 1, got 8.0", dict(num_experts=8.0)),
        (ValueError, "capacity and capacity_factor: expected at most one, got 8 and 1.0", dict(capacity=8, capacity_factor=1.0)),
        (ValueError, "capacity: expected at least the expert_alignment of 16, got 8", dict(capacity=8, expert_alignment=16)),
        (ValueError, "capacity: expected at least the expert_alignment of 1, got 0", dict(capacity=0)),
        (TypeError, "capacity: expected an int, got 1.5", dict(capacity=1.5)),
        (ValueError, "capacity_factor: expected a positive number, got -1.0", dict(capacity_factor=-1.0)),
        (TypeError, "capacity_factor: expected a number, got 'a'", dict(capacity_factor="a")),
        (ValueError, "capacity: expected at least one row for each of the 2 local experts, got 1", dict(capacity=1, layout="batched")),
        (ValueError, "expert_alignment: expected an int of at least 1, got 0", dict(expert_alignment=0)),
        (ValueError, "layout: expected 'ragged' or 'batched', got 'dense'", dict(layout="dense")),
        (ValueError, r"deliver: expected one of \['dequantized', 'quantized'\], got 'fp8'", dict(deliver="fp8")),
        (ValueError, r"scale_format: expected one of \['float32', 'e8m0'\], got 'int'", dict(scale_format="int")),
        (ValueError, "wire_dtype: expected None or float8_e4m3fn, got float8_e5m2", dict(wire_dtype=jnp.float8_e5m2)),
        (ValueError, "wire_dtype: expected float8_e4m3fn with deliver='quantized', got None", dict(deliver="quantized")),
        (ValueError, r"implementation: expected one of \[None, 'cuda', 'xla'\], got 'nccl'", dict(implementation="nccl")),
        (TypeError, "config: expected a jax_ep.Config or None, got int", dict(config=24)),
        (TypeError, "zero_tail: expected a bool, got 1", dict(zero_tail=1)),
        (TypeError, "axis_name: expected a name or a tuple of names, got 3", dict(axis_name=3)),
        (ValueError, "axis_name: expected distinct axes", dict(axis_name=("expert", "expert"))),
        (ValueError, "batch_axes: expected None inside shard_map, got 'data'", dict(batch_axes="data")),
    ],
    ids=lambda value: value if isinstance(value, str) else None,
)  # fmt: skip
def test_dispatch(error, message, arguments):
    with pytest.raises(error, match=message):
        dispatch(**arguments)


@pytest.mark.parametrize(
    "error, message, scales",
    [
        (ValueError, r"x\[1\]: expected shape \(2, 1\), got \(2, 2\)", np.zeros((16, 2), np.float32)),
        (TypeError, r"x\[1\]: expected dtype float32, got float16", np.zeros((16, 1), np.float16)),
    ],
)  # fmt: skip
def test_quantized_input(error, message, scales):
    q = X.astype(jnp.float8_e4m3fn)

    def f(q, s, idx):
        return jax_ep.dispatch((q, s), idx, num_experts=16, deliver="quantized")

    with pytest.raises(error, match=message):
        trace(f, q, scales, IDX)
    with pytest.raises(ValueError, match="deliver: expected 'quantized'"):
        trace(
            lambda q, s, i: jax_ep.dispatch((q, s), i, num_experts=16),
            q,
            np.zeros((16, 1), np.float32),
            IDX,
        )


@pytest.mark.parametrize(
    "error, message, change",
    [
        (ValueError, r"y: expected shape \(32,\) \+ \[H\], got \(31, 128\)", lambda d: (d.tokens[1:], d.handle)),
        (TypeError, "y: expected dtype bfloat16 or float16 or float32, got int32", lambda d: (d.tokens.astype(jnp.int32), d.handle)),
        (TypeError, "handle: expected a jax_ep handle, got Dispatched", lambda d: (d.tokens, d)),
        (ValueError, r"weights: expected shape \(32,\), got \(16,\)", lambda d: (d.tokens, d.handle, jnp.zeros(16))),
        (TypeError, "weights: expected dtype float32, got bfloat16", lambda d: (d.tokens, d.handle, jnp.zeros(32, jnp.bfloat16))),
        (ValueError, "y: expected a hidden size that is a multiple of 128 for fp8, got 64", lambda d: (d.tokens[:, :64], d.handle, dict(wire_dtype=jnp.float8_e4m3fn))),
        (ValueError, "wire_dtype: expected None or float8_e4m3fn, got bfloat16", lambda d: (d.tokens, d.handle, dict(wire_dtype=jnp.bfloat16))),
        (ValueError, r"scale_format: expected one of \['float32', 'e8m0'\], got 'int'", lambda d: (d.tokens, d.handle, dict(scale_format="int"))),
    ],
)  # fmt: skip
@pytest.mark.parametrize("combine", [jax_ep.combine, jax_ep.combine_start])
def test_combine(error, message, change, combine):
    def f(x, idx):
        *args, last = change(jax_ep.dispatch(x, idx, num_experts=16))
        return combine(*args, **last) if isinstance(last, dict) else combine(*args, last)

    with pytest.raises(error, match=message):
        trace(f, X, IDX)


def test_axis_not_bound():
    with pytest.raises(ValueError, match=r"Call inside jax.shard_map .* or set a mesh"):
        jax_ep.dispatch(jnp.asarray(X), jnp.asarray(IDX), num_experts=16)
    with pytest.raises(ValueError, match="expected axes of the mesh .*'expert'.*got .*'model'"):
        dispatch(axis_name="model")


def test_automatic_axes_beside_the_group():
    mesh = make_mesh((2, 4), ("data", "expert"))
    with pytest.raises(ValueError, match="to be manual inside shard_map, got automatic axes"):
        trace(
            lambda x, i: jax_ep.dispatch(x, i, num_experts=16).tokens,
            X,
            IDX,
            mesh=mesh,
            axis_names={"expert"},
        )


def test_global_view():
    mesh = make_mesh((8,), axis_type=AxisType.Auto)
    with jax.set_mesh(mesh):
        with pytest.raises(ValueError, match="multiple of the 8 ranks"):
            jax.eval_shape(lambda x, i: jax_ep.dispatch(x, i, num_experts=16), X[:12], IDX[:12])
        with pytest.raises(ValueError, match="batch_axes: expected axes of the mesh"):
            jax_ep.dispatch(X, IDX, num_experts=16, batch_axes="data")
        d = jax.jit(lambda x, i: jax_ep.dispatch(x, i, num_experts=16))(X, IDX)
    with pytest.raises(ValueError, match="handle: made on global arrays, used inside shard_map"):
        trace(lambda y: jax_ep.combine(y[0], d.handle), d.tokens)
    explicit = make_mesh((8,), axis_type=AxisType.Explicit)
    with (
        jax.set_mesh(explicit),
        pytest.raises(ValueError, match="x: expected its leading dimension"),
    ):
        jax.eval_shape(lambda x, i: jax_ep.dispatch(x, i, num_experts=16), X, IDX)


def test_initialize():
    mesh = make_mesh()
    jax_ep.initialize(mesh)
    jax_ep.initialize(mesh, timeout_s=5)
    jax_ep.check()
    other = jax.sharding.Mesh(mesh.devices[::-1], mesh.axis_names)
    with pytest.raises(ValueError, match="exists with another device order"):
        jax_ep.initialize(other)
    jax_ep.finalize()
    jax_ep.initialize(other)
    jax_ep.finalize()
    with pytest.raises(TypeError, match="mesh: expected a jax.sharding.Mesh, got AbstractMesh"):
        jax_ep.initialize(mesh.abstract_mesh)
    with pytest.raises(ValueError, match="axis_name: expected axes of the mesh"):
        jax_ep.initialize(mesh, "model")
    with pytest.raises(ValueError, match="timeout_s: expected a positive number of seconds, got 0"):
        jax_ep.initialize(mesh, timeout_s=0)
    with pytest.raises(TypeError, match="config: expected a jax_ep.Config or None, got int"):
        jax_ep.initialize(mesh, config=128)


def test_slots_of_another_size():
    """They belong to the devices of a group, whatever its axes are called."""
    config = jax_ep.Config(decode_tokens=256)
    mesh = make_mesh()
    with pytest.raises(
        ValueError, match=r"expected .* \(128, 16384\), got \(256, 16384\).*finalize"
    ):
        jax_ep.initialize(mesh, config=config)
    jax_ep.finalize()
    jax_ep.initialize(mesh, config=config)
    jax_ep.initialize(mesh)  # as it is
    other = jax.sharding.Mesh(mesh.devices, ("rank",))
    jax_ep.initialize(other, "rank")
    with pytest.raises(ValueError, match=r"expected .* \(256, 16384\), got \(128, 16384\)"):
        jax_ep.initialize(other, "rank", config=jax_ep.Config())
    jax_ep.finalize()


@pytest.mark.parametrize("num_sms", [0, -1, 1.5, True])
def test_config(num_sms):
    with pytest.raises(ValueError, match="Config.num_sms: expected None or a positive int"):
        jax_ep.Config(num_sms=num_sms)


@pytest.mark.parametrize("name", ["decode_tokens", "decode_row_bytes"])
@pytest.mark.parametrize("value", [-1, 1.5, True, None])
def test_config_of_slots(name, value):
    with pytest.raises(
        ValueError, match=f"Config.{name}: expected a non-negative int, got {value}"
    ):
        jax_ep.Config(**{name: value})


@pytest.mark.parametrize("overlap", [None, 1, "collective"])
def test_config_of_overlap(overlap):
    with pytest.raises(ValueError, match=f"Config.overlap: expected a bool, got {overlap!r}"):
        jax_ep.Config(overlap=overlap)


def test_slots_beyond_what_offsets_reach():
    jax_ep.Config(decode_tokens=1 << 17, decode_row_bytes=16384)
    with pytest.raises(
        ValueError, match=r"expected slots of less than 4 GiB .* got 4563402752 bytes"
    ):
        jax_ep.Config(decode_tokens=1 << 18, decode_row_bytes=16384)
