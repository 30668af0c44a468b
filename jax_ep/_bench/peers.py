# SPDX-License-Identifier: Apache-2.0
"""The same exchange through XLA's own collectives, which carry a copy of the token for each pair."""

import jax.numpy as jnp
from jax import lax

from .exchange import Exchange
from .timing import Operation


def time_peers(ex: Exchange) -> None:
    """All-to-all of the copies alone, and sorted pairs through a ragged one, as most MoE code does."""
    timer, work = ex.timer, ex.work
    R, T, K, H = timer.R, work.tokens, work.top_k, work.hidden
    local, x = work.experts // R, ex.x["bfloat16"]
    blocks = timer.mapped(lambda x: jnp.repeat(x, K, 0)[: T * K // R * R].reshape(R, -1, H))(x)

    def all_to_all(_, blocks):
        return lax.all_to_all(blocks, "expert", 0, 0)

    timer.time("lax.all_to_all of the K copies", Operation(all_to_all, (blocks,)))
    if not timer.on_gpu:
        print("sort and lax.ragged_all_to_all: XLA has none on this platform")
        return

    def ragged(_, idx, x):
        owner = (idx // local).reshape(-1)
        order = jnp.argsort(owner)
        sizes = jnp.bincount(owner, length=R).astype(jnp.int32)
        all_sizes, me = lax.all_gather(sizes, "expert"), lax.axis_index("expert")
        starts, offsets = (jnp.cumsum(all_sizes, 0) - all_sizes)[me], jnp.cumsum(sizes) - sizes
        out = jnp.zeros((int(T * K * 1.25), H), x.dtype)
        return lax.ragged_all_to_all(
            x[order // K], out, offsets, sizes, starts, all_sizes[:, me], axis_name="expert"
        )

    operands = (ex.on_device(ex.uniform[0]), x)
    timer.time("sort and lax.ragged_all_to_all", Operation(ragged, operands), length=2)
