# SPDX-License-Identifier: Apache-2.0
"""`Config(overlap=True)` on GPUs: the same bits, and XLA runs operations beside compute."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from cases import assert_matches, assert_same_bits, flat, inputs, put, reference, run
from conftest import make_mesh, poison_memory
from jax import lax
from jax.sharding import PartitionSpec as P

import jax_ep
from jax_ep.examples import two_microbatches

pytestmark = pytest.mark.gpu
RANKS = [1, pytest.param(2, marks=pytest.mark.multi)]
CONFIGS = dict(direct=jax_ep.Config(decode_tokens=0), slots=jax_ep.Config())
SPEC = P("expert")
#: Before JAX 0.12 XLA makes the pairs and schedules nothing between them (docs/overlap.md).
NOTHING_BETWEEN = jax.__version_info__[:2] < (0, 12)


@pytest.fixture(params=RANKS)
def mesh(request):
    if len(jax.devices()) < request.param or jax.default_backend() != "gpu":
        pytest.fail(f"expected {request.param} GPUs, got {jax.devices()}")
    poison_memory()
    yield make_mesh((request.param,))
    jax_ep.check()


def layer(config, x, idx, weights):
    """Rows doubled by their experts, and something independent of them."""
    d = jax_ep.dispatch(x, idx, weights, num_experts=16, config=config)
    return jax_ep.combine(d.tokens * 2, d.handle, weights=d.weights) / 8 + jnp.tanh(x)


def scanned(config, x, idx, weights):
    return lax.scan(lambda x, _: (layer(config, x, idx, weights), None), x, length=20)[0]


def looped(config, x, idx, weights):
    more = lambda state: state[0] < 20
    turn = lambda state: (state[0] + 1, layer(config, state[1], idx, weights))
    return lax.while_loop(more, turn, (0, x))[1]


def gradient(config, x, idx, weights):
    loss = lambda x, w: jnp.square(layer(config, x, idx, w)).sum()
    return jax.grad(loss, (0, 1))(x, weights)


def rematerialized(config, x, idx, weights):
    loss = lambda x: jnp.square(jax.checkpoint(functools.partial(layer, config))(x, idx, weights))
    return jax.grad(lambda x: loss(x).sum())(x)


def halves(config, x, idx, weights):
    sent = jax_ep.dispatch_start(x, idx, weights, num_experts=16, config=config)
    beside = jnp.tanh(x)
    d = jax_ep.dispatch_done(sent)
    return jax_ep.combine_done(jax_ep.combine_start(d.tokens, d.handle, d.weights)) + beside


def two_batches(config, x, idx, weights):
    """Independent operations of one group, which only their stream orders."""
    half = len(x) // 2
    return [layer(config, x[s], idx[s], weights[s]) for s in (slice(half), slice(half, None))]


def data(mesh, tokens=64, hidden=256):
    arrays = inputs(0, R=mesh.size, T=tokens, H=hidden, K=4, E=16)
    return [put(flat(a), mesh, SPEC) for a in arrays]


def mapped(f, mesh, config):
    f = functools.partial(f, config)
    return jax.jit(jax.shard_map(f, mesh=mesh, in_specs=SPEC, out_specs=SPEC))


def both(config):
    return config, dataclasses.replace(config, overlap=True)


@pytest.mark.parametrize("path", CONFIGS)
@pytest.mark.parametrize("f", [layer, scanned, looped, gradient, rematerialized, two_batches, halves])  # fmt: skip
def test_same_bits(mesh, f, path):
    if f is halves and path == "direct":
        pytest.skip("halves are for slots")
    args = data(mesh)
    programs = [mapped(f, mesh, config) for config in both(CONFIGS[path])]
    pairs = [two_microbatches.pairs_of(p.lower(*args).compile().as_text())[0] for p in programs]
    assert pairs[0] == 0 < pairs[1]
    want, *repeats = [jax.tree.map(np.asarray, p(*args)) for p in (*programs, programs[1])]
    for got in repeats:
        for name, (a, b) in enumerate(zip(*map(jax.tree.leaves, (got, want)), strict=True)):
            assert_same_bits(str(name), a, b)


@pytest.mark.parametrize("path", CONFIGS)
def test_matches_the_reference(mesh, path):
    x, idx, weights = inputs(1, R=mesh.size, T=100, H=256, K=4, E=16, dtype="bfloat16")
    _, config = both(CONFIGS[path])
    got = run(x, idx, weights, mesh=mesh, num_experts=16, config=config, zero_tail=True)
    assert_matches(got, reference(x, idx, weights, num_experts=16), whole=True)


@pytest.mark.parametrize("num_sms", [None, 8])
def test_products_between_start_and_done(mesh, num_sms):
    """Compiled, and run beside products that fill the GPU."""
    config = jax_ep.Config(decode_tokens=0, num_sms=num_sms, overlap=True)

    def f(config, x, idx, weights):
        product = x
        for _ in range(4):
            product = jnp.tanh(product @ jnp.ones((x.shape[-1], x.shape[-1]), x.dtype))
        return layer(config, x, idx, weights), product

    args = data(mesh, tokens=4096, hidden=2048)
    program = mapped(f, mesh, config)
    pairs, between = two_microbatches.pairs_of(program.lower(*args).compile().as_text())
    assert pairs == 3
    assert NOTHING_BETWEEN or between
    want = mapped(f, mesh, dataclasses.replace(config, overlap=False))(*args)[0]
    for _ in range(20):
        got = program(*args)[0]
    assert_same_bits("sums", np.asarray(got), np.asarray(want))
