# SPDX-License-Identifier: Apache-2.0
"""How processes agree to start and stop NVSHMEM, played by threads around a feigned NVSHMEM.

Every rank has its own copy of the module, so its own state; the key-value store is a dictionary.
"""

import importlib.util
import threading
import time
import types

import pytest

from jax_ep import _rdma, _rdma_library
from jax_ep._types import Rdma

LIBRARY = _rdma_library.Library((3, 3, 20), (3, 4, 5), "/lib/nvshmem.so", 13000, 0)
RDMA = Rdma(arena_bytes=2**20)


class Store:
    """The key-value store of all ranks."""

    def __init__(self, num_ranks):
        self.num_ranks, self.facts, self.changed = num_ranks, {}, threading.Condition()

    def meeting(self, rank):
        store = self

        class Meeting:
            def __init__(self, name, devices, timeout_s):
                self.name, self.timeout_s = name, timeout_s

            def exchange(self, facts):
                with store.changed:
                    said = store.facts.setdefault(self.name, {})
                    assert rank not in said, f"{self.name} twice"
                    said[rank] = facts
                    store.changed.notify_all()
                    if not store.changed.wait_for(
                        lambda: len(said) == store.num_ranks, self.timeout_s
                    ):
                        absent = sorted(set(range(store.num_ranks)) - set(said))
                        raise RuntimeError(f"process {absent[0]} did not arrive")
                return dict(sorted(said.items()))

            def barrier(self, name):
                Meeting(f"{self.name}/{name}", None, self.timeout_s).exchange({})

        return Meeting


class Nvshmem:
    """What the extension has of NVSHMEM, on one rank; remembers what was called."""

    rdma_smoke_words = 4

    def __init__(self, rank):
        self.rank, self.called, self.wrong = rank, [], {}
        self.unique_id = bytes([7] * 128)

    def rdma_unique_id(self):
        self.called.append("id")
        return self.unique_id

    def __getattr__(self, name):
        if not name.startswith("rdma_"):
            raise AttributeError(name)

        def call(*arguments):
            self.called.append(name.removeprefix("rdma_"))
            self.wrong.get(self.called[-1], lambda: None)()
            if name == "rdma_start":
                assert arguments == (self.unique_id, self.rank, 3, 0), arguments
            return 2**32

        return call


