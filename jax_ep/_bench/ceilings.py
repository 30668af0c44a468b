# SPDX-License-Identifier: Apache-2.0
"""What the link and the memory can do, measured in the run that is held against it.

Link: every rank sends to the next, all at once, by XLA's `ppermute` and by copies from device to
device (a copy engine, on GPUs); the faster counts. Memory: what is read is written to four places,
which counts for dispatch; four parts are read and their sum written, which counts for combine; and a
plain pass beside them. Arrays are far larger than any cache.
"""

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax

from .timing import Ceilings, Timer, take_turns

_TURNS, _BLOCK = 6, 512  # launches one after another, which hides their gaps; floats


def measure(timer: Timer, megabytes: int) -> Ceilings:
    """GB/s with arrays of so many MiB per rank."""
    R, size = timer.R, megabytes * 2**20
    big = timer.put(np.ones((R * size // 4 // _BLOCK, 1, _BLOCK), np.float32))

    def gbs(moved, f):  # f's result is the program's, so that no compiler leaves some out
        program = timer.mapped(f)
        (times,) = take_turns(lambda: [program(big) for _ in range(_TURNS)][-1])
        return moved * _TURNS / float(np.median(times)) / 1e9

    def write(places):  # one fused kernel: what it reads stays in cache for the other places
        return lambda x: x + jnp.arange(1.0, 1 + places)[:, None]

    def read(x):
        parts = x.reshape(4, -1)
        return parts[0] + parts[1] + parts[2] + parts[3]

    ppermute = copies = None
    if R > 1:
        ring = [(r, (r + 1) % R) for r in range(R)]
        ppermute = gbs(size, lambda x: lax.ppermute(x, "expert", ring))
        shards = {shard.device: shard.data for shard in big.addressable_shards}
        sources = [shards[device] for device in timer.devices] * _TURNS
        targets = [*timer.devices[1:], timer.devices[0]] * _TURNS
        (times,) = take_turns(lambda: jax.device_put(sources, targets))
        copies = size * _TURNS / float(np.median(times)) / 1e9
    return Ceilings(
        ppermute=ppermute,
        copies=copies,
        read_1_write_4=gbs(5 * size, write(4)),
        read_4_write_1=gbs(1.25 * size, read),
        read_1_write_1=gbs(2 * size, write(1)),
    )


def describe(ceilings: Ceilings) -> str:
    """One line, which says what counts."""
    memory = (
        f"memory {ceilings.read_1_write_4:.0f} GB/s (1 read : 4 writes; {ceilings.read_4_write_1:.0f} "
        f"at 4 : 1, {ceilings.read_1_write_1:.0f} at 1 : 1)"
    )
    if ceilings.ppermute is None:
        return f"ceilings: no link, {memory}"
    ways = f"copies between devices {ceilings.copies:.0f}, ppermute {ceilings.ppermute:.0f}"
    return f"ceilings: link {ceilings.link:.0f} GB/s (the faster of {ways}), {memory}"
