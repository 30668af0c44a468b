# SPDX-License-Identifier: Apache-2.0
"""Dispatch, combine and their gradients over all devices of all processes, in both views.

The same file runs in one process and, under `tests/launch.py`, in several: every process makes the
same inputs, works out the whole group by `jax_ep.reference` and compares what it holds itself.
"""

import contextlib
import os

import jax
import numpy as np
import pytest
from cases import DIRECT, FP8, assert_matches, assert_same_bits, flat, inputs, put, reference, run
from conftest import PORTABLE, devices, make_mesh
from jax.sharding import AxisType, Mesh
from jax.sharding import PartitionSpec as P

import jax_ep

pytestmark = PORTABLE
E = 16
LOCAL, AUTO, EXPLICIT = "shard_map", AxisType.Auto, AxisType.Explicit


def sizes(**changes):
    return dict(R=len(devices()), T=6, H=128, K=3, E=E, none=0.1) | changes


def everyone(view=LOCAL, shape=(-1,), names=("expert",), group="expert"):
    """A mesh of all devices, with the groups along `group` initialized."""
    shape = np.empty(len(devices())).reshape(shape).shape
    return make_mesh(shape, names, AUTO if view == LOCAL else view, group)


def in_view(view, mesh, f, spec=P("expert")):
    """`f` jitted, on each rank's blocks or on global arrays, and the mesh to set around it."""
    if view == LOCAL:
        mapped = jax.shard_map(f, mesh=mesh, in_specs=spec, out_specs=spec)
        return contextlib.nullcontext(), jax.jit(mapped)
    return jax.set_mesh(mesh), jax.jit(f)


def test_every_process_takes_part():
    assert jax.process_count() == int(os.environ.get("JAX_NUM_PROCESSES", 1))
    assert jax.process_index() == int(os.environ.get("JAX_PROCESS_ID", 0))
    assert len({d.process_index for d in everyone().devices.flat}) == jax.process_count()


@pytest.mark.parametrize(
    "view, dtype, options",
    [
        pytest.param(LOCAL, "bfloat16", dict(wire_dtype=FP8), marks=pytest.mark.newest),
        (LOCAL, "float32", dict(capacity=20, expert_alignment=4, config=DIRECT)),
        (AUTO, "bfloat16", dict(wire_dtype=FP8)),
        (EXPLICIT, "bfloat16", dict(capacity=20, expert_alignment=4)),
    ],
    ids=str,
)
def test_every_operation(view, dtype, options):
    """Forward, and each operation's transpose: cotangents in small integers make sums exact."""
    x, idx, weights = inputs(60, dtype=dtype, **sizes(skew=0.5))
    options = options | dict(num_experts=E)
    ref, ref_combined = reference(x, idx, weights, **options)
    rng = np.random.default_rng(61)
    like = (ref.tokens, ref.weights, ref.tokens, x)
    g_tokens, g_weights, y, g_out = (rng.integers(-3, 4, a.shape).astype(a.dtype) for a in like)

    def operations(x, idx, weights, g_out, g_tokens, g_weights, y):
        def rows(x, weights):
            d = jax_ep.dispatch(x, idx, weights, **options)
            return (d.tokens, d.weights), d

        _, back, d = jax.vjp(rows, x, weights, has_aux=True)
        combined = jax_ep.combine(d.tokens, d.handle, weights=d.weights)
        _, back_y = jax.vjp(lambda y, w: jax_ep.combine(y, d.handle, weights=w), y, d.weights)
        return d, combined, back((g_tokens, g_weights)), back_y(g_out)

    mesh = everyone(view)
    of_tokens = [flat(a) for a in (x, idx, weights, g_out)]
    of_rows = [flat(a) if view == LOCAL else a for a in (g_tokens, g_weights, y)]
    context, f = in_view(view, mesh, operations)
    with context:
        d, combined, (dx, dweights), (dy, dw) = f(
            *(put(a, mesh, P("expert")) for a in (*of_tokens, *of_rows))
        )
    assert_matches((d, combined), (ref, ref_combined))
    plan = ref.plan
    kept = plan.pair_row >= 0
    assert plan.num_dropped.any() == ("capacity" in options)
    want = np.where(kept, g_weights[plan.pair_rank, plan.pair_row], np.float32(0))
    assert_same_bits("dx", dx, jax_ep.reference.combine(g_tokens, plan))
    assert_same_bits("dweights", dweights, want)
    g_rows = jax_ep.reference.gather(g_out, plan.row_pair[..., :2]).astype(np.float32)
    assert_same_bits("dy", dy, (ref.weights[..., None] * g_rows).astype(x.dtype))
    assert_same_bits("dw", dw, (y.astype(np.float32) * g_rows).sum(-1))


