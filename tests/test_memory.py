# SPDX-License-Identifier: Apache-2.0
"""`python -m jax_ep memory`: what it prints is what the calls return, save and drop."""

import itertools
import pathlib
import re
import shlex

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from cases import FP8, flat
from conftest import make_mesh
from jax.sharding import PartitionSpec as P

import jax_ep
from jax_ep import __main__, _ffi, _memory

R, T, H, K, E = 8, 160, 256, 2, 16
OPTIONS = dict(layers=1, samples=1, skew=1.0)
with_cuda = pytest.mark.skipif(not _ffi.has_cuda(), reason="this build found no nvcc")


def model(**changes):
    return _memory.Model(**dict(tokens=T, hidden=H, experts=E, top_k=K, ranks=R) | changes)


def size(type_):
    return type_.size * type_.dtype.itemsize


def real_types(factor, combine_wire=None, **options):
    """What `dispatch` and `combine` return over the group, from their own `eval_shape`."""

    def body(x, idx, weights):
        d = jax_ep.dispatch(x, idx, weights, num_experts=E, capacity_factor=factor, **options)
        y = d.tokens.astype(x.dtype)
        return d, jax_ep.combine(y, d.handle, d.weights, wire_dtype=combine_wire)

    spec = P("expert")
    mapped = jax.shard_map(body, mesh=make_mesh((R,)), in_specs=spec, out_specs=spec)
    shapes = ((H,), jnp.bfloat16), ((K,), jnp.int32), ((K,), jnp.float32)
    return jax.eval_shape(
        mapped, *(jax.ShapeDtypeStruct((R * T, *shape), dtype) for shape, dtype in shapes)
    )


