# SPDX-License-Identifier: Apache-2.0
"""`python -m jax_ep memory`: rows and bytes of a layer on each device, and what a bound drops.

Nothing is computed on a device: results and what a layer saves come from tracing `dispatch` and
`combine`, scratch from tracing the CUDA calls, drops from the arithmetic of the plan on sampled
routings.
"""

import dataclasses
import functools
import json
import math
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import AbstractMesh, AxisType
from jax.sharding import PartitionSpec as P

from . import _api, _cuda, _ffi, _slots, _xla
from ._types import REMAT_NAMES, Config, Dispatched, Layout, Spec, Wire

_AXIS = "expert"


@dataclasses.dataclass(frozen=True)
class Model:
    """One MoE layer and its group, named as the command's arguments."""

    tokens: int  # T, per rank
    hidden: int  # H
    experts: int  # E
    top_k: int  # K
    ranks: int  # R
    dtype: str = "bfloat16"
    wire: str | None = None
    deliver: str = "dequantized"
    combine_wire: str | None = None
    alignment: int = 1
    layout: Layout = "ragged"

    def __post_init__(self):
        if self.top_k > self.experts:
            raise ValueError(
                f"top_k: expected at most the {self.experts} experts, got {self.top_k}"
            )

    def dispatch(self, x, topk_idx, topk_weights, factor: float | None) -> Dispatched:
        """`jax_ep.dispatch` of this layer, with a bound or without."""
        return _api.dispatch(
            x,
            topk_idx,
            topk_weights,
            num_experts=self.experts,
            axis_name=_AXIS,
            capacity_factor=factor,
            expert_alignment=self.alignment,
            wire_dtype=self.wire,
            deliver=self.deliver,
            layout=self.layout,
        )

    def combine(self, y, d: Dispatched):
        """`jax_ep.combine` of this layer."""
        return _api.combine(y, d.handle, d.weights, wire_dtype=self.combine_wire)


@dataclasses.dataclass(frozen=True)
class Types:
    """Types on one rank."""

    dispatched: Dispatched
    combined: Any  # [T, H]
    saved: dict[str, list]  # for the backward pass, by policy; empty without a gradient


def trace(model: Model, factor: float | None) -> Types:
    """What `dispatch` and `combine` return on one rank, and what a layer of them saves."""
    found = []

    def layer(x, topk_weights, topk_idx):
        d = model.dispatch(x, topk_idx, topk_weights, factor)
        rows = d.tokens.astype(x.dtype)
        return model.combine(rows * rows, d), d  # like an expert, the product keeps its operand

    def body(x, topk_weights, topk_idx):
        out, d = layer(x, topk_weights, topk_idx)
        only_named = jax.checkpoint_policies.save_only_these_names(*REMAT_NAMES)
        policies = {"all": layer, "REMAT_NAMES": jax.checkpoint(layer, policy=only_named)}
        if model.deliver == "quantized":
            policies = {}
        saved = {name: _saved(f, x, topk_weights, topk_idx) for name, f in policies.items()}
        found.append(jax.tree.map(jax.typeof, (d, out, saved)))
        return out

    mesh = AbstractMesh((model.ranks,), (_AXIS,), axis_types=(AxisType.Auto,))
    pairs = (model.ranks * model.tokens, model.top_k)
    jax.eval_shape(
        jax.shard_map(body, mesh=mesh, in_specs=P(_AXIS), out_specs=P(_AXIS)),
        jax.ShapeDtypeStruct((pairs[0], model.hidden), model.dtype),
        jax.ShapeDtypeStruct(pairs, jnp.float32),
        jax.ShapeDtypeStruct(pairs, jnp.int32),
    )
    return Types(*found[0])


def _saved(layer, x, topk_weights, topk_idx) -> list:
    """What the gradient of `layer` keeps from the forward pass, each array once."""
    _, backward, _ = jax.vjp(
        lambda *operands: layer(*operands, topk_idx), x, topk_weights, has_aux=True
    )
    return list({id(kept): kept for kept in jax.tree.leaves(backward)}.values())


def arrays(types: Types) -> dict[str, dict[str, Any]]:
    """Types by what returns them: results of dispatch, the plan in its handle, results of combine."""
    dispatched = vars(types.dispatched)
    plan = dispatched["handle"].plan
    return {
        "dispatch": {k: v for k, v in dispatched.items() if k != "handle" and v is not None},
        "plan": vars(plan),
        "combine": {"tokens": types.combined},
    }


