# SPDX-License-Identifier: Apache-2.0
"""Every number that scale_model.py takes from outside, with its unit and source.

Each is from a datasheet, a specification or a measurement, none from the figures that the model is
compared with, and none was fitted afterwards. `small_dispatch_us` and `small_combine_us`, which no
compared case uses, followed a new measurement of our kernels.
"""

import dataclasses
from typing import NamedTuple


class Input(NamedTuple):
    """A number that the model takes from outside, and where it is from."""

    value: float
    unit: str
    source: str


INPUTS = {
    # Network
    "nic_gbs": Input(
        50.0, "GB/s", "ConnectX-7 datasheet: 400 Gb/s InfiniBand, one NIC for each GPU"
    ),
    "nic_messages_us": Input(
        330.0, "messages/µs", "ConnectX-7 datasheet: 330 to 370 million a second"
    ),
    "packet_bytes": Input(4096, "B", "InfiniBand: largest MTU"),
    "packet_header_bytes": Input(26, "B", "InfiniBand: LRH 8, BTH 12, ICRC 4, VCRC 2"),
    "put_header_bytes": Input(16, "B", "InfiniBand: RETH, once for each RDMA write"),
    "signal_bytes": Input(
        54, "B", "InfiniBand: a packet with AtomicETH 28, for the signal of a put"
    ),
    "rdma_us": Input(
        8.35,
        "µs",
        "half of a round trip of 16.7 µs, put with signal by a GPU, H100 (NCCL GIN, arXiv:2511.15076)",
    ),
    # NVLink
    "h100_link_gbs": Input(
        350.0, "GB/s", "measured, 2 H100, first run; a later one: 352, docs/performance.md"
    ),
    "h200_link_gbs": Input(365.0, "GB/s", "measured, 2 H200, pushes from all SMs"),
    "h800_link_gbs": Input(160.0, "GB/s", "DeepEP's documentation: most that NVLink of H800 gives"),
    "flag_us": Input(1.3, "µs", "measured, 2 H200: half a round trip of 2.5 µs over NVLink"),
    # Memory
    "h100_dispatch_gbs": Input(
        2700.0,
        "GB/s",
        "measured, H100, 1 read : 4 writes, first run; a later one: 2685, docs/performance.md",
    ),
    "h100_combine_gbs": Input(
        2463.0,
        "GB/s",
        "measured, H100, 4 reads : 1 write, first run; a later one: 2626, docs/performance.md",
    ),
    "h200_memory_gbs": Input(4000.0, "GB/s", "measured, H200, as a copy"),
    # Our kernels
    "dispatch_sm_gbs": Input(67.0, "GB/s", "measured, 24 SMs of H100: docs/performance.md, SMs"),
    "combine_sm_gbs": Input(38.0, "GB/s", "measured, 24 SMs of H100: docs/performance.md, SMs"),
    "start_us": Input(12.0, "µs", "measured: until the first push, docs/performance.md"),
    "plan_us": Input(10.1, "µs", "measured: plan of 65536 pairs, docs/performance.md"),
    "plan_pair_ns": Input(
        0.0189, "ns", "measured: (10.1 - 8.9 µs) / (65536 - 2048 pairs), docs/performance.md"
    ),
    "small_dispatch_us": Input(
        10.5, "µs", "measured: T=128 FP8 13.2 µs less 2.7 of link, docs/performance.md"
    ),
    "small_combine_us": Input(
        8.7, "µs", "measured: T=128 13.9 µs less 5.2 of link, docs/performance.md"
    ),
    "slot_header_bytes": Input(128, "B", "ours: (rank, row) and weight of up to 8 pairs, in lines"),
    # DeepEP's kernels as we ran them: EP2 on 2 H200, T=4096, H=7168, top-8 of 256, 24 SMs
    "v1_dispatch_bf16_us": Input(354.0, "µs", "measured, DeepEP V1, 2 H200, 24 SMs"),
    "v1_dispatch_fp8_us": Input(246.0, "µs", "measured, DeepEP V1, 2 H200, 24 SMs"),
    "v1_combine_us": Input(426.0, "µs", "measured, DeepEP V1, 2 H200, 24 SMs"),
    "v1_small_dispatch_us": Input(29.3, "µs", "measured, DeepEP V1 low latency, 2 H200, T=128"),
    "v1_small_combine_us": Input(41.0, "µs", "measured, DeepEP V1 low latency, 2 H200, T=128"),
    "v2_sm_gbs": Input(
        87.5, "GB/s", "measured, 8 SMs push 350 GB/s, read and written; no run of V2 of our own"
    ),
}


def given(name: str) -> float:
    return INPUTS[name].value


@dataclasses.dataclass(frozen=True)
class Machine:
    """Rates of one GPU, GB/s; every GPU has a NIC of its own."""

    name: str
    link: float
    memory: dict[str, float]


_H100_MEMORY: dict[str, float] = {
    "dispatch": given("h100_dispatch_gbs"),
    "combine": given("h100_combine_gbs"),
}
_H200_MEMORY: dict[str, float] = dict.fromkeys(_H100_MEMORY, given("h200_memory_gbs"))
MACHINES = {
    "H100": Machine("H100", given("h100_link_gbs"), _H100_MEMORY),
    "H200": Machine("H200", given("h200_link_gbs"), _H200_MEMORY),
    "H800": Machine("H800", given("h800_link_gbs"), _H100_MEMORY),  # the memory of H100
}
