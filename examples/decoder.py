# SPDX-License-Identifier: Apache-2.0
"""Decoding with a KV cache: data parallel attention, expert parallel MoE, all under one `jit`.

token -> embed -> [norm -> qkv -> write the cache -> attend over it] -> [norm -> MoE] -> argmax

Every rank has sequences of its own, each in a row of the cache; only the MoE layer talks to other
ranks. The model is `byte_transformer.ByteTransformer`, its inputs without context. `decode.py`
measures it.
"""

import dataclasses
import functools
import time
from typing import Literal

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jax import Array, lax
from jax.sharding import Mesh, NamedSharding
from jax.sharding import PartitionSpec as P

import jax_ep

from . import experts
from .byte_transformer import Block, ByteTransformer, place, specs
from .experts import MoEConfig, gated, swiglu
from .moe_nnx import MoE

Cache = list[tuple[Array, Array]]  # of each block: keys and values [rows, kv_heads, length, D]


@dataclasses.dataclass(frozen=True)
class Sizes:
    """Of a model and of its cache."""

    hidden: int
    experts: int
    intermediate: int  # hidden size of an expert, of the shared one, too
    top_k: int
    heads: int
    kv_heads: int
    layers: int = 1
    length: int = 1024  # positions of a row of the cache
    dtype: str = "bfloat16"
    layout: Literal["ragged", "batched"] = "batched"


# The model, one token further, on one rank.


def decode(
    model: ByteTransformer,
    config: MoEConfig,
    cache: Cache,
    tokens: Array,
    position: Array,
    *,
    overlap: bool = False,
) -> tuple[Cache, Array]:
    """One token of every sequence, inside `jax.shard_map`.

    Args:
        model: of one rank.
        config: the model's, perhaps with another `implementation`.
        cache: of at least b rows; the first b are used.
        tokens: [b] int32.
        position: [b] int32, of the token in its sequence; -1 for a row without a sequence.
        overlap: the shared expert runs between the halves of dispatch and of combine.

    Returns:
        The cache with this token's keys and values, and logits [b, 256].
    """
    live, at = position >= 0, jnp.maximum(position, 0)
    offset = model.position[...][at]
    x = model.bytes(tokens).astype(offset.dtype) + offset
    kept = []
    for block, of_block in zip(model.blocks, cache, strict=True):
        x, of_block = attend(block, x, of_block, at)
        x = x + moe(block.moe, config, block.norm2(x), live, overlap)
        kept.append(of_block)
    return kept, model.head(model.norm(x))


def attend(block: Block, x: Array, cache: tuple[Array, Array], at: Array):
    """`Block.attend` for one position `at [b]` of each row of `x [b, H]`, and the cache after it."""
    b, (_, groups, length, d) = len(x), cache[0].shape
    q, *new = block.project(x)
    # Index dimensions lead: XLA writes in place, where it would else transpose the cache.
    rows = jnp.arange(b)[:, None], jnp.arange(groups), at[:, None]
    keys, values = (
        c.at[rows].set(n, unique_indices=True, mode="promise_in_bounds")
        for c, n in zip(cache, new, strict=True)
    )
    q = q.reshape(b, groups, -1, d)
    scores = jnp.einsum("bgqd,bgld->bgql", q, keys[:b], preferred_element_type=jnp.float32)
    seen = jnp.arange(length) <= at[:, None]
    scores = jnp.where(seen[:, None, None], scores / np.sqrt(d), -jnp.inf)
    mix = jax.nn.softmax(scores).astype(x.dtype)
    mixed = jnp.einsum("bgql,bgld->bgqd", mix, values[:b])
    return x + block.out(mixed.reshape(x.shape)), (keys, values)


