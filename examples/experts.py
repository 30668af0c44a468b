# SPDX-License-Identifier: Apache-2.0
"""The arithmetic of a routed layer in four stages, which both Flax layers call.

route      tokens -> weights and experts of each token
dispatch   tokens -> rows on the ranks of their experts, sorted by expert
experts    rows -> rows
combine    rows -> tokens
"""

import dataclasses
from typing import Any, Literal

import jax
import jax.numpy as jnp
from jax import Array, lax
from jax.sharding import Mesh
from jax.sharding import PartitionSpec as P

import jax_ep


@dataclasses.dataclass(frozen=True)
class MoEConfig:
    """Sizes and options of a MoE layer."""

    hidden: int
    expert_hidden: int
    num_experts: int
    top_k: int
    shared_hidden: int = 0  # hidden size of the shared expert; 0 for none
    num_groups: int = 1  # more than 1: group-limited routing
    topk_groups: int = 1
    bias_rate: float = 1e-3  # step of the loss-free balancing bias
    capacity_factor: float | None = None  # rows of a rank over its T*K; None never drops
    implementation: Literal["cuda", "xla"] | None = None
    layout: Literal["ragged", "batched"] = "ragged"
    config: jax_ep.Config | None = None  # which batches are small, for the CUDA kernels


def route(config: MoEConfig, x: Array, router: Array, bias: Array) -> tuple[Array, Array]:
    """Weights `[..., K]` and experts `[..., K]` of each token; `router [H, E]`, `bias [E]`."""
    logits = x.astype(jnp.float32) @ router.astype(jnp.float32)
    if config.num_groups > 1:
        return jax_ep.routing.group_limited_top_k(
            logits,
            config.top_k,
            num_groups=config.num_groups,
            topk_groups=config.topk_groups,
            bias=bias,
        )
    return jax_ep.routing.top_k(logits, config.top_k, score="sigmoid", bias=bias)


def dispatch(config: MoEConfig, x: Array, topk_idx: Array, weights: Array) -> jax_ep.Dispatched:
    """Send this rank's tokens to their experts."""
    return jax_ep.dispatch(x, topk_idx, weights, **dispatch_options(config))


def dispatch_options(config: MoEConfig) -> dict[str, Any]:
    """The keywords of `jax_ep.dispatch` and `jax_ep.dispatch_start`."""
    names = ("num_experts", "capacity_factor", "implementation", "layout", "config")
    return {name: getattr(config, name) for name in names}


def experts(d: jax_ep.Dispatched, w_in: Array, w_out: Array) -> Array:
    """SwiGLU of every row by its expert: `w_in [E/R, H, 2F]`, `w_out [E/R, F, H]`."""

    def product(rows, w):
        w = w.astype(rows.dtype)
        if rows.ndim == 3:  # batched
            return jnp.einsum("ech,ehf->ecf", rows, w)
        return lax.ragged_dot(rows, w, d.group_sizes)

    return product(gated(product(d.tokens, w_in)), w_out)


def combine(y: Array, d: jax_ep.Dispatched) -> Array:
    """Bring the rows back to their tokens, weighted and added up."""
    return jax_ep.combine(y, d.handle, weights=d.weights)


def moe(
    config: MoEConfig, mesh: Mesh, x: Array, router: Array, bias: Array, w_in: Array, w_out: Array
) -> tuple[Array, Array, Array]:
    """`x [B, S, H]`, the batch split over "expert", to `(out [B, S, H], load [E], dropped [R])`.

    The load is of the whole group, as the router chose; `dropped` are pairs that a rank had no room
    for.
    """

    def on_rank(x, router, bias, w_in, w_out):
        weights, topk_idx = route(config, x, router, bias)
        d = dispatch(config, x, topk_idx, weights)
        load = jax_ep.routing.expert_load(topk_idx, config.num_experts, "expert")
        return combine(experts(d, w_in, w_out), d), load, d.num_dropped

    split, whole = P("expert"), P()
    return jax.shard_map(
        on_rank,
        mesh=mesh,
        in_specs=(split, whole, whole, split, split),
        out_specs=(split, whole, split),
    )(x, router, bias, w_in, w_out)


def balance_metrics(load: Array) -> dict[str, Array]:
    """What both Flax layers say of the load `[..., E]` of a batch."""
    return {
        "max_violation": jax_ep.routing.max_violation(load),
        "load_entropy": jax_ep.routing.load_entropy(load),
    }


def swiglu(x: Array, w_in: Array, w_out: Array) -> Array:
    """The shared expert: every token, `w_in [H, 2F]`, `w_out [F, H]`."""
    return gated(x @ w_in.astype(x.dtype)) @ w_out.astype(x.dtype)


def gated(product: Array) -> Array:
    """SwiGLU between its two products, `[..., 2F]` to `[..., F]`."""
    gate, up = jnp.split(product, 2, axis=-1)
    return jax.nn.silu(gate) * up
