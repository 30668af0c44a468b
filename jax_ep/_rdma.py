# SPDX-License-Identifier: Apache-2.0
"""Life of NVSHMEM in this process: started once with all others, one arena, stopped together.

NVSHMEM ends the process on many failures and waits forever for a rank that is gone. So every step
is agreed on through JAX's key-value store: what can be known is checked before anybody starts, a
rank's failure is an error on all, and a collective call runs in a thread that can be left behind.
"""

import dataclasses
import logging
import os
import threading
from typing import Any

import jax

from . import _ffi, _rdma_checks, _rdma_environment, _rdma_library
from ._arena import Arena
from ._jax_compat import Device
from ._rendezvous import SETUP_TIMEOUT_S, Meeting
from ._types import Rdma

_log = logging.getLogger("jax_ep")

#: For each collective call of NVSHMEM; others wait twice as long for its outcome.
STEP_TIMEOUT_S = SETUP_TIMEOUT_S / 2
SMOKE_TIMEOUT_S = 10.0
#: For puts and signals on their way. A NIC gives one up after half a minute: NVSHMEM has it try 8
#: times, for 4.3 s each (`timeout` 20, `retry_cnt` 7 of its queue pairs).
QUIET_TIMEOUT_S = STEP_TIMEOUT_S


@dataclasses.dataclass
class World:
    """NVSHMEM as this process has started it. Its ranks are the processes, in order."""

    processes: tuple[int, ...]  # JAX's number of each rank's process
    rank: int
    rdma: Rdma
    variables: dict[str, str]  # of the environment, as NVSHMEM has read them
    library: _rdma_library.Library
    address: int  # of the arena on this rank
    arena: Arena
    direct: tuple[bool, ...]  # whether this GPU addresses each rank's arena, or reaches it by puts
    round: int  # of start, counted alike in every process

    def describe(self) -> list[str]:
        """What the log says of it: one line of sizes, one of variables."""
        near = sum(self.direct)
        return [
            f"NVSHMEM {'.'.join(map(str, self.library.found))}, rank {self.rank} of "
            f"{len(self.processes)}, arena of {self.arena.num_bytes} bytes, {near} ranks by P2P, "
            f"{len(self.direct) - near} by puts",
            " ".join(f"{name}={value}" for name, value in self.variables.items()),
        ]


class _State:
    world: World | None = None
    rounds = 0  # of start, counted alike in every process
    ended = ""  # how NVSHMEM ended here, which starts once in a process
    stuck = ""  # whose puts do not end; a kernel that waits for them may stay on the GPU


def world() -> World | None:
    """NVSHMEM as started here, if it is."""
    return _State.world


def start(devices: list[Device], hosts: dict[int, str], rdma: Rdma) -> World:
    """Start NVSHMEM with the processes of `devices`; once, later calls find it started.

    Collective: every process calls it with the same arguments, after `jax.devices()`.

    Args:
        devices: all that take part, one of each process.
        hosts: name of each process's host.
        rdma: as in `Config`, the same in later calls.

    Raises:
        RuntimeError: on every process, naming the rank that cannot start, and why.
    """
    processes = tuple(sorted({d.process_index for d in devices}))
    if _State.world is not None:
        _check_same(_State.world, processes, rdma)
        return _State.world
    _State.rounds += 1
    me = jax.process_index()
    mine = [d.local_hardware_id for d in devices if d.process_index == me]
    names = {p: f"process {p} on {hosts[p]}" for p in processes}
    variables = _rdma_environment.wanted(rdma, len({hosts[p] for p in processes}))
    library = _agree_to_start(devices, mine, variables, hosts, rdma, names)

    os.environ.update(variables)
    ext: Any = _ffi.rdma()
    rank, num_ranks = processes.index(me), len(processes)
    unique_id = ext.rdma_unique_id() if rank == 0 else bytes(128)
    ids = _exchange("id", devices, {"id": unique_id.hex()})
    unique_id = bytes.fromhex(ids[processes[0]]["id"])
    _together(
        "started", devices, names, lambda: ext.rdma_start(unique_id, rank, num_ranks, mine[0])
    )
    addresses: list[int] = []
    _together(
        "allocated", devices, names, lambda: addresses.append(ext.rdma_allocate(rdma.arena_bytes))
    )
    (address,) = addresses
    arena = Arena(rdma.arena_bytes)
    words = address + arena.take("smoke test", 8 * ext.rdma_smoke_words)
    _together(
        "tried", devices, names, lambda: ext.rdma_smoke(words, rank, num_ranks, 1, SMOKE_TIMEOUT_S)
    )
    _State.world = World(
        processes,
        rank,
        rdma,
        variables,
        library,
        address,
        arena,
        direct=tuple(bool(ext.rdma_peer(address, r)) for r in range(num_ranks)),
        round=_State.rounds,
    )
    for line in _State.world.describe():
        _log.info("jax_ep: %s", line)
    return _State.world


def stuck() -> str:
    """Whose puts do not end, as `give_up` was told; empty: nobody's."""
    return _State.stuck


def give_up(why: str) -> None:
    """Some process's puts do not end: from now on `check` fails, and `stop` waits for nobody."""
    _State.stuck = _State.stuck or why


def check() -> None:
    """Call it before waiting for this process's GPU, where `quiet` may have left a kernel.

    Raises:
        RuntimeError: `quiet` has failed, here or, as `give_up` was told, elsewhere.
    """
    if _State.stuck:
        raise RuntimeError(f"expected a new process, as {_State.stuck}")


