# SPDX-License-Identifier: Apache-2.0
"""Routers: which experts a token goes to, with which weights; pure JAX, any platform."""

import jax
import jax.numpy as jnp
from jax import Array, lax

from . import _arguments, _check
from ._placement import Placement, check_one_layer


def top_k(
    logits: Array,
    k: int,
    *,
    score: str = "softmax",
    normalize: bool = True,
    scale: float = 1.0,
    bias: Array | None = None,
) -> tuple[Array, Array]:
    """The k experts of highest score, and their weights.

    Equivalent code::

        scores = softmax(logits)                     # or sigmoid(logits)
        _, idx = lax.top_k(scores + bias, k)         # the bias only selects
        weights = scores[idx] / scores[idx].sum() * scale

    Args:
        logits: [..., E] floating.
        k: experts per token.
        score: "softmax" or "sigmoid".
        normalize: divide the k weights by their sum.
        scale: factor on the weights.
        bias: [E] float32, added for selection only (see `update_bias`).

    Returns:
        weights [..., k] float32, idx [..., k] int32; ties go to the lower id.

    Raises:
        TypeError, ValueError: naming the argument, with expected and got.

    Source: GShard (Lepikhin et al. 2020); sigmoid scores as in DeepSeek-V3 (2024).

    Example:
        >>> weights, idx = jax_ep.routing.top_k(jnp.log(jnp.array([[1.0, 6.0, 3.0]])), 2)
        >>> print(idx, np.asarray(weights).round(2))
        [[1 2]] [[0.67 0.33]]
    """
    scores, biased = _scores(logits, k, score, bias)
    return _select(scores, biased, k, normalize, scale)


def group_limited_top_k(
    logits: Array,
    k: int,
    *,
    num_groups: int,
    topk_groups: int,
    bias: Array | None = None,
    score: str = "sigmoid",
    normalize: bool = True,
    scale: float = 1.0,
) -> tuple[Array, Array]:
    """The k best experts out of the best `topk_groups` groups: bounds the ranks a token visits.

    Groups are consecutive experts, ranked by the sum of their two best biased scores; weights come
    from the unbiased ones.

    Args:
        logits: [..., E] floating.
        k: experts per token.
        num_groups: divides E.
        topk_groups: groups a token may use; they must hold at least k experts.
        bias: [E] float32, added for selection only.
        score: "sigmoid" or "softmax".
        normalize: divide the k weights by their sum.
        scale: factor on the weights.

    Returns:
        weights [..., k] float32, idx [..., k] int32.

    Raises:
        TypeError, ValueError: naming the argument, with expected and got.

    Source: DeepSeek-V3 technical report (2024), section 2.1.2, and its published gate.

    Example:
        >>> logits = jnp.array([[9.0, 0.0, 5.0, 5.0]])  # groups (0, 1) and (2, 3)
        >>> _, idx = jax_ep.routing.group_limited_top_k(logits, 2, num_groups=2, topk_groups=1)
        >>> idx.tolist()
        [[2, 3]]
    """
    scores, biased = _scores(logits, k, score, bias)
    num_experts = scores.shape[-1]
    if num_groups < 1 or num_experts % num_groups:
        raise ValueError(f"num_groups: expected a divisor of {num_experts}, got {num_groups}")
    per_group = num_experts // num_groups
    if not 1 <= topk_groups <= num_groups or topk_groups * per_group < k:
        raise ValueError(
            f"topk_groups: expected 1 to {num_groups} groups with at least k={k} experts "
            f"({per_group} each), got {topk_groups}"
        )
    grouped = biased.reshape(*biased.shape[:-1], num_groups, per_group)
    best, _ = lax.top_k(grouped, min(2, per_group))
    _, chosen = lax.top_k(best.sum(-1), topk_groups)
    allowed = (chosen[..., None] == jnp.arange(num_groups)).any(-2)
    masked = jnp.where(allowed[..., None], grouped, -jnp.inf).reshape(biased.shape)
    return _select(scores, masked, k, normalize, scale)


