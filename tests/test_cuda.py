# SPDX-License-Identifier: Apache-2.0
"""What only CUDA does, and what one or two GPUs do at larger sizes than the portable tests."""

import itertools
import re
import time

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from cases import FP8, assert_matches, assert_same_bits, flat, inputs, reference, run
from conftest import TIMEOUT_S, make_mesh, poison_memory
from jax import lax
from jax.sharding import AxisType, Mesh, NamedSharding
from jax.sharding import PartitionSpec as P

import jax_ep

pytestmark = pytest.mark.gpu
RANKS = [1, pytest.param(2, marks=pytest.mark.multi)]
E = 16


@pytest.fixture(params=RANKS)
def mesh(request):
    if len(jax.devices()) < request.param or jax.default_backend() != "gpu":
        pytest.fail(f"expected {request.param} GPUs, got {jax.devices()}")
    yield make_mesh((request.param,))
    jax_ep.check()


@pytest.fixture(autouse=True)
def poisoned_memory():
    poison_memory()


def random_options(rng):
    options = dict(num_experts=E, expert_alignment=int(rng.choice([1, 1, 4, 16])))
    options["layout"] = str(rng.choice(["ragged", "ragged", "batched"]))
    options["zero_tail"] = bool(rng.random() < 0.3)
    if rng.random() < 0.4 and options["layout"] == "ragged":
        options["capacity_factor"] = float(rng.choice([0.5, 1.0, 2.0]))
    elif rng.random() < 0.4:
        options["capacity"] = int(rng.integers(E, 400))
    wire = rng.choice(["none", "quantized", "dequantized"])
    if wire != "none":
        options.update(wire_dtype=FP8, deliver=str(wire))
        options["scale_format"] = str(rng.choice(["float32", "e8m0"]))
    if rng.random() < 0.4:
        scale_format = str(rng.choice(["float32", "e8m0"]))
        options["combine"] = dict(wire_dtype=FP8, scale_format=scale_format)
    return options


@pytest.mark.parametrize("seed", range(24))
def test_matches_the_reference(mesh, seed):
    rng = np.random.default_rng(seed)
    options = random_options(rng)
    sizes = dict(
        R=mesh.size,
        T=int(rng.choice([1, 3, 33, 130, 512])),
        H=int(rng.choice([128, 256, 1024])),
        K=int(rng.choice([1, 2, 8, 20])),
        E=E,
        dtype=str(rng.choice(["bfloat16", "float16", "float32"])),
    )
    x, idx, weights = inputs(
        seed,
        **sizes,
        none=float(rng.choice([0, 0.3])),
        skew=float(rng.choice([0, 0.5])),
        duplicates=bool(rng.random() < 0.2),
    )
    weights = None if rng.random() < 0.2 else weights
    got = run(x, idx, weights, mesh=mesh, implementation="cuda", **options)
    want = reference(x, idx, weights, **{k: v for k, v in options.items() if k != "zero_tail"})
    assert_matches(got, want, layout=options["layout"], whole=options["zero_tail"])


@pytest.mark.parametrize("combine", [{}, dict(wire_dtype=FP8)], ids=["plain", "fp8"])
def test_more_sms_give_the_same_bits(mesh, combine):
    x, idx, weights = inputs(4, R=mesh.size, T=300, H=1024, K=8, E=E, dtype="bfloat16")
    options = dict(num_experts=E, combine=combine)
    want = reference(x, idx, weights, **options)
    for num_sms in (1, 2, 7, 132):
        config = jax_ep.Config(num_sms=num_sms)
        got = run(x, idx, weights, mesh=mesh, implementation="cuda", config=config, **options)
        assert_matches(got, want, whole=False)


def layer(x, idx, weights, implementation, **options):
    d = jax_ep.dispatch(x, idx, weights, num_experts=E, implementation=implementation, **options)
    y = jnp.where((d.expert_ids >= 0)[:, None], d.tokens * 2, 0)
    return jax_ep.combine(y, d.handle, weights=d.weights)


def mapped(mesh, implementation, **options):
    f = lambda *a: layer(*a, implementation, **options)
    return jax.shard_map(f, mesh=mesh, in_specs=P("expert"), out_specs=P("expert"))


def placed(mesh, tokens):
    """x, topk_idx and weights of `tokens` tokens per rank, on the mesh."""
    arrays = inputs(5, R=mesh.size, T=tokens, H=256, K=4, E=E)
    return [jax.device_put(flat(a), NamedSharding(mesh, P("expert"))) for a in arrays]


