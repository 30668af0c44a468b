# SPDX-License-Identifier: Apache-2.0
"""CUDA graphs: XLA captures the operations, and thousands of replays with changing routing are right."""

import functools
import os
import pathlib
import re
import subprocess
import sys

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from cases import DIRECT, assert_same_bits, flat, inputs
from conftest import make_mesh
from jax import lax
from jax.sharding import NamedSharding
from jax.sharding import PartitionSpec as P
from test_benchmarks import load

import jax_ep

pytestmark = pytest.mark.gpu
RANKS = [1, pytest.param(2, marks=pytest.mark.multi)]
E, T, H, K = 16, 24, 256, 4
CAPTURE = {"xla_gpu_graph_min_graph_size": 1}  # graphs of a single call, too
ITERATIONS = 3000
noise = load("decode_steps").noise


@pytest.fixture(params=RANKS)
def mesh(request):
    if len(jax.devices()) < request.param or jax.default_backend() != "gpu":
        pytest.fail(f"expected {request.param} GPUs, got {jax.devices()}")
    yield make_mesh((request.param,))
    jax_ep.check()


# What XLA captures, and replays: a program of its own, as its flags are read once.

TURNS = 50
PROGRAM = f"""
import jax, jax.numpy as jnp, numpy as np
from jax import lax
from jax.sharding import AxisType, PartitionSpec as P
import jax_ep

mesh = jax.make_mesh((len(jax.devices()),), ("expert",), axis_types=(AxisType.Auto,))
jax_ep.initialize(mesh)

def program(name, layer):
    def loop(x, idx):
        step = lambda i, x: layer(x, (idx + i) % 8) / 2
        return lax.fori_loop(0, {TURNS}, step, x)
    loop.__name__ = name
    return jax.jit(jax.shard_map(loop, mesh=mesh, in_specs=P("expert"), out_specs=P("expert")))

def whole(x, idx, **options):
    d = jax_ep.dispatch(x, idx, num_experts=8, **options)
    return jax_ep.combine(d.tokens, d.handle)

def halves(x, idx):
    d = jax_ep.dispatch_done(jax_ep.dispatch_start(x, idx, num_experts=8))
    return jax_ep.combine_done(jax_ep.combine_start(d.tokens, d.handle))

def direct(x, idx):
    return whole(x, idx, config=jax_ep.Config(decode_tokens=0))

n = 16 * mesh.size
x = np.arange(n * 256, dtype=np.float32).reshape(n, 256)
idx = np.stack([np.arange(n) % 8, np.arange(n) // 3 % 8], 1).astype(np.int32)
for name, layer in dict(whole=whole, halves=halves, direct=direct).items():
    run = program(name, layer)
    for _ in range(4):  # the first is not captured
        np.testing.assert_array_equal(run(x, idx), x)
jax_ep.check()
"""
#: Custom calls of one turn of each loop.
CALLS = {"whole": 2, "halves": 4, "direct": 3}


def thunks(text):
    """Each thunk of a dump: its kind, and the kinds of those that it is inside of."""
    around = []  # (indentation, kind)
    for line in text.splitlines():
        if found := re.match(r"(\s*)\d+: (k\w+)", line):
            indent, kind = len(found[1]), found[2]
            around = [a for a in around if a[0] < indent]
            yield kind, [a[1] for a in around]
            around.append((indent, kind))


def test_thunks_reads_what_xla_dumps():
    dump = "0: kWhile\n  body:\n    0: kCommandBuffer a\n      0: kCustomCall b\n  1: kKernel\n2: kCopy"
    assert list(thunks(dump)) == [
        ("kWhile", []),
        ("kCommandBuffer", ["kWhile"]),
        ("kCustomCall", ["kWhile", "kCommandBuffer"]),
        ("kKernel", ["kWhile"]),
        ("kCopy", []),
    ]


def last_dump(folder: pathlib.Path, name: str):
    """The thunks of program `name`, after the passes that change them if any did."""
    for what in ("thunk_sequence_after_thunk_passes", "thunk_sequence"):
        if dumps := sorted(folder.glob(f"*jit_{name}.*{what}.txt")):
            return list(thunks(dumps[-1].read_text()))
    return pytest.fail(f"no thunks of {name} in {sorted(p.name for p in folder.iterdir())}")


