# SPDX-License-Identifier: Apache-2.0
"""Experts in FP8 against the same layer on dequantised rows, forward and backward."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from cases import flat, inputs
from conftest import PORTABLE, make_mesh, on_gpus, ranks
from jax import lax
from jax.sharding import PartitionSpec as P

import jax_ep
from jax_ep.examples import fp8_experts as example

pytestmark = PORTABLE
T, H, F, K, E = 24, 256, 128, 3, 8
FP8_WIRE = dict(wire_dtype=example.FP8)


def fp8(x, idx, weights, w_in, w_out, **options):
    return example.fp8_experts(x, idx, weights, w_in, w_out, num_experts=E, **options)


def plain(x, idx, weights, w_in, w_out, **options):
    """The same layer, its products in x's type; `FP8_WIRE` for rows that crossed as e4m3."""
    d = jax_ep.dispatch(x, idx, weights, num_experts=E, expert_alignment=128, **options)
    w_in, w_out = w_in.astype(x.dtype), w_out.astype(x.dtype)
    gate, up = jnp.split(lax.ragged_dot(d.tokens, w_in, d.group_sizes), 2, axis=-1)
    y = lax.ragged_dot(jax.nn.silu(gate) * up, w_out, d.group_sizes)
    return jax_ep.combine(y, d.handle, weights=d.weights)