@pytest.fixture
def data(mesh):
    return placed(mesh, 96)


def test_gradients_equal_those_of_xla(mesh, data):
    x, idx, weights = data

    def grads(implementation):
        f = mapped(mesh, implementation)
        loss = lambda x, w: (f(x, idx, w) ** 2).sum()
        return jax.jit(jax.value_and_grad(loss, (0, 1)))(x, weights)

    got, want = grads("cuda"), grads("xla")
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=2e-6), got, want)


def test_expert_gradients_ignore_what_the_tail_holds(mesh, data):
    """The tail of the rows is not zero here: grouped products must not let it into gradients."""
    x, idx, weights = data
    w = jax.random.normal(jax.random.key(0), (E, 256, 256)) / 16

    def loss(implementation, x, w):
        def layer(x, idx, weights, w):
            d = jax_ep.dispatch(
                x, idx, weights, num_experts=E, implementation=implementation, expert_alignment=8
            )
            y = lax.ragged_dot(d.tokens, w, d.group_sizes)
            return jax_ep.combine(y, d.handle, weights=d.weights)

        f = jax.shard_map(layer, mesh=mesh, in_specs=P("expert"), out_specs=P("expert"))
        return (f(x, idx, weights, w) ** 2).sum()

    got, want = (jax.jit(jax.grad(lambda x, w, i=i: loss(i, x, w), (0, 1)))(x, w) for i in ("cuda", "xla"))  # fmt: skip
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-4, atol=1e-4), got, want)


def test_loops_with_changing_routing(mesh, data):
    x, idx, weights = data

    def loop(implementation):
        f = mapped(mesh, implementation, expert_alignment=4)

        def step(i, x):
            return f(x, (idx + i) % E, weights) / 4

        return jax.jit(lambda x: lax.fori_loop(0, 60, step, x))(x)

    assert_same_bits("loop", loop("cuda"), np.asarray(loop("xla")))


def test_scan_remat_and_gradient(mesh, data):
    x, idx, weights = data

    def loss(implementation, x):
        f = jax.checkpoint(mapped(mesh, implementation))
        step = lambda h, i: (f(h, (idx + i) % E, weights) / 4, None)
        return (lax.scan(step, x, jnp.arange(4))[0] ** 2).sum()

    got, want = (jax.jit(jax.grad(lambda x, i=i: loss(i, x)))(x) for i in ("cuda", "xla"))
    np.testing.assert_allclose(got, want, rtol=2e-6)


def test_many_runs_give_the_same_bits(mesh, data):
    f = jax.jit(mapped(mesh, "cuda"))
    first = np.asarray(f(*data))
    for _ in itertools.repeat(None, 200):
        out = f(*data)
    assert_same_bits("again", out, first)


@pytest.mark.parametrize("command_buffers", [True, False])
def test_independent_exchanges_in_one_program(mesh, data, command_buffers):
    """XLA may not run two operations of a group at once, though nothing orders them."""
    x, idx, weights = data

    def both(implementation):
        f = mapped(mesh, implementation)

        def step(i, x):
            a, b = f(x, (idx + i) % E, weights), f(-x, (idx + 3 * i) % E, weights)
            return (a + 2 * b) / 8

        loop = jax.jit(lambda x: lax.fori_loop(0, 50, step, x))
        options = {} if command_buffers else {"xla_gpu_enable_command_buffer": ""}
        return np.asarray(loop.lower(x).compile(compiler_options=options)(x))

    assert_same_bits("both", both("cuda"), both("xla"))


@pytest.mark.parametrize("bad", [E + 5, -2, -(2**31)])
def test_bad_routing_is_an_error_and_initialize_recovers(mesh, data, caplog, bad):
    x, idx, weights = data
    f = jax.jit(mapped(mesh, "cuda"))
    want = np.asarray(f(*data))
    said = f"topk_idx {bad}, expected -1 to {E - 1}"
    try:  # a later call of the program may find it first
        out = f(x, idx.at[0, 0].set(bad), weights)
        assert np.isnan(np.asarray(out)).any()
    except jax.errors.JaxRuntimeError as error:
        assert said in str(error)
    with pytest.raises(RuntimeError, match=said):
        jax_ep.check()
    time.sleep(2)
    assert said in caplog.text  # the watchdog's word
    with pytest.raises(jax.errors.JaxRuntimeError, match="initialize"):
        jax.block_until_ready(f(*data))
    jax_ep.initialize(mesh, timeout_s=TIMEOUT_S)
    assert_same_bits("again", f(*data), want)


