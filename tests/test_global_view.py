# SPDX-License-Identifier: Apache-2.0
"""Global arrays under plain jit: results, gradients, shardings, and a compiled module in which
nothing is gathered but what the operation itself exchanges."""

import itertools
import re

import jax
import numpy as np
import pytest
from cases import DIRECT, FP8, assert_matches, assert_same_bits, flat, inputs, reference
from conftest import PORTABLE, fit, make_mesh, on_gpus, ranks
from jax.sharding import AxisType, NamedSharding
from jax.sharding import PartitionSpec as P

import jax_ep

pytestmark = PORTABLE
E, T, H = 16, 6, 256
MESHES = [
    ((8,), ("expert",), ("expert",)),
    ((2, 4), ("data", "expert"), ("expert",)),
    ((2, 4), ("data", "expert"), ("data", "expert")),
]
AUTO, EXPLICIT = AxisType.Auto, AxisType.Explicit
EXTRAS = dict(
    plain={},
    fp8=dict(wire_dtype=FP8),
    batched=dict(layout="batched", expert_alignment=2, config=DIRECT),
)
# One mesh of each type for each of the other options: an option does not change the sharding rule.
MESH_OF = {("fp8", AUTO): 2, ("fp8", EXPLICIT): 1, ("batched", AUTO): 1, ("batched", EXPLICIT): 0}


def cases():
    """Everything with everything, marked by what `make test` needs."""
    for axis_type, (name, extra), i in itertools.product(
        (AUTO, EXPLICIT), EXTRAS.items(), range(len(MESHES))
    ):
        marks = [pytest.mark.newest] if name == "fp8" or (name == "plain" and i < 2) else []
        if MESH_OF.get((name, axis_type), i) != i:
            marks = [pytest.mark.extensive]
        yield pytest.param(*MESHES[i], axis_type, extra, marks=marks, id=f"{name}-{i}-{axis_type}")


def layer(x, idx, weights, *, combine=None, **options):
    d = jax_ep.dispatch(x, idx, weights, num_experts=E, **options)
    return d, jax_ep.combine(d.tokens, d.handle, weights=d.weights, **(combine or {}))


def problem(shape, names, split, axis_type):
    mesh = make_mesh(fit(shape), names, axis_type)
    R = mesh.shape["expert"]
    groups = int(np.prod([mesh.shape[a] for a in split])) // R
    sets = [inputs(40 + g, R=R, T=T, H=H, K=3, E=E, none=0.1) for g in range(groups)]
    args = [np.concatenate([flat(s[i]) for s in sets]) for i in range(3)]
    options = {}
    if groups > 1 and axis_type == AxisType.Auto:
        options["batch_axes"] = "data"
    on = [jax.device_put(a, NamedSharding(mesh, P(split))) for a in args]
    return mesh, sets, on, options


@pytest.mark.parametrize("shape, names, split, axis_type, extra", [*cases()])
def test_results_gradients_shardings(shape, names, split, axis_type, extra):
    mesh, sets, args, options = problem(shape, names, split, axis_type)
    blocks = len(sets) * mesh.shape["expert"]
    with jax.set_mesh(mesh):

        def loss(x, w):
            d, out = layer(x, args[1], w, **options, **extra)
            return (out**2).sum(), (d, out)

        grads, (d, out) = jax.jit(jax.grad(loss, (0, 1), has_aux=True))(args[0], args[2])
    assert d.tokens.shape[0] == d.group_sizes.shape[0] == blocks
    want = NamedSharding(mesh, P(split))
    for leaf in (*jax.tree.leaves(d), out, *grads):
        assert leaf.sharding.is_equivalent_to(want, leaf.ndim), (leaf.shape, leaf.sharding)
    for g, (x, idx, weights) in enumerate(sets):
        part = lambda a, g=g: np.asarray(a).reshape(len(sets), -1, *a.shape[1:])[g]
        got = jax.tree.map(part, (d, out))
        want = reference(x, idx, weights, num_experts=E, **extra)
        assert_matches(got, want, layout=extra.get("layout", "ragged"))
        sent = x
        if extra.get("wire_dtype"):
            sent = jax_ep.reference.dequantize(*jax_ep.reference.quantize(x), np.float32)
        factor = np.where(idx >= 0, weights, 0).sum(-1, keepdims=True)
        dx = 2 * factor**2 * sent
        np.testing.assert_allclose(part(grads[0]), flat(dx), rtol=1e-4, atol=1e-4)
        dw = 2 * (factor * sent**2).sum(-1, keepdims=True) * (idx >= 0)
        np.testing.assert_allclose(part(grads[1]), flat(dw), rtol=1e-3, atol=1e-2)


def collectives(hlo):
    """Name -> how many instructions, reduced over all computations."""
    names = ("all-gather", "all-to-all", "all-reduce", "collective-permute", "reduce-scatter")
    return {n: len(re.findall(rf" {n}(?:-start)?\(", hlo)) for n in names}


