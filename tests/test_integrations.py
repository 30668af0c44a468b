# SPDX-License-Identifier: Apache-2.0
"""MaxText's sparse path around `integrations.maxtext`, against a dense MoE written here."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from cases import assert_close, put
from conftest import PORTABLE, fit, make_mesh, ranks
from jax import lax
from jax.sharding import PartitionSpec as P

import jax_ep
from jax_ep.integrations import maxtext

pytestmark = PORTABLE
B, S, D, F, E = 8, 6, 16, 8, 8
BATCH, TENSOR = P("expert"), P("expert", None, "tensor")
PARAMS = dict(
    w0=((E, D, F), TENSOR),
    w1=((E, D, F), TENSOR),
    wo=((E, F, D), P("expert", "tensor")),
    b0=((E, F), P("expert", "tensor")),
    b1=((E, F), P("expert", "tensor")),
    bo=((E, D), P("expert", "tensor")),
)


def inputs(top_k):
    rng = np.random.default_rng(top_k)
    normal = lambda *shape: rng.standard_normal(shape, np.float32)
    idx = np.argsort(normal(B, S, E), -1)[..., :top_k].astype(np.int32)
    params = {name: normal(*shape) for name, (shape, _) in PARAMS.items()}
    return normal(B, S, D), rng.random((B, S, top_k), np.float32), params, idx


def sparse(x, scores, params, idx, *, weighted, **options):
    """The experts of one rank, with hidden channels and the rows' D split over "tensor"."""
    weights = scores if weighted else None
    x = x if weighted else x * scores
    rows, sizes, ids, routed = maxtext.permute(
        x, idx, weights, num_experts=E, is_batch_sharded_by_expert=True, **options
    )
    gate = lax.ragged_dot(rows, params["w0"], sizes) + params["b0"][ids]
    up = lax.ragged_dot(rows, params["w1"], sizes) + params["b1"][ids]
    y = lax.ragged_dot(jax.nn.silu(gate) * up, params["wo"], sizes)
    y = lax.psum_scatter(y, "tensor", scatter_dimension=1, tiled=True) + params["bo"][ids]
    return maxtext.unpermute(y, routed)


def dense(x, scores, params, idx, *, weighted):
    """Every expert on every token, then the chosen ones."""
    inner = x if weighted else x * scores
    up = lambda w, b: jnp.einsum("bsd,edf->bsef", inner, params[w]) + params[b]
    hidden = jax.nn.silu(up("w0", "b0")) * up("w1", "b1")
    every = jnp.einsum("bsef,efd->bsed", hidden, params["wo"]) + params["bo"]
    chosen = jnp.take_along_axis(every, idx[..., None], 2)
    return (chosen * (scores[..., None] if weighted else 1)).sum(2)


@pytest.mark.parametrize(
    ("weighted", "top_k", "check_vma", "options"),
    [
        (True, 3, True, dict(zero_tail=True)),
        pytest.param(
            *(False, 1, False, dict(expert_alignment=4, zero_tail=True)), marks=pytest.mark.newest
        ),
    ],
    ids=["weighted", "scaled_before"],
)
def test_values_and_gradients_are_those_of_a_dense_layer(weighted, top_k, check_vma, options):
    mesh = make_mesh(fit((4, 2)), ("expert", "tensor"))
    x, scores, params, idx = inputs(top_k)
    specs = (BATCH, BATCH, {name: spec for name, (_, spec) in PARAMS.items()}, BATCH)
    mapped = jax.shard_map(
        functools.partial(sparse, weighted=weighted, **options),
        mesh=mesh,
        in_specs=specs,
        out_specs=TENSOR,
        check_vma=check_vma,
    )
    toward = np.random.default_rng(0).standard_normal(x.shape, np.float32)

    def loss(layer, *operands):
        out = layer(*operands)
        return (out * toward).sum(), out

    grad = lambda layer: jax.jit(
        jax.grad(functools.partial(loss, layer), argnums=(0, 1, 2), has_aux=True)
    )
    placed = jax.tree.map(
        lambda array, spec: put(array, mesh, spec), (x, scores, params, idx), specs
    )
    got = grad(mapped)(*placed)
    want = grad(functools.partial(dense, weighted=weighted))(x, scores, params, idx)
    jax.tree.map(functools.partial(assert_close, rtol=2e-4, atol=2e-4), got, want)