def path(model: Model, spec: Spec) -> _slots.Path:
    """Which path the operations take on CUDA."""
    return _slots.path(spec, model.hidden, jnp.dtype(model.dtype).itemsize)


def scratch(model: Model, types: Types) -> tuple[dict[str, Any], str | None]:
    """What the CUDA calls allocate besides their results; what keeps them from this layer, or None."""
    spec = types.dispatched.handle.spec
    if not _ffi.has_cuda():
        return {}, "this build has no CUDA kernels"
    if why := _cuda.why_not(spec):
        return {}, why
    idx = jax.ShapeDtypeStruct((spec.num_tokens, spec.top_k), jnp.int32)
    y = jax.ShapeDtypeStruct((spec.rows, model.hidden), model.dtype)
    plan = jax.tree.map(
        lambda t: jax.ShapeDtypeStruct(t.shape, t.dtype), types.dispatched.handle.plan
    )
    wire = Wire("copy" if model.combine_wire is None else "quantized")
    combine = functools.partial(_cuda.combine, spec=spec, wire=wire)
    try:
        named = {"combine": _unseen(combine, {"rows": y}, plan)}
    except ValueError as error:  # rows that the kernels cannot move
        return {}, str(error)
    if path(model, spec) == "direct":
        named["plan"] = _unseen(functools.partial(_cuda.plan, spec=spec), idx)
    each = {
        f"{name} {i}" if i else name: type_
        for name, types_ in named.items()
        for i, type_ in enumerate(types_)
    }
    return each, None


def _unseen(function, *operands) -> list:
    """Types of the results of a custom call that `function` does not return."""
    program = jax.make_jaxpr(function)(*operands)
    (call,) = (eqn for eqn in program.eqns if eqn.primitive.name == "ffi_call")
    return [result.aval for result in call.outvars[len(program.out_avals) :]]


def library(model: Model) -> dict[str, int | None]:
    """Bytes that a CUDA group keeps on each rank while the process lives, with the default Config."""
    config = Config()
    sizes = model.ranks, config.decode_tokens, config.decode_row_bytes
    return {
        "control block": sum(size for *_, size in _ffi.control_layout(model.ranks)),
        "slots": _ffi.slot_bytes(*sizes),
    }


def sample_routing(model: Model, *, skew: float, seed: int) -> np.ndarray:
    """Choices of one step, [R, T, K]: each token draws K distinct experts by their popularity.

    The popularity of an expert is log-normal: exp(skew * normal), the same for all tokens of a step.
    """
    rng = np.random.default_rng(seed)
    popularity = np.exp(skew * rng.standard_normal(model.experts))
    popularity /= popularity.sum()
    many_repeats = model.experts < 2 * model.top_k or skew > 2
    draw = _race if many_repeats else _redraw
    return np.stack([draw(rng, popularity, model.tokens, model.top_k) for _ in range(model.ranks)])


def _race(rng, popularity: np.ndarray, count: int, k: int) -> np.ndarray:
    """[count, k] distinct choices: the first k to finish, each at an exponential time."""
    times = rng.standard_exponential((count, len(popularity))) / popularity
    return np.argpartition(times, k - 1, axis=-1)[:, :k]


def _redraw(rng, popularity: np.ndarray, count: int, k: int) -> np.ndarray:
    """The same choices, faster where few repeat: one after another, what repeats is drawn again."""
    ends = np.cumsum(popularity)[:-1]
    chosen = np.empty((k, count), np.int64)
    for i in range(k):
        todo = np.arange(count)
        while todo.size:
            chosen[i, todo] = np.searchsorted(ends, rng.random(todo.size), side="right")
            todo = todo[(chosen[:i, todo] == chosen[i, todo]).any(0)]
    return chosen.T


def asked(model: Model, topk_idx: np.ndarray) -> np.ndarray:
    """Pairs that each expert is asked for, [R, E/R]."""
    return np.bincount(topk_idx.ravel(), minlength=model.experts).reshape(model.ranks, -1)


def dropped(counts: np.ndarray, spec: Spec) -> np.ndarray:
    """Pairs that each rank drops, [steps, R], of `counts [steps, R, E/R]`, as the plan does it."""
    return counts.sum(-1) - np.asarray(_kept(counts, spec)).sum(-1)


