# SPDX-License-Identifier: Apache-2.0
"""The specification itself, on cases small enough to work out by hand."""

import ml_dtypes
import numpy as np
import pytest

from jax_ep import num_rows, reference


@pytest.mark.parametrize(
    "counts, rows, alignment, want",
    [
        ([3, 1, 2], 100, 1, [3, 1, 2]),  # room for all
        ([5, 1, 5], 7, 1, [3, 1, 3]),  # light experts lose nothing
        ([5, 1, 5], 8, 1, [4, 1, 3]),  # what is left goes to the lowest id
        ([5, 0, 3], 12, 4, [8, 0, 4]),  # whole blocks
        ([9, 9, 9], 16, 4, [8, 4, 4]),
        ([0, 0, 0], 8, 4, [0, 0, 0]),
    ],
)
def test_water_filling(counts, rows, alignment, want):
    assert reference.grant(np.array(counts), rows, alignment).tolist() == want


def test_rows_are_sorted_by_expert_source_token_k():
    idx = np.array([[[2, 0], [0, 3]], [[0, 2], [-1, 2]]])  # R=2, T=2, K=2, E=4
    plan = reference.plan(idx, num_experts=4, expert_alignment=2)
    assert plan.counts.tolist() == [[3, 0], [3, 1]]
    assert plan.group_sizes.tolist() == [[4, 0], [4, 2]]
    assert plan.row_pair[0, :4].tolist() == [[0, 0, 1], [0, 1, 0], [1, 0, 0], [-1, -1, -1]]
    assert plan.row_pair[1, :6, 0].tolist() == [0, 1, 1, -1, 0, -1]
    assert plan.pair_row.tolist() == [[[0, 0], [1, 4]], [[2, 1], [-1, 2]]]
    assert plan.num_dropped.tolist() == [[0], [0]]


def test_drops_are_the_last_pairs_of_the_heaviest_expert():
    idx = np.array([0, 0, 0, 0, 1]).reshape(1, 5, 1)
    plan = reference.plan(idx, num_experts=2, capacity=3)
    assert plan.counts.tolist() == [[2, 1]]
    assert plan.num_dropped.tolist() == [[2]]
    assert plan.pair_row.reshape(-1).tolist() == [0, 1, -1, -1, 2]


def test_combine_rounds_partials_then_adds_in_rank_order():
    # One token, an expert on each of two ranks; bf16 keeps 8 bits of each partial.
    idx = np.array([[[0, 1]], [[-1, -1]]])
    plan = reference.plan(idx, num_experts=2)
    y = np.zeros((2, 2, 1), ml_dtypes.bfloat16)
    y[:, 0] = 1
    weights = np.zeros((2, 2), np.float32)
    weights[:, 0] = [1 + 2**-9, 2**-8 + 2**-12]
    # partials 1 + 2^-9 -> 1 and 2^-8 + 2^-12 -> itself; the sum 1 + 2^-8 + 2^-12 -> 1 + 2^-7
    assert float(reference.combine(y, plan, weights)[0, 0, 0]) == 1 + 2**-7
    exact = 1 + 2**-9 + 2**-8 + 2**-12
    assert float(ml_dtypes.bfloat16(exact)) == 1 + 2**-7
    node = reference.combine(y, plan, weights, ranks_per_node=1)
    assert node.dtype == ml_dtypes.bfloat16


def test_nodes_round_once_more():
    rng = np.random.default_rng(0)
    idx = np.tile(np.arange(4), (4, 8, 1))
    plan = reference.plan(idx, num_experts=4)
    y = rng.standard_normal((4, 32, 16)).astype(ml_dtypes.bfloat16)
    flat, nodes = (reference.combine(y, plan, ranks_per_node=n).astype(float) for n in (4, 2))
    exact = np.zeros((4, 8, 16))
    for r in range(4):
        for row, (s, t, _) in enumerate(plan.row_pair[r]):
            exact[s, t] += y[r, row].astype(float)
    assert np.abs(flat - exact).max() < 2**-5 and np.abs(nodes - exact).max() < 2**-5
    assert (flat != nodes).any()


