# SPDX-License-Identifier: Apache-2.0
"""How many rows a receiver's buffer has: pure integer arithmetic on static sizes."""

from ._types import Layout


def num_rows(
    num_tokens: int,
    top_k: int,
    *,
    num_experts: int,
    num_ranks: int,
    capacity: int | None = None,
    capacity_factor: float | None = None,
    expert_alignment: int = 1,
    layout: Layout = "ragged",
) -> int:
    """Rows of the buffer that `dispatch` returns on each rank (batched: E/R times C).

    Equivalent code, ragged, no capacity: `N = R*T*min(K, E//R); (N + (A-1)*min(E//R, N))//A*A`.

    Args:
        num_tokens: T, tokens per rank.
        top_k: K, experts per token.
        num_experts: E, over the whole group.
        num_ranks: R, the size of the group.
        capacity: upper bound in rows; rounded down to the alignment.
        capacity_factor: the bound as a multiple of T*K; rounded down, at least the alignment.
        expert_alignment: A; every expert's segment is a multiple of it.
        layout: "ragged" or "batched".

    Returns:
        The number of rows, an int.

    Raises:
        ValueError: for sizes out of range, both bounds at once, or a capacity below the alignment.

    Example:
        >>> jax_ep.num_rows(4096, 8, num_experts=256, num_ranks=8)  # every pair may come here
        262144
        >>> jax_ep.num_rows(4096, 8, num_experts=256, num_ranks=8, capacity_factor=1.25)
        40960
    """
    for name, value, least in (
        ("num_tokens", num_tokens, 0),
        ("top_k", top_k, 1),
        ("num_experts", num_experts, 1),
        ("num_ranks", num_ranks, 1),
        ("expert_alignment", expert_alignment, 1),
    ):
        if not _is_int(value) or value < least:
            raise ValueError(f"{name}: expected an int of at least {least}, got {value!r}")
    if num_experts % num_ranks:
        raise ValueError(
            f"num_experts: expected a multiple of the group's {num_ranks} ranks, got {num_experts}"
        )
    if layout not in ("ragged", "batched"):
        raise ValueError(f"layout: expected 'ragged' or 'batched', got {layout!r}")
    if capacity is not None and capacity_factor is not None:
        raise ValueError(
            f"capacity and capacity_factor: expected at most one, got {capacity} and {capacity_factor}"
        )
    local, align = num_experts // num_ranks, expert_alignment
    bound = _bound(capacity, capacity_factor, num_tokens * top_k, align)
    if layout == "batched":
        if bound is None:
            return local * num_ranks * num_tokens
        if bound < local:
            raise ValueError(
                f"capacity: expected at least one row for each of the {local} local experts, got {bound}"
            )
        return local * (bound // local)
    if bound is None:
        pairs = num_ranks * num_tokens * min(top_k, local)
        bound = pairs + (align - 1) * min(local, pairs)
    elif capacity_factor is not None:
        bound = max(bound, align)
    return bound // align * align


def _bound(capacity, capacity_factor, pairs: int, align: int) -> int | None:
    """The user's bound in rows, checked, not rounded; None without one."""
    if capacity is not None:
        if not _is_int(capacity):
            raise TypeError(f"capacity: expected an int, got {capacity!r}")
        if capacity < align:
            raise ValueError(
                f"capacity: expected at least the expert_alignment of {align}, got {capacity}"
            )
        return int(capacity)
    if capacity_factor is not None:
        if isinstance(capacity_factor, bool) or not isinstance(capacity_factor, (int, float)):
            raise TypeError(f"capacity_factor: expected a number, got {capacity_factor!r}")
        if not 0 < capacity_factor < float("inf"):
            raise ValueError(f"capacity_factor: expected a positive number, got {capacity_factor}")
        return int(capacity_factor * pairs)
    return None


def _is_int(value) -> bool:
    return isinstance(value, int) and not isinstance(value, bool)
