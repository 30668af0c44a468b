# SPDX-License-Identifier: Apache-2.0
"""Operations in two halves give the bits of whole ones, wherever JAX takes what is in flight."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from cases import FP8, assert_matches, assert_same_bits, flat, inputs, reference
from conftest import PORTABLE, fit, make_mesh, ranks
from jax import lax
from jax.sharding import AxisType, NamedSharding
from jax.sharding import PartitionSpec as P

import jax_ep

pytestmark = PORTABLE
E = 16
WIRE = dict(wire_dtype=FP8, scale_format="e8m0")


def problem(seed, **changes):
    return inputs(seed, **dict(R=ranks(), T=6, H=128, K=3, E=E, none=0.1) | changes)


def mapped(f, mesh=None, spec=P("expert")):
    return jax.shard_map(f, mesh=mesh or make_mesh(), in_specs=spec, out_specs=spec)


def pipeline(x, idx, weights, *, halves):
    """A loop that carries a dispatch and a combine in flight from one iteration into the next."""
    if halves:
        send = lambda x, i: jax_ep.dispatch_start(x, (idx + i) % E, weights, num_experts=E, **WIRE)
        give, back, total = jax_ep.dispatch_done, jax_ep.combine_start, jax_ep.combine_done
    else:
        send = lambda x, i: (x, (idx + i) % E)
        give = lambda sent: jax_ep.dispatch(*sent, weights, num_experts=E, **WIRE)
        back = lambda y, handle, weights, **wire: (y, handle, weights)
        total = lambda sent: jax_ep.combine(*sent, **WIRE)

    def step(carry, i):
        sent, partials = carry
        d, out = give(sent), total(partials)
        # Each start needs the done before it, so that XLA cannot swap them.
        partials = back(d.tokens * 2 + out[0, 0], d.handle, d.weights, **WIRE)
        return (send(out / 2 + d.group_sizes.sum(), i), partials), out

    d = jax_ep.dispatch(x, idx, weights, num_experts=E, **WIRE)
    carry = send(x + d.group_sizes.sum(), 1), back(d.tokens, d.handle, d.weights, **WIRE)
    carry, outs = lax.scan(jax.checkpoint(step), carry, jnp.arange(2, 6))
    return outs, give(carry[0]).tokens, total(carry[1])


@pytest.mark.newest
def test_scan_carries_what_is_in_flight():
    args = [flat(a) for a in problem(70)]
    specs = (P(None, "expert"), P("expert"), P("expert"))
    got, want = (
        jax.jit(
            jax.shard_map(
                lambda *a, halves=halves: pipeline(*a, halves=halves),
                mesh=make_mesh(),
                in_specs=P("expert"),
                out_specs=specs,
            )
        )(*args)
        for halves in (True, False)
    )
    for i in (0, 2):
        assert_same_bits("sums", got[i], np.asarray(want[i]))
    assert got[1].shape == want[1].shape


def test_in_flight_leaves_jit_and_shard_map():
    x, idx, weights = problem(71, dtype="bfloat16")
    start = jax.jit(mapped(lambda *a: jax_ep.dispatch_start(*a, num_experts=E)))

    def middle(sent):
        d = jax_ep.dispatch_done(sent)
        return d, jax_ep.combine_start(d.tokens, d.handle, d.weights, wire_dtype=FP8)

    d, partials = jax.jit(mapped(middle))(start(flat(x), flat(idx), flat(weights)))
    out = jax.jit(mapped(jax_ep.combine_done))(partials)
    want = reference(x, idx, weights, num_experts=E, combine=dict(wire_dtype=FP8))
    assert_matches((d, out), want)


@pytest.mark.parametrize("axis_type", [AxisType.Auto, AxisType.Explicit])
def test_global_view_with_hidden_shards(axis_type):
    mesh = make_mesh(fit((4, 2)), ("expert", "tensor"), axis_type)
    x, idx, weights = problem(72, R=mesh.shape["expert"], H=256, dtype="bfloat16")

    def layer(x, idx, weights):
        d = jax_ep.dispatch_done(jax_ep.dispatch_start(x, idx, weights, num_experts=E, **WIRE))
        return d, jax_ep.combine_done(jax_ep.combine_start(d.tokens, d.handle, d.weights, **WIRE))

    with jax.set_mesh(mesh):
        on = jax.device_put(flat(x), NamedSharding(mesh, P("expert", "tensor")))
        rest = [jax.device_put(flat(a), NamedSharding(mesh, P("expert"))) for a in (idx, weights)]
        got = jax.jit(layer)(on, *rest)
    assert_matches(got, reference(x, idx, weights, num_experts=E, **WIRE, combine=WIRE))


def trace(f, **changes):
    """Trace `f(x, idx, weights)` on every rank."""
    jax.eval_shape(mapped(lambda *a: jax.tree.leaves(f(*a))), *map(flat, problem(73, **changes)))


def started(x, idx, weights):
    """One operation of each kind, started."""
    sent = jax_ep.dispatch_start(x, idx, weights, num_experts=E)
    d = jax_ep.dispatch(x, idx, weights, num_experts=E)
    return sent, jax_ep.combine_start(d.tokens, d.handle, d.weights)


DONE = {"dispatch": jax_ep.dispatch_done, "combine": jax_ep.combine_done}


@pytest.mark.parametrize("kind", DONE)
def test_misuse_that_a_trace_can_see(kind):
    done, this = DONE[kind], list(DONE).index(kind)
    other = next(k for k in DONE if k != kind)

    def expect(error, message, f):
        with pytest.raises(error, match=message):
            trace(lambda *a: done(f(started(*a))))

    expect(
        TypeError,
        f"expected what jax_ep.{kind}_start returned, got that of {other}_start: use "
        f"jax_ep.{other}_done",
        lambda both: both[1 - this],
    )
    expect(TypeError, f"expected what jax_ep.{kind}_start returned, got tuple", lambda both: both)
    changed = lambda change: lambda both: jax.tree.map(change, both[this])
    arrays = rf"expected the arrays of jax_ep.{kind}_start as they were, int32\[1\], "
    expect(ValueError, arrays, changed(lambda a: a[:1]))
    expect(ValueError, arrays, changed(lambda a: a.astype(jnp.bfloat16) if a.ndim > 1 else a))

    def twice(both):
        done(both[this])
        return both[this]

    expect(ValueError, f"already done: expected one jax_ep.{kind}_done for each {kind}_st", twice)


def test_each_branch_may_have_its_done():
    def f(*args):
        sent, _ = started(*args)
        one = lambda: jax_ep.dispatch_done(sent).tokens
        two = lambda: jax_ep.dispatch_done(sent).tokens * 2
        return lax.cond(lax.axis_size("expert") > 1, one, two)

    trace(f)


def test_views_do_not_mix():
    x, idx, _ = problem(74)
    with jax.set_mesh(make_mesh()):
        sent = jax.jit(lambda *a: jax_ep.dispatch_start(*a, num_experts=E))(flat(x), flat(idx))
    with pytest.raises(ValueError, match="in_flight: made on global arrays, used inside shard_map"):
        jax.eval_shape(mapped(lambda sent: jax_ep.dispatch_done(sent).tokens), sent)
    with jax.set_mesh(make_mesh()):  # nor stay in flight
        jax.block_until_ready(jax.jit(jax_ep.dispatch_done)(sent).tokens)


def test_unknown_keyword():
    with pytest.raises(TypeError, match="unexpected keyword argument 'sms'"):
        trace(lambda *a: jax_ep.dispatch_start(*a, num_experts=E, sms=3))


def halves_by_name(x, idx, weights):
    """Each half as a function of one float array."""
    sent, partials = jax.lax.stop_gradient(started(x, idx, weights))
    d = jax.lax.stop_gradient(jax_ep.dispatch(x, idx, weights, num_experts=E))

    def with_first(in_flight, y):
        operands = (y, *in_flight.operands[1:])
        return jax_ep.InFlight(**{**vars(in_flight), "operands": operands})

    return {
        "dispatch_start": (lambda x: jax_ep.dispatch_start(x, idx, num_experts=E), x),
        "dispatch_done": (lambda x: jax_ep.dispatch_done(with_first(sent, x)), x),
        "combine_start": (lambda y: jax_ep.combine_start(y, d.handle), d.tokens),
        "combine_done": (lambda y: jax_ep.combine_done(with_first(partials, y)), d.tokens),
    }


@pytest.mark.parametrize("half", ["dispatch_start", "dispatch_done", "combine_start", "combine_done"])  # fmt: skip
def test_halves_are_forward_only_and_refuse_vmap(half):
    def gradient(*args):
        f, x = halves_by_name(*args)[half]
        return jax.grad(lambda x: sum(a.sum() for a in jax.tree.leaves(f(x))))(x)

    refused = f"jax_ep.{half} has no gradient.*Use jax_ep.dispatch and jax_ep.combine where you"
    with pytest.raises(TypeError, match=refused):
        trace(gradient)

    def tangent(*args):
        f, x = halves_by_name(*args)[half]
        return jax.jvp(lambda x: jax.tree.leaves(f(x))[0], (x,), (x,))

    with pytest.raises(TypeError, match=refused):
        trace(tangent)

    def unmoved(*args):
        f, x = halves_by_name(*args)[half]
        return jax.grad(lambda c: c * sum(a.sum() for a in jax.tree.leaves(f(x))))(2.0)[None]

    trace(unmoved)

    def batched(*args):
        f, x = halves_by_name(*args)[half]
        return jax.vmap(f)(jnp.stack([x, x]))

    with pytest.raises(ValueError, match=f"jax_ep.{half} under vmap: expected no vmap"):
        trace(batched)