def moe(layer: MoE, config: MoEConfig, x: Array, live: Array, overlap: bool) -> Array:
    """Routed and shared experts of `x [b, H]`; rows that are not live go to no routed expert."""
    weights, topk_idx = route(layer, config, x, live)
    w_in, w_out = layer.w_in[...], layer.w_out[...]
    shared_in, shared_out = layer.shared_in[...], layer.shared_out[...]
    if not overlap:
        d = experts.dispatch(config, x, topk_idx, weights)
        out = experts.combine(experts.experts(d, w_in, w_out), d)
        return out + swiglu(x, shared_in, shared_out)
    sent = jax_ep.dispatch_start(x, topk_idx, weights, **experts.dispatch_options(config))
    hidden = gated(x @ shared_in)  # while the rows are on their way
    d = jax_ep.dispatch_done(sent)
    partials = jax_ep.combine_start(experts.experts(d, w_in, w_out), d.handle, d.weights)
    shared = hidden @ shared_out  # while the sums are
    return jax_ep.combine_done(partials) + shared


def route(layer: MoE, config: MoEConfig, x: Array, live: Array) -> tuple[Array, Array]:
    """Weights and experts of each token; none for rows that are not live, so nothing is sent."""
    weights, topk_idx = experts.route(config, x, layer.router[...], layer.bias[...])
    return weights, jnp.where(live[:, None], topk_idx, -1)


# The model, one token further, on all ranks.


