# SPDX-License-Identifier: Apache-2.0
"""The benchmarks' own correctness checks, at tiny shapes and without timing."""

import dataclasses
import importlib.util
import pathlib

import jax
import jax.numpy as jnp
import numpy as np
import pytest

BENCHMARKS = pathlib.Path(__file__).parent.parent / "benchmarks"


def load(name):
    spec = importlib.util.spec_from_file_location(name, BENCHMARKS / f"{name}.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.fixture(scope="module")
def gshard():
    return load("gshard")


@pytest.mark.parametrize(
    "dtype", ["bfloat16", pytest.param("float32", marks=pytest.mark.extensive)]
)
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


@pytest.fixture(scope="module")
def decode_steps():
    return load("decode_steps")


def wrong_of_six_steps(decode_steps, path):
    mesh = jax.make_mesh((2,), ("expert",), devices=jax.devices()[:2])
    sizes = decode_steps.Sizes(R=2, T=3, H=16, K=2, E=8)
    row = decode_steps.measure(mesh, sizes, path, steps=6, in_a_run=3)
    assert row["steps"] == 6
    return row["wrong_rows"], row["wrong_sums"]


def test_decode_steps_are_right(decode_steps):
    assert wrong_of_six_steps(decode_steps, "whole") == (0, 0)


def test_decode_steps_find_what_is_wrong(decode_steps, monkeypatch):
    right = decode_steps.exchange

    def spoilt(*args, **options):
        d, out = right(*args, **options)
        out = out.at[1, 5].set(jnp.nextafter(out[1, 5], jnp.bfloat16(9)))  # the last bit
        return dataclasses.replace(d, weights=d.weights.at[0].add(1)), out

    monkeypatch.setattr(decode_steps, "exchange", spoilt)
    assert wrong_of_six_steps(decode_steps, "halves") == (12, 12)  # every step, on both ranks


def test_the_picture_shows_the_kept_results(tmp_path):
    plots = load("plots")
    exchange, decode = plots.kept_results()
    plots.draw(exchange, decode, tmp_path / "drawn.svg")
    kept = BENCHMARKS.parent / "docs" / "performance.svg"
    for picture in (tmp_path / "drawn.svg", kept):
        for workload in ("prefill", "training"):
            for row in plots.BARS:
                figure = f">{exchange['results'][workload][row]['median_us']:.0f}</text>"
                assert figure in picture.read_text(), (picture, workload, row)
