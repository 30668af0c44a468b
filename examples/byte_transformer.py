# SPDX-License-Identifier: Apache-2.0
"""A small byte-level causal language model whose feed-forward layers are MoE layers (Flax NNX)."""

import jax
import jax.numpy as jnp
import optax
from flax import nnx
from jax import Array
from jax.sharding import Mesh, NamedSharding
from jax.sharding import PartitionSpec as P

from .experts import MoEConfig
from .moe_nnx import MoE, update_bias


class Block(nnx.Module):
    """Attention and MoE, each behind a norm, each added to the stream."""

    def __init__(
        self,
        config: MoEConfig,
        heads: int,
        mesh: Mesh,
        *,
        kv_heads: int | None = None,
        rngs: nnx.Rngs,
    ):
        h = config.hidden
        self.heads, self.kv_heads = heads, kv_heads or heads
        self.norm1, self.norm2 = nnx.RMSNorm(h, rngs=rngs), nnx.RMSNorm(h, rngs=rngs)
        self.qkv = nnx.Linear(h, h + 2 * self.kv_heads * (h // heads), use_bias=False, rngs=rngs)
        self.out = nnx.Linear(h, h, use_bias=False, rngs=rngs)
        self.moe = MoE(config, mesh, rngs=rngs)

    def project(self, x: Array) -> tuple[Array, Array, Array]:
        """Queries `[..., heads, D]`, keys and values `[..., kv_heads, D]` of `x [..., H]`."""
        every = self.qkv(self.norm1(x))
        every = every.reshape(*x.shape[:-1], -1, x.shape[-1] // self.heads)
        q, k, v = jnp.split(every, (self.heads, self.heads + self.kv_heads), axis=-2)
        return q, k, v

    def attend(self, x: Array) -> Array:
        """The block's first half, `[B, S, H]` to `[B, S, H]`."""
        mixed = jax.nn.dot_product_attention(*self.project(x), is_causal=True)
        return x + self.out(mixed.reshape(x.shape))

    def __call__(self, x: Array) -> Array:
        """`[B, S, H]` to `[B, S, H]`."""
        x = self.attend(x)
        return x + self.moe(self.norm2(x))


class ByteTransformer(nnx.Module):
    """Bytes `[B, S]` to logits `[B, S, 256]`.

    Args:
        config: sizes and options of its MoE layers; `hidden` is the whole model's.
        mesh: has an axis "expert" that divides `config.num_experts` and the batch.
        layers: number of blocks.
        heads: attention heads; divides `hidden`.
        kv_heads: heads of keys and values, each for a group of attention heads; None for `heads`.
        length: longest S.
        context: each position's input sums an embedding of its byte and of the ones before, this
            many in all: letter groups need no attention to be seen, so a minute teaches more.
        rngs: for the initial weights.
    """

    def __init__(
        self,
        config: MoEConfig,
        mesh: Mesh,
        *,
        layers: int = 2,
        heads: int = 4,
        kv_heads: int | None = None,
        length: int = 64,
        context: int = 4,
        rngs: nnx.Rngs,
    ):
        self.context = context
        self.bytes = nnx.Embed(256 * context, config.hidden, rngs=rngs)
        self.position = nnx.Param(0.02 * jax.random.normal(rngs.params(), (length, config.hidden)))
        self.blocks = nnx.List(
            [Block(config, heads, mesh, kv_heads=kv_heads, rngs=rngs) for _ in range(layers)]
        )
        self.norm = nnx.RMSNorm(config.hidden, rngs=rngs)
        self.head = nnx.Linear(config.hidden, 256, rngs=rngs)

    def embed(self, text: Array) -> Array:
        """Bytes `[B, S]` to the first block's input `[B, S, H]`."""
        s = text.shape[1]
        earlier = [
            256 * back + jnp.pad(text, ((0, 0), (back, 0)))[:, :s] for back in range(self.context)
        ]
        return self.bytes(jnp.stack(earlier)).sum(0) + self.position[...][:s]

    def __call__(self, text: Array) -> Array:
        """Integers below 256, `[B, S]`, to `[B, S, 256]`."""
        x = self.embed(text)
        for block in self.blocks:
            x = block(x)
        return self.head(self.norm(x))


def place(module: nnx.Module, mesh: Mesh) -> None:
    """Split the experts' weights over the mesh axis "expert"; the rest goes to every device.

    Works for a model and for its optimizer, whose moments lie as the weights do.
    """
    state = nnx.state(module)
    shardings = jax.tree.map(lambda spec: NamedSharding(mesh, spec), specs(state))
    nnx.update(module, jax.device_put(state, shardings))


def specs(state: nnx.State) -> nnx.State:
    """How `place` splits each array of a module's state."""

    def spec(path, _):
        expert = "'w_in'" in jax.tree_util.keystr(path) or "'w_out'" in jax.tree_util.keystr(path)
        return P("expert") if expert else P()

    return jax.tree_util.tree_map_with_path(spec, state)


def loss_fn(model: ByteTransformer, text: Array) -> Array:
    """Mean cross entropy in nats per byte of `text [B, S+1]`."""
    logits = model(text[:, :-1])
    return optax.softmax_cross_entropy_with_integer_labels(logits, text[:, 1:]).mean()


def train_step(
    model: ByteTransformer, optimizer: nnx.Optimizer, text: Array
) -> tuple[Array, Array, Array]:
    """One step on `text [B, S+1]`: the loss, loads `[layers, E]` and drops `[layers, R]`."""
    only_params = nnx.DiffState(0, nnx.Param)
    loss, grads = nnx.value_and_grad(loss_fn, argnums=only_params)(model, text)
    optimizer.update(model, grads)
    update_bias(model)
    layers = [block.moe for block in model.blocks]
    load = jnp.stack([layer.load[...] for layer in layers])
    return loss, load, jnp.stack([layer.dropped[...] for layer in layers])
