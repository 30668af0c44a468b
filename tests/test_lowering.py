# SPDX-License-Identifier: Apache-2.0
"""Which implementation a platform gets is decided, and judged, when lowering."""

import dataclasses
import functools
import re
import warnings

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from cases import DIRECT, FP8
from conftest import make_mesh
from jax.sharding import AbstractMesh, AxisType
from jax.sharding import PartitionSpec as P

import jax_ep
from jax_ep import _ffi, _ops, _slots, _types, _view

ARGS = np.zeros((16, 8), np.float32), np.zeros((16, 2), np.int32)


def traced(implementation):
    def f(x, idx):
        d = jax_ep.dispatch(x, idx, num_experts=16, implementation=implementation)
        return jax_ep.combine(d.tokens, d.handle)

    mapped = jax.shard_map(f, mesh=make_mesh(), in_specs=P("expert"), out_specs=P("expert"))
    return jax.jit(mapped).trace(*ARGS)


@pytest.fixture
def no_cuda_kernels(monkeypatch):
    monkeypatch.setattr(_ffi, "has_cuda", lambda: False)


@pytest.mark.parametrize("platform", ["cpu", "cuda"])
def test_cuda_is_an_error_where_it_cannot_be(platform, no_cuda_kernels):
    with pytest.raises(
        ValueError, match=f"cannot be lowered for {platform}.*Valid here: None, 'xla'"
    ):
        traced("cuda").lower(lowering_platforms=(platform,))


def test_none_on_a_gpu_warns_once(no_cuda_kernels):
    _ops._warn_once.cache_clear()
    with pytest.warns(UserWarning, match="uses 'xla' .* because this build has no CUDA kernels"):
        traced(None).lower(lowering_platforms=("cuda",))
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        traced(None).lower(lowering_platforms=("cuda",))
        _ops._warn_once.cache_clear()
        traced("xla").lower(lowering_platforms=("cuda",))
        traced(None).lower(lowering_platforms=("cpu",))


with_cuda = pytest.mark.skipif(not _ffi.has_cuda(), reason="this build found no nvcc")


def cuda_module(f, mesh, *args):
    """The StableHLO of `f` under shard_map, lowered for CUDA on any machine."""
    mapped = jax.shard_map(f, mesh=mesh, in_specs=P("expert"), out_specs=P("expert"))
    return jax.jit(mapped).trace(*args).lower(lowering_platforms=("cuda",)).as_text()


def calls(module):
    """Target, attributes and the type signature of each of our custom calls."""
    pattern = r"custom_call @(jax_ep_\w+)\(.*?mhlo.backend_config = \{(.*?)\}.* : (\(.*)"
    return re.findall(pattern, module)


def moe(x, idx, weights, **options):
    d = jax_ep.dispatch(x, idx, weights, num_experts=16, **options)
    return jax_ep.combine(jnp.zeros(d.tokens.shape, x.dtype), d.handle, weights=d.weights)


SHAPES = [jax.ShapeDtypeStruct(s, d) for s, d in (((16, 256), jnp.bfloat16), ((16, 2), jnp.int32), ((16, 2), jnp.float32))]  # fmt: skip


COLLECTIVES = "all_gather", "all_to_all", "all_reduce", "collective_permute", "has_side_effect"
#: Types of what `plan` gives: the maps, expert_ids, counts, group_sizes, num_dropped.
PLANNED = ", ".join(f"tensor<{shape}xi32>" for shape in ("2x2", "2x2", "32", "16x2", "16", "32", "2", "2", "1"))  # fmt: skip
MAPS = ", ".join(PLANNED.split(", ")[:5])


def mesh_of_eight(abstract):
    return AbstractMesh((8,), ("expert",), axis_types=(AxisType.Auto,)) if abstract else make_mesh()


def attributes_of(call):
    """Name to value, both as text."""
    return dict(re.findall(r'(\w+) = ("[^"]*"|\w+)', call[1]))


