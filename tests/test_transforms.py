# SPDX-License-Identifier: Apache-2.0
"""What JAX may do to the operations: every transform, mesh and operand type of the documentation."""

import functools
import itertools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from cases import DIRECT, assert_close, assert_matches, assert_same_bits, flat, inputs, reference
from conftest import PORTABLE, fit, make_mesh, ranks
from jax import lax
from jax.sharding import AxisType, NamedSharding
from jax.sharding import PartitionSpec as P

import jax_ep

pytestmark = PORTABLE
E, SIZES = 16, dict(T=6, H=8, K=3, E=16)
CUDA_CALLS = [f"jax_ep_{name}" for name in ("plan", "dispatch", "combine", "slot_dispatch", "slot_combine")]  # fmt: skip


def layer(x, idx, weights, **options):
    d = jax_ep.dispatch(x, idx, weights, num_experts=E, **options)
    return jax_ep.combine(d.tokens * 2, d.handle, weights=d.weights)


def mapped(f, mesh=None, in_specs=P("expert"), out_specs=P("expert"), **kw):
    return jax.shard_map(f, mesh=mesh or make_mesh(), in_specs=in_specs, out_specs=out_specs, **kw)


@pytest.fixture(scope="module")
def data(platform):
    x, idx, weights = inputs(20, R=ranks(), **SIZES)
    d = jax_ep.reference.dispatch(x, idx, weights, num_experts=E)
    out = jax_ep.reference.combine(d.tokens * np.float32(2), d.plan, d.weights)
    return (flat(x), flat(idx), flat(weights)), flat(out)


@pytest.mark.parametrize("check_vma", [True, pytest.param(False, marks=pytest.mark.newest)])
def test_jit_and_eager(data, check_vma):
    args, want = data
    assert_same_bits("jit", jax.jit(mapped(layer, check_vma=check_vma))(*args), want)
    if check_vma:
        assert_same_bits("eager", mapped(layer)(*args), want)


@pytest.mark.newest
def test_eager_grad(data):
    args, _ = data
    f = mapped(layer)
    eager = jax.grad(lambda x: (f(x, *args[1:]) ** 2).sum())(args[0])
    jitted = jax.jit(jax.grad(lambda x: (f(x, *args[1:]) ** 2).sum()))(args[0])
    assert_close(eager, jitted, rtol=1e-6)


@pytest.mark.newest
def test_grad_inside_shard_map(data):
    args, _ = data
    inside = mapped(lambda *a: jax.grad(lambda x: (layer(x, *a[1:]) ** 2).sum())(a[0]))
    outside = jax.jit(jax.grad(lambda x: (mapped(layer)(x, *args[1:]) ** 2).sum()))(args[0])
    assert_close(jax.jit(inside)(*args), outside, rtol=1e-6)


def equations(jaxpr, counts=None):
    """How often each jax_ep primitive stands in a jaxpr, sub-jaxprs included."""
    counts = {} if counts is None else counts
    for eqn in jaxpr.eqns:
        if eqn.primitive.name.startswith("jax_ep_"):
            counts[eqn.primitive.name] = counts.get(eqn.primitive.name, 0) + 1
        for value in jax.tree.leaves(list(eqn.params.values())):
            inner = getattr(value, "jaxpr", value)
            if hasattr(inner, "eqns"):
                equations(inner, counts)
    return counts


@pytest.mark.parametrize(
    "config, names, want",
    [
        (DIRECT, (), dict(jax_ep_plan=2, jax_ep_dispatch=3, jax_ep_combine=2)),
        (DIRECT, jax_ep.REMAT_NAMES, dict(jax_ep_plan=1, jax_ep_dispatch=2, jax_ep_combine=2)),
        (None, (), dict(jax_ep_slot_dispatch=2, jax_ep_dispatch=1, jax_ep_combine=2)),
        (None, jax_ep.REMAT_NAMES, dict(jax_ep_slot_dispatch=1, jax_ep_dispatch=1, jax_ep_combine=2)),
    ],
)  # fmt: skip
def test_checkpoint_counts_operations(data, config, names, want):
    args, _ = data
    grad = grad_of_checkpointed(args, config, names)
    assert equations(jax.make_jaxpr(grad)(args[0], args[2]).jaxpr) == want


def grad_of_checkpointed(args, config, names):
    policy = jax.checkpoint_policies.save_only_these_names(*names) if names else None
    f = mapped(jax.checkpoint(functools.partial(layer, config=config), policy=policy))
    return jax.grad(lambda x, w: (f(x, args[1], w) ** 2).sum(), (0, 1))


