# SPDX-License-Identifier: Apache-2.0
"""Which implementation a platform gets is decided, and judged, when lowering."""

import re
import warnings

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from conftest import make_mesh
from jax.sharding import AbstractMesh, AxisType
from jax.sharding import PartitionSpec as P

import jax_ep
from jax_ep import _ffi, _ops

ARGS = np.zeros((16, 8), np.float32), np.zeros((16, 2), np.int32)


def traced(implementation):
    def f(x, idx):
        d = jax_ep.dispatch(x, idx, num_experts=16, implementation=implementation)
        return jax_ep.combine(d.tokens, d.handle)

    mapped = jax.shard_map(f, mesh=make_mesh(), in_specs=P("expert"), out_specs=P("expert"))
    return jax.jit(mapped).trace(*ARGS)


@pytest.fixture
def no_cuda_kernels(monkeypatch):
    monkeypatch.setattr(_ffi, "has_cuda", lambda: False)


@pytest.mark.parametrize("platform", ["cpu", "cuda"])
def test_cuda_is_an_error_where_it_cannot_be(platform, no_cuda_kernels):
    with pytest.raises(
        ValueError, match=f"cannot be lowered for {platform}.*Valid here: None, 'xla'"
    ):
        traced("cuda").lower(lowering_platforms=(platform,))


def test_none_on_a_gpu_warns_once(no_cuda_kernels):
    _ops._warn_once.cache_clear()
    with pytest.warns(UserWarning, match="uses 'xla' .* because this build has no CUDA kernels"):
        traced(None).lower(lowering_platforms=("cuda",))
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        traced(None).lower(lowering_platforms=("cuda",))
        _ops._warn_once.cache_clear()
        traced("xla").lower(lowering_platforms=("cuda",))
        traced(None).lower(lowering_platforms=("cpu",))


with_cuda = pytest.mark.skipif(not _ffi.has_cuda(), reason="this build found no nvcc")


def cuda_module(f, mesh, *args):
    """The StableHLO of `f` under shard_map, lowered for CUDA on any machine."""
    mapped = jax.shard_map(f, mesh=mesh, in_specs=P("expert"), out_specs=P("expert"))
    return jax.jit(mapped).trace(*args).lower(lowering_platforms=("cuda",)).as_text()


def calls(module):
    """Target, attributes and the type signature of each of our custom calls."""
    pattern = r"custom_call @(jax_ep_\w+)\(.*?mhlo.backend_config = \{(.*?)\}.* : (\(.*)"
    return re.findall(pattern, module)


def moe(x, idx, weights, **options):
    d = jax_ep.dispatch(x, idx, weights, num_experts=16, **options)
    return jax_ep.combine(jnp.zeros(d.tokens.shape, x.dtype), d.handle, weights=d.weights)


SHAPES = [jax.ShapeDtypeStruct(s, d) for s, d in (((16, 256), jnp.bfloat16), ((16, 2), jnp.int32), ((16, 2), jnp.float32))]  # fmt: skip


@with_cuda
@pytest.mark.parametrize("abstract", [False, True])
def test_cuda_calls_and_nothing_else(abstract):
    mesh = AbstractMesh((8,), ("expert",), axis_types=(AxisType.Auto,)) if abstract else make_mesh()
    module = cuda_module(moe, mesh, *SHAPES)
    assert [target for target, _, _ in calls(module)] == [
        "jax_ep_plan",
        "jax_ep_dispatch",
        "jax_ep_combine",
    ]
    for word in ("all_gather", "all_to_all", "all_reduce", "collective_permute", "has_side_effect"):
        assert word not in module
    plan, dispatch, combine = calls(module)
    for attribute in (
        'group = "expert=8|expert"',
        "num_ranks = 8",
        "num_experts = 16",
        "top_k = 2",
    ):
        assert attribute in plan[1] and attribute in dispatch[1] and attribute in combine[1]
    assert "(tensor<2x256xbf16>, tensor<4xf32>, tensor<2x2xi32>" in dispatch[2]
    assert "-> (tensor<32x256xbf16>, tensor<32xf32>)" in dispatch[2]
    assert "tensor<2x2x256xbf16>)" in combine[2]  # partial sums of min(R-1, K) peers


@with_cuda
@pytest.mark.parametrize(
    "options, attributes, result",
    [
        (dict(wire_dtype=jnp.float8_e4m3fn), "wire = 2", "tensor<32x256xbf16>"),
        (
            dict(wire_dtype=jnp.float8_e4m3fn, deliver="quantized", scale_format="e8m0"),
            "wire = 1",
            "tensor<32x256xf8E4M3FN>, tensor<32x2xf32>",
        ),
        (dict(zero_tail=True, config=jax_ep.Config(num_sms=9)), "num_sms = 9", "tensor<32x256xbf16>"),
        (dict(layout="batched", capacity=8), "batched = true", "tensor<8x256xbf16>"),
    ],
)  # fmt: skip
def test_cuda_attributes_follow_the_options(options, attributes, result):
    f = lambda *a: jax_ep.dispatch(*a, num_experts=16, **options).tokens
    (_, dispatch) = calls(cuda_module(f, make_mesh(), *SHAPES))
    assert attributes in dispatch[1] and f"-> ({result}" in dispatch[2]


@with_cuda
def test_cuda_gradient_is_combine_and_dispatch():
    def f(x, idx, weights):
        loss = lambda x, w: (moe(x, idx, w).astype(jnp.float32) ** 2).sum()
        return jax.grad(loss, (0, 1))(x, weights)

    targets = [target for target, _, _ in calls(cuda_module(f, make_mesh(), *SHAPES))]
    assert targets.count("jax_ep_plan") == 1
    assert targets.count("jax_ep_dispatch") == 2 and targets.count("jax_ep_combine") == 2


@with_cuda
@pytest.mark.parametrize(
    "shapes, message",
    [
        (((16, 12), (16, 2)), "rows of a multiple of 16 bytes for implementation='cuda', got 24"),
        (((16, 16), (16, 40)), "at most 32 experts per token, got 40.*Valid here: 'xla'"),
    ],
)
def test_what_the_kernels_cannot_do_is_an_error(shapes, message):
    args = jax.ShapeDtypeStruct(shapes[0], jnp.bfloat16), jax.ShapeDtypeStruct(shapes[1], jnp.int32)
    f = lambda *a: jax_ep.dispatch(*a, num_experts=64).tokens
    with pytest.raises(ValueError, match=message):
        cuda_module(f, make_mesh(), *args)


def test_xla_does_not_lose_the_way_to_fp8():
    """XLA:GPU drops f32 -> fp8 -> f32 for excess precision unless something stands between."""
    f = lambda *a: jax_ep.dispatch(*a, num_experts=16, wire_dtype=jnp.float8_e4m3fn).tokens
    mapped = jax.shard_map(f, mesh=make_mesh(), in_specs=P("expert"), out_specs=P("expert"))
    module = jax.jit(mapped).lower(*SHAPES).as_text()
    assert re.search(r"optimization_barrier %\w+, %\w+ : tensor<2x256xf8E4M3FN>", module)
