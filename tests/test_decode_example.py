# SPDX-License-Identifier: Apache-2.0
"""Decoding with a cache is the whole forward pass, and a changing batch compiles few programs."""

import dataclasses
import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from conftest import PORTABLE, make_mesh, on_gpus, ranks
from flax import nnx
from jax.sharding import NamedSharding
from jax.sharding import PartitionSpec as P

import jax_ep
from jax_ep.examples import byte_transformer, decode, decoder
from jax_ep.examples.decoder import Decoder, Request, Server, Sizes

pytestmark = PORTABLE
SIZES = Sizes(32, 16, 16, 3, heads=4, kv_heads=2, layers=2, length=16, dtype="float32")


@pytest.fixture(scope="module")
def model(platform):
    return decoder.build(SIZES, make_mesh())


def start(decoding, batch):
    """Random first tokens `[R, batch]`, in an empty cache."""
    rng, shape = np.random.default_rng(0), (ranks(), batch)
    tokens = rng.integers(0, 256, shape, np.int32)
    return (
        decoding.empty_cache(batch),
        decoding.put(tokens),
        decoding.put(np.zeros(shape, np.int32)),
    )


def sampled(decoding, carry, steps=SIZES.length):
    """Tokens `[steps, R*b]`; the cache stays where it is."""
    tokens, before = [], addresses(carry[0])
    for _ in range(steps):
        carry = decoding.step(decoding.state, *carry)
        assert addresses(carry[0]) == before
        tokens.append(np.asarray(carry[1]))
    return np.stack(tokens)


def addresses(cache):
    shards = (s for a in jax.tree.leaves(cache) for s in a.addressable_shards)
    return [s.data.unsafe_buffer_pointer() for s in shards]


def over_ranks(model, config):
    """`decoder.decode` of all ranks, and the weights, its first argument."""
    graph, state = nnx.split(model)

    def on_rank(state, *args):
        return decoder.decode(nnx.merge(graph, state), config, *args)

    split = P("expert")
    specs = (byte_transformer.specs(state), split, split, split)
    mesh = model.blocks[0].moe.mesh
    return jax.shard_map(on_rank, mesh=mesh, in_specs=specs, out_specs=split), state


@pytest.fixture(scope="module")
def logits(model):
    """`decoder.decode`, compiled for two of a cache's four rows, ragged; other tests have batched."""
    decoding = Decoder(model)
    mapped, state = over_ranks(model, dataclasses.replace(decoding.config, layout="ragged"))
    cache, zeros = decoding.empty_cache(4), decoding.put(np.zeros((ranks(), 2), np.int32))
    compiled = jax.jit(mapped).lower(state, cache, zeros, zeros).compile()

    def step(cache, *arrays):
        return compiled(state, cache or decoding.empty_cache(4), *map(decoding.put, arrays))

    return step


def test_bfloat16_is_bfloat16_throughout(model):
    half = nnx.clone(model)
    params = nnx.state(half, nnx.Param)
    nnx.update(half, jax.tree.map(lambda a: a.astype(jnp.bfloat16), params))
    decoding = Decoder(half)
    mapped, state = over_ranks(half, decoding.config)
    cache, logits = jax.eval_shape(mapped, state, *start(decoding, 2))
    assert {a.dtype for a in (logits, *jax.tree.leaves(cache))} == {jnp.dtype(jnp.bfloat16)}


def test_steps_with_a_cache_are_the_whole_forward_pass(model, logits):
    text = np.random.default_rng(1).integers(0, 256, (ranks() * 2, 10), np.int32)
    split = NamedSharding(model.blocks[0].moe.mesh, P("expert"))
    forward = nnx.jit(lambda model, text: model(text))
    want = np.asarray(forward(model, jax.device_put(text, split)))
    cache = None
    for i in range(text.shape[1]):
        cache, got = logits(cache, text[:, i], np.full(len(text), i, np.int32))
        np.testing.assert_allclose(got, want[:, i], atol=1e-4, err_msg=f"position {i}")


def test_rows_without_a_sequence_change_nothing(logits):
    rng = np.random.default_rng(2)
    live = np.argsort(rng.random((ranks(), 2))) == 0
    tokens = rng.integers(0, 256, live.shape, np.int32)
    position = np.where(live, 0, -1).astype(np.int32)
    others = np.where(live, tokens, 255 - tokens)
    got = [np.asarray(logits(None, t, position)[1])[live.reshape(-1)] for t in (tokens, others)]
    np.testing.assert_array_equal(*got)


