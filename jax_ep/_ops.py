# SPDX-License-Identifier: Apache-2.0
"""The primitives, whose implementation is chosen when lowering.

plan, dispatch, combine              the operations
slot_dispatch                        plan and dispatch of a small batch in one
*_start, *_done                      slot_dispatch and combine of a small batch in two halves

They see one rank's block inside `shard_map`. Gradients are one layer up, in `_grad.py`.
"""

import dataclasses
import functools
import warnings
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax
from jax.extend.core import Primitive
from jax.interpreters import batching, mlir

from . import _cuda, _ffi, _fp8, _jax_compat, _xla
from ._types import SCALE_BLOCK, Plan, Spec, Wire

_GPU_PLATFORMS = ("cuda", "rocm")


def _define(name: str, abstract, portable, cuda, batch_rule=None) -> Primitive:
    """A primitive with `abstract(*types, spec, ...)` and its two implementations."""
    prim = Primitive(f"jax_ep_{name}")
    prim.multiple_results = True

    def abstract_eval(*operands, batch, **params):
        """Types of the results; `batch` counts the leading vmapped dimensions."""
        lead = operands[0].shape[:batch]
        return [
            operands[0].update(shape=(*lead, *shape), dtype=jnp.dtype(dtype), weak_type=False)
            for shape, dtype in abstract(*operands, **params)
        ]

    def by_xla(*operands, batch, **params):
        function = functools.partial(portable, **params)
        for _ in range(batch):
            function = jax.vmap(function)
        return function(*operands)

    def by_cuda(*operands, batch, **params):
        return _cuda.over_batch(functools.partial(cuda, **params), batch, operands)

    prim.def_abstract_eval(abstract_eval)
    rules = {
        rule: mlir.lower_fun(function, multiple_results=True)
        for rule, function in (("xla", by_xla), ("cuda", by_cuda))
    }
    mlir.register_lowering(prim, functools.partial(_lower, rules, name, None))
    for platform in (*_GPU_PLATFORMS, "cpu", "tpu"):
        mlir.register_lowering(
            prim, functools.partial(_lower, rules, name, platform), platform=platform
        )
    batching.primitive_batchers[prim] = functools.partial(batch_rule or _batch, prim)
    return prim


def _lower(rules, name, platform, ctx, *operands, spec: Spec, **params):
    rule = _choose(name, platform, spec)
    return rules[rule](ctx, *operands, spec=spec, **params)


def _choose(name: str, platform: str | None, spec: Spec) -> str:
    """Which of "cuda" and "xla" serves one operation on a platform; never a silent replacement."""
    if spec.implementation == "xla" or (spec.implementation is None and platform != "cuda"):
        return "xla"
    if platform != "cuda":
        missing, valid = f"it is for CUDA, not for {platform or 'this platform'}", "None, 'xla'"
    elif not _ffi.has_cuda():
        if spec.implementation is None:
            _warn_once()
            return "xla"
        why = "; ".join(_ffi.missing())
        missing, valid = f"this build has no CUDA kernels ({why})", "None, 'xla'"
    else:
        missing, valid = _cuda.why_not(spec), "'xla'"
    if missing is None:
        return "xla" if spec.num_tokens == 0 else "cuda"  # nothing moves
    raise ValueError(
        f"jax_ep.{name}: implementation={spec.implementation!r} cannot be lowered for "
        f"{platform or 'this platform'}: {missing}. Valid here: {valid}."
    )


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
    if (prim is slot_dispatch_p or params.get("forward")) and any(d is None for d in dims):
        raise ValueError(
            "jax_ep.dispatch under vmap: expected x, topk_idx and topk_weights all mapped, got "
            f"mapped={[d is not None for d in dims]} of its operands. Broadcast the "
            "others first, or call dispatch outside the vmap."
        )
    moved = [
        jnp.broadcast_to(x, (size, *x.shape)) if d is None else jnp.moveaxis(x, d, 0)
        for x, d in zip(operands, dims, strict=True)
    ]
    results = prim.bind(*moved, batch=batch + 1, **params)
    return results, [0] * len(results)


