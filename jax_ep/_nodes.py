# SPDX-License-Identifier: Apache-2.0
"""CUDA groups that span nodes: their pieces of NVSHMEM's arena, and how they start.

A piece has a rank's control block and, behind it, its slots for small batches and its rings; it is
at one offset in all processes.
"""

import dataclasses

import jax

from . import _ffi, _rdma, _rdma_checks, _rendezvous, _topology
from ._jax_compat import Device
from ._types import Config


@dataclasses.dataclass(frozen=True)
class Piece:
    """A group's part of the arena."""

    key: str  # name of the group, alike in every process
    offset: int
    node_ranks: int  # L
    rings: tuple[int, int]  # slots of each, bytes of a slot
    slots: tuple[int, int]  # tokens of a small batch, bytes of a row


def topology_of(
    group: list[Device], hosts: dict[int, str], gpus_per_node: int | None
) -> _topology.Topology:
    """The nodes of a group, whose processes are on `hosts`."""
    places = [_topology.Place(d.process_index, hosts[d.process_index]) for d in group]
    return _topology.of_group(places, gpus_per_node)


def take(
    world: _rdma.World,
    devices: str,
    topology: _topology.Topology,
    config: Config,
    slots: tuple[int, int],
) -> Piece:
    """The piece of the group of `devices`, new unless it has one.

    Called in every process for every group, also those that it is not in, in one order: that is why
    offsets agree.

    Raises:
        MemoryError: the arena has no room for it.
    """
    rings = config.rdma.ring_slots, config.rdma.ring_slot_bytes
    N, L = topology.num_nodes, topology.ranks_per_node
    sizes = f"rings {rings[0]}x{rings[1]} slots {slots[0]}x{slots[1]}"
    key = f"{devices} nodes {N}x{L} {sizes} world {world.round}"
    offset = world.arena.offset(key)
    if offset is None:
        fields = _ffi.piece_layout(N * L, L, rings, slots)
        *_, (_, _, at, size) = fields
        try:
            offset = world.arena.take(key, at + size)
        except MemoryError as error:
            small = sum(size for name, _, _, size in fields if name in ("slots", "outboxes"))
            raise MemoryError(
                f"{error}, or lower Config.decode_tokens or decode_row_bytes: {small} of these "
                "bytes are for small batches"
            ) from None
    return Piece(key, offset, L, rings, slots)


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
        _rdma.check()  # the next call waits for this process's GPU
        address = world.address + piece.offset
        is_new = _ffi.make_node_group(
            piece.key, devices, address, L, elements, piece.rings, piece.slots
        )  # kernels of an earlier generation have ended here
        _rdma.quiet()  # so has what they put, before anybody's memory is zero
    except RuntimeError as error:  # the others wait for this process's word
        problems.append(str(error))
    meeting = _rendezvous.Meeting(f"{piece.key}/{generation}", group)
    said = meeting.exchange(
        {"problems": problems, "stuck": bool(_rdma.stuck()), "alike": {"offset": piece.offset}}
    )
    for p in said:
        if said[p]["stuck"]:
            _rdma.give_up(f"puts of process {p} stay")
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
    meeting.barrier("attached")  # nobody's kernel of an earlier generation runs, nor do its puts
    _ffi.start_group(name, piece.key, generation, timeout_s, sharing)
    meeting.barrier("started")  # nobody's kernel runs before every block and ring is zero
