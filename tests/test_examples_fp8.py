# SPDX-License-Identifier: Apache-2.0
"""Experts in FP8 against the same experts in the type of x, forward and backward."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from cases import flat, inputs
from conftest import make_mesh
from jax import lax
from jax.sharding import PartitionSpec as P

import jax_ep
from jax_ep.examples import fp8_experts as example

R, T, H, F, K, E = 4, 24, 256, 128, 3, 8


def exact_experts(x, idx, weights, w_in, w_out):
    d = jax_ep.dispatch(x, idx, weights, num_experts=E)
    gate, up = jnp.split(lax.ragged_dot(d.tokens, w_in, d.group_sizes), 2, axis=-1)
    y = lax.ragged_dot(jax.nn.silu(gate) * up, w_out, d.group_sizes)
    return jax_ep.combine(y, d.handle, weights=d.weights)


def fp8(x, idx, weights, w_in, w_out):
    return example.fp8_experts(x, idx, weights, w_in, w_out, num_experts=E)


@pytest.fixture(scope="module")
def operands():
    x, idx, weights = inputs(70, R=R, T=T, H=H, K=K, E=E, none=0.1)
    idx[idx == 5] = 4  # an expert without tokens
    rng = np.random.default_rng(71)
    w_in = rng.standard_normal((E, H, 2 * F), np.float32) / np.sqrt(H)
    w_out = rng.standard_normal((E, F, H), np.float32) / np.sqrt(F)
    return flat(x) / 3, flat(idx), flat(weights), w_in, w_out


def mapped(f):
    return jax.shard_map(f, mesh=make_mesh((R,)), in_specs=P("expert"), out_specs=P("expert"))


def values_and_gradients(f, operands):
    x, idx, weights, w_in, w_out = operands
    target = jnp.cos(jnp.arange(x.size, dtype=jnp.float32)).reshape(x.shape)

    def loss(x, weights, w_in, w_out):
        out = mapped(f)(x, idx, weights, w_in, w_out)
        return (out.astype(jnp.float32) * target).sum(), out

    (_, out), grads = jax.jit(jax.value_and_grad(loss, (0, 1, 2, 3), has_aux=True))(
        x, weights, w_in, w_out
    )
    return [np.asarray(a, np.float64) for a in (out, *grads)]


def errors(got, want):
    return [np.linalg.norm(a - b) / np.linalg.norm(b) for a, b in zip(got, want, strict=True)]


def test_close_to_the_exact_layer(operands):
    """e4m3 keeps 3 bits: 2^-4 / sqrt(3) = 3.6 % of a uniform rounding error in each of the factors."""
    got, want = (values_and_gradients(f, operands) for f in (fp8, exact_experts))
    assert max(errors(got, want)) < 0.10
    assert not got[3][5].any() and not got[4][5].any()  # the expert without tokens


def test_exact_where_quantisation_is(operands):
    """Integers up to 8 with 448 in each block are e4m3 values times a scale of 1."""
    x, idx, weights, w_in, w_out = operands
    rng = np.random.default_rng(72)
    x = rng.integers(-8, 9, x.shape).astype(np.float32)
    x.reshape(-1, 128)[:, 0] = 448
    w_in = rng.integers(-1, 2, w_in.shape).astype(np.float32) * 448

    def first_product(x, idx, weights, w_in, w_out):
        d = jax_ep.dispatch(
            x, idx, num_experts=E, wire_dtype=example.FP8, deliver="quantized", expert_alignment=128
        )
        w, w_scales = example.quantize_weights(w_in)
        y = example.fp8_ragged_dot(d.tokens, d.scales, w, w_scales, d.group_sizes)
        return jax_ep.combine(y, d.handle)

    def want(x, idx, weights, w_in, w_out):
        d = jax_ep.dispatch(x, idx, num_experts=E)
        return jax_ep.combine(lax.ragged_dot(d.tokens, w_in, d.group_sizes), d.handle)

    got, want = (jax.jit(mapped(f))(x, idx, weights, w_in, w_out) for f in (first_product, want))
    np.testing.assert_allclose(got, want, rtol=1e-5, atol=1e-2)


def test_what_the_tail_holds_does_not_matter(operands):
    x, idx, weights, w_in, w_out = operands

    def f(poison, x, idx, weights, w_in, w_out):
        options = dict(
            num_experts=E, wire_dtype=example.FP8, deliver="quantized", expert_alignment=128
        )
        d = jax_ep.dispatch(x, idx, weights, **options)
        tail = jnp.arange(d.tokens.shape[0]) >= d.group_sizes.sum()
        bad = jnp.where(poison & tail[:, None], jnp.nan, d.tokens.astype(jnp.float32))
        scales = jnp.where(poison & tail[:, None], jnp.nan, d.scales)
        d = dataclasses.replace(d, tokens=bad.astype(example.FP8), scales=scales)
        y, back = jax.vjp(lambda *a: example._products(*a, d), x, w_in, w_out)
        g = jnp.where(poison & tail[:, None], jnp.nan, jnp.ones_like(y))
        return jax_ep.combine(y, d.handle, weights=d.weights), *back(g)

    outs = [
        jax.jit(mapped(lambda *a, p=p: f(p, *a)))(x, idx, weights, w_in, w_out)
        for p in (False, True)
    ]
    for clean, poisoned in zip(*outs, strict=True):
        np.testing.assert_array_equal(clean, poisoned)


def test_trains_like_the_exact_layer(operands):
    x, idx, weights, w_in, w_out = operands
    target = jax.jit(mapped(exact_experts))(x, idx, weights, w_in[::-1], w_out)

    def final_loss(f):
        def loss(w):
            return ((mapped(f)(x, idx, weights, *w) - target) ** 2).mean()

        step = jax.jit(
            lambda w: (loss(w), jax.tree.map(lambda a, g: a - 2.0 * g, w, jax.grad(loss)(w)))
        )
        w = (w_in, w_out)
        losses = []
        for _ in range(30):
            value, w = step(w)
            losses.append(float(value))
        return losses

    exact, quantized = final_loss(exact_experts), final_loss(fp8)
    assert exact[-1] < 0.8 * exact[0]
    assert abs(quantized[-1] - exact[-1]) < 0.05 * exact[0]
