# SPDX-License-Identifier: Apache-2.0
"""Loss-free balancing in the Flax layers: a skewed router balances, and the metrics say so."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from conftest import make_mesh
from flax import nnx
from jax import lax

from jax_ep import routing
from jax_ep.examples import moe_linen, moe_nnx
from jax_ep.examples.experts import MoEConfig

CONFIG = MoEConfig(16, 8, num_experts=16, top_k=2, bias_rate=0.01)
STEPS = 120


def test_metrics():
    loads = np.array([[5, 1, 1, 1], [2, 2, 2, 2], [8, 0, 0, 0], [0, 0, 0, 0]])
    np.testing.assert_allclose(routing.max_violation(loads), [1.5, 0, 3, 0])
    p = np.array([5, 1, 1, 1]) / 8
    first = -(p * np.log(p)).sum() / np.log(4)
    np.testing.assert_allclose(routing.load_entropy(loads), [first, 1, 0, 1], rtol=1e-6)


def batches(mesh):
    """`[steps, R, 256, H]`, all tokens leaning the same way, so that a router prefers few experts."""
    rng = np.random.default_rng(0)
    x = rng.standard_normal((STEPS, mesh.size, 256, CONFIG.hidden), np.float32)
    return x + 1.5 * rng.standard_normal(CONFIG.hidden).astype(np.float32)


def nnx_metrics(config, mesh):
    """MaxVio and entropy of each step."""
    layer = moe_nnx.MoE(config, mesh, rngs=nnx.Rngs(0))
    graph, params, state = nnx.split(layer, nnx.Param, moe_nnx.Balance)

    def step(state, x):
        layer = nnx.merge(graph, params, state)
        layer(x)
        metrics = moe_nnx.update_bias(layer)
        return nnx.split(layer, nnx.Param, moe_nnx.Balance)[2], metrics

    (metrics,) = jax.jit(lambda xs: lax.scan(step, state, xs)[1])(batches(mesh)).values()
    return metrics


def linen_metrics(config, mesh):
    """The same of the Linen layer."""
    layer, xs = moe_linen.MoE(config, mesh), batches(mesh)
    variables = jax.jit(layer.init)(jax.random.key(0), xs[0])

    def step(balance, x):
        state = {"params": variables["params"], "balance": balance}
        _, changed = layer.apply(state, x, mutable=["balance"])
        metrics = moe_linen.metrics(changed["balance"])
        return moe_linen.update_bias(changed["balance"], config.bias_rate), metrics

    return jax.jit(lambda xs: lax.scan(step, variables["balance"], xs)[1])(xs)


@pytest.mark.parametrize("flavour", [nnx_metrics, linen_metrics])
def test_a_skewed_router_balances(flavour):
    mesh = make_mesh((2,))
    metrics = jax.tree.map(np.asarray, flavour(CONFIG, mesh))
    violation, entropy = metrics["max_violation"], metrics["load_entropy"]
    assert violation.shape == entropy.shape == (STEPS,)
    assert violation[0] > 2 and entropy[0] < 0.8  # each batch is as skewed as the first
    assert violation[-20:].mean() < 0.5 and entropy[-20:].mean() > 0.97


def test_linen_metrics_reach_every_layer():
    inner = {"bias": jnp.zeros(2), "load": jnp.array([1, 3])}
    metrics = moe_linen.metrics({"a": inner, "b": {"c": inner}})
    assert metrics["a"]["max_violation"] == metrics["b"]["c"]["max_violation"] == 0.5