EVERY_CALL = dict(
    group='"expert=8|expert"',
    num_ranks="8",
    num_experts="16",
    num_tokens="2",
    top_k="2",
    rows="32",
    alignment="1",
    batched="false",
    num_sms="0",
)
COPY = dict(wire="0", power_of_two="false")
OF_DISPATCH = dict(zero_tail="false", has_scales="false", has_scalars="true")


@with_cuda
@pytest.mark.parametrize("abstract", [False, True])
def test_cuda_calls_and_nothing_else(abstract):
    f = lambda *a: moe(*a, config=DIRECT)
    module = cuda_module(f, mesh_of_eight(abstract), *SHAPES)
    plan, dispatch, combine = calls(module)
    assert [plan[0], dispatch[0], combine[0]] == [
        "jax_ep_plan",
        "jax_ep_dispatch",
        "jax_ep_combine",
    ]
    assert not any(word in module for word in COLLECTIVES)
    assert attributes_of(plan) == EVERY_CALL
    assert attributes_of(dispatch) == EVERY_CALL | COPY | OF_DISPATCH
    kinds = dict(has_rows="true", has_weights="true", has_scalars="false")
    assert attributes_of(combine) == EVERY_CALL | COPY | kinds
    assert f"-> ({PLANNED}, tensor<" in plan[2]
    rows = "tensor<32x256xbf16>, tensor<32xf32>"
    assert dispatch[2] == f"(tensor<2x256xbf16>, tensor<4xf32>, {MAPS}) -> ({rows})"
    partials = "tensor<2x2x256xbf16>"  # partial sums of min(R-1, K) peers
    assert combine[2] == f"({rows}, {MAPS}) -> (tensor<2x256xbf16>, {partials})"


@with_cuda
@pytest.mark.parametrize("abstract", [False, True])
def test_a_small_batch_is_one_call_each_way(abstract):
    module = cuda_module(moe, mesh_of_eight(abstract), *SHAPES)
    dispatch, combine = calls(module)
    assert [dispatch[0], combine[0]] == ["jax_ep_slot_dispatch", "jax_ep_slot_combine"]
    assert not any(word in module for word in COLLECTIVES)
    assert attributes_of(dispatch) == EVERY_CALL | COPY | OF_DISPATCH | dict(phase="0")
    assert attributes_of(combine) == EVERY_CALL | COPY | dict(phase="0", has_weights="true")
    rows = "tensor<32x256xbf16>, tensor<32xf32>"
    assert dispatch[2] == f"(tensor<2x256xbf16>, tensor<4xf32>, tensor<2x2xi32>) -> ({rows}, {PLANNED})"  # fmt: skip
    assert combine[2] == f"({rows}, {MAPS}) -> tensor<2x256xbf16>"


@with_cuda
@pytest.mark.parametrize("abstract", [False, True])
def test_halves(abstract):
    def halves(x, idx, weights):
        started = jax_ep.dispatch_start(
            x, idx, weights, num_experts=16, wire_dtype=FP8, deliver="quantized"
        )
        d = jax_ep.dispatch_done(started)
        y = jnp.zeros(d.tokens.shape, x.dtype)
        options = dict(wire_dtype=FP8, scale_format="e8m0")
        return jax_ep.combine_done(jax_ep.combine_start(y, d.handle, **options))

    module = cuda_module(halves, mesh_of_eight(abstract), *SHAPES)
    found = calls(module)
    assert [c[0] for c in found] == ["jax_ep_slot_dispatch"] * 2 + ["jax_ep_slot_combine"] * 2
    assert not any(word in module for word in COLLECTIVES)
    for call, phase in zip(found, ("1", "2", "1", "2"), strict=True):
        own = dict(has_weights="false", power_of_two="true")
        if call[0] == "jax_ep_slot_dispatch":
            own = OF_DISPATCH | dict(power_of_two="false")
        assert attributes_of(call) == EVERY_CALL | own | dict(phase=phase, wire="1")
    given, ticket = "tensor<2x256xbf16>, tensor<4xf32>, tensor<2x2xi32>", "tensor<1xi32>"
    rows = "tensor<32x256xf8E4M3FN>, tensor<32x2xf32>, tensor<32xf32>"
    y = f"tensor<32x256xbf16>, {MAPS}"
    assert [types for _, _, types in found] == [
        f"({given}) -> {ticket}",
        f"({ticket}, {given}) -> ({rows}, {PLANNED})",
        f"({y}) -> {ticket}",
        f"({ticket}, {y}) -> tensor<2x256xbf16>",
    ]


