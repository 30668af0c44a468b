# SPDX-License-Identifier: Apache-2.0
"""The static description of one exchange (`Spec`) and the pytrees a user holds."""

import dataclasses
import re
from typing import Literal

import jax
from jax import Array

Layout = Literal["ragged", "batched"]
Implementation = Literal["cuda", "xla"]
WireKind = Literal["copy", "quantized", "dequantized"]
Operation = Literal["dispatch", "combine"]

#: Names under which results are saved by `jax.checkpoint` policies such as
#: `jax.checkpoint_policies.save_only_these_names(*jax_ep.REMAT_NAMES)`: with all of them
#: saved, the backward pass repeats no communication of the forward pass.
REMAT_NAMES = ("jax_ep.plan", "jax_ep.dispatch", "jax_ep.combine")

#: Channels that share one FP8 scale.
SCALE_BLOCK = 128


@dataclasses.dataclass(frozen=True)
class Rdma:
    """How a group that spans nodes uses the network; part of `Config`, decided by `initialize`.

    What is None is left to NVSHMEM and its environment variables. docs/multi_node.md says when to
    choose what.

    Args:
        service_level: InfiniBand service level, 0 to 15, and so the virtual lane: isolates this
            traffic from that of others. NVSHMEM_IB_SL.
        traffic_class: traffic class on RoCE, 0 to 255. NVSHMEM_IB_TRAFFIC_CLASS.
        gid_index: which GID of its port a NIC uses on RoCE. NVSHMEM_IB_GID_INDEX.
        nics: NICs to use, "name:port", with a leading "^" not to use. NVSHMEM_HCA_LIST.
        nic_map: NICs of the ranks of a node in turn, "name:port:count". NVSHMEM_HCA_PE_MAPPING.
        transport: "ibgda", where the GPU drives the NIC, or "ibrc", where a thread of the CPU does;
            None: as NVSHMEM's environment has it. Between virtual nodes of one host it is unused.
        arena_bytes: device memory of each rank that other nodes write into.
        ring_slots: messages on the way at once to all other nodes together, and from the other
            ranks of a node: each of them has its share, one at least. This and the next are a
            group's; the others are the process's, alike in all its groups.
        ring_slot_bytes: most bytes of one, a multiple of 128. A message holds T/1024 tokens at least,
            so an operation wants about T/1024 rows of H. Default: 8 rows of 16 KiB and where they
            go, enough for 8192 tokens of H=8192 in bfloat16.
    """

    service_level: int | None = None
    traffic_class: int | None = None
    gid_index: int | None = None
    nics: tuple[str, ...] = ()
    nic_map: tuple[str, ...] = ()
    transport: Literal["ibgda", "ibrc"] | None = "ibgda"
    arena_bytes: int = 2**29
    ring_slots: int = 192
    ring_slot_bytes: int = 33 * 2**12

    def __post_init__(self):
        for name, top in (("service_level", 15), ("traffic_class", 255), ("gid_index", 255)):
            n = getattr(self, name)
            if n is not None and (
                not isinstance(n, int) or isinstance(n, bool) or not 0 <= n <= top
            ):
                raise ValueError(f"Rdma.{name}: expected None or an int of 0 to {top}, got {n!r}")
        for name, form in (("nics", r"\^?[^:,^\s]+:\d+"), ("nic_map", r"[^:,^\s]+:\d+:\d+")):
            entries = getattr(self, name)
            if not isinstance(entries, tuple) or not all(
                isinstance(e, str) and re.fullmatch(form, e) for e in entries
            ):
                like = '"mlx5_0:1"' if name == "nics" else '"mlx5_0:1:2"'
                raise ValueError(
                    f"Rdma.{name}: expected a tuple of strings like {like}, got {entries!r}"
                )
        if self.nics and self.nic_map:
            raise ValueError("Rdma.nics, nic_map: expected one of them, got both")
        if self.transport not in ("ibgda", "ibrc", None):
            raise ValueError(
                f"Rdma.transport: expected 'ibgda', 'ibrc' or None, got {self.transport!r}"
            )
        for name, unit in (("arena_bytes", 1), ("ring_slots", 1), ("ring_slot_bytes", 128)):
            n = getattr(self, name)
            if not isinstance(n, int) or isinstance(n, bool) or n < 1 or n % unit:
                of = f"a multiple of {unit}" if unit > 1 else "a positive int"
                raise ValueError(f"Rdma.{name}: expected {of}, got {n!r}")
        if self.ring_slot_bytes >= 2**31:
            raise ValueError(
                f"Rdma.ring_slot_bytes: expected less than {2**31}, got {self.ring_slot_bytes}"
            )