class Decoder:
    """A model's weights, and one program for each batch size that it is called with.

    Args:
        model: placed on the devices of its mesh.
        implementation: of dispatch and combine.
        overlap: as in `decode`.
    """

    def __init__(self, model: ByteTransformer, implementation=None, *, overlap: bool = False):
        graph, self.state = nnx.split(model)
        layer = model.blocks[0].moe
        self.mesh = layer.mesh
        self.config = dataclasses.replace(layer.config, implementation=implementation)
        self.split = NamedSharding(self.mesh, P("expert"))
        self.length, block = len(model.position[...]), model.blocks[0]
        self._row = (block.kv_heads, self.length, self.config.hidden // block.heads)
        self._layers, self.dtype = len(model.blocks), model.position[...].dtype

        def on_rank(state, cache, tokens, position):
            merged = nnx.merge(graph, state)
            cache, logits = decode(merged, self.config, cache, tokens, position, overlap=overlap)
            following = jnp.where(position < 0, -1, (position + 1) % self.length)
            return cache, logits.argmax(-1).astype(jnp.int32), following

        ranks = P("expert")
        mapped = jax.shard_map(
            on_rank,
            mesh=self.mesh,
            in_specs=(specs(self.state), ranks, ranks, ranks),
            out_specs=ranks,
        )
        #: (weights, cache, tokens [R*b], position [R*b]) to the next three; takes the cache over.
        #: A sequence that fills its row starts again from position 0.
        self.step = jax.jit(mapped, donate_argnums=1)
        self.steps = jax.jit(self._steps, donate_argnums=1, static_argnames="length")

    def _steps(self, state, cache, tokens, position, *, length: int):
        def step(carry, _):
            return self.step(state, *carry), None

        return lax.scan(step, (cache, tokens, position), length=length)[0]

    def empty_cache(self, rows: int) -> Cache:
        """A cache of so many rows on every rank."""
        shape = (self.mesh.size * rows, *self._row)
        zeros = functools.partial(jnp.zeros, shape, self.dtype, device=self.split)
        return [(zeros(), zeros()) for _ in range(self._layers)]

    def put(self, array: np.ndarray) -> Array:
        """`[R, b]` on the host to `[R*b]` over the ranks."""
        return jax.device_put(array.reshape(-1), self.split)

    def programs(self) -> int:
        """How many programs `step` has been compiled to."""
        return self.step._cache_size()  # type: ignore[attr-defined]


def build(sizes: Sizes, mesh: Mesh, config: jax_ep.Config | None = None) -> ByteTransformer:
    """A model with random weights of `sizes.dtype` on the devices of the mesh."""
    moe_config = MoEConfig(
        sizes.hidden,
        sizes.intermediate,
        num_experts=sizes.experts,
        top_k=sizes.top_k,
        shared_hidden=sizes.intermediate,
        layout=sizes.layout,
        config=config,
    )

    @nnx.jit
    def random() -> ByteTransformer:
        model = ByteTransformer(
            moe_config,
            mesh,
            layers=sizes.layers,
            heads=sizes.heads,
            kv_heads=sizes.kv_heads,
            length=sizes.length,
            context=1,
            rngs=nnx.Rngs(0),
        )
        params = nnx.state(model, nnx.Param)
        nnx.update(model, jax.tree.map(lambda a: a.astype(sizes.dtype), params))
        return model

    model = random()
    place(model, mesh)
    return model


# A loop whose batch changes at every step.


class Server:
    """Sequences that come and go, each in one row of one rank's cache for as long as it lives.

    A new sequence takes the lowest free row, and a step runs a batch of the power of two that
    covers every rank's live rows. So there are at most log2(rows) + 1 programs, and no sequence is
    ever moved.

    Args:
        decoder: what runs a step.
        rows: most sequences of a rank, a power of two.
    """

    def __init__(self, decoder: Decoder, rows: int):
        if rows < 1 or rows & (rows - 1):
            raise ValueError(f"rows: expected a power of two, got {rows}")
        self.decoder, self.cache = decoder, decoder.empty_cache(rows)
        self.tokens = np.zeros((decoder.mesh.size, rows), np.int32)
        self.position = np.full(self.tokens.shape, -1, np.int32)
        self.rows, self.most_programs = rows, rows.bit_length()  # log2(rows) + 1

    def warm_up(self) -> None:
        """Compile every batch size, before the first request waits for it."""
        if (self.position >= 0).any():
            raise RuntimeError("warm_up: expected no sequence yet, got some")
        for exponent in range(self.most_programs):
            self._run(2**exponent)

    def admit(self, token: int) -> tuple[int, int] | None:
        """Start a sequence; its rank and row, or None if all are taken."""
        free = np.argwhere(self.position.T < 0)
        if not len(free):
            return None
        row, rank = map(int, free[0])
        self.tokens[rank, row], self.position[rank, row] = token, 0
        return rank, row

    def finish(self, rank: int, row: int) -> None:
        """Free a row."""
        self.position[rank, row] = -1

    def step(self) -> int:
        """The next token of every sequence, into `tokens`; returns the batch size it ran."""
        highest = int(np.flatnonzero((self.position >= 0).any(0)).max(initial=0))
        batch = 1 << highest.bit_length()
        self._run(batch)
        if self.decoder.programs() > self.most_programs:
            raise RuntimeError(
                f"expected at most {self.most_programs} programs, got {self.decoder.programs()}"
            )
        return batch

    def _run(self, batch: int) -> None:
        part = np.s_[:, :batch]
        arrays = [self.decoder.put(a[part]) for a in (self.tokens, self.position)]
        self.cache, *arrays = self.decoder.step(self.decoder.state, self.cache, *arrays)
        self.tokens[part], self.position[part] = (np.asarray(a).reshape(-1, batch) for a in arrays)


@dataclasses.dataclass
class Request:
    """What a user asks for, and has got so far."""

    token: int  # the first
    count: int  # how many to decode
    tokens: list[int] = dataclasses.field(default_factory=list)


def serve(server: Server, arriving: list[list[Request]]) -> list[tuple[int, int, float]]:
    """Decode all requests, `arriving[i]` of which come before step i.

    Returns:
        For each step live sequences, batch size per rank, and seconds.
    """
    longest = max((r.count for requests in arriving for r in requests), default=0)
    if longest > server.decoder.length:
        raise ValueError(f"count: expected at most {server.decoder.length}, got {longest}")
    waiting: list[Request] = []
    live: dict[tuple[int, int], Request] = {}
    log = []
    while arriving or waiting or live:
        start = time.perf_counter()
        waiting += arriving.pop(0) if arriving else []
        while waiting and (row := server.admit(waiting[0].token)) is not None:
            live[row] = waiting.pop(0)
        if not live:
            continue
        batch = server.step()
        log.append((len(live), batch, time.perf_counter() - start))
        for row, request in list(live.items()):
            request.tokens.append(int(server.tokens[row]))
            if len(request.tokens) == request.count:
                server.finish(*row)
                del live[row]
    return log