@with_cuda
@pytest.mark.parametrize("config", [None, DIRECT], ids=["slots", "direct"])
@pytest.mark.parametrize(
    "options, attributes, result",
    [
        (dict(wire_dtype=FP8), dict(wire="2"), "tensor<32x256xbf16>"),
        (
            dict(wire_dtype=FP8, deliver="quantized", scale_format="e8m0"),
            dict(wire="1", power_of_two="true"),
            "tensor<32x256xf8E4M3FN>, tensor<32x2xf32>",
        ),
        (dict(zero_tail=True), dict(zero_tail="true"), "tensor<32x256xbf16>"),
        (dict(layout="batched", capacity=8), dict(batched="true"), "tensor<8x256xbf16>"),
    ],
)  # fmt: skip
def test_cuda_attributes_follow_the_options(config, options, attributes, result):
    f = lambda *a: jax_ep.dispatch(*a, num_experts=16, config=config, **options).tokens
    *_, dispatch = calls(cuda_module(f, make_mesh(), *SHAPES))
    assert attributes_of(dispatch).items() >= attributes.items()
    assert f"-> ({result}" in dispatch[2]


@with_cuda
def test_prequantized_tokens_and_sms():
    x = [jax.ShapeDtypeStruct(*a) for a in (((16, 256), FP8), ((16, 2), jnp.float32))]
    options = dict(num_experts=16, deliver="quantized", config=jax_ep.Config(num_sms=9))
    f = lambda *a: jax_ep.dispatch(a[:2], a[2], **options).tokens
    (dispatch,) = calls(cuda_module(f, make_mesh(), *x, SHAPES[1]))
    got = attributes_of(dispatch)
    assert (got["wire"], got["has_scales"], got["has_scalars"], got["num_sms"]) == (
        *("0", "true", "false", "9"),
    )
    assert dispatch[2].startswith("(tensor<2x256xf8E4M3FN>, tensor<2x2xf32>, tensor<2x2xi32>)")


@with_cuda
@pytest.mark.parametrize(
    "config, results",
    [
        (None, "tensor<2x256xbf16>"),
        (DIRECT, "(tensor<2x256xbf16>, tensor<2x2x384xui8>)"),  # 256 values, 2 scales, 128 bytes
    ],
    ids=["slots", "direct"],
)
@pytest.mark.parametrize("scale_format", ["float32", "e8m0"])
def test_cuda_fp8_combine(config, results, scale_format):
    def f(x, idx, weights):
        d = jax_ep.dispatch(x, idx, num_experts=16, config=config)
        return jax_ep.combine(d.tokens, d.handle, wire_dtype=FP8, scale_format=scale_format)

    *_, combine = calls(cuda_module(f, make_mesh(), *SHAPES))
    got = attributes_of(combine)
    assert (got["wire"], got["has_weights"]) == ("1", "false")
    assert got["power_of_two"] == str(scale_format == "e8m0").lower()
    assert combine[2].endswith(f"-> {results}")


@with_cuda
@pytest.mark.parametrize("config, forward", [(None, 1), (DIRECT, 2)], ids=["slots", "direct"])
def test_cuda_gradient_is_combine_and_dispatch(config, forward):
    def f(x, idx, weights):
        loss = lambda x, w: (moe(x, idx, w, config=config).astype(jnp.float32) ** 2).sum()
        return jax.grad(loss, (0, 1))(x, weights)

    targets = [target for target, _, _ in calls(cuda_module(f, make_mesh(), *SHAPES))]
    whole = ["jax_ep_slot_dispatch", "jax_ep_slot_combine"]
    if config is DIRECT:
        whole = ["jax_ep_plan", "jax_ep_dispatch", "jax_ep_combine"]
    # Backward has a plan, and scalars besides rows: not for the slots.
    assert targets == [*whole, "jax_ep_dispatch", "jax_ep_combine"]


