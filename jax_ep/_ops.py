# SPDX-License-Identifier: Apache-2.0
"""Three primitives, plan, dispatch and combine, whose implementation is chosen when lowering.

They see one rank's block inside `shard_map`. Gradients are one layer up, in `_grad.py`.
"""

import functools
import warnings

import jax
import jax.numpy as jnp
from jax.extend.core import Primitive
from jax.interpreters import batching, mlir

from . import _jax_compat, _xla
from ._types import Spec

_GPU_PLATFORMS = ("cuda", "rocm")


def _define(name: str, abstract, implementation) -> Primitive:
    """A primitive with `abstract(*types, spec, ...)` and its portable implementation."""
    prim = Primitive(f"jax_ep_{name}")
    prim.multiple_results = True

    def abstract_eval(*operands, batch, **params):
        """Types of the results; `batch` counts the leading vmapped dimensions."""
        lead = operands[0].shape[:batch]
        return [
            operands[0].update(shape=(*lead, *shape), dtype=jnp.dtype(dtype), weak_type=False)
            for shape, dtype in abstract(*operands, **params)
        ]

    def portable(*operands, batch, **params):
        function = functools.partial(implementation, **params)
        for _ in range(batch):
            function = jax.vmap(function)
        return function(*operands)

    prim.def_abstract_eval(abstract_eval)
    lower = mlir.lower_fun(portable, multiple_results=True)
    mlir.register_lowering(prim, functools.partial(_lower, lower, name, None))
    for platform in (*_GPU_PLATFORMS, "cpu", "tpu"):
        mlir.register_lowering(
            prim, functools.partial(_lower, lower, name, platform), platform=platform
        )
    batching.primitive_batchers[prim] = functools.partial(_batch, prim)
    return prim


def _lower(lower, name, platform, ctx, *operands, spec: Spec, **params):
    if spec.implementation == "cuda":
        raise ValueError(
            f"jax_ep.{name}: implementation='cuda' cannot be lowered for {platform or 'this platform'}: "
            "this build has no CUDA kernels. Valid here: None, 'xla'."
        )
    if spec.implementation is None and platform == "cuda":
        _warn_once()
    return lower(ctx, *operands, spec=spec, **params)


@functools.cache
def _warn_once():
    warnings.warn(
        "jax_ep: implementation=None uses 'xla' (JAX's own collectives) on this GPU, because this "
        "build has no CUDA kernels; it is correct, but far from the link's speed. "
        "implementation='xla' silences this.",
        stacklevel=2,
    )


def _batch(prim, operands, dims, *, batch, **params):
    """vmap: every operand gets the mapped dimension in front and the exchange carries them all."""
    size = next(x.shape[d] for x, d in zip(operands, dims, strict=True) if d is not None)
    if prim is plan_p and dims[0] is None:  # unreachable by vmap, which skips unmapped calls
        raise AssertionError("plan without a mapped operand")
    if params.get("forward") and any(d is None for d in dims):
        raise ValueError(
            "jax_ep.dispatch under vmap: expected x, topk_idx and topk_weights all mapped, got "
            f"mapped={[d is not None for d in dims]} of its operands and plan. Broadcast the "
            "others first, or call dispatch outside the vmap."
        )
    moved = [
        jnp.broadcast_to(x, (size, *x.shape)) if d is None else jnp.moveaxis(x, d, 0)
        for x, d in zip(operands, dims, strict=True)
    ]
    results = prim.bind(*moved, batch=batch + 1, **params)
    return results, [0] * len(results)


def _plan_types(topk_idx, *, spec: Spec):
    del topk_idx
    pairs = (spec.num_tokens, spec.top_k)
    experts = (spec.local_experts,)
    by_source = (spec.num_ranks * spec.num_tokens, spec.top_k)
    shapes = (pairs, pairs, (spec.rows,), by_source, (spec.rows,), experts, experts, (1,))
    return [(shape, jnp.int32) for shape in shapes]


def _plan(topk_idx, *, spec: Spec):
    return _xla.plan(topk_idx, spec=spec)


def _dispatch_types(*operands, spec: Spec, forward: bool, ranks: tuple[int, ...]):
    del forward
    return [
        ((spec.rows, *value.shape[value.ndim - rank + 1 :]), value.dtype)
        for value, rank in zip(operands[:-1], ranks, strict=True)
    ]


def _dispatch(*operands, spec: Spec, forward: bool, ranks: tuple[int, ...]):
    del forward, ranks
    *values, row_pair = operands
    return _xla.dispatch(tuple(values), row_pair, spec=spec)


def _combine_types(y, *_, spec: Spec, kinds: tuple[str, ...]):
    sizes = {
        "rows": ((spec.num_tokens, y.shape[-1]), y.dtype),
        "scalars": ((spec.num_tokens * spec.top_k,), jnp.float32),
    }
    return [sizes[kind] for kind in kinds if kind in sizes]


def _combine(*operands, spec: Spec, kinds: tuple[str, ...]):
    named = dict(zip(kinds, operands[: len(kinds)], strict=True))
    row_pair, token_rows = operands[len(kinds) :]
    results = []
    if "rows" in named:
        results.append(_xla.combine(named["rows"], named.get("weights"), token_rows, spec=spec))
    if "scalars" in named:
        results.append(_xla.return_scalars(named["scalars"], row_pair, spec=spec))
    return results


#: topk_idx [T, K] -> pair_rank, pair_row, row_pair, token_rows, expert_ids, counts, sizes, dropped
plan_p = _define("plan", _plan_types, _plan)
#: values ([T, H], [T, H/128] or [T*K]), row_pair -> rows of each value
dispatch_p = _define("dispatch", _dispatch_types, _dispatch)
#: operands named by kinds ("rows", "weights", "scalars"), row_pair, token_rows -> tokens, scalars
combine_p = _define("combine", _combine_types, _combine)


def plan(topk_idx, *, spec: Spec):
    """Bind `plan_p` on one rank's block."""
    return tuple(plan_p.bind(topk_idx, spec=spec, batch=0))


def dispatch(*operands, spec: Spec, forward: bool):
    """Bind `dispatch_p`: values, then row_pair."""
    operands = _vary(operands, spec)
    ranks = tuple(value.ndim for value in operands[:-1])
    return tuple(dispatch_p.bind(*operands, spec=spec, forward=forward, ranks=ranks, batch=0))


def combine(*operands, spec: Spec, kinds: tuple[str, ...]):
    """Bind `combine_p`: the operands that `kinds` names, then row_pair and token_rows."""
    return tuple(combine_p.bind(*_vary(operands, spec), spec=spec, kinds=kinds, batch=0))


def _vary(operands, spec: Spec):
    """Operands typed alike: a cotangent may vary over fewer axes than the primal did."""
    axes = frozenset(spec.axis).union(*map(_jax_compat.varying_axes, operands))
    if not any(map(_jax_compat.varying_axes, operands)):
        return operands  # check_vma=False, or inside custom_partitioning: types carry no axes
    return tuple(_jax_compat.cast_to_varying(x, axes) for x in operands)
