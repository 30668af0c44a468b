# SPDX-License-Identifier: Apache-2.0
"""Random shapes, dtypes, routings and options: the implementation equals the reference in bits."""

import pytest
from cases import DIRECT, FP8, assert_matches, hidden, inputs, reference, run
from conftest import PORTABLE, devices
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

pytestmark = PORTABLE
SLOW = dict(
    deadline=None,
    derandomize=True,
    suppress_health_check=[HealthCheck.too_slow, HealthCheck.function_scoped_fixture],
)


@st.composite
def problems(draw):
    """Arguments of `inputs`, options, what must not change a bit, whether there are weights."""
    R = draw(st.sampled_from([R for R in (1, 2, 4, 8) if len(devices()) >= R]))
    local = draw(st.integers(1, 5))
    K, T = draw(st.integers(1, 6)), draw(st.integers(0, 12))
    fp8 = draw(st.sampled_from([None, "dequantized", "quantized"]))
    H = draw(st.sampled_from([128, 256])) if fp8 else hidden(draw(st.sampled_from([1, 7, 64])))
    problem = dict(
        seed=draw(st.integers(0, 2**31)),
        R=R,
        T=T,
        H=H,
        K=K,
        E=R * local,
        dtype=draw(st.sampled_from(["bfloat16", "float16", "float32"])),
        none=draw(st.sampled_from([0.0, 0.3, 1.0])),
        duplicates=draw(st.booleans()),
        skew=draw(st.sampled_from([0.0, 0.5, 5.0])),
    )
    A = draw(st.sampled_from([1, 2, 3, 8]))
    layout = draw(st.sampled_from(["ragged", "batched"]))
    options = dict(num_experts=R * local, expert_alignment=A, layout=layout)
    bound = draw(st.sampled_from([None, "capacity", "factor"]))
    if bound == "capacity":
        options["capacity"] = max(A, local) + draw(st.integers(0, R * 12 * K))
    elif bound == "factor" and local <= T * K:
        options["capacity_factor"] = draw(st.sampled_from([1.0, 1.25, 3.0]))
    if fp8:
        options |= dict(
            wire_dtype=FP8,
            deliver=fp8,
            scale_format=draw(st.sampled_from(["float32", "e8m0"])),
        )
    how = draw(st.sampled_from([{}, dict(config=DIRECT), dict(halves=True)]))
    if H % 128 == 0 and draw(st.booleans()):
        scale_format = draw(st.sampled_from(["float32", "e8m0"]))
        options["combine"] = dict(wire_dtype=FP8, scale_format=scale_format)
    return problem, options, how, draw(st.booleans())


@pytest.mark.newest
@settings(max_examples=16, **SLOW)
@given(problems())
def test_equals_reference_bit_for_bit(problem):
    sizes, options, how, weighted = problem
    x, idx, weights = inputs(**sizes)
    weights = weights if weighted else None
    got = run(x, idx, weights, **options, **how)
    want = reference(x, idx, weights, **options)
    assert_matches(got, want, layout=options["layout"])