def test_without_initialize(data, mesh):
    jax_ep.finalize()
    f = jax.jit(mapped(mesh, "cuda"))
    with pytest.raises(jax.errors.JaxRuntimeError, match="call jax_ep.initialize"):
        jax.block_until_ready(f(*data))
    jax_ep.initialize(mesh, timeout_s=TIMEOUT_S)


@pytest.fixture
def handed(mesh, monkeypatch):
    """Runs a layer with another operand or attribute handed to one FFI call, past what Python
    checks: `handed(target, change_of_operands, **attributes)`."""
    data, ffi_call = placed(mesh, 256), jax.ffi.ffi_call

    def run(target=None, change=lambda *operands: operands, **attributes):
        def call(name, results):
            def hand_over(*operands, **given):
                if name == target:
                    assert given.keys() >= attributes.keys()
                    operands, given = change(*operands), given | attributes
                return ffi_call(name, results)(*operands, **given)

            return hand_over

        with monkeypatch.context() as patch:
            patch.setattr(jax.ffi, "ffi_call", call)
            program = jax.jit(mapped(mesh, "cuda")).lower(*data).compile()
        return np.asarray(program(*data))

    return run


one_rank = pytest.mark.parametrize("mesh", [1], indirect=True)


@one_rank
@pytest.mark.parametrize("target", ["jax_ep_plan", "jax_ep_dispatch", "jax_ep_combine"])
def test_attributes_out_of_range_are_an_error(mesh, handed, target):
    """A program that was exported elsewhere may hand anything to the handlers."""
    limits = "expected at most 64 ranks that divide at most 3072 experts"
    out_of_range = dict(
        num_ranks=(65, 3, 0, -1),
        num_experts=(3073, -E),
        num_tokens=(70000, 0),
        top_k=(33, -4),
        alignment=(0,),
        rows=(-8,),
        num_sms=(-1,),
    )
    bad = [(limits, name, values) for name, values in out_of_range.items()]
    bad += [("expected type", "top_k", (5,))]
    want = handed()
    for said, name, values in bad:
        for value in values if target == "jax_ep_plan" else values[:1]:
            with pytest.raises(jax.errors.JaxRuntimeError, match=f"{target}: .*{said}"):
                handed(target, **{name: np.int64(value)})
    with pytest.raises(jax.errors.JaxRuntimeError, match=f"{target}: no group 'nobody'"):
        handed(target, group="nobody")
    jax_ep.check()
    assert_same_bits("again", handed(), want)


@one_rank
@pytest.mark.parametrize(
    "target, said, wires",
    [
        ("jax_ep_dispatch", "0 (copy), 1 (quantized) or 2 (dequantized)", (-1, 3)),
        ("jax_ep_combine", "0 (copy) or 1 (quantized)", (-1, 2)),
    ],
)
def test_a_wire_out_of_range_is_an_error(mesh, handed, target, said, wires):
    for wire in wires:
        error = re.escape(f"{target}: wire: expected {said}, got {wire}")
        with pytest.raises(jax.errors.JaxRuntimeError, match=error):
            handed(target, wire=np.int64(wire))


@one_rank
@pytest.mark.parametrize("target", ["jax_ep_plan", "jax_ep_dispatch", "jax_ep_combine"])
def test_a_refused_launch_does_not_spoil_the_next_one(mesh, handed, target):
    want = handed()
    with pytest.raises(jax.errors.JaxRuntimeError, match=target):
        handed(target, num_sms=np.int64(-1))
    assert_same_bits("again", handed(), want)


@one_rank
def test_operands_of_another_kind_are_an_error(mesh, handed):
    expected, got = r"expected type \d+ \[256, 4\]", r"got type \d+"
    changes = [
        ("jax_ep_plan", f"topk_idx: {expected}, {got}", lambda idx: [idx.astype(jnp.float32)]),
        ("jax_ep_plan", f"topk_idx: {expected}, {got}", lambda idx: [idx.T]),
        ("jax_ep_plan", "expected 1 operands .*, got 2 and", lambda idx: [idx, idx]),
        ("jax_ep_dispatch", "x: expected bf16, f16", lambda x, *all: [x.astype(jnp.int8), *all]),
        ("jax_ep_dispatch", f"x: .*{got}", lambda x, *all: [x[:-1], *all]),
        ("jax_ep_dispatch", "expected an operand, got none", lambda *all: all[:-1]),
        ("jax_ep_combine", "y: expected bf16, f16", lambda y, *all: [y.astype(FP8), *all]),
        ("jax_ep_combine", f"weights: .*{got}", lambda y, w, *all: [y, w[:-1], *all]),
    ]
    want = handed()
    for target, said, change in changes:
        with pytest.raises(jax.errors.JaxRuntimeError, match=f"{target}: .*{said}"):
            handed(target, change)
    jax_ep.check()
    assert_same_bits("again", handed(), want)


