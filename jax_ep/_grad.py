# SPDX-License-Identifier: Apache-2.0
"""Differentiable dispatch and combine over one plan: each is the other's transpose.

dispatch   tokens = S x,  w_rows = S w      dx = S^T g,          dw = S^T g_w
combine    out = S^T (w_rows * y)           dy = w_rows * (S g), dw_rows = <y, S g>
"""

import functools

import jax
import jax.numpy as jnp

from . import _view
from ._types import Plan, Spec, Wire

QUANTIZED_GRADIENT = (
    "jax_ep.dispatch(deliver='quantized') has no gradient for x: an fp8 result would get an fp8 "
    "cotangent. Wrap dispatch and the expert GEMM in one jax.custom_vjp whose backward is "
    "jax_ep.combine (docs/sharp_bits.md shows it), or use deliver='dequantized'."
)


def attach(spec: Spec, rows: dict, sources: dict, plan: Plan) -> dict:
    """`rows`, with the gradient of `dispatch(sources)`: rows and scalars go back by `combine`.

    The rows were computed from stopped sources; sources and rows are dicts with the keys "rows"
    and, or, "scalars".
    """
    return dict(_attach(spec, rows, sources, plan))  # type: ignore[arg-type]


@functools.partial(jax.custom_vjp, nondiff_argnums=(0,))
def _attach(spec, rows, sources, plan):
    del spec, sources, plan
    return rows


def _attach_fwd(spec, rows, sources, plan):
    del spec, sources
    return rows, plan


def _attach_bwd(spec, plan, cotangents):
    results = _view.combine(cotangents, plan, spec=spec)
    return None, {kind: results[kind] for kind in cotangents}, None


_attach.defvjp(_attach_fwd, _attach_bwd)


@jax.custom_vjp
def refuse_gradient(rows, source):
    """`rows`; differentiating through them raises `QUANTIZED_GRADIENT`."""
    del source
    return rows


def _refuse_fwd(rows, source):
    raise TypeError(QUANTIZED_GRADIENT)


refuse_gradient.defvjp(_refuse_fwd, lambda _, g: (None, g))


def forward_only(name: str, values: dict) -> dict:
    """`values`; differentiating through them raises an error that names the operation."""
    return dict(zip(values, _forward_only(name, *values.values()), strict=True))


@functools.partial(jax.custom_jvp, nondiff_argnums=(0,))
def _forward_only(name, *arrays):
    del name
    return arrays


@_forward_only.defjvp
def _refuse_jvp(name, primals, tangents):
    del primals, tangents
    raise TypeError(
        f"jax_ep.{name} has no gradient: operations in two halves are forward only. Use "
        "jax_ep.dispatch and jax_ep.combine where you differentiate, or jax.lax.stop_gradient."
    )


@functools.partial(jax.custom_vjp, nondiff_argnums=(0, 1))
def combine(spec: Spec, wire: Wire, y, weights, plan: Plan):
    """`y [rows, H]` to `[T, H]`; `weights [rows]` or None. The wire is not differentiated."""
    named = {"rows": y} if weights is None else {"rows": y, "weights": weights}
    return _view.combine(named, plan, spec=spec, wire=wire)["rows"]


def _combine_fwd(spec: Spec, wire: Wire, y, weights, plan):
    out = combine(spec, wire, y, weights, plan)
    return out, (None if weights is None else y, weights, plan)


def _combine_bwd(spec, wire, residuals, g):
    del wire
    y, weights, plan = residuals
    g_rows = _view.dispatch({"tokens": g}, plan, spec=spec, forward=False)["tokens"]
    if weights is None:
        return g_rows, None, None
    owned = plan.row_pair >= 0
    weights = jnp.where(owned, weights, 0)  # what a caller left in the tail stays there
    owned, g_rows = owned[..., None], g_rows.astype(jnp.float32)
    dy = jnp.where(owned, weights[..., None] * g_rows, 0).astype(y.dtype)
    products = y.astype(jnp.float32) * g_rows
    return dy, jnp.where(owned, products, 0).sum(-1), None


combine.defvjp(_combine_fwd, _combine_bwd)
