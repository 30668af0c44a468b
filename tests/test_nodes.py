# SPDX-License-Identifier: Apache-2.0
"""Groups that span nodes, without GPUs: their settings, pieces of the arena, and steps of a start."""

import itertools
import pathlib
import threading
import time
import types
from typing import Any

import jax
import numpy as np
import pytest
from jax.sharding import Mesh

import jax_ep
from jax_ep import _ffi, _info, _nodes
from jax_ep._arena import ALIGNMENT, Arena
from jax_ep._topology import Topology

needs_layout = pytest.mark.skipif(not _ffi.has_cuda(), reason="the layout is in the CUDA build")


def test_a_group_keeps_its_nodes_and_network():
    mesh = Mesh(np.array(jax.devices()[:4]), ("nodes",))
    two = jax_ep.Config(gpus_per_node=2)
    jax_ep.initialize(mesh, "nodes", config=two)
    jax_ep.initialize(mesh, "nodes")  # as before
    with pytest.raises(ValueError, match="another gpus_per_node: expected 2, got 1.*finalize"):
        jax_ep.initialize(mesh, "nodes", config=jax_ep.Config(gpus_per_node=1))
    other = jax_ep.Config(gpus_per_node=2, rdma=jax_ep.Rdma(ring_slots=3))
    with pytest.raises(ValueError, match="another rdma.*ring_slots=192.*ring_slots=3"):
        jax_ep.initialize(mesh, "nodes", config=other)
    jax_ep.finalize()
    jax_ep.initialize(mesh, "nodes", config=other)
    jax_ep.finalize()


def world(processes=(0, 1, 2, 3), arena_bytes=2**30) -> Any:
    return types.SimpleNamespace(
        processes=processes, address=2**40, arena=Arena(arena_bytes), round=1, rank=0
    )


SLOTS = (128, 16384)


