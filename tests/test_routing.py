# SPDX-License-Identifier: Apache-2.0
"""Routers against NumPy."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from conftest import make_mesh
from jax.sharding import PartitionSpec as P

from jax_ep import routing


def scores_of(logits, score):
    z = logits.astype(np.float64)
    if score == "sigmoid":
        return 1 / (1 + np.exp(-z))
    e = np.exp(z - z.max(-1, keepdims=True))
    return e / e.sum(-1, keepdims=True)


@pytest.mark.parametrize("score", ["softmax", "sigmoid"])
@pytest.mark.parametrize("normalize", [True, False])
@pytest.mark.parametrize("biased", [True, False])
def test_top_k(score, normalize, biased):
    rng = np.random.default_rng(0)
    logits = rng.standard_normal((3, 5, 16)).astype(np.float32)
    bias = rng.standard_normal(16).astype(np.float32) if biased else None
    weights, idx = routing.top_k(logits, 4, score=score, normalize=normalize, scale=2.5, bias=bias)
    assert weights.dtype == jnp.float32 and idx.dtype == jnp.int32
    s = scores_of(logits, score)
    want = np.argsort(-(s + (0 if bias is None else bias)), -1, kind="stable")[..., :4]
    np.testing.assert_array_equal(idx, want)
    w = np.take_along_axis(s, want, -1)
    w = w / w.sum(-1, keepdims=True) if normalize else w
    np.testing.assert_allclose(weights, 2.5 * w, rtol=1e-5)


def test_group_limited_top_k_as_deepseek_v3():
    rng = np.random.default_rng(1)
    logits = rng.standard_normal((40, 32)).astype(np.float32)
    bias = (rng.standard_normal(32) / 4).astype(np.float32)
    weights, idx = routing.group_limited_top_k(
        logits, 4, num_groups=8, topk_groups=3, bias=bias, scale=2.5
    )
    s = scores_of(logits, "sigmoid")
    for t in range(40):
        by = (s[t] + bias).reshape(8, 4)
        groups = np.argsort(-np.sort(by, -1)[:, -2:].sum(-1), kind="stable")[:3]
        masked = np.full((8, 4), -np.inf)
        masked[groups] = by[groups]
        want = np.argsort(-masked.reshape(-1), kind="stable")[:4]
        np.testing.assert_array_equal(idx[t], want)
        np.testing.assert_allclose(weights[t], 2.5 * s[t][want] / s[t][want].sum(), rtol=1e-5)
        assert len(set(want // 4)) <= 3


def test_all_groups_is_plain_top_k():
    logits = np.random.default_rng(2).standard_normal((9, 16)).astype(np.float32)
    a = routing.group_limited_top_k(logits, 3, num_groups=4, topk_groups=4)
    b = routing.top_k(logits, 3, score="sigmoid")
    np.testing.assert_array_equal(a[1], b[1])
    np.testing.assert_allclose(a[0], b[0])


def test_bias_has_no_gradient_and_weights_have():
    logits = np.random.default_rng(3).standard_normal((9, 16)).astype(np.float32)
    f = lambda logits, bias: (routing.top_k(logits, 3, bias=bias)[0] ** 2).sum()
    d_logits, d_bias = jax.grad(f, (0, 1))(logits, np.zeros(16, np.float32))
    assert np.abs(d_logits).max() > 0 and not d_bias.any()


def test_expert_load_and_bias():
    idx = np.random.default_rng(4).integers(-1, 16, (32, 3)).astype(np.int32)
    want = np.bincount(idx[idx >= 0], minlength=16)
    np.testing.assert_array_equal(routing.expert_load(idx, 16), want)
    f = jax.shard_map(
        lambda i: routing.expert_load(i, 16, "expert"),
        mesh=make_mesh(),
        in_specs=P("expert"),
        out_specs=P(),
    )
    np.testing.assert_array_equal(jax.jit(f)(idx), want)
    bias = routing.update_bias(jnp.zeros(16), jnp.asarray(want), rate=0.5)
    np.testing.assert_array_equal(bias, 0.5 * np.sign(want.mean() - want))


@pytest.mark.parametrize(
    "error, message, call",
    [
        (ValueError, "k: expected 1 to E", lambda z: routing.top_k(z, 17)),
        (TypeError, "logits: expected a dtype of kind floating, got int32", lambda z: routing.top_k(z.astype(np.int32), 1)),
        (ValueError, r"score: expected one of \['softmax', 'sigmoid'\], got 'relu'", lambda z: routing.top_k(z, 2, score="relu")),
        (ValueError, r"bias: expected shape \(16,\), got \(15,\)", lambda z: routing.top_k(z, 2, bias=jnp.zeros(15))),
        (ValueError, "num_groups: expected a divisor of 16, got 3", lambda z: routing.group_limited_top_k(z, 2, num_groups=3, topk_groups=1)),
        (ValueError, "topk_groups: expected 1 to 8 groups with at least k=4", lambda z: routing.group_limited_top_k(z, 4, num_groups=8, topk_groups=1)),
        (TypeError, "topk_idx: expected a dtype of kind integer", lambda z: routing.expert_load(z, 4)),
        (ValueError, "load: expected the shape of bias", lambda z: routing.update_bias(jnp.zeros(4), jnp.zeros(5))),
    ],
)  # fmt: skip
def test_bad_input(error, message, call):
    with pytest.raises(error, match=message):
        call(np.zeros((2, 16), np.float32))
