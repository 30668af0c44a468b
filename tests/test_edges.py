# SPDX-License-Identifier: Apache-2.0
"""Sizes at the edge, options one by one, the same bits on every run."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from cases import (
    FP8,
    assert_matches,
    assert_same_bits,
    flat,
    hidden,
    inputs,
    program,
    reference,
    run,
)
from conftest import PORTABLE, make_mesh, on_gpus, ranks
from jax.sharding import PartitionSpec as P

import jax_ep

pytestmark = PORTABLE


@pytest.mark.parametrize(
    "sizes",
    [
        dict(R=4, T=0, H=8, K=2, E=8),  # no tokens
        dict(R=4, T=5, H=8, K=2, E=8, none=1.0),  # nobody names an expert
        dict(R=1, T=5, H=8, K=2, E=8),  # one rank
        dict(R=8, T=5, H=8, K=3, E=8),  # one expert per rank; K > E/R
        dict(R=2, T=5, H=8, K=1, E=8),
        dict(R=2, T=5, H=8, K=7, E=4),  # K > E: duplicates
        dict(R=2, T=5, H=33, K=2, E=4),  # H not a multiple of 128, no fp8
        dict(R=4, T=1, H=1, K=1, E=4),
    ],
    ids=str,
)
def test_edge_sizes(sizes):
    sizes = sizes | dict(R=ranks(sizes["R"]), H=hidden(sizes["H"]))
    x, idx, weights = inputs(0, **sizes)
    got = run(x, idx, weights, num_experts=sizes["E"])
    assert_matches(got, reference(x, idx, weights, num_experts=sizes["E"]))


def test_one_empty_rank():
    x, idx, weights = inputs(1, R=ranks(4), T=6, H=8, K=2, E=8)
    idx[len(idx) // 2] = -1
    assert_matches(run(x, idx, weights, num_experts=8), reference(x, idx, weights, num_experts=8))


@pytest.mark.parametrize("bad", [8, 100, -2, 2**31 - 1, -(2**31)])
def test_out_of_range_names_no_expert(bad):
    if on_gpus():
        pytest.skip(
            "an error on CUDA: test_cuda.py::test_bad_routing_is_an_error_and_initialize_recovers"
        )
    x, idx, weights = inputs(2, R=ranks(4), T=6, H=8, K=2, E=8)
    idx[-1, 2, 0] = bad
    want = idx.copy()
    want[-1, 2, 0] = -1
    assert_matches(run(x, idx, weights, num_experts=8), reference(x, want, weights, num_experts=8))


@pytest.mark.parametrize(
    "dtype",
    [
        np.uint8,
        np.uint32,
        *(pytest.param(t, marks=pytest.mark.extensive) for t in (np.int8, np.int16)),
    ],
)
def test_integer_types(dtype):
    x, idx, weights = inputs(3, R=ranks(4), T=6, H=8, K=2, E=8)
    got = run(x, idx.astype(dtype), weights, num_experts=8)
    assert_matches(got, reference(x, idx, weights, num_experts=8))


@pytest.mark.parametrize("zero_tail", [False, True])
def test_tail(zero_tail):
    x, idx, weights = inputs(4, R=ranks(4), T=6, H=8, K=2, E=8)
    d, _ = run(x, idx, weights, num_experts=8, zero_tail=zero_tail)
    R = len(x)
    rows = np.asarray(d.tokens).reshape(R, -1, 8)
    sizes = np.asarray(d.group_sizes).reshape(R, -1).sum(1)
    if zero_tail:
        assert all(not rows[r, sizes[r] :].any() for r in range(R))
    want = reference(x, idx, weights, num_experts=8)[0]
    for r in range(R):
        assert_same_bits("rows", rows[r, : sizes[r]], want.tokens[r, : sizes[r]])


@pytest.mark.parametrize("scale_format", ["float32", "e8m0"])
def test_prequantized_input(scale_format):
    x, idx, weights = inputs(5, R=ranks(4), T=6, H=256, K=2, E=8)
    x[0, 0, :128] = 0
    quantized = jax_ep.reference.quantize(x, scale_format)
    options = dict(num_experts=8, deliver="quantized")
    want = reference(quantized, idx, weights, **options)
    assert_matches(run(quantized, idx, weights, **options), want)
    inside = run(x, idx, weights, wire_dtype=FP8, scale_format=scale_format, **options)
    assert_matches(inside, want)


def test_leading_dimensions_are_restored():
    x, idx, weights = inputs(6, R=ranks(4), T=6, H=8, K=2, E=8)
    d, out = run(*(a.reshape(-1, 2, 3, a.shape[-1]) for a in (x, idx, weights)), num_experts=8)
    assert out.shape == (2 * len(x), 3, 8)
    assert_matches((d, out), reference(x, idx, weights, num_experts=8))


def test_hidden_size_may_change_before_combine():
    x, idx, _ = inputs(7, R=ranks(4), T=6, H=8, K=2, E=8)

    def body(x, idx):
        d = jax_ep.dispatch(x, idx, num_experts=8)
        return jax_ep.combine(jnp.tile(d.tokens, (1, 3)), d.handle)

    mesh = make_mesh((ranks(4),))
    mapped = jax.shard_map(body, mesh=mesh, in_specs=P("expert"), out_specs=P("expert"))
    plain = reference(x, idx, None, num_experts=8)[1]
    assert_same_bits("combined", jax.jit(mapped)(flat(x), flat(idx)), np.tile(plain, (1, 1, 3)))


def test_same_bits_every_run():
    x, idx, weights = inputs(8, R=ranks(8), T=32, H=64, K=4, E=16, dtype="bfloat16")
    options = dict(num_experts=16, capacity_factor=1.0, zero_tail=True)
    first = run(x, idx, weights, **options)
    f, args = program(x, idx, weights, **options)  # compiled once more
    for _ in range(4):
        again = f(*args)
        for a, b in zip(jax.tree.leaves(first), jax.tree.leaves(again), strict=True):
            assert_same_bits("run", a, np.asarray(b))


def test_float64_sum_within_rounding():
    x, idx, weights = inputs(9, R=ranks(4), T=16, H=32, K=4, E=8, dtype="bfloat16")
    _, out = run(x, idx, weights, num_experts=8)
    exact = (weights.astype(float).sum(-1, keepdims=True)) * x.astype(float)
    bound = 2**-7 * np.abs(weights).sum(-1, keepdims=True) * np.abs(x.astype(float))
    assert (np.abs(np.asarray(out, float).reshape(exact.shape) - exact) <= bound).all()


def test_sums_that_round_to_zero_have_no_sign():
    x, idx, weights = inputs(10, R=ranks(4), T=6, H=8, K=3, E=8, dtype="float16")
    x[:], weights = -(2.0**-24), np.abs(weights) / 16  # each rank's sum rounds to -0
    got, want = (f(x, idx, weights, num_experts=8) for f in (run, reference))
    assert not np.signbit(want[1]).any()
    assert_matches(got, want)