class Ranks:
    """Three processes on two hosts, one GPU each."""

    def __init__(self, step_timeout_s):
        self.step_timeout_s = step_timeout_s
        self.store = Store(3)
        self.devices = [
            types.SimpleNamespace(process_index=r, local_hardware_id=0) for r in range(3)
        ]
        self.hosts = {0: "a", 1: "a", 2: "b"}
        self.environments = [{} for _ in range(3)]
        self.nvshmem = [Nvshmem(r) for r in range(3)]
        self.problems = [[] for _ in range(3)]
        self.modules = [self._module(r) for r in range(3)]

    def _module(self, rank):
        spec = importlib.util.find_spec("jax_ep._rdma")
        module = importlib.util.module_from_spec(spec)
        spec.loader.exec_module(module)
        module.STEP_TIMEOUT_S = self.step_timeout_s
        module.Meeting = self.store.meeting(rank)
        module.os = types.SimpleNamespace(environ=self.environments[rank])
        module.jax = types.SimpleNamespace(process_index=lambda: rank, devices=lambda: self.devices)
        module._ffi = types.SimpleNamespace(rdma=lambda: self.nvshmem[rank])
        checks = _rdma._rdma_checks
        module._rdma_checks = types.SimpleNamespace(
            look=lambda devices, variables: types.SimpleNamespace(library=LIBRARY),
            problems=lambda *_, **__: list(self.problems[rank]),
            raise_if_any=checks.raise_if_any,
            differing=checks.differing,
        )
        return module

    def together(self, call):
        """`call(rank, module)` in a thread each: results or errors."""
        outcomes = [None] * 3

        def run(rank):
            try:
                outcomes[rank] = call(rank, self.modules[rank])
            except Exception as error:
                outcomes[rank] = error

        threads = [threading.Thread(target=run, args=(r,)) for r in range(3)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join(30)
            assert not thread.is_alive(), "a rank hangs"
        return outcomes

    def start(self, rdma=lambda rank: RDMA):
        return self.together(lambda r, m: m.start(self.devices, self.hosts, rdma(r)))


@pytest.fixture
def ranks():
    return Ranks(step_timeout_s=20.0)


@pytest.fixture
def hasty_ranks():
    return Ranks(step_timeout_s=1.0)


def test_start_and_stop(ranks):
    worlds = ranks.start()
    for rank, world in enumerate(worlds):
        assert (world.processes, world.rank) == ((0, 1, 2), rank)
        assert world.direct == (True, True, True) and world.address == 2**32
        assert ranks.environments[rank]["NVSHMEM_IB_ENABLE_IBGDA"] == "1"  # two hosts
    steps = ["start", "allocate", "smoke", "peer", "peer", "peer"]
    assert [n.called for n in ranks.nvshmem] == [["id", *steps], steps, steps]
    assert ranks.start() == worlds  # nothing new
    assert ranks.together(lambda r, m: m.stop()) == [None] * 3
    assert [n.called[-2:] for n in ranks.nvshmem] == [["release", "stop"]] * 3


def test_it_starts_once_in_a_process(ranks):
    ranks.start()
    others = ranks.start(lambda rank: Rdma(arena_bytes=1))
    assert all("started with another Config" in str(e) for e in others)
    ranks.together(lambda r, m: m.stop())
    for nvshmem in ranks.nvshmem:
        nvshmem.called.clear()
    said = "expected a new process, as NVSHMEM was stopped by jax_ep.finalize"
    assert all(said in str(e) for e in ranks.start())
    assert [n.called for n in ranks.nvshmem] == [[], [], []]


def test_a_rank_that_cannot_start_keeps_all_from_it(ranks):
    ranks.problems[2] = ["no NIC"]
    errors = ranks.start()
    assert all("process 2 on b: no NIC" in str(e) for e in errors)
    assert [n.called for n in ranks.nvshmem] == [[], [], []]
    assert ranks.environments == [{}, {}, {}]
    ranks.problems[2] = []
    assert [world.rank for world in ranks.start()] == [0, 1, 2]


def test_ranks_with_another_config_keep_all_from_it(ranks):
    errors = ranks.start(lambda rank: Rdma(arena_bytes=2**20 + rank))
    assert all("process 1 on a: Config.rdma: expected" in str(e) for e in errors)
    assert [n.called for n in ranks.nvshmem] == [[], [], []]


@pytest.mark.parametrize("step, said", [("start", "started"), ("smoke", "tried")])
def test_a_failure_of_one_rank_is_everybodys(ranks, step, said):
    def fail():
        raise RuntimeError("NVSHMEM: no luck")

    ranks.nvshmem[1].wrong[step] = fail
    errors = ranks.start()
    assert all("process 1 on a: NVSHMEM: no luck" in str(e) for e in errors)
    for error in ranks.start():
        assert "expected a new process" in str(error) and f"could not be {said}" in str(error)


def test_a_rank_that_hangs_is_named(hasty_ranks):
    hasty_ranks.nvshmem[2].wrong["allocate"] = lambda: time.sleep(3)
    errors = hasty_ranks.start()
    assert all("process 2 on b: NVSHMEM (allocated): expected an end" in str(e) for e in errors)


def test_puts_that_do_not_end_need_a_new_process(ranks, caplog):
    def fail():
        raise RuntimeError("NVSHMEM: expected all puts")

    ranks.start()
    ranks.nvshmem[1].wrong["quiet"] = fail
    quieted = ranks.together(lambda r, m: m.quiet())
    assert [type(outcome) for outcome in quieted] == [type(None), RuntimeError, type(None)]
    assert [n.called[-1] for n in ranks.nvshmem] == ["quiet"] * 3
    checked = ranks.together(lambda r, m: m.check())
    assert checked[0] is checked[2] is None
    assert "expected a new process" in str(checked[1]) and "all puts" in str(checked[1])
    ranks.modules[1].stop()  # does not wait for a GPU that may be busy for ever
    assert ranks.nvshmem[1].called[-1] == "quiet"
    assert "was not stopped: puts of this one stay: NVSHMEM" in caplog.text
    for module, nvshmem in zip(ranks.modules[::2], ranks.nvshmem[::2], strict=True):
        module.give_up("puts of process 1 stay")
        with pytest.raises(RuntimeError, match="expected a new process, as puts of process 1"):
            module.check()
        module.stop()  # waits for nobody
        assert nvshmem.called[-1] == "quiet"


def test_stop_leaves_nvshmem_when_a_rank_is_gone(hasty_ranks, caplog):
    hasty_ranks.start()
    hasty_ranks.together(lambda r, m: m.stop() if r else None)
    assert [n.called[-1] for n in hasty_ranks.nvshmem] == ["peer"] * 3  # nobody called stop
    assert "NVSHMEM was not stopped: expected all of the processes [0, 1, 2]" in caplog.text


def test_stop_after_a_failure_does_not_wait(ranks):
    ranks.start()
    began = time.monotonic()
    ranks.modules[0].stop(dead="rank 1 gave up on rank 2")
    assert time.monotonic() - began < 10 and ranks.nvshmem[0].called[-1] == "peer"