def run_program(folder, *flags):
    """Run PROGRAM on all GPUs, thunks dumped into `folder`: what XLA logs of command buffers."""
    flags = [f"--xla_dump_to={folder}", "--xla_gpu_graph_min_graph_size=1", *flags]
    verbose = {"TF_CPP_MIN_LOG_LEVEL": "0", "TF_CPP_VMODULE": "command_buffer_thunk=3"}
    beside = {"XLA_PYTHON_CLIENT_PREALLOCATE": "false"}  # this process has its part of the memory
    environment = os.environ | beside | verbose | {"XLA_FLAGS": " ".join(flags)}
    words = [sys.executable, "-c", PROGRAM]
    done = subprocess.run(words, env=environment, capture_output=True, text=True, timeout=150)
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-3000:]
    return done.stderr


def replays(log: str) -> list[int]:
    """For each launch of a command buffer, which one it was since the buffer was recorded."""
    return [int(n) for n in re.findall(r"Execute command buffer.*?num_executions=(\d+)", log)]


def around_custom_calls(folder, name):
    """For each custom call of a turn of loop `name`, the thunks that it is inside of."""
    around = [a for kind, a in last_dump(folder, name) if kind == "kCustomCall"]
    assert len(around) >= CALLS[name], f"{name}: expected {CALLS[name]} custom calls, got {around}"
    return around


@pytest.mark.parametrize("captured", ["by default", "FUSION,CUSTOM_CALL"])
def test_loops_replay_what_xla_captured(tmp_path, captured):
    flags = [] if captured == "by default" else [f"--xla_gpu_enable_command_buffer={captured}"]
    log = run_program(tmp_path, *flags)
    for name in CALLS:
        assert all("kCommandBuffer" in around for around in around_custom_calls(tmp_path, name))
    if captured != "by default":  # a graph is one turn, recorded before the first of them
        launched = replays(log)
        assert launched.count(TURNS - 2) >= len(CALLS), f"{launched} {log[-3000:]}"


def test_a_whole_loop_is_one_graph(tmp_path):
    log = run_program(tmp_path, "--xla_gpu_enable_command_buffer=FUSION,CUSTOM_CALL,WHILE")
    for name in CALLS:
        for around in around_custom_calls(tmp_path, name):
            assert around[:2] == ["kCommandBuffer", "kWhile"]
    assert replays(log), log[-3000:]


def test_without_command_buffers_nothing_is_captured(tmp_path):
    """What the tests above look at tells the difference."""
    log = run_program(tmp_path, "--xla_gpu_enable_command_buffer=")
    for name in CALLS:
        assert not any("kCommandBuffer" in around for around in around_custom_calls(tmp_path, name))
    assert not replays(log)


# Thousands of iterations with routing that changes on the device.


def exchange(x, idx, weights, path, implementation):
    options = dict(num_experts=E, implementation=implementation)
    if path == "direct":
        options["config"] = DIRECT
    if path == "halves":
        d = jax_ep.dispatch_done(jax_ep.dispatch_start(x, idx, weights, **options))
        y = (d.tokens * 2, d.handle, d.weights)
        return d, jax_ep.combine_done(jax_ep.combine_start(*y))
    d = jax_ep.dispatch(x, idx, weights, **options)
    return d, jax_ep.combine(d.tokens * 2, d.handle, d.weights)


def checksum(array):
    """A number that depends on every bit of a float32 array and on where it is."""
    bits = lax.bitcast_convert_type(array, jnp.uint32).reshape(-1)
    place = jnp.arange(bits.size, dtype=jnp.uint32)
    return jnp.sum(bits * (2 * place + 1), dtype=jnp.uint32)


def step(i, path, implementation):
    """Checksums of the rows and of the sums of iteration `i`, whose inputs are drawn here."""
    i = i * lax.axis_size("expert") + lax.axis_index("expert")
    draw = lambda stream, *shape: noise(i, stream, shape)
    floats = lambda bits: bits.astype(jnp.int32).astype(jnp.float32)
    stride = 2 * draw(1, T, 1) + 1  # E is a power of two: K different experts
    idx = (draw(2, T, 1) + stride * jnp.arange(K, dtype=jnp.uint32)) % E
    idx = jnp.where(draw(3, T, K) % 8 == 0, -1, idx.astype(jnp.int32))
    values = floats(draw(4, T, H)), idx, floats(draw(5, T, K)) * 2.0**-31
    d, out = exchange(*values, path, implementation)
    is_row = jnp.arange(d.tokens.shape[0]) < d.group_sizes.sum()
    return jnp.stack([checksum(jnp.where(is_row[:, None], d.tokens, 0)), checksum(out)])