def test_rows_without_a_sequence_go_to_no_expert(model):
    layer, live = model.blocks[0].moe, np.array([True, False, True])
    x = np.random.default_rng(3).standard_normal((3, SIZES.hidden), np.float32)
    _, topk_idx = decoder.route(layer, layer.config, x, live)
    np.testing.assert_array_equal((np.asarray(topk_idx) >= 0).all(1), live)
    np.testing.assert_array_equal((np.asarray(topk_idx) == -1).all(1), ~live)


def test_implementations_halves_and_a_scan_give_the_same_tokens(model):
    names = ["xla", "cuda"] if on_gpus() else ["xla"]
    decoders = {name: Decoder(model, name) for name in names}
    decoders |= {f"{name}, halves": Decoder(model, name, overlap=True) for name in names}
    got = {name: sampled(d, start(d, 4)) for name, d in decoders.items()}
    for name, tokens in got.items():
        np.testing.assert_array_equal(tokens, got["xla"], err_msg=name)
    assert len(np.unique(got["xla"])) > 20
    scan = decoders[names[-1]]
    _, tokens, position = scan.steps(scan.state, *start(scan, 4), length=4)
    np.testing.assert_array_equal(tokens, got["xla"][3])
    assert (np.asarray(position) == 4).all()


class Compilations:
    """Counts what XLA compiles, from JAX's own events."""

    def __enter__(self):
        self.count = 0
        jax.monitoring.register_event_duration_secs_listener(self.listen)
        return self

    def __exit__(self, *_):
        jax.monitoring.unregister_event_duration_listener(self.listen)

    def listen(self, event, *_, **__):
        self.count += event == "/jax/core/compile/backend_compile_duration"


def requests(count):
    rng = np.random.default_rng(4)
    return [Request(int(rng.integers(256)), int(rng.integers(2, 12))) for _ in range(count)]


def test_a_changing_batch_compiles_few_programs(model):
    rows, R = 4, ranks()
    server = Server(Decoder(model), rows)
    everyone = requests(10 * R)
    few = [everyone[i : i + R // 2 + 1] for i in range(0, 4 * R, R // 2 + 1)]
    placed = sum(map(len, few))
    arriving = [*few, *[[]] * 12, everyone[placed:]]  # a few at a time, a pause, all at once
    with Compilations() as compilations:
        log = decoder.serve(server, arriving)
    live, batches, _ = zip(*log, strict=True)
    assert len(set(live)) > 5 and max(live) == R * rows and set(batches) == {1, 2, 4}
    assert server.decoder.programs() == compilations.count == server.most_programs == 3
    alone = Server(server.decoder, rows)
    for request in everyone[::5]:
        again = Request(request.token, request.count)
        decoder.serve(alone, [[again]])
        assert request.tokens == again.tokens and len(again.tokens) == request.count
    with Compilations() as compilations:
        server.warm_up()
    assert compilations.count == 0
    alone.most_programs = 2
    with pytest.raises(RuntimeError, match="expected at most 2 programs, got 3"):
        alone.step()
    alone.admit(0)
    with pytest.raises(RuntimeError, match="warm_up: expected no sequence yet"):
        alone.warm_up()


def test_a_server_refuses_what_it_cannot_hold(model):
    decoding = Decoder(model)
    with pytest.raises(ValueError, match="rows: expected a power of two, got 6"):
        Server(decoding, 6)
    with pytest.raises(ValueError, match="count: expected at most 16, got 17"):
        decoder.serve(Server(decoding, 2), [[Request(0, 17)]])


@pytest.fixture
def no_groups():
    """The command is a program of its own."""
    jax_ep.finalize()
    yield
    jax_ep.finalize()


@pytest.mark.usefixtures("no_groups")
def test_the_command_prints_and_keeps_its_figures(tmp_path, capsys):
    file = tmp_path / "decode.json"
    small = "--hidden 32 --experts 16 --intermediate 16 --top-k 2 --heads 2 --kv-heads 1 --length 8"
    short = "--steps 4 --scan 2 --batch 2 --rows 1 --changing-steps 4 --overlap --dtype float32"
    assert decode.main([*small.split(), *short.split(), "--json", str(file)]) == 0
    printed, kept = capsys.readouterr().out, json.loads(file.read_text())
    first, *others = kept["fixed"]
    assert first["steps"] == 4 and first["on_cuda"] == "slots"
    assert all(row["same"] == 1 for row in (first, *others))
    assert 0 < first["host p50 us"] <= first["host p99 us"] and first["scan us"] > 0
    assert kept["changing"]["programs"] == kept["changing"]["bound"] == 1
    for text in ("host p50 us", "host p99 us", "scan us", "1 programs, 0 of them compiled while"):
        assert text in printed, printed
    assert decode.row_of([1.0, 3.0], 0.5, 8)["host tokens/s"] == 4