def update_bias(bias: Array, load: Array, *, rate: float = 1e-3) -> Array:
    """One step of loss-free balancing: raise the bias of underloaded experts, lower the others.

    Equivalent code: `bias + rate * sign(load.mean() - load)`.

    Args:
        bias: [E] float32.
        load: [E] pairs of each expert in this step over the whole group (`expert_load`).
        rate: step size.

    Returns:
        The new bias, [E] float32.

    Raises:
        ValueError: for shapes that differ.

    Source: Wang et al. 2024, "Auxiliary-loss-free load balancing strategy for MoE".

    Example:
        >>> jax_ep.routing.update_bias(jnp.zeros(3), jnp.array([10, 4, 1]), rate=0.5).tolist()
        [-0.5, 0.5, 0.5]
    """
    if bias.shape != load.shape or bias.ndim != 1:
        raise ValueError(f"load: expected the shape of bias {bias.shape} = [E], got {load.shape}")
    load = load.astype(jnp.float32)
    return bias + rate * jnp.sign(load.mean() - load)


def max_violation(load: Array) -> Array:
    """MaxVio: how far the busiest expert is above an equal share; 0 is perfect, E/K - 1 the worst.

    Equivalent code: `load.max(-1) / load.mean(-1) - 1`.

    Args:
        load: [..., E] pairs of each expert: of a batch for MaxVio_batch, summed over many for
            MaxVio_global.

    Returns:
        [...] float32; 0 where there is no load.

    Source: Wang et al. 2024, "Auxiliary-loss-free load balancing strategy for MoE".

    Example:
        >>> float(jax_ep.routing.max_violation(jnp.array([6, 2, 2, 2])))
        1.0
    """
    load = jnp.asarray(load, jnp.float32)
    mean = load.mean(-1)
    return jnp.where(mean > 0, load.max(-1) / jnp.where(mean > 0, mean, 1) - 1, 0.0)


def load_entropy(load: Array) -> Array:
    """Entropy of the load's distribution over experts, over its largest value log E.

    Equivalent code: `-(p * log(p)).sum(-1) / log(E)` with `p = load / load.sum(-1)`.

    Args:
        load: [..., E] pairs of each expert.

    Returns:
        [...] float32: 1 for equal loads, 0 for one expert with all; 1 where there is no load.

    Example:
        >>> jax_ep.routing.load_entropy(jnp.array([[3, 3, 3], [9, 0, 0]])).tolist()
        [1.0, 0.0]
    """
    load = jnp.asarray(load, jnp.float32)
    total = load.sum(-1, keepdims=True)
    share = load / jnp.where(total > 0, total, 1)
    entropy = jax.scipy.special.entr(share).sum(-1) / jnp.log(max(load.shape[-1], 2))
    return jnp.where(total[..., 0] > 0, entropy, 1.0)


def expert_load(topk_idx: Array, num_experts: int, axis_name=None) -> Array:
    """How many pairs each expert gets, over the whole group.

    Equivalent code: `lax.psum(bincount(topk_idx[topk_idx >= 0], length=E), axis_name)`.

    Args:
        topk_idx: [..., K] integer, this rank's block; -1 counts for nobody.
        num_experts: E.
        axis_name: axes to sum over inside `shard_map`; None counts only the given array.

    Returns:
        [E] int32.

    Raises:
        TypeError: topk_idx is not integer.

    Example:
        >>> jax_ep.routing.expert_load(jnp.array([[0, 2], [2, -1]]), 3).tolist()
        [1, 0, 2]
    """
    topk_idx = _check.array("topk_idx", topk_idx, kind=jnp.integer).reshape(-1)
    named = (topk_idx >= 0) & (topk_idx < num_experts)
    load = jnp.zeros(num_experts, jnp.int32)
    load = load.at[jnp.where(named, topk_idx, num_experts)].add(1, mode="drop")
    return load if axis_name is None else lax.psum(load, axis_name)