LAYERS = 20  # of plan, dispatch and combine: 60 operations


def absent_peer(mesh):
    """Rank 0 runs 60 operations, rank 1 none: a per-rank branch around a collective."""

    def layers(x, idx, weights):
        def one(h, _):
            return layer(h, idx, weights, "cuda") / 4, None

        run_all = lambda h: lax.scan(one, h, None, length=LAYERS)[0]
        return lax.cond(lax.axis_index("expert") == 0, run_all, lambda h: h, x)

    return jax.shard_map(layers, mesh=mesh, in_specs=P("expert"), out_specs=P("expert"))


def bad_routing_midway(mesh):
    """60 operations, of which the 31st gets a bad expert on the last rank."""

    def layers(x, idx, weights):
        mine = lax.axis_index("expert") == mesh.size - 1

        def one(i, h):
            bad = mine & (i == LAYERS // 2)
            return layer(h, idx.at[7, 1].add(jnp.where(bad, E, 0)), weights, "cuda") / 4

        return lax.fori_loop(0, LAYERS, one, x)

    return jax.shard_map(layers, mesh=mesh, in_specs=P("expert"), out_specs=P("expert"))


def check_it_fails_and_recovers(mesh, function, said, data, command_buffers, timeout_s=2.0):
    """The whole program ends within twice the timeout, with `said`; then the group works again."""
    jax_ep.finalize()
    jax_ep.initialize(mesh, timeout_s=timeout_s)
    options = {} if command_buffers else {"xla_gpu_enable_command_buffer": ""}
    program = jax.jit(function).lower(*data).compile(compiler_options=options)
    start = time.monotonic()
    with pytest.raises((RuntimeError, jax.errors.JaxRuntimeError), match=said):
        jax.block_until_ready(program(*data))
        jax_ep.check()
    assert time.monotonic() - start < 2 * timeout_s
    jax_ep.initialize(mesh, timeout_s=TIMEOUT_S)
    got, want = (jax.jit(mapped(mesh, name))(*data) for name in ("cuda", "xla"))
    assert_same_bits("again", got, np.asarray(want))


@pytest.mark.parametrize("command_buffers", [True, False])
def test_absent_peer_ends_in_an_error_in_time(mesh, command_buffers):
    if mesh.size == 1:
        pytest.skip("takes two ranks")
    said, data = "rank 0 gave up on rank 1", placed(mesh, 256)
    check_it_fails_and_recovers(mesh, absent_peer(mesh), said, data, command_buffers)


@pytest.mark.parametrize("command_buffers", [True, False])
def test_bad_routing_midway_ends_in_an_error_in_time(mesh, command_buffers):
    data, rank = placed(mesh, 256), mesh.size - 1
    bad = int(data[1][256 * rank + 7, 1]) + E
    said = f"rank {rank} got topk_idx {bad}, expected -1 to {E - 1}"
    check_it_fails_and_recovers(mesh, bad_routing_midway(mesh), said, data, command_buffers)


def test_a_permuted_mesh_has_its_own_ranks(mesh):
    jax_ep.finalize()
    permuted = Mesh(mesh.devices[::-1], mesh.axis_names, axis_types=(AxisType.Auto,))
    jax_ep.initialize(permuted)
    x, idx, weights = inputs(7, R=mesh.size, T=40, H=256, K=4, E=E)
    got = run(x, idx, weights, mesh=permuted, implementation="cuda", num_experts=E)
    assert_matches(got, reference(x, idx, weights, num_experts=E))
    if mesh.size > 1:
        with pytest.raises(ValueError, match="exists with another device order"):
            jax_ep.initialize(mesh)
    jax_ep.finalize()


def test_groups_made_and_destroyed_again_and_again(mesh, data):
    f = jax.jit(mapped(mesh, "cuda"))
    want = np.asarray(f(*data))
    for _ in range(30):
        jax_ep.finalize()
        jax_ep.initialize(mesh, timeout_s=TIMEOUT_S)
        assert_same_bits("again", f(*data), want)
