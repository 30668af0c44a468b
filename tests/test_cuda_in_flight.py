# SPDX-License-Identifier: Apache-2.0
"""What only CUDA finds of halves that are misused: named errors in time, and a group that recovers."""

import time

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from cases import assert_same_bits, flat, inputs
from conftest import TIMEOUT_S, make_mesh
from jax import lax
from jax.sharding import PartitionSpec as P
from test_cuda_processes import TESTS, launch

import jax_ep

pytestmark = pytest.mark.gpu
RANKS = [1, pytest.param(2, marks=pytest.mark.multi)]
E, SHORT_S = 8, 2.0


@pytest.fixture(params=RANKS)
def mesh(request):
    if len(jax.devices()) < request.param or jax.default_backend() != "gpu":
        pytest.fail(f"expected {request.param} GPUs, got {jax.devices()}")
    yield make_mesh((request.param,))
    jax_ep.check()


def mapped(f, mesh):
    return jax.jit(jax.shard_map(f, mesh=mesh, in_specs=P("expert"), out_specs=P("expert")))


def layer(x, idx, weights, implementation=None):
    d = jax_ep.dispatch(x, idx, weights, num_experts=E, implementation=implementation)
    return jax_ep.combine(d.tokens, d.handle, d.weights)


def after(values, number):
    """`values`, but not before `number [1]` is known, which is never negative: XLA orders by data."""
    return jax.tree.map(lambda a: jnp.where(number[0] >= 0, a, 0), values)


def start(x, idx, weights):
    return jax_ep.dispatch_start(x, idx, weights, num_experts=E)


def two_dispatch_starts(x, idx, weights):
    first = start(x, idx, weights)
    second = start(after(x, first.ticket), idx, weights)
    d = jax_ep.dispatch_done(second)
    return d.tokens, jax_ep.dispatch_done(after(first, d.num_dropped)).tokens


def a_dispatch_between_the_halves(x, idx, weights):
    first = start(x, idx, weights)
    d = jax_ep.dispatch(after(x, first.ticket), idx, weights, num_experts=E)
    return d.tokens, jax_ep.dispatch_done(after(first, d.num_dropped)).tokens


def two_combine_starts(x, idx, weights):
    d = jax_ep.dispatch(x, idx, weights, num_experts=E)
    first = jax_ep.combine_start(d.tokens, d.handle, d.weights)
    second = jax_ep.combine_start(after(d.tokens, first.ticket), d.handle, d.weights)
    return jax_ep.combine_done(after(first, second.ticket)), second.ticket


def done_of_the_start_before(x, idx, weights):
    first = start(x, idx, weights)
    d = jax_ep.dispatch_done(first)
    second = start(after(x, d.num_dropped), idx, weights)
    return d.tokens, jax_ep.dispatch_done(after(first, second.ticket)).tokens


TURNS = "expected one start, then its done, in turn"
MISUSE = {
    two_dispatch_starts: f"dispatch_start: .* began before the done of start .*{TURNS}",
    a_dispatch_between_the_halves: f"dispatch: .* began before the done of start .*{TURNS}",
    two_combine_starts: f"combine_start: .* began before the done of start .*{TURNS}",
    done_of_the_start_before: f"dispatch_done: .* wants start .*, but the last one was .*{TURNS}",
}


@pytest.mark.parametrize("misuse", MISUSE, ids=lambda f: f.__name__)
@pytest.mark.parametrize("command_buffers", [True, False])
def test_misuse_is_named_when_it_runs(mesh, misuse, command_buffers):
    args = [flat(a) for a in inputs(3, R=mesh.size, T=6, H=128, K=3, E=E)]
    options = {"xla_gpu_graph_min_graph_size": 1}
    if not command_buffers:
        options = {"xla_gpu_enable_command_buffer": ""}
    program = mapped(misuse, mesh).lower(*args).compile(options)
    fails_and_recovers(mesh, lambda: program(*args), MISUSE[misuse], args)


def fails_and_recovers(mesh, call, said, args):
    """`call` ends in an error that has `said` within twice the timeout; then the group works again."""
    jax_ep.finalize()
    jax_ep.initialize(mesh, timeout_s=SHORT_S)
    begun = time.monotonic()
    with pytest.raises((RuntimeError, jax.errors.JaxRuntimeError), match=said):
        jax.block_until_ready(call())
        jax_ep.check()
    assert time.monotonic() - begun < 2 * SHORT_S
    jax_ep.initialize(mesh, timeout_s=TIMEOUT_S)
    got, want = (mapped(lambda *a, i=i: layer(*a, i), mesh)(*args) for i in ("cuda", "xla"))
    assert_same_bits("again", got, np.asarray(want))


@pytest.mark.multi
@pytest.mark.parametrize("kind", ["dispatch", "combine"])
def test_a_peer_that_dies_between_start_and_done(kind):
    """Rank 1 starts once; rank 0 goes on: what was sent arrives, then it gives up on rank 1."""
    mesh = make_mesh((2,))
    args = [flat(a) for a in inputs(4, R=2, T=6, H=128, K=3, E=E)]

    def back(x, idx, weights):
        d = jax_ep.dispatch(x, idx, weights, num_experts=E)
        return jax_ep.combine_start(d.tokens, d.handle, d.weights)

    def turn(x, idx, weights):
        if kind == "combine":
            return jax_ep.combine_done(back(x, idx, weights))
        return jax_ep.dispatch_done(start(x, idx, weights)).tokens[: x.shape[0]]

    def only_start(x, idx, weights):
        return after(x, (start if kind == "dispatch" else back)(x, idx, weights).ticket)

    def on_each(x, idx, weights):
        turns = lambda x: lax.fori_loop(0, 20, lambda _, x: turn(x, idx, weights), x)
        first = lax.axis_index("expert") == 0
        return lax.cond(first, turns, lambda x: only_start(x, idx, weights), x)

    program = mapped(on_each, mesh).lower(*args).compile()
    gave_up = "jax_ep.dispatch(_done)?: rank 0 gave up on rank 1"
    fails_and_recovers(mesh, lambda: program(*args), gave_up, args)


@pytest.mark.multi
def test_a_process_that_dies_between_start_and_done(tmp_path):
    _, logs = launch(tmp_path, "python", TESTS / "multi" / "halves_program.py")
    assert "survived" in logs[0], "\n".join(logs)