@pytest.mark.newest
@pytest.mark.parametrize(
    "dtype, options, combine, how",
    [
        (
            "bfloat16",
            dict(wire_dtype=FP8, deliver="quantized", scale_format="e8m0"),
            dict(wire_dtype=FP8),
            dict(halves=True),
        ),
        (
            "float16",
            dict(capacity=12, layout="batched", wire_dtype=FP8, scale_format="e8m0"),
            dict(wire_dtype=FP8, scale_format="e8m0"),
            dict(config=DIRECT),
        ),
        ("bfloat16", {}, {}, dict(config=jax_ep.Config(overlap=True))),
        ("bfloat16", {}, {}, dict(config=jax_ep.Config(overlap=True, decode_tokens=0))),
    ],
    ids=["halves", "direct", "overlapped", "overlapped, direct"],
)
def test_formats(dtype, options, combine, how):
    x, idx, weights = inputs(62, dtype=dtype, **sizes(skew=0.5))
    options = options | dict(num_experts=E, combine=combine)
    if "capacity" in options:  # a row for each expert at least
        options["capacity"] = max(options["capacity"], E // len(devices()))
    got, want = run(x, idx, weights, **options, **how), reference(x, idx, weights, **options)
    assert_matches(got, want, layout=options.get("layout", "ragged"))


def test_group_over_two_axes():
    """Minor axis first: ranks are not in the order of devices."""
    mesh = everyone(
        shape=(min(2, len(devices())), -1), names=("node", "gpu"), group=("gpu", "node")
    )
    x, idx, weights = inputs(63, dtype="bfloat16", **sizes())
    got = run(x, idx, weights, mesh=mesh, num_experts=E, axis_name=("gpu", "node"))
    assert_matches(got, reference(x, idx, weights, num_experts=E))


@pytest.mark.parametrize(
    "names, view", [(("data", "expert"), LOCAL), (("expert", "data"), AUTO)], ids=str
)
def test_groups_side_by_side(names, view):
    """Groups of neighbouring devices, and groups of devices far apart."""
    mesh = everyone(view, (min(2, len(devices())), -1), names)
    sets = [
        inputs(64 + g, dtype="bfloat16", **sizes(R=mesh.shape["expert"]))
        for g in range(mesh.shape["data"])
    ]
    options = dict(num_experts=E, zero_tail=True)
    options |= {} if view == LOCAL else dict(batch_axes="data")

    def layer(x, idx, weights):
        d = jax_ep.dispatch(x, idx, weights, **options)
        return d.tokens, jax_ep.combine(d.tokens, d.handle, weights=d.weights)

    spec = P(("data", "expert"))
    context, f = in_view(view, mesh, layer, spec)
    with context:
        tokens, out = f(
            *(put(np.concatenate([flat(s[i]) for s in sets]), mesh, spec) for i in range(3))
        )
    want = [reference(*s, num_experts=E) for s in sets]
    assert_same_bits("tokens", tokens, np.concatenate([w[0].tokens for w in want]))
    assert_same_bits("combined", out, np.concatenate([w[1] for w in want]))


def test_initialize():
    mesh = everyone()
    jax_ep.initialize(mesh)  # again
    x, idx, weights = inputs(67, dtype="bfloat16", **sizes())
    got = run(x, idx, weights, mesh=mesh, num_experts=E)
    assert_matches(got, reference(x, idx, weights, num_experts=E))
    jax_ep.check()
    if mesh.size > 1:
        with pytest.raises(ValueError, match="exists with another device order"):
            jax_ep.initialize(Mesh(mesh.devices[::-1], mesh.axis_names))
    jax_ep.finalize()
