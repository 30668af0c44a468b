# SPDX-License-Identifier: Apache-2.0
"""Which implementation a platform gets is decided, and judged, when lowering."""

import warnings

import jax
import numpy as np
import pytest
from conftest import make_mesh
from jax.sharding import PartitionSpec as P

import jax_ep
from jax_ep import _ops

ARGS = np.zeros((16, 8), np.float32), np.zeros((16, 2), np.int32)


def traced(implementation):
    def f(x, idx):
        d = jax_ep.dispatch(x, idx, num_experts=16, implementation=implementation)
        return jax_ep.combine(d.tokens, d.handle)

    mapped = jax.shard_map(f, mesh=make_mesh(), in_specs=P("expert"), out_specs=P("expert"))
    return jax.jit(mapped).trace(*ARGS)


@pytest.mark.parametrize("platform", ["cpu", "cuda"])
def test_cuda_is_an_error_where_it_cannot_be(platform):
    with pytest.raises(
        ValueError, match=f"cannot be lowered for {platform}.*Valid here: None, 'xla'"
    ):
        traced("cuda").lower(lowering_platforms=(platform,))


def test_none_on_a_gpu_warns_once():
    _ops._warn_once.cache_clear()
    with pytest.warns(UserWarning, match="uses 'xla' .* because this build has no CUDA kernels"):
        traced(None).lower(lowering_platforms=("cuda",))
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        traced(None).lower(lowering_platforms=("cuda",))
        _ops._warn_once.cache_clear()
        traced("xla").lower(lowering_platforms=("cuda",))
        traced(None).lower(lowering_platforms=("cpu",))
