# SPDX-License-Identifier: Apache-2.0
"""CUDA groups that span nodes: their pieces of NVSHMEM's arena, and how they start.

A piece has a rank's control block and, behind it, its rings; it is at one offset in all processes.
"""

import dataclasses

import jax

from . import _ffi, _rdma, _rdma_checks, _rendezvous, _topology
from ._jax_compat import Device
from ._types import Rdma


@dataclasses.dataclass(frozen=True)
class Piece:
    """A group's part of the arena."""

    key: str  # name of the group, alike in every process
    offset: int
    node_ranks: int  # L
    rings: tuple[int, int]  # slots of each, bytes of a slot


def topology_of(
    group: list[Device], hosts: dict[int, str], gpus_per_node: int | None
) -> _topology.Topology:
    """The nodes of a group, whose processes are on `hosts`."""
    places = [_topology.Place(d.process_index, hosts[d.process_index]) for d in group]
    return _topology.of_group(places, gpus_per_node)


def check_config(decode_tokens: int) -> None:
    """Raise unless small batches are switched off: their slots do not go between nodes."""
    if decode_tokens:
        raise ValueError(
            "config: expected decode_tokens=0 for a group that spans nodes, as small batches take "
            f"the path of large ones there, got {decode_tokens}: give jax_ep.initialize and the "
            "operations jax_ep.Config(decode_tokens=0)"
        )


def take(world: _rdma.World, devices: str, topology: _topology.Topology, rdma: Rdma) -> Piece:
    """The piece of the group of `devices`, new unless it has one.

    Called in every process for every group, also those that it is not in, in one order: that is why
    offsets agree.
    """
    rings = rdma.ring_slots, rdma.ring_slot_bytes
    N, L = topology.num_nodes, topology.ranks_per_node
    key = f"{devices} nodes {N}x{L} rings {rings[0]}x{rings[1]} world {world.round}"
    offset = world.arena.offset(key)
    if offset is None:
        *_, (_, _, at, size) = _ffi.ring_layout(N * L, L, *rings)
        offset = world.arena.take(key, at + size)
    return Piece(key, offset, L, rings)


def start(
    name: str,
    group: list[Device],
    world: _rdma.World,
    piece: Piece,
    generation: int,
    timeout_s: float,
    sharing: int,
) -> None:
    """Make or restart a group that has a device of this process; every process of it does.

    Args:
        name: the group's signature.
        group: its devices, in rank order.
        world: NVSHMEM, as started with the processes of all groups.
        piece: of the group.
        generation: number of this start, from 1.
        timeout_s: bound of every wait of its kernels.
        sharing: ranks that share a GPU.

    Raises:
        RuntimeError: in every process, what is wrong in one of them.
    """
    me, L = jax.process_index(), piece.node_ranks
    devices = [d.local_hardware_id if d.process_index == me else -1 for d in group]
    elements = [world.processes.index(d.process_index) for d in group]
    is_new, problems = False, []
    try:
        address = world.address + piece.offset
        is_new = _ffi.make_node_group(piece.key, devices, address, L, elements, piece.rings)
    except RuntimeError as error:  # the others wait for this process's word
        problems.append(str(error))
    meeting = _rendezvous.Meeting(f"{piece.key}/{generation}", group)
    said = meeting.exchange({"problems": problems, "alike": {"offset": piece.offset}})
    _rdma_checks.raise_if_any({f"process {p}": said[p]["problems"] for p in said})
    _rdma_checks.raise_if_any(
        _rdma_checks.differing({f"process {p}": said[p]["alike"] for p in said})
    )
    if L > 1:
        first = next(r for r, device in enumerate(devices) if device >= 0) // L * L
        at_node = _rendezvous.Meeting(
            f"{piece.key}/{generation}/from {first}", group[first : first + L]
        )
        _rendezvous.share_memory(at_node, piece.key, devices, attach=is_new)
    meeting.barrier("attached")  # nobody's kernel of an earlier generation runs
    _ffi.start_group(name, piece.key, generation, timeout_s, sharing)
    meeting.barrier("started")  # nobody's kernel runs before every block and ring is zero