@pytest.fixture(scope="module")
def operands(platform):
    """Every expert's count is far from a multiple of 128; one of several ranks sends nothing."""
    R = ranks(4)
    x, idx, _ = inputs(70, R=R, T=T, H=H, K=K, E=E, none=0.1)
    idx[idx == 5] = 4  # an expert without tokens
    if R > 1:
        idx[R // 2] = -1
    rng = np.random.default_rng(71)
    logits = rng.standard_normal((R * T, K), np.float32)
    w_in = rng.standard_normal((E, H, 2 * F), np.float32) / np.sqrt(np.float32(H))
    w_out = rng.standard_normal((E, F, H), np.float32) / np.sqrt(np.float32(F))
    return flat(x) / 3, flat(idx), logits, w_in, w_out


def mapped(f, mesh=None, tokens=P("expert")):
    experts = P("expert")
    return jax.shard_map(
        f,
        mesh=mesh or make_mesh((ranks(4),)),
        in_specs=(tokens, tokens, tokens, experts, experts),
        out_specs=tokens,
    )


def values_and_gradients(layer, operands):
    """The output, and the gradients of x, the router's logits, w_in and w_out."""
    x, idx, logits, w_in, w_out = operands
    target = jnp.cos(jnp.arange(x.size, dtype=jnp.float32)).reshape(x.shape)

    def loss(x, logits, w_in, w_out):
        out = layer(x, idx, jax.nn.softmax(logits), w_in, w_out)
        return (out.astype(jnp.float32) * target).sum(), out

    step = jax.jit(jax.value_and_grad(loss, (0, 1, 2, 3), has_aux=True))
    (_, out), grads = step(x, logits, w_in, w_out)
    return [np.asarray(a, np.float64) for a in (out, *grads)]


@pytest.fixture(scope="module")
def fp8_results(operands):
    return values_and_gradients(mapped(fp8), operands)


def errors(got, want):
    return [np.linalg.norm(a - b) / np.linalg.norm(b) for a, b in zip(got, want, strict=True)]


@pytest.mark.parametrize(
    "dtype", [pytest.param("float32", marks=pytest.mark.extensive), "bfloat16"]
)
def test_close_to_the_layer_on_dequantised_rows(operands, dtype):
    """e4m3 rounds normal values by 2.6 % in norm, and errors add up in squares.

    Behind the rows, three tensors are rounded: w_in, which enters gate and up (2.6 % * sqrt(2)), the
    activations and w_out: 5.2 % in all. Rows rounded too: 6.4 %. Gradients see fewer of them.
    """
    operands = (jnp.asarray(operands[0], dtype), *operands[1:])
    dequantised = functools.partial(plain, **FP8_WIRE)
    got, near, exact = (
        values_and_gradients(mapped(f), operands) for f in (fp8, dequantised, plain)
    )
    assert max(errors(got, near)) < 0.06
    assert max(errors(got, exact)) < 0.075
    assert min(errors(got, near)) > 0.01  # it was FP8 indeed
    assert not got[3][5].any() and not got[4][5].any()  # the expert without tokens


def powers_of_two():
    """Operands that e4m3 holds exactly: every product is +-2^k, or a sum that float32 holds.

    Column f of the gate reads channel f, which is positive, times at least 32: silu is the identity
    there. Column f of up reads channel 128 + f.
    """
    rng = np.random.default_rng(72)

    def random(*shape):
        return np.exp2(rng.integers(0, 3, shape)) * rng.choice([-1, 1], shape)

    x = random(ranks(4) * T, H)
    x[:, :F] = abs(x[:, :F])
    f = np.arange(F)
    w_in = np.zeros((E, H, 2 * F))
    w_in[:, f, f] = 32 * abs(random(E, F))
    w_in[:, F + f, F + f] = random(E, F)
    return [a.astype(np.float32) for a in (x, w_in, random(E, F, H))]


def test_exact_where_quantisation_is(operands):
    _, idx, logits, *_ = operands
    x, w_in, w_out = powers_of_two()
    operands = (x, idx, logits, w_in, w_out)
    got, want = (values_and_gradients(mapped(f), operands) for f in (fp8, plain))
    assert max(errors(got, want)) < 1e-6


def poison(rows, real):
    return jnp.where(real[:, None], rows.astype(jnp.float32), jnp.nan).astype(rows.dtype)


@jax.custom_vjp
def poison_both_ways(rows, real):
    """NaN in the rows that are not real, and in their cotangent."""
    return poison(rows, real)


poison_both_ways.defvjp(
    lambda rows, real: (poison(rows, real), real), lambda real, g: (poison(g, real), None)
)


def test_rows_without_a_pair_may_hold_nan(operands, fp8_results, monkeypatch):
    """As delivered, as the product leaves them, as the caller of combine gets their cotangent."""
    dispatch, combine, product = jax_ep.dispatch, jax_ep.combine, example.fp8_ragged_dot
    calls = []

    def poisoned_dispatch(*args, **options):
        calls.append("dispatch")
        d = dispatch(*args, **options)
        assert d.tokens.dtype == example.FP8
        real = d.expert_ids >= 0
        return dataclasses.replace(d, tokens=poison(d.tokens, real), scales=poison(d.scales, real))

    def poisoned_product(rows, row_scales, w, w_scales, group_sizes):
        calls.append("product")
        y = product(rows, row_scales, w, w_scales, group_sizes)
        return poison(y, jnp.arange(len(y)) < group_sizes.sum())

    def poisoned_combine(y, handle, weights=None):
        calls.append("combine")
        return combine(poison_both_ways(y, handle.plan.row_pair >= 0), handle, weights)

    monkeypatch.setattr(jax_ep, "dispatch", poisoned_dispatch)
    monkeypatch.setattr(jax_ep, "combine", poisoned_combine)
    monkeypatch.setattr(example, "fp8_ragged_dot", poisoned_product)
    got = values_and_gradients(mapped(fp8), operands)
    assert set(calls) == {"dispatch", "product", "combine"}
    if on_gpus():  # two programs: sums in another order may move a value to the next of e4m3
        assert max(errors(got, fp8_results)) < 1e-3
        return
    for clean, with_nan in zip(fp8_results, got, strict=True):
        np.testing.assert_array_equal(clean, with_nan)


def test_fp8_ragged_dot():
    """Against float64, an expert at a time: empty groups, blocks with scales of their own, a tail."""
    rng = np.random.default_rng(73)
    sizes = np.array([0, 128, 0, 256, 0], np.int32)
    x = rng.standard_normal((512, H), np.float32) * np.exp2(rng.integers(-9, 9, (512, 1)))
    x[sizes.sum() :] = np.nan
    w = rng.standard_normal((5, H, 2 * F), np.float32)
    w[:, :128, 128:] *= 1e3
    w[1, 128:, :128] = 0
    w[3, 128:, :128] = 1e-40  # denormal, as its scale would be
    q, scales = example.quantize_rows(x.astype(np.float32))
    w_q, w_scales = example.quantize_weights(w)
    got = jax.jit(example.fp8_ragged_dot)(q, scales, w_q, w_scales, sizes)
    assert got.dtype == jnp.float32 and w_scales.shape == (5, H // 128, 2 * F // 128)
    expert = np.repeat(np.arange(5), sizes)
    q, scales, w_q, w_scales = (
        np.asarray(a.astype(jnp.float32), np.float64) for a in (q, scales, w_q, w_scales)
    )
    rows = (q * scales.repeat(128, 1))[: len(expert)]
    exact_w = w_q * w_scales.repeat(128, 1).repeat(128, 2)
    want = np.einsum("rh,rhf->rf", rows, exact_w[expert])
    size = np.einsum("rh,rhf->rf", abs(rows), abs(exact_w[expert]))
    assert (abs(got[: len(expert)] - want) <= 1e-6 * size).all()
    assert (
        abs(exact_w - w) <= 2.0**-4 * abs(w) + 2.0**-10 * w_scales.max((1, 2))[:, None, None]
    ).all()


def test_shards_of_the_batch_share_experts(operands, fp8_results):
    """Data times expert parallel: two groups, of two if they can, whose gradients of weights add up.

    Sums in another order may move an activation to the next e4m3 value.
    """
    if ranks(2) < 2:
        pytest.skip("takes two devices")
    mesh, tokens = make_mesh((2, ranks(4) // 2), ("data", "expert")), P(("data", "expert"))
    got = values_and_gradients(mapped(fp8, mesh, tokens), operands)
    assert max(errors(got, fp8_results)) < 1e-3


def test_hidden_sizes_are_multiples_of_128(operands):
    x, idx, logits, w_in, w_out = operands
    with pytest.raises(ValueError, match=rf"w_out: expected .* got \({E // ranks(4)}, 64, 256\)"):
        jax.eval_shape(mapped(fp8), x, idx, logits, w_in, w_out[:, :64])


def test_thirty_steps_train_like_the_exact_layer(operands):
    """A regression on what another set of experts makes of x."""
    x, idx, logits, w_in, w_out = operands
    weights = jax.nn.softmax(logits)
    target = jax.jit(mapped(plain))(x, idx, weights, w_in[::-1], w_out[::-1])
    optimizer = optax.adam(3e-3)

    def losses(f):
        layer = mapped(f)

        def loss(w):
            return ((layer(x, idx, weights, *w) - target) ** 2).mean() / (target**2).mean()

        @jax.jit
        def step(w, state):
            value, g = jax.value_and_grad(loss)(w)
            updates, state = optimizer.update(g, state)
            return value, optax.apply_updates(w, updates), state

        w, values = (w_in, w_out), []
        state = optimizer.init(w)
        for _ in range(30):
            value, w, state = step(w, state)
            values.append(float(value))
        return np.array(values)

    exact, quantized = losses(plain), losses(fp8)
    assert exact[-1] < 0.1 * exact[0]
    assert (abs(quantized - exact) < 0.02 * exact[0]).all()