def types(function, *, x_spec=BATCH, shape=(B, S, D), check_vma=True, **options):
    """Types of `function` of what `permute` gives on each rank of one group."""
    mesh = make_mesh()

    def body(x, idx):
        options.setdefault("is_batch_sharded_by_expert", True)
        weights = x[..., :2]  # of any floating type
        return function(*maxtext.permute(x, idx, weights, num_experts=E, **options))

    mapped = jax.shard_map(
        body, mesh=mesh, in_specs=(x_spec, x_spec), out_specs=BATCH, check_vma=check_vma
    )
    x = jax.ShapeDtypeStruct(shape, jnp.bfloat16)
    idx = jax.ShapeDtypeStruct((*shape[:-1], 2), jnp.int32)
    return jax.eval_shape(mapped, x, idx)


def test_shapes_and_buffer_factor():
    R = ranks()
    for factor, rows in (
        (-1.0, R * (B // R) * S * min(2, E // R)),
        (1.5, int(1.5 * (B // R) * S * 2)),
    ):
        x, sizes, ids, weights = types(
            lambda x, sizes, ids, d: (x, sizes, ids, d.weights), ragged_buffer_factor=factor
        )
        assert x.shape == (R * rows, D) and x.dtype == jnp.bfloat16
        assert sizes.shape == (E,) and ids.shape == (R * rows,) and weights.dtype == jnp.float32
    out = types(lambda x, sizes, ids, d: maxtext.unpermute(x[:, :4], d))
    assert out.shape == (B, S, 4)


@pytest.mark.parametrize(
    "options",
    [{}, dict(is_batch_sharded_by_expert=False, check_vma=False)],
    ids=["by_type", "as_told"],
)
def test_replicated_batches_are_refused(options):
    if ranks() == 1:
        pytest.skip("takes two ranks")
    expected = (
        r"x: expected a batch that is sharded over the group's axes \('expert',\), got one that is "
        r"replicated over \('expert',\)"
    )
    with pytest.raises(ValueError, match=expected):
        types(lambda rows, *_: rows, x_spec=P(), **options)


def test_nothing_unspecified_goes_back_without_weights(monkeypatch):
    """On CUDA the tail of the rows' gradient is unspecified: here all of it is NaN."""
    monkeypatch.setattr(maxtext, "combine", lambda rows, *_, **__: rows)
    none = dict.fromkeys(f.name for f in dataclasses.fields(jax_ep.Dispatched))
    routed = jax_ep.Dispatched(**none | dict(expert_ids=jnp.array([0, -1])))
    _, back = jax.vjp(lambda rows: maxtext.unpermute(rows, routed), jnp.ones((2, 3)))
    (got,) = back(jnp.full((2, 3), jnp.nan))
    np.testing.assert_array_equal(got, [[np.nan] * 3, [0] * 3])


def test_wrong_use():
    with pytest.raises(ValueError, match=r"x: expected shape \[B, S, D\], got \(\d+, 16\)"):
        types(lambda rows, *_: rows, shape=(8, D))
    with pytest.raises(TypeError, match="routed: expected the last result of permute, got int"):
        maxtext.unpermute(jnp.zeros((2, D)), 3)
    with pytest.raises(ValueError, match=r"y: expected shape \(\d+,\) \+ \[H\], got \(3, 16\)"):
        types(lambda rows, sizes, ids, d: maxtext.unpermute(rows[:3], d))
    with jax.set_mesh(make_mesh()), pytest.raises(ValueError, match=r"inside jax\.shard_map"):
        maxtext.permute(
            jnp.zeros((B, S, D)),
            jnp.zeros((B, S, 1), jnp.int32),
            num_experts=E,
            is_batch_sharded_by_expert=True,
        )