@pytest.mark.parametrize(
    "shape, names, split, axis_type",
    [
        *(pytest.param(*mesh, AUTO, marks=pytest.mark.extensive) for mesh in MESHES[:2]),
        (*MESHES[2], AUTO),
        *(pytest.param(*mesh, EXPLICIT, marks=pytest.mark.extensive) for mesh in MESHES[:2]),
        pytest.param(*MESHES[2], EXPLICIT, marks=pytest.mark.newest),
    ],
    ids=str,
)
def test_nothing_is_gathered_around_the_operations(shape, names, split, axis_type):
    """The global view compiles to exactly the collectives of the same code in shard_map."""
    mesh, _, args, options = problem(shape, names, split, axis_type)
    with jax.set_mesh(mesh):

        def loss(f):
            return lambda x, idx, w: (f(x, idx, w)[1] ** 2).sum()

        inside = jax.shard_map(layer, in_specs=P(split), out_specs=P(split))
        texts = [
            jax.jit(jax.grad(loss(f), (0, 2))).lower(*args).compile().as_text()
            for f in (lambda *a: layer(*a, **options), inside)
        ]
    view, local = map(collectives, texts)
    assert view == local
    assert view["collective-permute"] == 0
    if on_gpus():  # the operations are custom calls
        assert not any(view.values()), view


@pytest.mark.parametrize("axis_type", [AxisType.Auto, AxisType.Explicit])
def test_hidden_shards_stay(axis_type):
    mesh = make_mesh(fit((4, 2)), ("expert", "tensor"), axis_type)
    x, idx, weights = inputs(50, R=mesh.shape["expert"], T=T, H=H, K=3, E=E)
    spec = P("expert", "tensor")
    with jax.set_mesh(mesh):
        on = jax.device_put(flat(x), NamedSharding(mesh, spec))
        rest = [jax.device_put(flat(a), NamedSharding(mesh, P("expert"))) for a in (idx, weights)]
        d, out = jax.jit(layer)(on, *rest)
    assert out.sharding.is_equivalent_to(NamedSharding(mesh, spec), 2)
    assert d.tokens.sharding.is_equivalent_to(NamedSharding(mesh, P("expert", None, "tensor")), 3)
    assert_matches((d, out), reference(x, idx, weights, num_experts=E))


@pytest.mark.parametrize("axis_type", [AxisType.Auto, AxisType.Explicit])
@pytest.mark.parametrize("hidden", [256, 128])
def test_fp8_and_hidden_shards(axis_type, hidden):
    """A shard may not cut a block of 128 channels: gathered on Auto, an error on Explicit meshes."""
    mesh = make_mesh(fit((4, 2)), ("expert", "tensor"), axis_type)
    x, idx, weights = inputs(53, R=mesh.shape["expert"], T=T, H=hidden, K=3, E=E, dtype="bfloat16")
    with jax.set_mesh(mesh):
        on = jax.device_put(flat(x), NamedSharding(mesh, P("expert", "tensor")))
        rest = [jax.device_put(flat(a), NamedSharding(mesh, P("expert"))) for a in (idx, weights)]
        options = dict(wire_dtype=FP8, combine=dict(wire_dtype=FP8))
        f = jax.jit(lambda *a: layer(*a, **options))
        if hidden < 128 * mesh.shape["tensor"] and axis_type == AxisType.Explicit:
            with pytest.raises(ValueError, match="shards of H in multiples of 128 .* split 2 ways"):
                f(on, *rest)
            return
        got = f(on, *rest)
    assert_matches(got, reference(x, idx, weights, num_experts=E, **options))


@pytest.mark.parametrize(
    "T, H, K, options",
    [
        (1, 256, 3, {}),
        (1, 256, 1, {}),
        pytest.param(
            *(6, 128, 3, dict(wire_dtype=FP8, deliver="quantized")), marks=pytest.mark.newest
        ),
    ],
    ids=str,
)
def test_one_token_one_expert_one_block(T, H, K, options):
    """Factors of size 1 in the sharding rule; on few devices the group has one rank, too."""
    mesh = make_mesh(fit((4, 2)), ("expert", "tensor"))
    x, idx, weights = inputs(54, R=mesh.shape["expert"], T=T, H=H, K=K, E=E)

    on = [jax.device_put(flat(a), NamedSharding(mesh, P("expert"))) for a in (x, idx, weights)]

    def loss(weights):
        d = jax_ep.dispatch(*on[:2], weights, num_experts=E, **options)
        out = jax_ep.combine(d.tokens.astype(x.dtype), d.handle, weights=d.weights)
        return out.sum(), (d, out)

    with jax.set_mesh(mesh):
        dweights, got = jax.jit(jax.grad(loss, has_aux=True))(on[2])
    assert np.isfinite(dweights).all()
    assert_matches(got, reference(x, idx, weights, num_experts=E, **options))


def test_one_device():
    mesh = make_mesh((1,))
    x, idx, weights = inputs(51, R=1, T=T, H=H, K=3, E=E)
    with jax.set_mesh(mesh):
        got = jax.jit(layer)(flat(x), flat(idx), flat(weights))
    assert_matches(got, reference(x, idx, weights, num_experts=E))


def test_leading_dimensions():
    R = ranks()
    x, idx, weights = inputs(52, R=R, T=T, H=H, K=3, E=E)
    with jax.set_mesh(make_mesh()):
        out = jax.jit(layer)(*(a.reshape(2 * R, 3, -1) for a in (x, idx, weights)))[1]
    assert out.shape == (2 * R, 3, H)
    assert_same_bits("combined", out, reference(x, idx, weights, num_experts=E)[1])