def quiet() -> None:
    """Wait until puts and signals of kernels that have ended here are over at their destinations.

    A kernel ends before a NIC has delivered what it has issued. Every process calls this before
    they meet and take memory for something new, so that nothing old arrives there.

    Raises:
        RuntimeError: it took longer than `QUIET_TIMEOUT_S`; NVSHMEM is of no use here any more.
    """
    ext: Any = _ffi.rdma()
    try:
        ext.rdma_quiet(QUIET_TIMEOUT_S)
    except RuntimeError as error:
        give_up(f"puts of this one stay: {error}")
        raise


def stop(dead: str = "") -> None:
    """Stop NVSHMEM and free the arena, in all its processes together; without a world, nothing.

    Args:
        dead: why a rank may be gone. Then, or if a process does not come in time, NVSHMEM is left
            as it is until the process ends, which a warning says: stopping it would wait forever.
    """
    known, _State.world = _State.world, None
    if known is None:
        return
    ext: Any = _ffi.rdma()
    dead = dead or _State.stuck

    def free_and_stop():
        ext.rdma_release(known.address)
        ext.rdma_stop()

    if not dead:
        try:
            _barrier(known.processes)
            _bounded("stopping NVSHMEM", STEP_TIMEOUT_S, free_and_stop)
        except RuntimeError as error:
            dead = str(error)
    _State.ended = f"left behind: {dead}" if dead else "stopped by jax_ep.finalize"
    if dead:
        _log.warning("jax_ep: NVSHMEM was not stopped: %s", dead)


def _check_same(known: World, processes: tuple[int, ...], rdma: Rdma) -> None:
    """NVSHMEM reads its environment once, and its processes stay the same."""
    if processes != known.processes:
        raise RuntimeError(
            "jax_ep.initialize: NVSHMEM was started with another mesh: expected its processes "
            f"{list(known.processes)}, got {list(processes)}"
        )
    if _of_the_process(rdma) != _of_the_process(known.rdma):
        raise RuntimeError(
            "jax_ep.initialize: NVSHMEM was started with another Config: expected "
            f"{known.rdma}, got {rdma}"
        )


def _of_the_process(rdma: Rdma) -> Rdma:
    """Without what is each group's own: its rings."""
    return dataclasses.replace(rdma, ring_slots=1, ring_slot_bytes=128)


def _agree_to_start(
    devices: list[Device],
    mine: list[int],
    variables: dict[str, str],
    hosts: dict[int, str],
    rdma: Rdma,
    names: dict[int, str],
) -> _rdma_library.Library:
    """Check every process before anybody starts; raise the same error in all."""
    num_hosts = len({hosts[p] for p in names})
    library = None
    try:
        here = _rdma_checks.look(mine, variables)
        library = here.library
        found = _rdma_checks.problems(here, rdma, len(names), num_hosts)
    except Exception as error:  # others wait for this process's word
        found = [f"{type(error).__name__}: {error}"]
    if _State.ended:  # NVSHMEM's own second start in a process ends it
        found = [f"expected a new process, as NVSHMEM was {_State.ended}"]
    alike = {
        "Config.rdma": repr(rdma),
        "NVSHMEM": ".".join(map(str, library.found[:2])) if library else "",
    }
    said = _exchange("checks", devices, {"problems": found, "alike": alike})
    _rdma_checks.raise_if_any({names[p]: said[p]["problems"] for p in said})
    _rdma_checks.raise_if_any(_rdma_checks.differing({names[p]: said[p]["alike"] for p in said}))
    assert library is not None  # else there was a problem
    return library


def _exchange(step: str, devices: list[Device], facts: dict) -> dict[int, dict]:
    meeting = Meeting(f"rdma/{_State.rounds}/{step}", devices, 2 * STEP_TIMEOUT_S)
    return meeting.exchange(facts)


def _together(step: str, devices: list[Device], names: dict[int, str], function) -> None:
    """`function()` on every rank; where it fails on one, raise on all."""
    said: list[str] = []
    try:
        _bounded(f"NVSHMEM ({step})", STEP_TIMEOUT_S, function)
    except RuntimeError as error:
        said.append(str(error))
    try:
        everyone = _exchange(step, devices, {"problems": said})
        _rdma_checks.raise_if_any({names[p]: everyone[p]["problems"] for p in everyone})
    except RuntimeError as error:  # NVSHMEM has started on some
        _State.ended = f"left behind: a rank could not be {step}"
        if said and said[0] not in str(error):
            raise RuntimeError(f"{error}; here: {said[0]}") from error
        raise


def _bounded(what: str, timeout_s: float, function) -> None:
    """`function()` in a thread of its own, which is left behind if it takes too long.

    Raises:
        RuntimeError: what `function` raised, or that it took too long.
    """
    failures: list[BaseException] = []

    def run():
        try:
            function()
        except BaseException as error:
            failures.append(error)

    thread = threading.Thread(target=run, name=f"jax_ep {what}", daemon=True)
    thread.start()
    thread.join(timeout_s)
    if thread.is_alive():
        raise RuntimeError(f"{what}: expected an end within {timeout_s:g} s, got none")
    if failures:
        raise RuntimeError(str(failures[0])) from failures[0]


def _barrier(processes: tuple[int, ...]) -> None:
    """Wait for all processes of the world, for a while."""
    devices = [d for d in jax.devices() if d.process_index in processes]
    meeting = Meeting(f"rdma/{_State.rounds}", devices, STEP_TIMEOUT_S)
    try:
        meeting.barrier("stop")
    except Exception as error:
        raise RuntimeError(
            f"expected all of the processes {list(processes)} to stop within {STEP_TIMEOUT_S:g} s"
        ) from error
