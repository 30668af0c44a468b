# SPDX-License-Identifier: Apache-2.0
"""Descriptors of memory between the processes of a group, played by threads and files in memory."""

import os
import threading
import types
from typing import Any

import pytest

from jax_ep import _rendezvous

pytestmark = pytest.mark.skipif(not hasattr(os, "memfd_create"), reason="Linux, as CUDA is")


@pytest.mark.parametrize("names", [("pool", "control"), ("pool",)], ids=str)
def test_every_rank_maps_the_others(monkeypatch, names):
    """Rank 0 is on another node: ranks 1 to 3 meet. `names`: what each exports."""
    ranks, me, barrier = (1, 2, 3), threading.local(), threading.Barrier(3)
    said, mapped, errors = {}, {rank: {} for rank in ranks}, []

    def exchange(facts):
        said[me.rank] = facts
        barrier.wait(10)
        return dict(said)

    meeting: Any = types.SimpleNamespace(processes=list(ranks), exchange=exchange)

    def export_rank(key, rank, in_pool):
        assert (key, rank, in_pool) == ("key", me.rank, 4096)
        exported = []
        for name in names:
            fd = os.memfd_create(name)
            exported.append((fd, os.write(fd, f"{name} of rank {rank}".encode())))
        return exported

    def attach_rank(key, rank, exported):
        mapped[me.rank][rank] = [os.pread(fd, size, 0).decode() for fd, size in exported]

    ffi = types.SimpleNamespace(export_rank=export_rank, attach_rank=attach_rank)
    monkeypatch.setattr(_rendezvous, "_ffi", ffi)
    monkeypatch.setattr(_rendezvous, "_pointer_into_pool", lambda device: 4096)

    def run(rank):
        me.rank = rank
        devices = [0 if r == rank else -1 for r in range(4)]
        try:
            _rendezvous.share_memory(meeting, "key", devices, attach=True)
        except Exception as error:
            errors.append(error)

    before = len(os.listdir("/proc/self/fd"))
    threads = [threading.Thread(target=run, args=(rank,)) for rank in ranks]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(20)
    assert not errors
    want = {rank: [f"{name} of rank {rank}" for name in names] for rank in ranks}
    for rank in ranks:
        assert mapped[rank] == {r: text for r, text in want.items() if r != rank}
    assert len(os.listdir("/proc/self/fd")) == before
