# SPDX-License-Identifier: Apache-2.0
"""A Mixture-of-Experts layer for Flax Linen; the collection "balance" holds bias, load and drops."""

import flax.linen as nn
import jax.numpy as jnp
from jax import Array
from jax.sharding import Mesh

import jax_ep

from .experts import MoEConfig, balance_metrics, moe, swiglu


class MoE(nn.Module):
    """Router, routed SwiGLU experts over the mesh axis "expert", and a shared expert.

    Apply it with `mutable=["balance"]` while training, and pass the returned collection through
    `update_bias` after each step.

    Args:
        config: sizes and options.
        mesh: has an axis "expert" that divides `config.num_experts` and the batch.
    """

    config: MoEConfig
    mesh: Mesh

    @nn.compact
    def __call__(self, x: Array) -> Array:
        """`x [B, S, H]` to `[B, S, H]`; notes the load and the drops of this batch."""
        c, init = self.config, nn.initializers.lecun_normal()
        per_expert = nn.initializers.lecun_normal(batch_axis=0)
        router = self.param("router", init, (c.hidden, c.num_experts))
        w_in = self.param("w_in", per_expert, (c.num_experts, c.hidden, 2 * c.expert_hidden))
        w_out = self.param("w_out", per_expert, (c.num_experts, c.expert_hidden, c.hidden))
        bias = self.variable("balance", "bias", jnp.zeros, c.num_experts)
        load = self.variable("balance", "load", jnp.zeros, c.num_experts, jnp.int32)
        ranks = self.mesh.shape["expert"]
        dropped = self.variable("balance", "dropped", jnp.zeros, ranks, jnp.int32)
        out, *noted = moe(c, self.mesh, x, router, bias.value, w_in, w_out)
        if self.is_mutable_collection("balance"):
            load.value, dropped.value = noted
        if c.shared_hidden:
            shared_in = self.param("shared_in", init, (c.hidden, 2 * c.shared_hidden))
            shared_out = self.param("shared_out", init, (c.shared_hidden, c.hidden))
            out = out + swiglu(x, shared_in, shared_out)
        return out


def update_bias(balance: dict, rate: float) -> dict:
    """The collection "balance" after a training step: loss-free balancing in every MoE layer."""
    if "bias" in balance:
        bias = jax_ep.routing.update_bias(balance["bias"], balance["load"], rate=rate)
        return {**balance, "bias": bias}
    return {name: update_bias(inner, rate) for name, inner in balance.items()}


def metrics(balance: dict) -> dict:
    """`max_violation` and `load_entropy` of every MoE layer's last batch, nested as "balance" is."""
    if "load" in balance:
        return balance_metrics(balance["load"])
    return {name: metrics(inner) for name, inner in balance.items()}