def _refuse_batch(prim, operands, dims, **params):
    """A start or a done under vmap would have several operations in flight at once."""
    del operands, dims, params
    name = prim.name.removeprefix("jax_ep_")
    raise ValueError(
        f"jax_ep.{name} under vmap: expected no vmap, as a group has one dispatch and one combine in "
        "flight at a time. Fold the mapped dimension into the tokens, or use dispatch and combine."
    )


def _plan_types(topk_idx, *, spec: Spec):
    del topk_idx
    pairs = (spec.num_tokens, spec.top_k)
    experts = (spec.local_experts,)
    sources = spec.num_ranks * spec.num_tokens
    maps = (pairs, pairs, (spec.rows,), (sources, spec.top_k), (sources,))
    return [(shape, jnp.int32) for shape in (*maps, (spec.rows,), experts, experts, (1,))]


def split_plan(planned) -> tuple[Plan, tuple]:
    """The results of `plan_p`: the maps, then expert_ids, counts, group_sizes, num_dropped."""
    count = len(dataclasses.fields(Plan))
    return Plan(*planned[:count]), tuple(planned[count:])


def _split(operands, kinds: tuple[str, ...]) -> tuple[dict, Plan]:
    """Operands as they are bound: those that `kinds` names, then the plan."""
    return dict(zip(kinds, operands[: len(kinds)], strict=True)), Plan(*operands[len(kinds) :])