def place(
    topk_idx: Array,
    placement: Placement,
    axis_name: str | tuple[str, ...] | None = None,
    *,
    spread: str = "even",
) -> Array:
    """Experts to slots of a placement; the pairs of a replicated expert take turns at its slots.

    Equivalent code, for the n-th pair, in order, that names expert e on rank r::

        slot = placement.slots[e, (n + r) % placement.replicas[e]]

    Local arithmetic, no communication. `dispatch` takes the result, with
    `num_experts=placement.num_slots`.

    Args:
        topk_idx: [..., K] integer, this rank's block; -1 for no expert stays -1, and what is not an
            expert becomes P, which is no slot.
        placement: of one layer (`jax_ep.balance`).
        axis_name: axes of the group inside `shard_map`: ranks then begin at different replicas. None
            begins at the first.
        spread: "even": a rank's pairs of an expert differ by at most one between its replicas; takes
            a sort of the pairs. "token": n is the token's number, which costs next to nothing, and
            is even as far as tokens choose experts independently of their number.

    Returns:
        [..., K] int32.

    Raises:
        TypeError, ValueError: naming the argument, with expected and got.

    Example:
        >>> placement = jax_ep.balance.placement([0, 0, 1, 2], num_experts=3, num_ranks=2)
        >>> jax_ep.routing.place(jnp.array([[0], [0], [1], [0]]), placement).tolist()
        [[0], [1], [2], [0]]
    """
    topk_idx = _check.array("topk_idx", topk_idx, kind=jnp.integer)
    _check.one_of("spread", spread, ("even", "token"))
    check_one_layer("placement", placement)
    if topk_idx.ndim < 1 or topk_idx.shape[-1] < 1:
        raise ValueError(f"topk_idx: expected shape [..., K], K at least 1, got {topk_idx.shape}")
    num_experts = placement.num_experts
    expert = _arguments._as_int32(topk_idx, num_experts).reshape(-1)
    named = (expert >= 0) & (expert < num_experts)
    safe = jnp.where(named, expert, 0)
    turn = jnp.arange(expert.size, dtype=jnp.int32)
    if spread == "token":
        turn = turn // topk_idx.shape[-1]
    else:
        turn = _number_in_expert(jnp.where(named, expert, num_experts), num_experts)
    start = 0 if axis_name is None else lax.axis_index(axis_name)
    replica = (turn + start) % jnp.asarray(placement.replicas)[safe]
    slot = jnp.asarray(placement.slots)[safe, replica]
    elsewhere = jnp.where(expert < 0, expert, placement.num_slots)
    return jnp.where(named, slot, elsewhere).astype(jnp.int32).reshape(topk_idx.shape)


def _number_in_expert(expert, num_experts):
    """How many pairs before each one name the same expert."""
    order = jnp.argsort(expert, stable=True)
    ranked = expert[order]
    first = jnp.searchsorted(ranked, jnp.arange(num_experts + 1))
    number = jnp.arange(expert.size, dtype=jnp.int32) - first[ranked].astype(jnp.int32)
    return jnp.zeros_like(expert).at[order].set(number, unique_indices=True)


def _scores(logits, k, score, bias):
    logits = _check.array("logits", logits, kind=jnp.floating)
    _check.one_of("score", score, ("softmax", "sigmoid"))
    if logits.ndim < 1 or not 1 <= k <= logits.shape[-1]:
        raise ValueError(f"k: expected 1 to E for logits of shape {logits.shape}, got {k}")
    logits = logits.astype(jnp.float32)
    scores = jax.nn.softmax(logits) if score == "softmax" else jax.nn.sigmoid(logits)
    if bias is None:
        return scores, scores
    if bias.shape != logits.shape[-1:]:
        raise ValueError(f"bias: expected shape {logits.shape[-1:]}, got {bias.shape}")
    return scores, scores + lax.stop_gradient(bias)


def _select(scores, by, k, normalize, scale):
    _, idx = lax.top_k(lax.stop_gradient(by), k)
    weights = jnp.take_along_axis(scores, idx, axis=-1)
    if normalize:
        weights = weights / jnp.maximum(weights.sum(-1, keepdims=True), 1e-20)
    return weights * scale, idx.astype(jnp.int32)