@pytest.mark.newest
def test_checkpoint_gives_the_same_gradient(data):
    args, _ = data
    plain = jax.grad(lambda x, w: (mapped(layer)(x, args[1], w) ** 2).sum(), (0, 1))
    want = jax.jit(plain)(args[0], args[2])
    for config, names in ((DIRECT, ()), (None, jax_ep.REMAT_NAMES)):
        got = jax.jit(grad_of_checkpointed(args, config, names))(args[0], args[2])
        jax.tree.map(lambda a, b: assert_close(a, b, rtol=1e-6), got, want)


def test_scan_and_its_gradient(data):
    args, _ = data

    def stacked(x, idx, weights):
        step = lambda h, _: (layer(h, idx, weights) / 4, None)
        return lax.scan(step, x, None, length=3)[0]

    def unrolled(x, idx, weights):
        for _ in range(3):
            x = layer(x, idx, weights) / 4
        return x

    results = []
    for f in (stacked, unrolled):

        def loss(x, g=mapped(f)):
            out = g(x, *args[1:])
            return (out**2).sum(), out

        results.append(jax.jit(jax.grad(loss, has_aux=True))(args[0]))
    (scanned_grad, scanned), (grad, out) = results
    assert_close(scanned, out, rtol=1e-6)
    assert_close(scanned_grad, grad, rtol=1e-5, atol=1e-6)


def test_while_loop_and_cond(data):
    args, want = data

    def body(x, idx, weights):
        done = lambda c: c[0] < 1
        return lax.while_loop(done, lambda c: (c[0] + 1, layer(c[1], idx, weights)), (0, x))[1]

    assert_same_bits("while", jax.jit(mapped(body))(*args), want)

    def branch(flag, *a):
        return lax.cond(flag, lambda *b: layer(*b), lambda *b: b[0], *a)

    f = jax.jit(mapped(branch, in_specs=(P(), *(P("expert"),) * 3)))
    assert_same_bits("taken", f(True, *args), want)
    assert_same_bits("not taken", f(False, *args), args[0])


def test_donation(data):
    args, want = data
    sharding = NamedSharding(make_mesh(), P("expert"))
    x = jax.device_put(args[0], sharding)
    out = jax.jit(mapped(layer), donate_argnums=0)(x, *args[1:])
    assert_same_bits("donated", out, want)
    assert x.is_deleted()


def test_export_and_ahead_of_time(data):
    args, want = data
    put = lambda a: jax.device_put(a, NamedSharding(make_mesh(), P("expert")))
    on = [put(a) for a in args]
    f = jax.jit(mapped(layer))
    checks = [jax.export.DisabledSafetyCheck.custom_call(name) for name in CUDA_CALLS]
    exported = jax.export.export(f, disabled_checks=checks)(*on)
    exported = jax.export.deserialize(exported.serialize())
    assert_same_bits("exported", jax.jit(exported.call)(*on), want)
    assert_same_bits("compiled", f.lower(*on).compile()(*on), want)


@pytest.mark.newest
def test_replicated_operands(data):
    """Replicated tokens, varying routing and the reverse: gradients are summed over the ranks."""
    args, _ = data
    x, weights = args[0][:6], args[2][:6]

    def loss(x, weights, tile):
        spec = P("expert") if tile else P()
        f = mapped(layer, in_specs=(spec, P("expert"), spec))
        if tile:
            x, weights = jnp.tile(x, (ranks(), 1)), jnp.tile(weights, (ranks(), 1))
        return (f(x, args[1], weights) ** 2).sum()

    grad = lambda tile, argnum: jax.jit(
        jax.value_and_grad(functools.partial(loss, tile=tile), argnum)
    )(x, weights)
    want, (want_dx, want_dweights) = grad(True, (0, 1))
    for argnum, want_grads in (((0, 1), (want_dx, want_dweights)), (0, want_dx)):
        got, got_grads = grad(False, argnum)
        jax.tree.map(
            lambda a, b: assert_close(a, b, rtol=1e-5), (got, got_grads), (want, want_grads)
        )


