# SPDX-License-Identifier: Apache-2.0
"""The portable implementation works in pieces; here they are small and overlap at the end."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from cases import FP8, assert_matches, flat, inputs, reference, run
from conftest import make_mesh
from jax.sharding import PartitionSpec as P

import jax_ep
from jax_ep import _xla

SIZES = dict(R=4, T=21, K=3, E=8, none=0.1)


@pytest.fixture(autouse=True)
def small_pieces(monkeypatch):
    jax.clear_caches()
    monkeypatch.setattr(_xla, "_GATHER_BYTES", 1)
    monkeypatch.setattr(_xla, "_BLOCK_BYTES", 1)
    monkeypatch.setattr(_xla, "_CHUNK_BYTES", 1)  # eight tokens


@pytest.mark.parametrize(
    "H, options, dtype",
    [
        (300, {}, "bfloat16"),
        pytest.param(300, {}, "float32", marks=pytest.mark.newest),
        pytest.param(
            *(300, dict(layout="batched", capacity=40), "bfloat16"), marks=pytest.mark.newest
        ),
        (384, dict(wire_dtype=FP8, deliver="quantized", combine=dict(wire_dtype=FP8)), "float32"),
    ],
    ids=str,
)
def test_equals_reference_bit_for_bit(H, options, dtype):
    x, idx, weights = inputs(60, H=H, dtype=dtype, **SIZES)
    options = dict(num_experts=8, **options)
    assert_matches(run(x, idx, weights, **options), reference(x, idx, weights, **options))


def test_gradient_and_vmap():
    x, idx, weights = (flat(a) for a in inputs(61, H=300, **SIZES))

    def layer(x, idx, weights):
        d = jax_ep.dispatch(x, idx, weights, num_experts=8)
        return jax_ep.combine(d.tokens, d.handle, weights=d.weights)

    def both(x, idx, weights):
        pairs = (jnp.stack([a, a[::-1]]) for a in (x, idx, weights))
        return jax.vmap(layer)(*pairs).sum(0)

    mapped = jax.shard_map(both, mesh=make_mesh((4,)), in_specs=P("expert"), out_specs=P("expert"))
    dx = jax.jit(jax.grad(lambda x: (mapped(x, idx, weights) * x).sum()))(x)
    factor = np.where(idx >= 0, weights, 0).sum(-1, keepdims=True)
    # out[t] = f[t] x[t] + f[-t] x[-t], so d/dx[t] of out.x is 2 f[t] x[t] + (f[t] + f[-t]) x[-t]
    flip = lambda a: a.reshape(4, 21, -1)[:, ::-1].reshape(a.shape)
    want = 2 * factor * x + (factor + flip(factor)) * flip(x)
    np.testing.assert_allclose(dx, want, rtol=1e-4, atol=1e-4)
