# SPDX-License-Identifier: Apache-2.0
"""A Mixture-of-Experts layer for Flax NNX."""

import jax
import jax.numpy as jnp
from flax import nnx
from jax import Array
from jax.sharding import Mesh

import jax_ep

from .experts import MoEConfig, balance_metrics, moe, swiglu


class Balance(nnx.Variable):
    """State of the router that no gradient touches: its bias, the last batch's load and drops."""


class MoE(nnx.Module):
    """Router, routed SwiGLU experts over the mesh axis "expert", and a shared expert.

    Args:
        config: sizes and options.
        mesh: has an axis "expert" that divides `config.num_experts` and the batch.
        rngs: for the initial weights.
    """

    def __init__(self, config: MoEConfig, mesh: Mesh, *, rngs: nnx.Rngs):
        c, init = config, jax.nn.initializers.lecun_normal()
        per_expert = jax.nn.initializers.lecun_normal(batch_axis=0)
        self.config, self.mesh = config, mesh
        self.router = nnx.Param(init(rngs.params(), (c.hidden, c.num_experts)))
        self.w_in = nnx.Param(
            per_expert(rngs.params(), (c.num_experts, c.hidden, 2 * c.expert_hidden))
        )
        self.w_out = nnx.Param(
            per_expert(rngs.params(), (c.num_experts, c.expert_hidden, c.hidden))
        )
        if c.shared_hidden:
            self.shared_in = nnx.Param(init(rngs.params(), (c.hidden, 2 * c.shared_hidden)))
            self.shared_out = nnx.Param(init(rngs.params(), (c.shared_hidden, c.hidden)))
        self.bias = Balance(jnp.zeros(c.num_experts))
        self.load = Balance(jnp.zeros(c.num_experts, jnp.int32))
        self.dropped = Balance(jnp.zeros(mesh.shape["expert"], jnp.int32))

    def __call__(self, x: Array) -> Array:
        """`x [B, S, H]` to `[B, S, H]`; notes the load and the drops of this batch."""
        out, self.load[...], self.dropped[...] = moe(
            self.config,
            self.mesh,
            x,
            *(v[...] for v in (self.router, self.bias, self.w_in, self.w_out)),
        )
        if self.config.shared_hidden:
            out = out + swiglu(x, self.shared_in[...], self.shared_out[...])
        return out

    def update_bias(self) -> None:
        """Loss-free balancing of this layer by the load of its last batch."""
        self.bias[...] = jax_ep.routing.update_bias(
            self.bias[...], self.load[...], rate=self.config.bias_rate
        )

    def metrics(self) -> dict[str, Array]:
        """Scalars `max_violation` and `load_entropy` of the last batch."""
        return balance_metrics(self.load[...])


def update_bias(model: nnx.Module) -> dict[str, dict[str, Array]]:
    """Loss-free balancing in every MoE layer of a model: call it once after each training step.

    Returns:
        The metrics of each layer, by its path in the model, such as "blocks/0/moe".
    """
    metrics = {}
    for path, layer in nnx.iter_modules(model):
        if isinstance(layer, MoE):
            layer.update_bias()
            metrics["/".join(map(str, path))] = layer.metrics()
    return metrics
