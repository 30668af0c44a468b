# SPDX-License-Identifier: Apache-2.0
"""Which expert each slot holds: the object, and its checks."""

import dataclasses
from typing import Any

import jax
import numpy as np


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True, eq=False)
class Placement:
    """Which expert each slot holds; a pytree, of one layer or with a leading [layers].

    Shapes depend on the sizes alone: a jitted function that takes a placement as an argument is
    not compiled again for another one.

    Attributes:
        experts: [P] int32; the expert of each slot.
        replicas: [E] int32; how many slots hold each expert, at least 1.
        slots: [E, P-E+1] int32; the slots of each expert, ascending, then -1.
        num_ranks: R; rank r owns slots [r*P/R, (r+1)*P/R).
    """

    experts: Any
    replicas: Any
    slots: Any
    num_ranks: int = dataclasses.field(metadata=dict(static=True))

    @property
    def num_slots(self) -> int:
        """P: what `dispatch` takes as `num_experts`."""
        return self.experts.shape[-1]

    @property
    def num_experts(self) -> int:
        """E: what the router chooses from."""
        return self.replicas.shape[-1]

    def __getitem__(self, layer) -> "Placement":
        """The placement of one layer."""
        if self.experts.ndim != 2:
            raise TypeError("placement: expected several layers to take one from, got one layer")
        return jax.tree.map(lambda a: a[layer], self)


def placement(
    experts, *, num_experts: int, num_ranks: int, slots_per_rank: int | None = None
) -> Placement:
    """A checked `Placement` from the expert of each slot, made by hand or read from a file.

    Args:
        experts: [P] or [layers, P] integer, on the host.
        num_experts: E; every one must be in a slot of every layer.
        num_ranks: R, divides P.
        slots_per_rank: how many slots a rank has memory for; None: whatever P/R is.

    Returns:
        A `Placement` of NumPy arrays.

    Raises:
        TypeError, ValueError: naming the argument, with expected and got.

    Example:
        >>> p = jax_ep.balance.placement([0, 1, 0, 2], num_experts=3, num_ranks=2)
        >>> p.replicas.tolist(), p.slots.tolist()
        ([2, 1, 1], [[0, 2], [1, -1], [3, -1]])
    """
    experts = np.asarray(experts)
    if not np.issubdtype(experts.dtype, np.integer):
        raise TypeError(f"experts: expected a dtype of kind integer, got {experts.dtype}")
    if experts.ndim not in (1, 2):
        raise ValueError(f"experts: expected shape [P] or [layers, P], got {experts.shape}")
    num_slots = experts.shape[-1]
    check_sizes(num_experts, num_slots, num_ranks)
    if slots_per_rank is not None and num_slots != num_ranks * slots_per_rank:
        raise ValueError(
            f"experts: expected {num_ranks} ranks of {slots_per_rank} slots, {num_ranks * slots_per_rank} "
            f"in all, got {num_slots}"
        )
    wrong = (experts < 0) | (experts >= num_experts)
    if wrong.any():
        at = tuple(map(int, np.argwhere(wrong)[0]))
        raise ValueError(f"experts: expected 0 to {num_experts - 1}, got {experts[at]} at {at}")
    by_layer = np.atleast_2d(experts).astype(np.int32)
    layers = np.arange(len(by_layer))[:, None]
    replicas = count(by_layer, num_experts)
    if not replicas.all():
        layer, expert = map(int, np.argwhere(replicas == 0)[0])
        raise ValueError(
            f"experts: expected every expert in a slot, got none of {expert} in {layer=}"
        )
    order = np.argsort(by_layer, 1, kind="stable")
    ranked = np.take_along_axis(by_layer, order, 1)
    first = np.cumsum(replicas, 1) - replicas
    slots = np.full((*replicas.shape, num_slots - num_experts + 1), -1, np.int32)
    slots[layers, ranked, np.arange(num_slots) - first[layers, ranked]] = order
    made = Placement(by_layer, replicas, slots, num_ranks)
    return made if experts.ndim == 2 else made[0]


def round_robin(
    num_experts: int, *, num_slots: int, num_ranks: int, num_layers: int | None = None
) -> Placement:
    """Slot p holds expert p % E: where to start without loads.

    Args:
        num_experts: E.
        num_slots: P, at least E.
        num_ranks: R, divides P.
        num_layers: None for a placement of one layer.

    Returns:
        A `Placement`.

    Raises:
        ValueError: for sizes that do not fit.

    Example:
        >>> jax_ep.balance.round_robin(3, num_slots=4, num_ranks=2).experts.tolist()
        [0, 1, 2, 0]
    """
    check_sizes(num_experts, num_slots, num_ranks)
    experts = np.arange(num_slots) % num_experts
    if num_layers is not None:
        experts = np.tile(experts, (num_layers, 1))
    return placement(experts, num_experts=num_experts, num_ranks=num_ranks)


def count(experts: np.ndarray, num_experts: int) -> np.ndarray:
    """Slots of each expert, `[layers, P]` to `[layers, E]`."""
    replicas = np.zeros((len(experts), num_experts), np.int32)
    np.add.at(replicas, (np.arange(len(experts))[:, None], experts), 1)
    return replicas


def check_sizes(num_experts: int, num_slots: int, num_ranks: int) -> None:
    """Raise unless every expert has a slot and every rank as many slots."""
    if num_slots < num_experts or num_experts < 1:
        raise ValueError(f"num_slots: expected at least the {num_experts} experts, got {num_slots}")
    divides("num_ranks", num_ranks, "slots", num_slots)


def divides(name: str, value: int, what: str, whole: int) -> None:
    """Raise unless `value` divides the `whole` of something."""
    if value < 1 or whole % value:
        raise ValueError(f"{name}: expected a divisor of the {whole} {what}, got {value}")


def check_one_layer(name: str, value) -> None:
    """Raise unless `value` is a placement of one layer."""
    if not isinstance(value, Placement):
        raise TypeError(f"{name}: expected a jax_ep.balance.Placement, got {type(value).__name__}")
    if value.experts.ndim != 1:
        raise ValueError(
            f"{name}: expected one layer, got {value.experts.shape[0]}; take {name}[layer]"
        )