@pytest.mark.parametrize(
    ("changes", "options"),
    [
        ({}, {}),
        (dict(alignment=16, wire=FP8), dict(expert_alignment=16, wire_dtype=FP8)),
        (dict(layout="batched", combine_wire=FP8), dict(layout="batched", combine_wire=FP8)),
        (dict(wire=FP8, deliver="quantized"), dict(wire_dtype=FP8, deliver="quantized")),
    ],
    ids=["ragged", "aligned", "batched", "quantized"],
)
def test_buffers_are_those_of_the_calls(changes, options):
    names = {k: np.dtype(v).name if v is FP8 else v for k, v in changes.items()}
    values = _memory.facts(model(**names), [1.5], **OPTIONS)
    printed = _memory.table(values)
    for bound in values["bounds"]:
        d, out = real_types(bound["capacity_factor"], **options)
        assert bound["rows"] == d.handle.spec.rows
        fields = {k: v for k, v in vars(d).items() if k != "handle" and v is not None}
        real = {"dispatch": fields, "plan": vars(d.handle.plan), "combine": {"tokens": out}}
        for part, types in real.items():
            assert bound["arrays"][part].keys() == types.keys()
            for name, type_ in types.items():
                got = bound["arrays"][part][name]
                assert got["shape"] == [type_.shape[0] // R, *type_.shape[1:]]
                assert got["dtype"] == type_.dtype.name
                assert got["bytes"] * R == size(type_)
                assert re.search(rf"{part}: {name} .*\b{got['bytes']:,}\b", printed)


def test_saved_for_backward():
    """Without a policy the rows of dispatch, those of the experts, weights and plan; with the names
    of `REMAT_NAMES` the experts' rows are made again."""
    values = _memory.facts(model(), [], **OPTIONS | dict(layers=3))
    (bound,) = values["bounds"]
    arrays = bound["arrays"]
    rows = arrays["dispatch"]["tokens"]["bytes"]
    others = arrays["dispatch"]["weights"]["bytes"] + sum(
        array["bytes"] for array in arrays["plan"].values()
    )
    assert bound["saved"] == {"all": 3 * (2 * rows + others), "REMAT_NAMES": 3 * (rows + others)}


@with_cuda
def test_scratch_of_the_cuda_calls():
    def scratch(**changes):
        m = model(top_k=3, hidden=8192, **changes)
        named, reason = _memory.scratch(m, _memory.trace(m, None))
        return {name: size(type_) for name, type_ in named.items()}, reason

    words = _ffi.plan_scratch_words(R, E, T, 3)
    assert scratch() == ({"combine": T * 3 * 8192 * 2, "plan": 4 * words}, None)
    fp8, _ = scratch(combine_wire="float8_e4m3fn")
    assert fp8["combine"] == T * 3 * (8192 + 2 * 128)
    assert scratch(tokens=8) == ({}, None)  # slots
    assert scratch(ranks=1) == ({"plan": 4 * _ffi.plan_scratch_words(1, E, T, 3)}, None)
    assert scratch(tokens=2**15) == ({}, "expected at most 65536 pairs (T*K) per rank, got 98304")


def test_scratch_says_what_the_kernels_cannot_do(monkeypatch):
    m = model(hidden=100)
    monkeypatch.setattr(_ffi, "has_cuda", lambda: True)
    _, reason = _memory.scratch(m, _memory.trace(m, None))
    assert "expected rows of a multiple of 16 bytes" in reason and "got 200 bytes" in reason
    monkeypatch.setattr(_ffi, "has_cuda", lambda: False)
    values = _memory.facts(m, [], **OPTIONS)
    assert values["no_cuda"] == "this build has no CUDA kernels" and values["library"] == {}
    assert "no figures, this build has no CUDA kernels" in _memory.table(values)


@pytest.mark.parametrize(
    ("changes", "options"),
    [
        ({}, {}),
        (dict(alignment=4), dict(expert_alignment=4)),
        (dict(layout="batched"), dict(layout="batched")),
    ],
    ids=["ragged", "aligned", "batched"],
)
def test_drops_are_those_of_the_calls(changes, options):
    m = model(tokens=24, hidden=1, top_k=4, **changes)

    def body(x, idx):
        return jax_ep.dispatch(x, idx, num_experts=E, capacity_factor=1.1, **options).num_dropped

    mapped = jax.shard_map(body, mesh=make_mesh((R,)), in_specs=P("expert"), out_specs=P("expert"))
    run = jax.jit(mapped)
    x = np.zeros((R * 24, 1), np.float32)
    none, bound = _memory.facts(m, [1.1], layers=1, samples=3, skew=0.5)["bounds"]
    for name, skew in (("uniform", 0.0), ("skewed", 0.5)):
        routings = [_memory.sample_routing(m, skew=skew, seed=i) for i in range(3)]
        lost = np.array([run(x, flat(idx)) for idx in routings])
        assert lost.any()
        pairs = 3 * R * 24 * 4
        expected = {"probability": (lost.sum(1) > 0).mean(), "share": lost.sum() / pairs}
        assert bound["drops"][name] == expected
        assert none["drops"][name] == {"probability": 0, "share": 0}


@pytest.mark.parametrize("draw", [_memory._race, _memory._redraw])
def test_experts_are_drawn_by_their_popularity(draw):
    popularity = np.array([0.5, 0.25, 0.15, 0.1])
    chosen = draw(np.random.default_rng(0), popularity, 20000, 2)
    assert chosen.shape == (20000, 2) and (chosen[:, 0] != chosen[:, 1]).all()
    named = np.zeros(4)
    for a, b in itertools.permutations(range(4), 2):  # one after the other, without a again
        named[[a, b]] += popularity[a] * popularity[b] / (1 - popularity[a])
    np.testing.assert_allclose(np.bincount(chosen.ravel()) / 20000, named, atol=0.015)


def test_routing_is_the_same_every_time():
    m = model()
    one, two, other = (_memory.sample_routing(m, skew=1.0, seed=s) for s in (1, 1, 2))
    assert one.shape == (R, T, K) and (one == two).all() and (one != other).any()


@with_cuda
def test_documented_output_is_what_the_command_prints(capsys):
    page = (pathlib.Path(__file__).parent.parent / "docs" / "memory.md").read_text()
    command, text = re.search(
        r"```bash\npython -m (jax_ep memory .*?)\n```\n+```text\n(.*?)\n```", page, re.S
    ).groups()
    assert __main__.main(shlex.split(command)[1:]) == 0
    assert capsys.readouterr().out.startswith(text)  # what the library keeps is on another page