@functools.partial(jax.jit, static_argnames="spec")
def _kept(counts: jax.Array, spec: Spec) -> jax.Array:
    return jax.vmap(lambda step: _xla._segments(step, spec)[0])(counts)


def facts(model: Model, factors: list[float], *, layers: int, samples: int, skew: float) -> dict:
    """Everything `memory` prints, as plain values."""
    bounds = (None, *factors)
    traced = [trace(model, factor) for factor in bounds]
    _, no_cuda = scratch(model, traced[0])
    counts = {
        name: np.stack(
            [asked(model, sample_routing(model, skew=s, seed=i)) for i in range(samples)]
        )
        for name, s in (("uniform", 0.0), ("skewed", skew))
    }
    return {
        "model": dataclasses.asdict(model),
        "layers": layers,
        "samples": samples,
        "skew": skew,
        "path": path(model, traced[0].dispatched.handle.spec),
        "no_cuda": no_cuda,
        "library": {} if no_cuda else library(model),
        "bounds": [
            {"capacity_factor": factor, **_bound(model, types, counts, layers)}
            for factor, types in zip(bounds, traced, strict=True)
        ],
    }


def _bound(model: Model, types: Types, counts: dict[str, np.ndarray], layers: int) -> dict:
    spec = types.dispatched.handle.spec
    allocated = {**arrays(types), "scratch": scratch(model, types)[0]}
    drops = {}
    for name, pairs in counts.items():
        lost = dropped(pairs, spec).sum(-1)
        share = float(lost.sum() / pairs.sum())
        drops[name] = {"probability": float((lost > 0).mean()), "share": share}
    return {
        "rows": spec.rows,
        "arrays": {
            part: {name: _described(type_) for name, type_ in named.items()}
            for part, named in allocated.items()
        },
        "saved": {name: layers * sum(map(_bytes, kept)) for name, kept in types.saved.items()},
        "drops": drops,
    }


def _described(type_) -> dict:
    return {"shape": list(type_.shape), "dtype": type_.dtype.name, "bytes": _bytes(type_)}


def _bytes(type_) -> int:
    return math.prod(type_.shape) * type_.dtype.itemsize


def main(model: Model, factors: list[float], as_json: bool, **options) -> int:
    """Print the facts."""
    values = facts(model, factors, **options)
    print(json.dumps(values, indent=2) if as_json else table(values))
    return 0


def table(values: dict) -> str:
    """The facts for people: one column for each bound, whole bytes."""
    m, bounds = values["model"], values["bounds"]
    lines = [
        f"{m['ranks']} ranks, {m['tokens']} tokens each, hidden {m['hidden']} of {m['dtype']}, top-"
        f"{m['top_k']} of {m['experts']} experts, alignment {m['alignment']}, {m['layout']}",
        "",
        _line("capacity factor", ["none"] + [f"{b['capacity_factor']:g}" for b in bounds[1:]]),
        _line("rows", [f"{b['rows']:,}" for b in bounds]),
        "bytes on each device",
    ]
    for part, named in bounds[0]["arrays"].items():
        for name, first in named.items():
            sizes = [f"{b['arrays'][part][name]['bytes']:,}" for b in bounds]
            lines.append(_line(f"  {part}: {name} {first['dtype']}", sizes))
    for name in bounds[0]["saved"]:
        title = f"  saved for backward, {values['layers']} layer(s): {name}"
        lines.append(_line(title, [f"{b['saved'][name]:,}" for b in bounds]))
    lines.append(f"drops in {values['samples']} sampled steps")
    for name in bounds[0]["drops"]:
        title = f"  {name}" if name == "uniform" else f"  {name} {values['skew']:g}"
        for what, words in (("probability", "steps that drop"), ("share", "pairs dropped")):
            lines.append(
                _line(f"{title}: {words}", [f"{b['drops'][name][what]:.2%}" for b in bounds])
            )
    if values["no_cuda"]:
        return "\n".join([*lines, f"CUDA kernels: no figures, {values['no_cuda']}"])
    kept = ", ".join(f"{name} {size:,} bytes" for name, size in values["library"].items())
    return "\n".join([*lines, f"CUDA kernels: path {values['path']}; the library keeps {kept}"])


def _line(title: str, cells: list[str]) -> str:
    return f"{title:44}" + "".join(f"{cell:>16}" for cell in cells)