@dataclasses.dataclass(frozen=True)
class Config:
    """How an operation uses the device; but for `gpus_per_node` it never changes a result.

    Args:
        num_sms: most thread blocks (one per SM) the CUDA kernels take; None for the default, which
            follows from memory and links and leaves 32 SMs to collectives that run beside, but in
            small batches (docs/sharp_bits.md). The `xla` implementation ignores it.
        overlap: whether XLA may run an operation beside independent compute, on the stream of its
            own collectives; docs/overlap.md. All operations of a group in a program want the same
            choice, as those of different streams could meet. The `xla` implementation ignores it.
        decode_tokens: most tokens per rank, T, that take the path for small batches on CUDA; 0
            switches it off. `initialize` sizes the slots of a group by this and the next; where it
            spans nodes they lie in `Rdma.arena_bytes`.
        decode_row_bytes: most bytes of a row, H times the item size of `x` or `y`, that take it.
        gpus_per_node: ranks that form a node, neighbours in the group; None: those of one host. A
            divisor of that splits hosts into virtual nodes, between which data goes as between
            hosts. combine rounds once more for each node, as `reference.combine(ranks_per_node=)`
            does. The `xla` implementation ignores it.
        rdma: what `initialize` tells the network, where a group spans nodes.
    """

    num_sms: int | None = None
    decode_tokens: int = 128
    decode_row_bytes: int = 16384
    overlap: bool = False
    gpus_per_node: int | None = None
    rdma: Rdma = Rdma()

    def __post_init__(self):
        for name in ("num_sms", "gpus_per_node"):
            n = getattr(self, name)
            if n is not None and (not isinstance(n, int) or isinstance(n, bool) or n < 1):
                raise ValueError(f"Config.{name}: expected None or a positive int, got {n!r}")
        for name in ("decode_tokens", "decode_row_bytes"):
            n = getattr(self, name)
            if not isinstance(n, int) or isinstance(n, bool) or n < 0:
                raise ValueError(f"Config.{name}: expected a non-negative int, got {n!r}")
        slots = self.decode_tokens * (
            self.decode_row_bytes * 33 // 32 + 512
        )  # of one source, about
        if slots >= 2**32:  # what a kernel's offsets reach
            raise ValueError(
                "Config.decode_tokens, decode_row_bytes: expected slots of less than 4 GiB for the "
                f"tokens of one rank, got {slots} bytes"
            )
        if not isinstance(self.overlap, bool):
            raise ValueError(f"Config.overlap: expected a bool, got {self.overlap!r}")
        if not isinstance(self.rdma, Rdma):
            raise ValueError(f"Config.rdma: expected a jax_ep.Rdma, got {self.rdma!r}")


