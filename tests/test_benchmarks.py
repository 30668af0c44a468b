# SPDX-License-Identifier: Apache-2.0
"""The benchmarks' own correctness checks, at tiny shapes and without timing."""

import importlib.util
import pathlib

import jax
import numpy as np
import pytest

BENCHMARKS = pathlib.Path(__file__).parent.parent / "benchmarks"


@pytest.fixture(scope="module")
def gshard():
    spec = importlib.util.spec_from_file_location("gshard", BENCHMARKS / "gshard.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.mark.parametrize("dtype", ["bfloat16", "float32"])
def test_gshard_checks_what_it_times(gshard, dtype):
    sizes = gshard.Sizes(R=8, T=12, H=8, K=3, E=16, capacity_factor=1.0)
    x, idx, weights = gshard.problem(sizes, dtype)
    whole, _ = gshard.programs(sizes)
    args = [a.reshape(-1, a.shape[-1]) for a in (x, idx, weights)]
    for name, f in whole.items():
        got = np.asarray(jax.block_until_ready(f(*args)))
        dropped = gshard.check(name, got, sizes, x, idx, weights)
        assert dropped > 0
        with pytest.raises(AssertionError, match=name):
            gshard.check(name, got[::-1], sizes, x, idx, weights)
