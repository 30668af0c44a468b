# SPDX-License-Identifier: Apache-2.0
"""The public halves of dispatch and combine: `*_start` sends, `*_done` waits and delivers."""

import jax
from jax import Array

from . import _arguments, _check, _grad, _jax_compat, _view
from ._api import combined, delivered
from ._types import Dispatched, Handle, InFlight, Operation, Plan, Spec, Wire


@jax.named_scope("jax_ep.dispatch_start")
def dispatch_start(
    x: Array | tuple[Array, Array], topk_idx: Array, topk_weights: Array | None = None, **options
) -> InFlight:
    """Send every token, and return: the first half of `dispatch`, for `dispatch_done`.

    Equivalent code: `dispatch_done(dispatch_start(x, idx, w, **options))` is
    `dispatch(x, idx, w, **options)`, bit for bit. On CUDA nothing of it stays on the device between
    the halves, and it takes small batches only: docs/decode.md has the rule. On `xla` the first half
    is nothing and the second all. A group has one dispatch and one combine in flight at a time;
    make a start depend on the result of the done before it, or XLA may swap them. Forward only.

    Args:
        x: as in `dispatch`, and so are the others.
        topk_idx: [..., K] integer.
        topk_weights: [..., K] float32, or None.
        **options: the keywords of `dispatch`.

    Returns:
        An `InFlight`, a pytree: it may be carried by `lax.scan` or leave `jit` and `shard_map`.

    Raises:
        TypeError, ValueError: while tracing, as in `dispatch`; when differentiated; under `vmap`;
            when lowering for CUDA, a batch too large for it.
        RuntimeError: on CUDA when it runs, from the call or from `check`: a start before the done
            of the one before.

    Example:
        >>> mesh = jax.make_mesh((2,), ("expert",), axis_types=(jax.sharding.AxisType.Auto,))
        >>> @jax.jit
        ... @functools.partial(jax.shard_map, mesh=mesh, in_specs=P("expert"), out_specs=P("expert"))
        ... def exchange(x, idx):
        ...     sent = jax_ep.dispatch_start(x, idx, num_experts=4)
        ...     beside = jnp.sin(x)  # while rows travel
        ...     d = jax_ep.dispatch_done(sent)
        ...     sums = jax_ep.combine_start(d.tokens, d.handle)
        ...     return jax_ep.combine_done(sums), beside
        >>> exchange(jnp.array([[1.0], [2.0]]), jnp.array([[3], [0]]))[0].tolist()
        [[1.0], [2.0]]
    """
    values, topk_idx, spec, wire = _arguments.dispatch(x, topk_idx, topk_weights, **options)
    values = _grad.forward_only("dispatch_start", values)
    ticket = _view.dispatch_start(values, topk_idx, spec=spec, wire=wire)
    return _in_flight("dispatch", ticket, values, (topk_idx,), spec, wire)


@jax.named_scope("jax_ep.dispatch_done")
def dispatch_done(in_flight: InFlight) -> Dispatched:
    """Wait for the rows of a `dispatch_start` and deliver them: the second half of `dispatch`.

    Args:
        in_flight: what `dispatch_start` returned. Once only.

    Returns:
        A `Dispatched`; its handle is for `combine` and for `combine_start`.

    Raises:
        TypeError: not what `dispatch_start` returned; when differentiated.
        ValueError: used before, as far as one trace can see; arrays of other shapes or types.
        RuntimeError: on CUDA when it runs, from the call or from `check`: of a start that
            was not the last.
    """
    in_flight = _take("dispatch", in_flight)
    (topk_idx,), spec = in_flight.routing, in_flight.spec
    values = _grad.forward_only("dispatch_done", in_flight.values)
    rows, planned = _view.slot_dispatch(
        values, topk_idx, spec=spec, wire=in_flight.wire, ticket=in_flight.ticket
    )
    return delivered(rows, planned, spec)


@jax.named_scope("jax_ep.combine_start")
def combine_start(
    y: Array,
    handle: Handle,
    weights: Array | None = None,
    *,
    wire_dtype=None,
    scale_format: str = "float32",
) -> InFlight:
    """Send this rank's sums, and return: the first half of `combine`, for `combine_done`.

    As `dispatch_start` is to `dispatch`, with the same limits.

    Args:
        y: as in `combine`, and so are the others.
        handle: `Dispatched.handle`.
        weights: [rows] float32, or None.
        wire_dtype: None or `jnp.float8_e4m3fn`.
        scale_format: "float32" or "e8m0".

    Returns:
        An `InFlight`.

    Raises:
        TypeError, ValueError, RuntimeError: as `combine` and `dispatch_start`.
    """
    values, plan, spec, wire = _arguments.combine(
        y, handle, weights, wire_dtype=wire_dtype, scale_format=scale_format
    )
    values = _grad.forward_only("combine_start", values)
    ticket = _view.combine_start(values, plan, spec=spec, wire=wire)
    return _in_flight("combine", ticket, values, plan.arrays(), spec, wire)


@jax.named_scope("jax_ep.combine_done")
def combine_done(in_flight: InFlight) -> Array:
    """Wait for the sums of a `combine_start` and add them up: the second half of `combine`.

    Args:
        in_flight: what `combine_start` returned. Once only.

    Returns:
        [..., H] of `y.dtype`, as `combine`.

    Raises:
        TypeError, ValueError, RuntimeError: as `dispatch_done`.
    """
    in_flight = _take("combine", in_flight)
    plan, spec = Plan(*in_flight.routing), in_flight.spec
    values = _grad.forward_only("combine_done", in_flight.values)
    sums = _view.combine(values, plan, spec=spec, wire=in_flight.wire, ticket=in_flight.ticket)
    return combined(sums["rows"], spec)


def _in_flight(
    operation: Operation, ticket: Array, values: dict, routing, spec: Spec, wire: Wire
) -> InFlight:
    operands = (*values.values(), *routing)
    types = _types((ticket, *operands))
    return InFlight(ticket, operands, operation, tuple(values), spec, wire, types)


def _types(arrays) -> tuple[str, ...]:
    return tuple(f"{array.dtype}{list(array.shape)}" for array in arrays)


def _take(operation: Operation, in_flight: InFlight) -> InFlight:
    """Check what a done was given, and mark it as used.

    The mark is on the object, so it is lost where a transform takes the pytree apart; it counts in
    one trace, as the branches of a `cond` may each have the done of one start.
    """
    done, name = f"{operation}_done", type(in_flight).__name__
    if not isinstance(in_flight, InFlight):
        raise TypeError(f"in_flight: expected what jax_ep.{operation}_start returned, got {name}")
    if in_flight.operation != operation:
        raise TypeError(
            f"in_flight: expected what jax_ep.{operation}_start returned, got that of "
            f"{in_flight.operation}_start: use jax_ep.{in_flight.operation}_done"
        )
    _check.view_of("in_flight", in_flight.spec)
    got = _types((in_flight.ticket, *in_flight.operands))
    if got != in_flight.types:
        raise ValueError(
            f"in_flight: expected the arrays of jax_ep.{operation}_start as they were, "
            f"{', '.join(in_flight.types)}, got {', '.join(got)}"
        )
    here, done_in = _jax_compat.trace_state(), getattr(in_flight, "_done_in", ())
    if here in done_in:
        raise ValueError(
            f"in_flight: already done: expected one jax_ep.{done} for each {operation}_start"
        )
    object.__setattr__(in_flight, "_done_in", (*done_in, here))  # frozen, and no leaf
    return in_flight