AUTO, EXPLICIT = AxisType.Auto, AxisType.Explicit
MESHES = [
    ((8,), ("expert",), "expert"),
    ((4, 2), ("data", "expert"), "expert"),
    ((2, 2, 2), ("data", "expert", "tensor"), "expert"),
    ((2, 4), ("node", "gpu"), ("node", "gpu")),
    ((2, 2, 2), ("data", "node", "gpu"), ("node", "gpu")),
    ((2, 4), ("node", "gpu"), ("gpu", "node")),
]


def mesh_cases():
    """Every mesh of each type, marked by what `make test` needs: inside shard_map types differ little."""
    for axis_type, i in itertools.product((AUTO, EXPLICIT), range(len(MESHES))):
        marks = [pytest.mark.extensive]
        if (axis_type, i) in ((AUTO, 2), (AUTO, 5), (EXPLICIT, 4)):
            marks = []
        elif (axis_type, i) in ((AUTO, 1), (EXPLICIT, 1)):
            marks = [pytest.mark.newest]
        shape, names, group = MESHES[i]
        yield pytest.param(shape, names, group, axis_type, marks=marks)


@pytest.mark.parametrize("shape, names, group, axis_type", [*mesh_cases()], ids=str)
def test_meshes(shape, names, group, axis_type):
    mesh = make_mesh(fit(shape), names, axis_type, group)
    axes = (group,) if isinstance(group, str) else group
    split = (*(a for a in names if a == "data"), *axes)
    groups = mesh.shape.get("data", 1)
    R = int(np.prod([mesh.shape[a] for a in axes]))
    sets = [inputs(30 + g, R=R, **SIZES) for g in range(groups)]
    args = [np.concatenate([flat(s[i]) for s in sets]) for i in range(3)]
    config = DIRECT if axis_type == AxisType.Explicit else None  # each path on every mesh

    def body(x, idx, weights):
        d = jax_ep.dispatch(x, idx, weights, num_experts=E, axis_name=group, config=config)
        return d, jax_ep.combine(d.tokens, d.handle, weights=d.weights)

    with jax.set_mesh(mesh):
        on = [jax.device_put(a, NamedSharding(mesh, P(split))) for a in args]
        f = mapped(body, mesh, P(split), P(split))

        def loss(x):
            d, out = f(x, *on[1:])
            return (out**2).sum(), (d, out)

        dx, (d, out) = jax.jit(jax.grad(loss, has_aux=True))(on[0])
    for g, (x, idx, weights) in enumerate(sets):
        part = lambda a, g=g: np.asarray(a).reshape(groups, -1, *a.shape[1:])[g]
        assert_matches(
            (jax.tree.map(part, d), part(out)), reference(x, idx, weights, num_experts=E)
        )
        factor = flat(np.where(idx >= 0, weights, 0).sum(-1, keepdims=True))
        assert_close(part(dx), 2 * factor**2 * flat(x), rtol=1e-4, atol=1e-5)


def test_handle_leaves_and_comes_back(data):
    args, want = data
    first = jax.jit(mapped(lambda *a: jax_ep.dispatch(*a, num_experts=E)))
    second = jax.jit(mapped(lambda y, d: jax_ep.combine(y, d.handle, weights=d.weights)))
    d = first(*args)
    assert_same_bits("combined", second(d.tokens * 2, d), want)


def test_vmap_over_micro_batches(data):
    (x, idx, weights), want = data
    both = [np.stack([a, a[::-1]]) for a in (x, idx, weights)]
    f = jax.jit(
        mapped(
            lambda *a: jax.vmap(layer)(*a), in_specs=P(None, "expert"), out_specs=P(None, "expert")
        )
    )
    out = f(*both)
    assert_same_bits("first", out[0], want)
    single = jax.jit(mapped(layer))
    assert_same_bits("second", out[1], np.asarray(single(*(a[1] for a in both))))
    grad = jax.jit(jax.grad(lambda x: (f(x, *both[1:]) ** 2).sum()))(both[0])
    alone = jax.jit(jax.grad(lambda x: (single(x, idx, weights) ** 2).sum()))(x)
    assert_close(grad[0], alone, rtol=1e-5)


def test_vmap_with_an_operand_left_out(data):
    (x, idx, weights), _ = data
    f = mapped(
        lambda x, i, w: jax.vmap(layer, in_axes=(None, 0, 0))(x, i, w),
        in_specs=(P("expert"), P(None, "expert"), P(None, "expert")),
        out_specs=P(None, "expert"),
    )
    with pytest.raises(ValueError, match="expected x, topk_idx and topk_weights all mapped"):
        jax.jit(f)(x, np.stack([idx] * 2), np.stack([weights] * 2))
