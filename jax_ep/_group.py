# SPDX-License-Identifier: Apache-2.0
"""Life of a group: `initialize`, `finalize`, `check`.

On CUDA this sets up the control blocks that the kernels of a group share. Elsewhere there is nothing
to set up; what can be wrong is checked all the same, so that a program written on a laptop is right
on GPUs.
"""

import functools
import logging
import math
import threading
import time

import jax
import numpy as np
from jax.sharding import Mesh

from . import _check, _ffi, _nodes, _rdma, _rendezvous
from ._check import axis_tuple
from ._jax_compat import Device
from ._types import Config

_groups: dict[str, Mesh] = {}
_configs: dict[str, Config] = {}  # of each signature
_slot_sizes: dict[str, tuple[int, int]] = {}  # of each group's devices: tokens, bytes of a row
_log = logging.getLogger("jax_ep")
_WATCH_PERIOD_S = 1.0
_calls: dict[str, int] = {}  # of initialize for each signature, alike in every process
_generation: dict[str, int] = {}  # of each group's devices, counted alike in every process


def signature(mesh, axes: tuple[str, ...]) -> str:
    """Name of the groups along `axes`, the same in every process and inside jit."""
    sizes = ",".join(f"{axis}={size}" for axis, size in mesh.shape.items())
    return f"{sizes}|{','.join(axes)}"


def initialize(
    mesh: Mesh,
    axis_name="expert",
    *,
    timeout_s: float = 60.0,
    config: Config | None = None,
    stats: bool | None = None,
) -> None:
    """Set up the group of every line of devices along `axis_name`; once, outside jit.

    Idempotent; after a failure it starts a new generation. Needed before the first operation on
    CUDA; elsewhere it only checks its arguments.

    Args:
        mesh: a concrete `jax.sharding.Mesh` of all devices that take part.
        axis_name: the mesh axis, or tuple of axes, along which devices exchange tokens.
        timeout_s: seconds after which a wait for a peer ends in an error.
        config: `decode_tokens` and `decode_row_bytes` size the slots for small batches, which are
            allocated here, where a group spans nodes in `Rdma.arena_bytes`; pass the same to the
            operations. None: as an earlier call has it, or the default `Config`. `gpus_per_node`
            and `rdma` are for groups that span nodes.
        stats: whether operations of these groups record timings for `jax_ep.stats`: on CUDA those
            that are launched, or captured into a CUDA graph, from then on. None: as before; at
            first they do not.

    Raises:
        TypeError: `mesh` is not a concrete mesh, `config` not a `Config`, `stats` not a bool.
        ValueError: an unknown axis; a timeout that is not positive; a mesh of the same axes and
            sizes but another order of devices than an earlier one; slots of another size; ranks
            that do not form nodes of one size, side by side; nodes of another size than before, or
            another network.
        MemoryError: slots and rings of a group that spans nodes do not fit `Rdma.arena_bytes`.
        RuntimeError: a group that spans processes or nodes could not be set up, in all of them.

    Example:
        >>> jax_ep.initialize(jax.make_mesh((2,), ("expert",)))
    """
    if not isinstance(mesh, Mesh):
        raise TypeError(f"mesh: expected a jax.sharding.Mesh, got {type(mesh).__name__}")
    axes = axis_tuple(axis_name)
    for axis in axes:
        if axis not in mesh.axis_names:
            raise ValueError(
                f"axis_name: expected axes of the mesh {mesh.axis_names}, got {axis_name!r}"
            )
    if not isinstance(timeout_s, (int, float)) or not 0 < timeout_s < float("inf"):
        raise ValueError(f"timeout_s: expected a positive number of seconds, got {timeout_s!r}")
    if stats is not None and not isinstance(stats, bool):
        raise TypeError(f"stats: expected True, False or None, got {stats!r}")
    name = signature(mesh, axes)
    known = _groups.get(name)
    if known is not None and list(known.devices.flat) != list(mesh.devices.flat):
        raise ValueError(
            f"mesh: a group over {dict(mesh.shape)} exists with another device order: expected "
            f"{[d.id for d in known.devices.flat]}, got {[d.id for d in mesh.devices.flat]}. "
            "Call jax_ep.finalize() first."
        )
    groups = groups_of(mesh, axes)
    slots = _slots_of(groups, config)
    config = _config_of(name, config, len(groups[0]))
    on_gpus = all(d.platform in ("gpu", "cuda") for d in mesh.devices.flat)
    if on_gpus and _ffi.has_cuda():
        restart = known is None or _ffi.is_broken(name)
        _start(name, groups, float(timeout_s), restart, slots, config)
        if stats is not None:
            _ffi.record_stats(name, stats)
        _watch()
    _groups[name], _configs[name] = mesh, config
    _slot_sizes.update((_key(group), slots) for group in groups)


def groups_of(mesh: Mesh, axes: tuple[str, ...]) -> list[list[Device]]:
    """Devices of each group along `axes`, in rank order."""
    others = [axis for axis in mesh.axis_names if axis not in axes]
    order = [mesh.axis_names.index(axis) for axis in (*others, *axes)]
    num_ranks = math.prod(mesh.shape[axis] for axis in axes)
    return np.transpose(mesh.devices, order).reshape(-1, num_ranks).tolist()