def loop(mesh, kind, path, implementation, **compiler_options):
    """Checksums of all iterations, `[ITERATIONS, R, 2]`."""

    def scanned(n):
        sums = lax.scan(
            lambda _, i: (_, step(i, path, implementation)), None, jnp.arange(ITERATIONS)
        )
        return sums[1][:, None]

    def whiled(n):  # the host does not know when it ends
        def body(carry):
            i, sums = carry
            return i + 1, sums.at[i].set(step(i, path, implementation))

        none = jnp.zeros((ITERATIONS, 2), jnp.uint32) + 0 * lax.axis_index("expert").astype(
            jnp.uint32
        )
        return lax.while_loop(lambda carry: carry[0] < n[0], body, (0, none))[1][:, None]

    f = scanned if kind == "scan" else whiled
    mapped = jax.shard_map(f, mesh=mesh, in_specs=P(), out_specs=P(None, "expert"))
    n = jnp.array([ITERATIONS])
    return np.asarray(jax.jit(mapped).lower(n).compile(compiler_options=compiler_options)(n))


@functools.cache
def expected(mesh):
    return loop(mesh, "scan", "whole", "xla")


@pytest.mark.parametrize(
    "kind, path, captured",
    [
        ("scan", "whole", "FUSION,CUSTOM_CALL"),
        ("while", "whole", "FUSION,CUSTOM_CALL"),
        ("scan", "halves", "FUSION,CUSTOM_CALL"),
        ("while", "direct", "FUSION,CUSTOM_CALL"),
        ("scan", "whole", "FUSION,CUSTOM_CALL,WHILE"),
        ("while", "halves", "FUSION,CUSTOM_CALL,WHILE"),
    ],
)
def test_loops_of_thousands(mesh, kind, path, captured):
    options = CAPTURE | {"xla_gpu_enable_command_buffer": captured}
    got, want = loop(mesh, kind, path, "cuda", **options), expected(mesh)
    assert len(np.unique(want[:, 0, 1])) > 0.99 * ITERATIONS  # inputs do change
    wrong = np.flatnonzero((got != want).any((1, 2)))
    assert not wrong.size, f"{wrong.size} of {ITERATIONS} iterations differ, first {wrong[:9]}"


# Buffers that move on one device only.


def pointers(array):
    return [shard.data.unsafe_buffer_pointer() for shard in array.addressable_shards]


@functools.partial(jax.jit, donate_argnums=0)
def overwrite(old, new):
    """`new`, in the buffer of `old`."""
    return old * 0 + new


def replace(array, values, moved):
    """`values` in the buffers of `array`, but in another one on device `moved`.

    Also that device's old part, which keeps its buffer as long as it lives.
    """
    parts = [shard.data for shard in array.addressable_shards]
    before, old = pointers(array), parts[moved]
    for i, part in enumerate(np.split(values, len(parts))):
        new = jax.device_put(part, parts[i].device)
        parts[i] = new if i == moved else overwrite(parts[i], new)
    new = jax.make_array_from_single_device_arrays(array.shape, array.sharding, parts)
    assert [a != b for a, b in zip(pointers(new), before, strict=True)] == [
        i == moved for i in range(len(parts))
    ]
    return new, old


@pytest.mark.multi
@pytest.mark.parametrize("moved", [0, 1])
@pytest.mark.parametrize("path", ["whole", "halves", "direct"])
def test_buffers_that_move_on_one_device_only(path, moved):
    mesh = make_mesh((2,))

    def jitted(implementation):
        f = lambda *a: exchange(*a, path, implementation)[1]
        return jax.jit(jax.shard_map(f, mesh=mesh, in_specs=P("expert"), out_specs=P("expert")))

    drawn = lambda seed: [flat(a) for a in inputs(seed, R=2, T=T, H=H, K=K, E=E)]
    arrays = [jax.device_put(a, NamedSharding(mesh, P("expert"))) for a in drawn(0)]
    options = CAPTURE | {"xla_gpu_enable_command_buffer": "FUSION,CUSTOM_CALL"}
    program, xla, kept = jitted("cuda").lower(*arrays).compile(options), jitted("xla"), []
    for seed in range(1, 30):
        for _ in range(3):  # recorded, then replayed
            jax.block_until_ready(program(*arrays))
        for i, values in enumerate(drawn(seed)):
            arrays[i], old = replace(arrays[i], values, moved)
            kept.append(old)
        got = program(*arrays)
        assert_same_bits(f"{len(kept)} moved", got, np.asarray(xla(*arrays)))
    jax_ep.check()