def in_halves(config, x, idx, weights):
    sent = jax_ep.dispatch_start(x, idx, weights, num_experts=16, config=config)
    d = jax_ep.dispatch_done(sent)
    y = jnp.zeros(d.tokens.shape, x.dtype)
    return jax_ep.combine_done(jax_ep.combine_start(y, d.handle, d.weights))


def gradient(config, x, idx, weights):
    loss = lambda x, w: (moe(x, idx, w, config=config).astype(jnp.float32) ** 2).sum()
    return jax.grad(jax.checkpoint(loss), (0, 1))(x, weights)


def scanned(config, x, idx, weights):
    turn = lambda x, _: (moe(x, idx, weights, config=config), None)
    return jax.lax.scan(turn, x, length=2)[0]


def whole(config, x, idx, weights):
    return moe(x, idx, weights, config=config)


FORMS = [(whole, 0), (whole, 128), (gradient, 0), (gradient, 128), (scanned, 0), (in_halves, 128)]


@with_cuda
@pytest.mark.parametrize("f, tokens", FORMS)
def test_overlap_annotates_every_call(f, tokens):
    """Each custom call is alone in a function of its name, and calls of that have the annotation."""
    config = jax_ep.Config(decode_tokens=tokens)
    plain, beside = (
        cuda_module(functools.partial(f, c), mesh_of_eight(True), *SHAPES)
        for c in (config, dataclasses.replace(config, overlap=True))
    )
    assert "_xla_stream_annotation" not in plain
    targets = sorted(target for target, _, _ in calls(plain))
    bodies = re.findall(r"func\.func private @(jax_ep_[a-z_]*[a-z])(.*?)\n  }", beside, re.DOTALL)
    assert [target for target, _, _ in calls(beside)] == [
        target for name, body in bodies for target, _, _ in calls(body) if target == name
    ]
    called = re.findall(r"(?<!_)call @(jax_ep_[a-z_]*[a-z]).*?(collective|:)", beside)
    assert sorted(called) == [(target, "collective") for target in targets]


@with_cuda
def test_overlap_leaves_maps_and_scratch_in_one_array():
    f = functools.partial(whole, jax_ep.Config(decode_tokens=0, overlap=True))
    module = cuda_module(f, mesh_of_eight(True), *SHAPES)
    signatures = r"(?<!_)call @jax_ep_(\w+?)\(.* -> (.*)"
    results = dict(re.findall(signatures, module))
    words = 4 + 4 + 32 + 32 + 16 + 32 + 2 + 2 + 1
    assert results == dict(
        plan=f"tensor<{words}xi32>",
        dispatch="(tensor<32x256xbf16>, tensor<32xf32>)",
        combine="tensor<2x256xbf16>",
    )


@pytest.mark.parametrize("overlap", [False, True])
def test_overlap_changes_nothing_elsewhere(overlap):
    f = functools.partial(whole, jax_ep.Config(overlap=overlap))
    mapped = jax.shard_map(f, mesh=make_mesh(), in_specs=P("expert"), out_specs=P("expert"))
    module = jax.jit(mapped).lower(*SHAPES).as_text()
    assert "_xla_stream_annotation" not in module and "jax_ep" not in module