@needs_layout
def test_pieces_are_alike_in_all_processes():
    topology, config = Topology(num_nodes=2, ranks_per_node=1, num_hosts=2), jax_ep.Config()
    here, there = world(), world()
    groups = ["0,1", "2,3"]  # each process is in one of them
    pieces = [
        [_nodes.take(w, group, topology, config, SLOTS) for group in groups] for w in (here, there)
    ]
    assert pieces[0] == pieces[1]
    first, second = pieces[0]
    rings = config.rdma.ring_slots, config.rdma.ring_slot_bytes
    *_, (_, _, at, size) = _ffi.piece_layout(2, 1, rings, SLOTS)
    assert second.offset - first.offset == -(-(at + size) // ALIGNMENT) * ALIGNMENT
    assert _nodes.take(here, "0,1", topology, config, SLOTS) == first  # a restart
    fewer = jax_ep.Config(rdma=jax_ep.Rdma(ring_slots=1))
    small = _nodes.take(here, "0,1", topology, fewer, SLOTS)
    assert small.offset > second.offset and small.rings[0] == 1
    none = _nodes.take(here, "0,1", topology, fewer, (0, 16384))
    assert none.offset > small.offset and none.slots == (0, 16384)


@needs_layout
def test_a_piece_that_does_not_fit():
    topology, config = Topology(num_nodes=8, ranks_per_node=8, num_hosts=8), jax_ep.Config()
    message = r"raise Rdma.arena_bytes, or lower Config.decode_tokens .* \d+ of these bytes are"
    with pytest.raises(MemoryError, match=message):
        _nodes.take(world(arena_bytes=2**27), "many", topology, config, SLOTS)


@needs_layout
def test_slots_and_rings_follow_the_control_block():
    fields = _ffi.piece_layout(8, 4, (4, 1024), (32, 2048))
    control = sum(size for *_, size in _ffi.control_layout(8))
    assert control <= fields[0][2] < control + 128 * len(fields)
    sizes = {name: size for name, _, _, size in fields}
    for (_, _, at, size), (_, _, next_at, _) in itertools.pairwise(fields):
        assert at + size <= next_at < at + size + 128
    assert sizes["slots"] == _ffi.slot_bytes(8, 32, 2048) == 2 * sizes["outboxes"]
    assert (sizes["send"], sizes["receive"], sizes["partials"]) == (4096, 4096, 3 * 2048)
    config = jax_ep.Config(rdma=jax_ep.Rdma(ring_slots=4, ring_slot_bytes=1024))
    lines = _info.between_nodes(config, node_ranks=4)
    assert lines[0].endswith("bytes on each of 2 nodes of 4 ranks")
    assert [line.split(":")[0] for line in lines[1:]] == list(sizes)


@needs_layout
def test_documented_memory_is_that_in_the_code():
    page = pathlib.Path(__file__).parent.parent / "docs" / "multi_node.md"
    assert "\n".join(_info.between_nodes(jax_ep.Config(), node_ranks=8)) in page.read_text()


class Processes:
    """Four processes, a rank each, in two nodes of two; threads that meet in a dictionary."""

    def __init__(self, monkeypatch):
        self.facts, self.changed = {}, threading.Condition()
        self.log = {p: [] for p in range(4)}
        self.broken = {}  # what a process fails to make
        self.stuck = {}  # why a process's GPU cannot be waited for
        self.given_up = {p: [] for p in range(4)}
        self.unquiet = {}  # why a process's puts do not end
        self.quiet = set()  # processes whose puts have ended
        self.offsets = dict.fromkeys(range(4), 512)
        me = threading.local()
        processes = self

        class Meeting:
            def __init__(self, name, devices):
                self.name, self.processes = name, sorted(d.process_index for d in devices)

            def exchange(self, facts):
                return self._meet(self.name, facts)

            def barrier(self, name):
                self._meet(f"{self.name} {name}", {})
                processes.log[me.rank].append(name)

            def _meet(self, name, facts):
                said = processes.facts.setdefault(name, {})
                with processes.changed:
                    said[me.rank] = facts
                    processes.changed.notify_all()
                    everyone = lambda: len(said) == len(self.processes)
                    assert processes.changed.wait_for(everyone, 10), f"{name}: alone"
                return dict(sorted(said.items()))

        def share_memory(meeting, key, devices, *, attach):
            assert meeting.processes == [me.rank // 2 * 2, me.rank // 2 * 2 + 1] and attach
            assert [r for r, device in enumerate(devices) if device >= 0] == [me.rank]
            processes.log[me.rank].append("shared")

        def make(key, devices, address, node_ranks, elements, rings, slots):
            assert (node_ranks, elements) == (2, [3, 2, 1, 0]), elements
            assert (rings, slots) == ((16, 1280), (128, 16384))
            assert address == 2**40 + processes.offsets[me.rank]
            if me.rank in processes.broken:
                raise RuntimeError(processes.broken[me.rank])
            processes.log[me.rank].append("made")
            return True

        def check():
            if me.rank in processes.stuck:
                raise RuntimeError(processes.stuck[me.rank])

        def quiet():
            if me.rank in processes.unquiet:
                processes.stuck[me.rank] = processes.unquiet[me.rank]
                raise RuntimeError(processes.unquiet[me.rank])
            processes.log[me.rank].append("quiet")
            time.sleep(0.1 * me.rank)  # the others wait
            processes.quiet.add(me.rank)

        def started(*args):
            assert args == ("signature", "key", 2, 3.0, 1)
            assert processes.quiet == {0, 1, 2, 3}
            processes.log[me.rank].append("begun")

        ffi = types.SimpleNamespace(make_node_group=make, start_group=started)
        meet = types.SimpleNamespace(Meeting=Meeting, share_memory=share_memory)
        monkeypatch.setattr(_nodes, "_ffi", ffi)
        rdma = types.SimpleNamespace(
            check=check,
            quiet=quiet,
            stuck=lambda: processes.stuck.get(me.rank, ""),
            give_up=lambda why: processes.given_up[me.rank].append(why),
        )
        monkeypatch.setattr(_nodes, "_rdma", rdma)
        monkeypatch.setattr(_nodes, "_rendezvous", meet)
        monkeypatch.setattr(_nodes, "jax", types.SimpleNamespace(process_index=lambda: me.rank))
        self.me = me

    def start(self):
        """The error of each process, or None."""
        devices: list[Any] = [
            types.SimpleNamespace(process_index=p, local_hardware_id=0) for p in range(4)
        ]
        errors: list[Any] = [None] * 4

        def run(rank):
            self.me.rank = rank
            piece = _nodes.Piece("key", self.offsets[rank], 2, (16, 1280), SLOTS)
            try:
                _nodes.start("signature", devices, world((3, 2, 1, 0)), piece, 2, 3.0, 1)
            except Exception as error:
                errors[rank] = error

        threads = [threading.Thread(target=run, args=(rank,)) for rank in range(4)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join(30)
        return errors


def test_start(monkeypatch):
    processes = Processes(monkeypatch)
    assert processes.start() == [None] * 4
    assert set(map(tuple, processes.log.values())) == {
        ("made", "quiet", "shared", "attached", "begun", "started")
    }
    assert not any(processes.given_up.values())


def test_what_goes_wrong_in_one_is_an_error_in_all(monkeypatch):
    processes = Processes(monkeypatch)
    processes.broken[2] = "expected NVLink between all GPUs of a node"
    for error in processes.start():
        assert isinstance(error, RuntimeError) and "process 2: expected NVLink" in str(error), error
    for wrong in ("stuck", "unquiet"):
        processes = Processes(monkeypatch)
        getattr(processes, wrong)[3] = "NVSHMEM: expected all puts to be over"
        for error in processes.start():
            assert isinstance(error, RuntimeError) and "process 3: NVSHMEM" in str(error), error
        assert ("made" in processes.log[3]) == (wrong == "unquiet")
        assert list(processes.given_up.values()) == [["puts of process 3 stay"]] * 4
    processes = Processes(monkeypatch)
    processes.offsets[1] = 1024
    for error in processes.start():
        assert "process 1: offset: expected 512, as on process 0, got 1024" in str(error), error