def test_fp8_scales():
    x = np.zeros((3, 128), np.float32)
    x[1, 5], x[2] = 896, 2.0**-140
    q, scale = reference.quantize(x)
    assert scale[:, 0].tolist() == [1, 2, 1]
    assert q[1, 5] == 448 and not q[2].astype(float).any()
    _, power = reference.quantize(np.full((1, 128), 449.0, np.float32), "e8m0")
    assert power.item() == 2


@pytest.mark.parametrize("scale_format, subnormal", [("float32", 1), ("e8m0", 2)])
@pytest.mark.parametrize("dtype, half_step", [(ml_dtypes.bfloat16, 2**-8), (np.float32, 2**-24)])
def test_fp8_combine_is_within_the_stated_error(scale_format, subnormal, dtype, half_step):
    """Of a peer's partial p: 2^-4 |p|, or 2^-10/448 of the block's largest where p is tiny."""
    R, T, K, H = 4, 16, 3, 256
    rng = np.random.default_rng(1)
    idx = rng.integers(0, 8, (R, T, K))
    plan = reference.plan(idx, num_experts=8)
    y = rng.standard_normal((R, plan.row_pair.shape[1], H)) * 2.0 ** rng.integers(-12, 4, H)
    y = y.astype(dtype)
    weights = rng.standard_normal(y.shape[:2]).astype(np.float32)
    out = reference.combine(y, plan, weights, wire_dtype="e4m3", scale_format=scale_format)
    partial = np.zeros((R, R, T, H))  # [holder, source, T, H]
    for r in range(R):
        for row, (s, t, _) in enumerate(plan.row_pair[r]):
            if s >= 0:
                partial[r, s, t] += weights[r, row].astype(float) * y[r, row].astype(float)
    largest = np.abs(partial).reshape(R, R, T, -1, 128).max(-1).repeat(128, -1)
    wire = np.maximum(2**-4 * np.abs(partial), subnormal * 2**-10 / 448 * largest)
    wire[np.arange(R), np.arange(R)] = 0
    bound = wire.sum(0) + 2 * half_step * (np.abs(partial).sum(0) + wire.sum(0))
    error = np.abs(out.astype(float) - partial.sum(0))
    assert (error <= bound * (1 + 2**-8) + 1e-6).all()
    assert (error > 0.4 * bound).any()  # it is reached, nearly


def test_fp8_combine_keeps_what_stays_at_home():
    idx = np.array([[[0, 2], [1, 1]], [[3, -1], [-1, -1]]])
    plan = reference.plan(idx, num_experts=4)
    rng = np.random.default_rng(2)
    y = rng.standard_normal((2, plan.row_pair.shape[1], 128)).astype(np.float32)
    exact, fp8 = reference.combine(y, plan), reference.combine(y, plan, wire_dtype="e4m3")
    assert (fp8[0, 0] != exact[0, 0]).any()  # one of its experts is on rank 1
    np.testing.assert_array_equal(fp8[0, 1], exact[0, 1])
    np.testing.assert_array_equal(fp8[1], exact[1])


def test_num_rows_formula():
    assert num_rows(4096, 8, num_experts=256, num_ranks=2) == 65536
    assert (
        num_rows(5, 3, num_experts=8, num_ranks=4, expert_alignment=16) == (40 + 15 * 2) // 16 * 16
    )
    assert num_rows(5, 3, num_experts=8, num_ranks=4, capacity=37, expert_alignment=8) == 32
    assert num_rows(10, 2, num_experts=8, num_ranks=4, capacity_factor=1.25) == 25
    assert num_rows(10, 2, num_experts=8, num_ranks=4, layout="batched") == 80
    assert num_rows(10, 2, num_experts=8, num_ranks=4, layout="batched", capacity=15) == 14
    assert num_rows(0, 2, num_experts=8, num_ranks=4) == 0
