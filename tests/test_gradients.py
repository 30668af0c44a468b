# SPDX-License-Identifier: Apache-2.0
"""Gradients against a dense mixture of experts in float64, together and each alone."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from cases import FP8, flat, inputs
from conftest import PORTABLE, make_mesh, ranks
from jax.sharding import PartitionSpec as P

import jax_ep

pytestmark = PORTABLE
T, H, K, E = 12, 16, 3, 8


def routed(x, weights, w, idx, mesh, *, inside=True, **options):
    """Sum of squares of a routed layer with one matrix per expert."""

    def body(x, weights, w, idx):
        d = jax_ep.dispatch(x, idx, weights, num_experts=E, **options)
        y = jnp.tanh(jax.lax.ragged_dot(d.tokens, w, d.group_sizes))
        if not inside:
            return jax_ep.combine(y * d.weights[:, None], d.handle)
        return jax_ep.combine(y, d.handle, weights=d.weights)

    mapped = jax.shard_map(body, mesh=mesh, in_specs=P("expert"), out_specs=P("expert"))
    return (mapped(x, weights, w, idx) ** 2).sum()


def dense64(x, weights, w, idx):
    """The same in NumPy float64 with hand-written gradients for x, weights and w."""
    x, weights, w = (np.asarray(a, np.float64) for a in (x, weights, w))
    out = np.zeros_like(x)
    y = np.zeros((*idx.shape, H))
    for t, k in np.argwhere(idx >= 0):
        y[t, k] = np.tanh(x[t] @ w[idx[t, k]])
        out[t] += weights[t, k] * y[t, k]
    g = 2 * out
    dx, dweights, dw = np.zeros_like(x), np.zeros_like(weights), np.zeros_like(w)
    for t, k in np.argwhere(idx >= 0):
        dweights[t, k] = g[t] @ y[t, k]
        h = weights[t, k] * g[t] * (1 - y[t, k] ** 2)
        dx[t] += w[idx[t, k]] @ h
        dw[idx[t, k]] += np.outer(x[t], h)
    return (out**2).sum(), (dx, dweights, dw)


def problem(none=0.2, **kw):
    x, idx, weights = inputs(11, R=ranks(4), T=T, H=H, K=K, E=E, none=none, **kw)
    w = np.random.default_rng(1).standard_normal((E, H, H)).astype(np.float32) / 4
    return flat(x) / 3, flat(weights), w, flat(idx)


@pytest.mark.parametrize(
    "options, inside",
    [
        ({}, True),
        pytest.param(dict(expert_alignment=4), True, marks=pytest.mark.extensive),
        pytest.param({}, False, marks=pytest.mark.extensive),
        pytest.param(dict(expert_alignment=4), False, marks=pytest.mark.newest),
    ],
    ids=str,
)
def test_against_dense_float64(options, inside):
    args = problem()
    loss, want = dense64(*args)
    f = jax.jit(
        jax.value_and_grad(
            lambda *a: routed(*a, make_mesh((ranks(4),)), inside=inside, **options),
            argnums=(0, 1, 2),
        )
    )
    got_loss, got = f(*args)
    assert abs(got_loss - loss) <= 1e-5 * abs(loss)
    for name, a, b in zip(("x", "topk_weights", "w"), got, want, strict=True):
        error = np.linalg.norm(np.asarray(a) - b) / np.linalg.norm(b)
        assert error < 1e-5, (name, error)


@pytest.mark.newest
@pytest.mark.parametrize("argnum", [0, 1, 2])
def test_each_alone(argnum):
    args = problem()
    _, want = dense64(*args)
    got = jax.jit(jax.grad(lambda *a: routed(*a, make_mesh((ranks(4),))), argnums=argnum))(*args)
    assert np.linalg.norm(np.asarray(got) - want[argnum]) < 1e-5 * np.linalg.norm(want[argnum])


@pytest.mark.newest
@pytest.mark.parametrize("argnum", [0, 1], ids=["y", "weights"])
def test_combine_operands_alone(argnum):
    x, idx, weights = inputs(12, R=ranks(4), T=T, H=H, K=K, E=E)
    plan = jax_ep.reference.dispatch(x, idx, weights, num_experts=E)

    def loss(y, weights, idx, x):
        def body(y, weights, idx, x):
            d = jax_ep.dispatch(x, idx, num_experts=E)
            return jax_ep.combine(y, d.handle, weights=weights)

        mapped = jax.shard_map(
            body, mesh=make_mesh((ranks(4),)), in_specs=P("expert"), out_specs=P("expert")
        )
        return (mapped(y, weights, idx, x) ** 2).sum() / 2

    y, w = plan.tokens * 1.5, plan.weights
    got = jax.jit(jax.grad(loss, argnums=argnum))(flat(y), flat(w), flat(idx), flat(x))
    out = jax_ep.reference.combine(y, plan.plan, w).astype(np.float64)
    g = jax_ep.reference.gather(out, plan.plan.row_pair[..., :2])
    want = flat(g * w[..., None]) if argnum == 0 else flat((g * y).sum(-1))
    assert np.linalg.norm(np.asarray(got) - want) < 1e-5 * np.linalg.norm(want)


@pytest.mark.newest
def test_dropped_pairs_get_zero():
    x, idx, weights = inputs(13, R=ranks(4), T=T, H=H, K=K, E=E, skew=1.0)

    def loss(x, weights, idx):
        def body(x, weights, idx):
            d = jax_ep.dispatch(x, idx, weights, num_experts=E, capacity=10)
            return jax_ep.combine(d.tokens, d.handle, weights=d.weights)

        mapped = jax.shard_map(
            body, mesh=make_mesh((ranks(4),)), in_specs=P("expert"), out_specs=P("expert")
        )
        return mapped(x, weights, idx).sum()

    dx, dw = jax.jit(jax.grad(loss, (0, 1)))(flat(x), flat(weights), flat(idx))
    kept = flat(jax_ep.reference.plan(idx, num_experts=E, capacity=10).pair_row) >= 0
    assert not kept.all() and kept.any()
    assert not np.asarray(dw)[~kept].any() and np.asarray(dw)[kept].all()
    want = (flat(weights) * kept).sum(1, keepdims=True) * np.ones(H)
    np.testing.assert_allclose(dx, want, rtol=1e-5, atol=1e-5)


def test_fp8_wire_is_straight_through():
    x, idx, weights = inputs(14, R=ranks(4), T=T, H=128, K=K, E=E)

    def loss(x, weights, idx, **wire):
        def body(x, weights, idx):
            d = jax_ep.dispatch(x, idx, weights, num_experts=E, **wire)
            return jax_ep.combine(d.tokens, d.handle, weights=d.weights, **wire)

        mapped = jax.shard_map(
            body, mesh=make_mesh((ranks(4),)), in_specs=P("expert"), out_specs=P("expert")
        )
        return mapped(x, weights, idx).sum()

    args = flat(x), flat(weights), flat(idx)
    plain = jax.jit(jax.grad(loss))(*args)
    wired = jax.jit(jax.grad(lambda *a: loss(*a, wire_dtype=FP8)))(*args)
    np.testing.assert_array_equal(plain, wired)


def test_quantized_refuses_x_but_not_weights():
    x, idx, weights = inputs(15, R=ranks(4), T=T, H=128, K=K, E=E)

    def loss(x, weights, idx):
        def body(x, weights, idx):
            d = jax_ep.dispatch(x, idx, weights, num_experts=E, wire_dtype=FP8, deliver="quantized")
            return jax_ep.combine(d.tokens.astype(jnp.float32), d.handle, weights=d.weights)

        mapped = jax.shard_map(
            body, mesh=make_mesh((ranks(4),)), in_specs=P("expert"), out_specs=P("expert")
        )
        return mapped(x, weights, idx).sum()

    args = flat(x), flat(weights), flat(idx)
    with pytest.raises(TypeError, match="custom_vjp whose backward is"):
        jax.grad(loss)(*args)
    dw = jax.jit(jax.grad(loss, 1))(*args)
    q, _ = jax_ep.reference.quantize(flat(x))
    np.testing.assert_allclose(
        dw, np.broadcast_to(q.astype(np.float32).sum(-1, keepdims=True), dw.shape), rtol=1e-5
    )
