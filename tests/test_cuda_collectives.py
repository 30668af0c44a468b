# SPDX-License-Identifier: Apache-2.0
"""Operations beside collectives of XLA's own, on another stream: none holds what the other needs."""

import functools
import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from cases import DIRECT, assert_same_bits, flat, inputs, put
from conftest import make_mesh
from jax import lax
from jax.sharding import PartitionSpec as P

import jax_ep

pytestmark = [pytest.mark.gpu, pytest.mark.multi]
LAYERS, CALLS = 8, 50
PATHS = dict(large=(2048, DIRECT), small=(128, jax_ep.Config()), tiny=(1, jax_ep.Config()))
COLLECTIVES = dict(all_gather=functools.partial(lax.all_gather, tiled=True), psum=lax.psum)
SPEC = P("expert")


def layers(config, collective, x, idx, weights, parameters):
    """Each layer's parameters come by a collective while tokens pass through the layer before."""
    for _ in range(LAYERS):
        if collective is not None:
            whole = COLLECTIVES[collective](parameters, "expert")
        d = jax_ep.dispatch(x, idx, weights, num_experts=16, config=config)
        x = jax_ep.combine(d.tokens * 2, d.handle, weights=d.weights) / 8
        if collective is not None:
            parameters = jnp.tanh(whole[: len(parameters)]) + x.mean().astype(x.dtype)
    return x, parameters


def operations_beside(text):
    """Of a compiled program's text: calls of ours between the start and the done of a collective."""
    count, running = 0, 0
    for line in text.splitlines():
        running += bool(re.search(r"\b(all-gather|all-reduce)-start\(", line))
        running -= bool(re.search(r"\b(all-gather|all-reduce)-done\(", line))
        count += running > 0 and 'custom_call_target="jax_ep_' in line
    return count


@pytest.mark.parametrize("path", PATHS)
@pytest.mark.parametrize("collective", COLLECTIVES)
def test_neither_waits_for_the_other(path, collective):
    if len(jax.devices()) < 2:
        pytest.fail(f"expected 2 GPUs, got {jax.devices()}")
    tokens, config = PATHS[path]
    mesh = make_mesh((2,))
    arrays = inputs(0, R=2, T=tokens, H=2048, K=4, E=16, dtype="bfloat16")
    args = [put(flat(a), mesh, SPEC) for a in arrays]
    args.append(put(np.zeros((2**14, 1024), args[0].dtype), mesh, SPEC))  # 16 MiB of each rank

    def program(collective):
        f = functools.partial(layers, config, collective)
        return jax.jit(jax.shard_map(f, mesh=mesh, in_specs=SPEC, out_specs=SPEC, check_vma=False))

    want = np.asarray(program(None)(*args)[0])
    beside = program(collective)
    assert operations_beside(beside.lower(*args).compile().as_text()) >= LAYERS
    for _ in range(CALLS):
        got = beside(*args)
    assert_same_bits("sums", np.asarray(got[0]), want)
    jax_ep.check()