@dataclasses.dataclass(frozen=True)
class Spec:
    """Everything about an exchange that is known while tracing. Hashable."""

    axis: tuple[str, ...]  # mesh axes of the group, major first
    num_ranks: int  # R
    num_experts: int  # E
    num_tokens: int  # T, per rank
    top_k: int  # K
    rows: int  # rows of the receiver's buffer, per rank
    alignment: int  # A
    layout: Layout
    zero_tail: bool
    implementation: Implementation | None
    config: Config
    group: str  # signature of the mesh axes and the group's, as `initialize` knows it
    batch_shape: tuple[int, ...]  # the leading dimensions `combine` restores
    groups: int | None = None  # global view: number of groups side by side; None in shard_map
    mesh_axes: tuple[str, ...] = ()  # global view: mesh axes over which the tokens are split
    hidden_axes: tuple[str, ...] = ()  # global view, Explicit mesh: axes that split H

    @property
    def local_experts(self) -> int:
        """E/R."""
        return self.num_experts // self.num_ranks

    @property
    def is_global(self) -> bool:
        """Whether arrays carry the leading rank axis of the global view."""
        return self.groups is not None

    @property
    def row_shape(self) -> tuple[int, ...]:
        """Shape of the receiver's buffer without H, as the user sees it on one rank."""
        if self.layout == "ragged":
            return (self.rows,)
        return (self.local_experts, self.rows // self.local_experts)


@dataclasses.dataclass(frozen=True)
class Wire:
    """What happens to a row on its way: a token's in dispatch, a partial sum in combine.

    combine knows "copy" and "quantized": what arrives there is added up, not delivered.
    """

    kind: WireKind = "copy"
    scale_format: str = "float32"


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Plan:
    """The maps between pairs and rows, for one rank (global view: a leading rank axis)."""

    pair_rank: Array  # [T, K] int32: rank that receives the pair; -1: no expert
    pair_row: Array  # [T, K] int32: its row there; -1: no expert, or dropped
    row_pair: Array  # [rows] int32: (source rank * T + token) * K + k; negative: padding, tail
    token_rows: Array  # [R*T, K] int32: my rows of (source rank, token), ascending, then -1
    token_slot: Array  # [R*T] int32: ranks below mine that the token names, its own excepted

    def arrays(self) -> tuple[Array, ...]:
        """The arrays, in the order of the fields."""
        return tuple(getattr(self, field.name) for field in dataclasses.fields(self))


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Handle:
    """The plan of one dispatch as the user holds it: opaque, a pytree of arrays."""

    plan: Plan
    spec: Spec = dataclasses.field(metadata=dict(static=True))


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Dispatched:
    """What `dispatch` returns on each rank; in the global view every array has a leading [R].

    Attributes:
        tokens: [rows, H] (batched: [E/R, C, H]); expert-major rows, padding inside segments zero.
        scales: [rows, H/128] float32 with `deliver="quantized"`, else None.
        group_sizes: [E/R] int32; kept pairs per local expert, rounded up to `expert_alignment`:
            what `jax.lax.ragged_dot` takes.
        counts: [E/R] int32; kept pairs per local expert, not rounded.
        expert_ids: [rows] int32; local expert of the row, -1 on padding and tail.
        weights: [rows] float32, 0 on padding and tail; None without `topk_weights`.
        num_dropped: [1] int32; pairs sent to this rank's experts that did not fit.
        handle: what `combine` needs.
    """

    tokens: Array
    scales: Array | None
    group_sizes: Array
    counts: Array
    expert_ids: Array
    weights: Array | None
    num_dropped: Array
    handle: Handle


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class InFlight:
    """An operation that was started and is not done: opaque, a pytree of arrays.

    What `dispatch_start` and `combine_start` return, for one `dispatch_done` or `combine_done`.
    """

    ticket: Array  # [1] int32
    operands: tuple[Array, ...]  # values named by kinds, then topk_idx (dispatch) or the plan
    operation: Operation = dataclasses.field(metadata=dict(static=True))
    kinds: tuple[str, ...] = dataclasses.field(metadata=dict(static=True))
    spec: Spec = dataclasses.field(metadata=dict(static=True))
    wire: Wire = dataclasses.field(metadata=dict(static=True))
    types: tuple[str, ...] = dataclasses.field(metadata=dict(static=True))  # of the arrays

    @property
    def values(self) -> dict[str, Array]:
        """The operands that `kinds` names."""
        return dict(zip(self.kinds, self.operands[: len(self.kinds)], strict=True))

    @property
    def routing(self) -> tuple[Array, ...]:
        """The operands after them: topk_idx, or the arrays of the plan."""
        return self.operands[len(self.kinds) :]
