# SPDX-License-Identifier: Apache-2.0
"""How the processes of a group meet while it is set up.

Facts go through JAX's key-value store, file descriptors of device memory through Unix sockets.
"""

import contextlib
import json
import os
import pathlib
import socket
import threading
import uuid
from typing import Any

import jax
import numpy as np

from . import _ffi, _jax_compat
from ._jax_compat import Device

# Settings of XLA's allocator whose memory cannot be mapped once by other processes.
_UNSHARED = {
    "XLA_PYTHON_CLIENT_PREALLOCATE": ("false", "0"),
    "XLA_PYTHON_CLIENT_ALLOCATOR": ("platform", "cuda_async"),
}


#: How long the processes of a group wait for each other while it is set up.
SETUP_TIMEOUT_S = 120.0


class Meeting:
    """One round of exchange between the processes of some devices."""

    def __init__(self, name: str, devices: list[Device], timeout_s: float = SETUP_TIMEOUT_S):
        self.processes = sorted({d.process_index for d in devices})
        self._prefix = f"jax_ep/{name}"
        self._timeout_ms = max(1, int(timeout_s * 1000))
        self._client = _jax_compat.key_value_client()
        if self._client is None:
            raise RuntimeError(
                "jax_ep.initialize: expected jax.distributed.initialize() before it, as the mesh has "
                f"devices of {len(self.processes)} processes"
            )

    def exchange(self, facts: dict) -> dict[int, dict]:
        """Everybody's facts, by process."""
        mine = f"{self._prefix}/facts/{jax.process_index()}"
        self._client.key_value_set(mine, json.dumps(facts))
        return {p: json.loads(self._get(p)) for p in self.processes}

    def _get(self, process: int) -> str:
        try:
            return self._client.blocking_key_value_get(
                f"{self._prefix}/facts/{process}", self._timeout_ms
            )
        except Exception as error:
            raise RuntimeError(
                f"jax_ep.initialize: process {process} did not arrive within "
                f"{self._timeout_ms / 1000:g} s; expected it to call initialize with the same mesh"
            ) from error

    def barrier(self, name: str) -> None:
        """Wait for all processes of the meeting."""
        self._client.wait_at_barrier(
            f"{self._prefix}/{name}", self._timeout_ms, process_ids=self.processes
        )


def agree(meeting: Meeting, device: int, restart: bool) -> tuple[int, bool, dict[int, str]]:
    """How many processes of the meeting use one GPU, at most; whether any wants to restart; hosts."""
    mine = dict(host=host(), gpu=_ffi.device_bus_id(device), restart=restart)
    everyone = meeting.exchange(mine)
    gpus = [(facts["host"], facts["gpu"]) for facts in everyone.values()]
    restart = any(facts["restart"] for facts in everyone.values())
    hosts = {process: facts["host"] for process, facts in everyone.items()}
    return max(map(gpus.count, gpus)), restart, hosts


def share_memory(meeting: Meeting, key: str, devices: list[int], *, attach: bool) -> None:
    """Map every rank's control block and pool in every process of the meeting.

    `devices` of the whole group has -1 for ranks of other processes; one rank is here. `attach` is False if it was
    done in an earlier round.
    """
    rank = next(r for r, device in enumerate(devices) if device >= 0)
    device = devices[rank]
    address = f"jax_ep-{uuid.uuid4()}"
    facts: dict[str, Any] = dict(
        rank=rank,
        address=address,
        attach=attach,
    )
    exported = []
    if attach:
        _check_allocator()
        exported = _ffi.export_rank(key, rank, _pointer_into_pool(device))
        facts.update(bytes=[size for _, size in exported])
    with contextlib.ExitStack() as stack:
        if exported:
            fds = [fd for fd, _ in exported]
            for fd in fds:
                stack.callback(os.close, fd)
            server = stack.enter_context(_serve(address, fds, len(meeting.processes) - 1))
        everyone = meeting.exchange(facts)
        _check(everyone, facts)
        if exported:
            for other in everyone.values():
                if other["rank"] != rank:
                    _attach(key, other)
            server.join()


def _check(everyone: dict[int, dict], mine: dict) -> None:
    if any(facts["attach"] != mine["attach"] for facts in everyone.values()):
        raise RuntimeError(
            "jax_ep.initialize: a process was restarted while others were not; expected all of them "
            "to call initialize equally often"
        )


def _check_allocator() -> None:
    for name, bad in _UNSHARED.items():
        value = os.environ.get(name, "").lower()
        if value in bad:
            raise RuntimeError(
                f"jax_ep.initialize: expected {name} unset in a group of several processes, got "
                f"{value!r}: peers write into XLA's preallocated pool, mapped once"
            )


def host() -> str:
    """Name of this host, and of its boot, as hosts may share a name."""
    boot = pathlib.Path("/proc/sys/kernel/random/boot_id")
    return f"{socket.gethostname()} {boot.read_text().strip() if boot.exists() else ''}"


def _pointer_into_pool(device: int) -> int:
    """An address in the memory that XLA has taken of this device."""
    (local,) = (d for d in jax.local_devices() if d.local_hardware_id == device)
    array = jax.device_put(np.zeros(128, np.int32), local)
    return array.block_until_ready().unsafe_buffer_pointer()


class _serve:
    """Send the descriptors of one exported rank to `count` processes, in the background."""

    def __init__(self, address: str, fds: list[int], count: int):
        self._socket = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
        self._socket.bind("\0" + address)
        self._socket.listen(count)
        self._socket.settimeout(60)
        self._fds, self._count = fds, count
        self._thread = threading.Thread(target=self._send, daemon=True)

    def _send(self):
        with contextlib.suppress(OSError):  # the other side says what went wrong
            for _ in range(self._count):
                connection, _ = self._socket.accept()
                with connection:
                    socket.send_fds(connection, [b"x"], self._fds)
                    connection.recv(1)  # taken

    def join(self):
        self._thread.join()

    def __enter__(self):
        self._thread.start()
        return self

    def __exit__(self, *_):
        self._socket.close()


def _attach(key: str, other: dict) -> None:
    """Take the descriptors of another process's rank and map its memory."""
    with socket.socket(socket.AF_UNIX, socket.SOCK_STREAM) as connection:
        connection.settimeout(60)
        connection.connect("\0" + other["address"])
        _, fds, _, _ = socket.recv_fds(connection, 1, len(other["bytes"]))
        try:
            _ffi.attach_rank(key, other["rank"], list(zip(fds, other["bytes"], strict=True)))
        finally:
            for fd in fds:
                os.close(fd)
        connection.send(b"x")
