# SPDX-License-Identifier: Apache-2.0
"""How many SMs the CUDA kernels take when `Config.num_sms` is None, in words; the rule is in C++."""

from . import _ffi


def rule() -> list[str]:
    """The rule; nothing without the extension."""
    numbers = _ffi.default_sms_numbers()
    if numbers is None:
        return []
    dispatch, combine, us, spare, left = numbers
    return [
        "dispatch, combine: as many as keep up with the memory, or with the links where these bind, at "
        f"{dispatch:g} and {combine:g} GB/s through memory an SM and {us:g} us a sum, times {spare:g}; "
        f"with FP8 on the wire, between nodes, and plans: all but {left}, which others keep; "
        "small batches: all"
    ]


def of_gpu(
    name: str, speeds: tuple[int, float, float], num_ranks: int, top_k: int, row_bytes: int
) -> str:
    """What the rule gives on a GPU of `(SMs, GB/s of memory, GB/s of links)`."""
    sms, memory_gbs, link_gbs = speeds
    memory, link = (f"{gbs:.0f} GB/s" if gbs else "unknown" for gbs in (memory_gbs, link_gbs))
    chosen = _ffi.default_sms(speeds, num_ranks, top_k, row_bytes)
    return (
        f"{name}: {sms} SMs, memory {memory}, links {link}: dispatch {chosen['dispatch']}, "
        f"combine {chosen['combine']} (R={num_ranks}, K={top_k}, rows of {row_bytes} bytes)"
    )