@pytest.mark.parametrize(
    "sizes, why",
    [
        (dict(), None),
        (dict(num_tokens=128, top_k=8), None),
        (dict(num_tokens=129), "at most 128 tokens per rank (Config.decode_tokens), got 129"),
        (dict(num_tokens=0), "at least 1 token per rank, got 0"),
        (dict(itemsize=4), None),
        (dict(hidden=8193), "at most 16384 bytes in a row (Config.decode_row_bytes), got 16386"),
        (dict(num_tokens=128, top_k=9), "at most 8192 pairs (R*T*K) in the group, got 9216"),
        (dict(num_experts=1032), "at most 1024 experts in the group, got 1032"),
        (dict(num_ranks=64, num_tokens=16, top_k=8), None),
        (dict(decode_tokens=4000, num_tokens=1024, top_k=1), None),
        (dict(decode_tokens=0), "at most 0 tokens per rank (Config.decode_tokens), got 1"),
        (dict(decode_row_bytes=8191), "at most 8191 bytes in a row"),
    ],
    ids=str,
)  # fmt: skip
def test_path_by_shape(sizes, why):
    sizes = (
        dict(num_ranks=8, num_experts=64, num_tokens=1, top_k=2, hidden=4096, itemsize=2) | sizes
    )
    hidden, itemsize = sizes.pop("hidden"), sizes.pop("itemsize")
    config = jax_ep.Config(**{k: sizes.pop(k) for k in tuple(sizes) if k.startswith("decode")})
    spec = _types.Spec(
        axis=("expert",),
        rows=1,
        alignment=1,
        layout="ragged",
        zero_tail=False,
        implementation=None,
        config=config,
        group="expert=8|expert",
        batch_shape=(),
        **sizes,
    )
    assert _slots.path(spec, hidden, itemsize) == ("direct" if why else "slots")
    got = _slots.why_direct(spec, hidden, itemsize)
    assert got is None if why is None else why in got


@with_cuda
@pytest.mark.parametrize("half", ["dispatch_start", "dispatch_done", "combine_start", "combine_done"])  # fmt: skip
def test_halves_take_small_batches_only(half):
    """An error where the program is lowered; `done` in a program of its own judges, too."""
    args = [jax.ShapeDtypeStruct(s, d) for s, d in (((8 * 200, 256), jnp.bfloat16), ((8 * 200, 2), jnp.int32))]  # fmt: skip

    def f(x, idx):
        if half == "dispatch_start":
            return jax_ep.dispatch_start(x, idx, num_experts=16)
        d = jax_ep.dispatch(x, idx, num_experts=16, implementation="xla")
        spec = dataclasses.replace(d.handle.spec, implementation=None)
        if half == "combine_start":
            return jax_ep.combine_start(d.tokens, jax_ep.Handle(d.handle.plan, spec))
        ticket = idx[:1, 0]
        if half == "dispatch_done":
            return _view.slot_dispatch(
                {"tokens": x}, idx, spec=spec, wire=_types.Wire(), ticket=ticket
            )
        maps = d.handle.plan
        return _view.combine({"rows": d.tokens}, maps, spec=spec, wire=_types.Wire(), ticket=ticket)

    message = f"jax_ep.{half} is for small batches on CUDA: expected at most 128 tokens per rank .*, got 200"
    with pytest.raises(ValueError, match=message):
        cuda_module(f, make_mesh(), *args)


@with_cuda
@pytest.mark.parametrize(
    "shapes, message",
    [
        (((16, 12), (16, 2)), "rows of a multiple of 16 bytes for implementation='cuda', got 24"),
        (((16, 16), (16, 40)), "at most 32 experts per token, got 40.*Valid here: 'xla'"),
    ],
)
@pytest.mark.parametrize("config", [None, DIRECT], ids=["slots", "direct"])
def test_what_the_kernels_cannot_do_is_an_error(shapes, message, config):
    args = jax.ShapeDtypeStruct(shapes[0], jnp.bfloat16), jax.ShapeDtypeStruct(shapes[1], jnp.int32)
    f = lambda *a: jax_ep.dispatch(*a, num_experts=64, config=config).tokens
    with pytest.raises(ValueError, match=message):
        cuda_module(f, make_mesh(), *args)


def test_xla_does_not_lose_the_way_to_fp8():
    """XLA:GPU drops f32 -> fp8 -> f32 for excess precision unless something stands between."""
    f = lambda *a: jax_ep.dispatch(*a, num_experts=16, wire_dtype=FP8).tokens
    mapped = jax.shard_map(f, mesh=make_mesh(), in_specs=P("expert"), out_specs=P("expert"))
    module = jax.jit(mapped).lower(*SHAPES).as_text()
    assert re.search(r"optimization_barrier %\w+, %\w+ : tensor<2x256xf8E4M3FN>", module)
