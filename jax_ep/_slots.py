# SPDX-License-Identifier: Apache-2.0
"""Which path an operation takes on CUDA: `slots` for small batches, else `direct`; by shape alone.

slots    routing, rows and flags travel together into slots that the library owns, in one flight;
         the receiver makes the plan and expands the rows locally
direct   a plan first, then rows straight into the receiver's output buffer

All ranks see the same shapes, so they agree. The `xla` implementation has one path.
"""

from typing import Literal

from ._types import Config, Spec

Path = Literal["slots", "direct"]

#: R*T*K and E at most: every block of a rank works out the whole plan in its shared memory.
MAX_SLOT_PAIRS, MAX_SLOT_EXPERTS = 8192, 1024


def path(spec: Spec, hidden: int, itemsize: int) -> Path:
    """The path of rows of `hidden` channels of `itemsize` bytes, of `x` or of `y`."""
    return "slots" if why_direct(spec, hidden, itemsize) is None else "direct"


def why_direct(spec: Spec, hidden: int, itemsize: int) -> str | None:
    """What keeps an operation from the slots, with expected and got; None if nothing does."""
    config, pairs = spec.config, spec.num_ranks * spec.num_tokens * spec.top_k
    if spec.num_tokens == 0:
        return "expected at least 1 token per rank, got 0"
    limits = (
        ("tokens per rank (Config.decode_tokens)", spec.num_tokens, config.decode_tokens),
        ("bytes in a row (Config.decode_row_bytes)", hidden * itemsize, config.decode_row_bytes),
        ("pairs (R*T*K) in the group", pairs, MAX_SLOT_PAIRS),
        ("experts in the group", spec.num_experts, MAX_SLOT_EXPERTS),
    )
    for what, got, most in limits:
        if got > most:
            return f"expected at most {most} {what}, got {got}"
    return None


def rule(config: Config) -> str:
    """The rule for one `Config`, in words."""
    return (
        f"slots up to {config.decode_tokens} tokens per rank, {config.decode_row_bytes} bytes in a "
        f"row, {MAX_SLOT_PAIRS} pairs (R*T*K) and {MAX_SLOT_EXPERTS} experts in the group; else direct"
    )
