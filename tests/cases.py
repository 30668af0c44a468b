# SPDX-License-Identifier: Apache-2.0
"""Random inputs, and one way to run both the implementation and the reference on them."""

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
from conftest import make_mesh, on_gpus
from jax.sharding import NamedSharding
from jax.sharding import PartitionSpec as P

import jax_ep

FP8 = jnp.float8_e4m3fn
DIRECT = jax_ep.Config(decode_tokens=0)  # every batch is too large for the slots
DTYPES = {"bfloat16": ml_dtypes.bfloat16, "float16": np.float16, "float32": np.float32}


def inputs(seed, *, R, T, H, K, E, dtype="float32", none=0.0, duplicates=False, skew=0.0):
    """`x [R, T, H]`, `topk_idx [R, T, K]` and `topk_weights [R, T, K]`."""
    rng = np.random.default_rng(seed)
    x = (rng.standard_normal((R, T, H)) * 3).astype(DTYPES[dtype])
    score = rng.gumbel(size=(R, T, E)) - skew * np.arange(E)
    idx = np.argsort(-score, -1)[..., :K]
    if duplicates or K > E:
        idx = rng.choice(idx.reshape(-1) if idx.size else E, (R, T, K))
    idx = np.where(rng.random((R, T, K)) < none, -1, idx).astype(np.int32)
    return x, idx, rng.standard_normal((R, T, K)).astype(np.float32)


def hidden(size):
    """A hidden size for the platform: CUDA kernels move rows in words of 16 bytes."""
    return -(-size // 8) * 8 if on_gpus() else size


def flat(array):
    """Rank axis into the first dimension, as `shard_map` splits it."""
    return array.reshape(-1, *array.shape[2:])


def put(array, mesh, spec):
    """A global array, of which each process places its own part."""
    sharding = NamedSharding(mesh, spec)
    return jax.make_array_from_callback(array.shape, sharding, lambda index: array[index])


def run(x, idx, weights, **options):
    """`(Dispatched, combined)` of the implementation; options as in `program`."""
    f, args = program(x, idx, weights, **options)
    return f(*args)


def program(x, idx, weights, *, mesh=None, halves=False, combine=None, **options):
    """A jitted function that gives `(Dispatched, combined)`, and its arguments.

    `halves`: each operation as its start and its done. `combine`: keywords of `combine`.
    """
    R = idx.shape[0]
    mesh = mesh or make_mesh((R,))
    spec = P(options.get("axis_name", "expert"))
    args = [x, idx] + ([] if weights is None else [weights])
    args = jax.tree.map(lambda array: put(flat(array), mesh, spec), args)

    def body(x, idx, weights=None):
        if halves:
            d = jax_ep.dispatch_done(jax_ep.dispatch_start(x, idx, weights, **options))
        else:
            d = jax_ep.dispatch(x, idx, weights, **options)
        y = d.tokens if d.scales is None else d.tokens.astype(jnp.float32)
        rows = (y, d.handle, d.weights)
        if halves:
            return d, jax_ep.combine_done(jax_ep.combine_start(*rows, **(combine or {})))
        return d, jax_ep.combine(*rows, **(combine or {}))

    mapped = jax.shard_map(body, mesh=mesh, in_specs=spec, out_specs=spec)
    return jax.jit(mapped), args


def reference(x, idx, weights, *, config=None, combine=None, **options):
    """The same by `jax_ep.reference`, where a `config` changes nothing."""
    del config
    d = jax_ep.reference.dispatch(x, idx, weights, **options)
    y = d.tokens if d.scales is None else d.tokens.astype(np.float32)
    return d, jax_ep.reference.combine(y, d.plan, d.weights, **(combine or {}))


def assert_same_bits(name, got, want, compared=None):
    """Equal to the last bit, NaNs and signs of zero included; each process looks at its part.

    `compared`: which rows count, of the shape of `got` without the last dimension; None for all.
    """
    if isinstance(got, jax.Array) and not got.is_fully_addressable:
        want = want.reshape(got.shape)
        for shard in got.addressable_shards:
            rows = None if compared is None else compared[shard.index[: compared.ndim]]
            assert_same_bits(f"{name} on {shard.device}", shard.data, want[shard.index], rows)
        return
    got = np.ascontiguousarray(got).reshape(want.shape)
    assert got.dtype == want.dtype, f"{name}: dtype {got.dtype}, expected {want.dtype}"
    same = got.view(np.uint8) == np.ascontiguousarray(want).view(np.uint8)
    if compared is not None:
        same |= ~compared[..., None]
    assert same.all(), f"{name}: {np.argwhere(~same)[:5]} differ\n{got}\n{want}"


def assert_close(got, want, *, rtol, atol=0.0):
    """Within rounding; on GPUs, which add up in any order, measured by the largest value, too."""
    if on_gpus():
        atol = max(atol, rtol * float(np.abs(want).max()))
    np.testing.assert_allclose(got, want, rtol=rtol, atol=atol)


def in_segments(plan, layout):
    """`[R, rows]`: the rows that belong to an expert's segment, padding included."""
    R, rows = plan.expert_ids.shape
    local = plan.group_sizes.shape[1]
    if layout == "ragged":
        return np.arange(rows) < plan.group_sizes.sum(1, keepdims=True)
    place = np.arange(rows).reshape(local, -1) - np.arange(local)[:, None] * (rows // local)
    return (place < plan.group_sizes[:, :, None]).reshape(R, rows)


def assert_matches(got, want, *, layout="ragged", whole=None):
    """A run equals the reference bit for bit.

    `whole`: the tail too, where the reference has zeros; `xla`, so the CPU, zeroes it always.
    """
    whole = not on_gpus() if whole is None else whole
    (d, combined), (ref, ref_combined) = got, want
    plan = ref.plan
    compared = np.full(plan.expert_ids.shape, whole) | in_segments(plan, layout)

    def assert_same_rows(name, got, want):
        rows = compared.reshape(got.shape[:-1])
        assert_same_bits(name, got, want.reshape(got.shape), rows)

    for name in ("expert_ids", "counts", "group_sizes", "num_dropped"):
        assert_same_bits(name, getattr(d, name), getattr(plan, name))
    assert_same_rows("tokens", d.tokens, ref.tokens)
    if ref.scales is not None:
        assert_same_rows("scales", d.scales, ref.scales)
    if ref.weights is not None:
        assert_same_bits("weights", d.weights, ref.weights)
    assert_same_bits("combined", combined, ref_combined)