def _dispatch_types(*operands, spec: Spec, wire: Wire, kinds: tuple[str, ...], forward: bool):
    del forward
    tokens, quantized = operands[0], wire.kind == "quantized"
    hidden = tokens.shape[-1]
    dtype = jnp.float8_e4m3fn if quantized else tokens.dtype
    types: dict[str, tuple[tuple[int, ...], Any]] = {"tokens": ((spec.rows, hidden), dtype)}
    if "scales" in kinds or quantized:
        types["scales"] = ((spec.rows, hidden // SCALE_BLOCK), jnp.float32)
    if "scalars" in kinds:
        types["scalars"] = ((spec.rows,), jnp.float32)
    return list(types.values())


def _dispatch_xla(*operands, spec: Spec, wire: Wire, kinds: tuple[str, ...], forward: bool):
    del forward
    values, maps = _split(operands, kinds)
    if wire.kind != "copy":
        # The barrier keeps XLA from taking the way to fp8 and back for excess precision.
        q, scales = lax.optimization_barrier(_fp8.quantize(values["tokens"], wire.scale_format))
        if wire.kind == "quantized":
            values = {**values, "tokens": q, "scales": scales}
        else:
            values["tokens"] = _fp8.dequantize(q, scales, values["tokens"].dtype)
    in_order = [values[kind] for kind in ("tokens", "scales", "scalars") if kind in values]
    return _xla.dispatch(tuple(in_order), maps.row_pair, spec=spec)


def _dispatch_cuda(*operands, spec: Spec, wire: Wire, kinds: tuple[str, ...], forward: bool):
    del forward
    values, maps = _split(operands, kinds)
    return _cuda.dispatch(values, maps, spec=spec, wire=wire)


def _combine_types(*operands, spec: Spec, wire: Wire, kinds: tuple[str, ...]):
    del wire
    named, _ = _split(operands, kinds)
    types = []
    if "rows" in named:
        types.append(((spec.num_tokens, named["rows"].shape[-1]), named["rows"].dtype))
    if "scalars" in named:
        types.append(((spec.num_tokens * spec.top_k,), jnp.float32))
    return types


def _combine_xla(*operands, spec: Spec, wire: Wire, kinds: tuple[str, ...]):
    named, maps = _split(operands, kinds)
    results = []
    if "rows" in named:
        rows, weights = named["rows"], named.get("weights")
        results.append(_xla.combine(rows, weights, maps.token_rows, spec=spec, wire=wire))
    if "scalars" in named:
        results.append(_xla.return_scalars(named["scalars"], maps.row_pair, spec=spec))
    return results


def _combine_cuda(*operands, spec: Spec, wire: Wire, kinds: tuple[str, ...]):
    named, maps = _split(operands, kinds)
    return _cuda.combine(named, maps, spec=spec, wire=wire)


def _slot_dispatch_types(*operands, spec: Spec, wire: Wire, kinds: tuple[str, ...]):
    rows = _dispatch_types(*operands, spec=spec, wire=wire, kinds=kinds, forward=True)
    return [*rows, *_plan_types(operands[-1], spec=spec)]


def _slot_dispatch_xla(*operands, spec: Spec, wire: Wire, kinds: tuple[str, ...]):
    *values, topk_idx = operands
    planned = _xla.plan(topk_idx, spec=spec)
    maps, _ = split_plan(planned)
    operands = (*values, *maps.arrays())
    rows = _dispatch_xla(*operands, spec=spec, wire=wire, kinds=kinds, forward=True)
    return (*rows, *planned)


def _slot_dispatch_cuda(
    *operands, spec: Spec, wire: Wire, kinds: tuple[str, ...], phase: _cuda.Phase = "whole"
):
    ticket, operands = _split_ticket(operands, phase)
    values = dict(zip(kinds, operands[:-1], strict=True))
    return _cuda.slot_dispatch(ticket, values, operands[-1], spec=spec, wire=wire, phase=phase)


def _slot_combine_cuda(
    *operands, spec: Spec, wire: Wire, kinds: tuple[str, ...], phase: _cuda.Phase
):
    ticket, operands = _split_ticket(operands, phase)
    named, maps = _split(operands, kinds)
    return _cuda.slot_combine(ticket, named, maps, spec=spec, wire=wire, phase=phase)


def _split_ticket(operands, phase: _cuda.Phase):
    return (operands[:1], operands[1:]) if phase == "done" else ((), operands)


def _ticket_types(*operands, **params):
    del operands, params
    return [((1,), jnp.int32)]


def _no_ticket(*operands, **params):
    """A start on `xla`, where the done is the whole operation."""
    del operands, params
    return [jnp.zeros(1, jnp.int32)]


def _after_ticket(function):
    """`function` of the operands without the ticket in front."""
    return lambda ticket, *operands, **params: function(*operands, **params)


def _define_halves(name: str, types, portable, cuda) -> tuple[Primitive, Primitive]:
    """Start and done of an operation whose CUDA implementation takes a phase."""
    start, done = (functools.partial(cuda, phase=phase) for phase in ("start", "done"))
    return (
        _define(f"{name}_start", _ticket_types, _no_ticket, start, _refuse_batch),
        _define(f"{name}_done", _after_ticket(types), _after_ticket(portable), done, _refuse_batch),
    )


#: topk_idx [T, K] -> the arrays of Plan, expert_ids, counts, group_sizes, num_dropped
plan_p = _define("plan", _plan_types, _xla.plan, _cuda.plan)
#: values named by kinds ("tokens", "scales", "scalars"), the plan -> rows of each value
dispatch_p = _define("dispatch", _dispatch_types, _dispatch_xla, _dispatch_cuda)
#: values named by kinds ("rows", "weights", "scalars"), the plan -> tokens, scalars of pairs
combine_p = _define("combine", _combine_types, _combine_xla, _combine_cuda)
#: the values of dispatch, topk_idx -> rows of each value, the results of plan
slot_dispatch_p = _define(
    "slot_dispatch", _slot_dispatch_types, _slot_dispatch_xla, _slot_dispatch_cuda
)
#: the operands of slot_dispatch -> ticket [1]; ticket, the same operands -> its results
dispatch_start_p, dispatch_done_p = _define_halves(
    "dispatch", _slot_dispatch_types, _slot_dispatch_xla, _slot_dispatch_cuda
)
#: the operands of combine -> ticket [1]; ticket, the same operands -> its results
combine_start_p, combine_done_p = _define_halves(
    "combine", _combine_types, _combine_xla, _slot_combine_cuda
)


def bind(prim: Primitive, *operands, spec: Spec, **params):
    """Results of a primitive on one rank's block."""
    return tuple(prim.bind(*_vary(operands, spec), spec=spec, batch=0, **params))


def _vary(operands, spec: Spec):
    """Operands typed alike: a cotangent may vary over fewer axes than the primal did."""
    axes = frozenset(spec.axis).union(*map(_jax_compat.varying_axes, operands))
    if not any(map(_jax_compat.varying_axes, operands)):
        return operands  # check_vma=False, or inside custom_partitioning: types carry no axes
    return tuple(_jax_compat.cast_to_varying(x, axes) for x in operands)