def _key(group: list[Device]) -> str:
    return ",".join(str(d.id) for d in group)


def _config_of(name: str, config: Config | None, num_ranks: int) -> Config:
    """`config`, or that of an earlier call, whose nodes and network it must have."""
    known = _configs.get(name)
    if config is None and known is not None:
        return known
    config = _check.config(config)
    if config.gpus_per_node is not None and num_ranks % config.gpus_per_node:
        raise ValueError(
            f"config: expected gpus_per_node to divide the {num_ranks} ranks of a group, got "
            f"{config.gpus_per_node}"
        )
    for field in ("gpus_per_node", "rdma"):
        want, got = getattr(known or config, field), getattr(config, field)
        if want != got:
            raise ValueError(
                f"config: groups over this mesh exist with another {field}: expected {want}, got "
                f"{got}. Call jax_ep.finalize() first."
            )
    return config


def _slots_of(groups: list[list[Device]], config: Config | None) -> tuple[int, int]:
    """Tokens and bytes of a row that the slots of `groups` take."""
    known = {_slot_sizes[key] for key in map(_key, groups) if key in _slot_sizes}
    if config is None and len(known) == 1:
        return known.pop()
    config = _check.config(config)
    wanted = config.decode_tokens, config.decode_row_bytes
    for sizes in known - {wanted}:
        raise ValueError(
            "config: a group of these devices exists with slots of another size: expected "
            f"decode_tokens and decode_row_bytes {sizes}, got {wanted}. Call jax_ep.finalize() first."
        )
    return wanted


def _start(
    name: str,
    groups: list[list[Device]],
    timeout_s: float,
    restart: bool,
    slots: tuple[int, int],
    config: Config,
) -> None:
    """Make or restart every group that has a device of this process, if any process wants it."""
    me = jax.process_index()
    everyone = [d for group in groups for d in group]
    sharing = 1  # ranks on one GPU, which share its SMs
    hosts = {me: _rendezvous.host()}
    if any(d.process_index != me for d in everyone):
        _calls[name] = _calls.get(name, 0) + 1
        device = next(d.local_hardware_id for d in everyone if d.process_index == me)
        meeting = _rendezvous.Meeting(f"{name}/{_calls[name]}", everyone)
        sharing, restart, hosts = _rendezvous.agree(meeting, device, restart)
    topologies = [_nodes.topology_of(group, hosts, config.gpus_per_node) for group in groups]
    spans_nodes = any(topology.spans_nodes for topology in topologies)
    if not restart:
        return
    world = _rdma.start(everyone, hosts, config.rdma) if spans_nodes else None
    for group, topology in zip(groups, topologies, strict=True):
        if world is not None and topology.spans_nodes:
            piece = _nodes.take(world, _key(group), topology, config, slots)  # in every process
            if any(d.process_index == me for d in group):
                generation = _generation[piece.key] = _generation.get(piece.key, 0) + 1
                _nodes.start(name, group, world, piece, generation, timeout_s, sharing)
            continue
        if all(d.process_index != me for d in group):
            continue
        key = f"{_key(group)} slots {slots[0]}x{slots[1]}"  # groups of other slots live on
        devices = [d.local_hardware_id if d.process_index == me else -1 for d in group]
        _generation[key] = _generation.get(key, 0) + 1
        is_new = _ffi.make_group(key, devices, *slots)
        if -1 not in devices:
            _ffi.start_group(name, key, _generation[key], timeout_s, sharing)
            continue
        meeting = _rendezvous.Meeting(f"{key}/{_generation[key]}", group)
        _rendezvous.share_memory(meeting, key, devices, attach=is_new)
        meeting.barrier("attached")
        _ffi.start_group(name, key, _generation[key], timeout_s, sharing)
        meeting.barrier("started")  # nobody's kernel runs before every block is zero


@functools.cache
def _watch() -> None:
    """Log each failure once: under CUDA-graph replay no handler runs that could return it."""

    def look():
        said = ""
        while True:
            fault = _ffi.describe_faults()
            if fault and fault != said:
                _log.error("jax_ep: %s", fault)
            said = fault
            time.sleep(_WATCH_PERIOD_S)

    threading.Thread(target=look, name="jax_ep watchdog", daemon=True).start()


def finalize() -> None:
    """Take every group out of use; `initialize` makes new ones. Call it when no operation runs.

    Where a group spans nodes, all its processes call it together, and programs that ran on it are
    compiled anew afterwards (`jax.clear_caches()`): its memory is gone.
    """
    _rdma.stop(dead=_ffi.describe_faults())
    _groups.clear()
    _configs.clear()
    _slot_sizes.clear()
    _ffi.finalize_groups()


def check() -> None:
    """Raise the error that an operation recorded on the device, naming the slow rank, if any.

    The `xla` implementation records none: its errors are XLA's own.

    Raises:
        RuntimeError: an operation of this process failed on the device.
    """
    fault = _ffi.describe_faults()
    if fault:
        raise RuntimeError(f"jax_ep: {fault}")
