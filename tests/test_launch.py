# SPDX-License-Identifier: Apache-2.0
"""The launcher keeps its promises, and the tests of `tests/multi` pass in 2 and in 4 processes."""

import fcntl
import os
import pathlib
import re
import signal
import subprocess
import sys
import time

import pytest

TESTS = pathlib.Path(__file__).parent
PREAMBLE = "import os, signal, sys, time; rank = int(os.environ['JAX_PROCESS_ID']);"


def launch(*args):
    return [sys.executable, str(TESTS / "launch.py"), *map(str, args)]


def run(*args):
    """Exit status and output; the launcher's own deadline must come first."""
    result = subprocess.run(launch(*args), capture_output=True, text=True, timeout=300)
    assert not result.stderr, result.stderr
    return result.returncode, result.stdout


def python(code):
    return "--", "python", "-c", PREAMBLE + code


def test_ranks_know_themselves(tmp_path):
    names = (
        *("JAX_COORDINATOR_ADDRESS", "JAX_NUM_PROCESSES", "JAX_PLATFORMS"),
        *("XLA_FLAGS", "PYTEST_DEBUG_TEMPROOT"),
    )
    code = f"print(rank, *map(os.environ.get, {names}))"
    status, output = run(
        "-n", 3, "--devices-per-process", 2, "--logs", tmp_path / "logs", *python(code)
    )
    assert status == 0
    logs = [(tmp_path / "logs" / f"rank{r}.log").read_text() for r in range(3)]
    assert logs[0] in output
    address = logs[0].split()[1]
    assert re.fullmatch(r"127\.0\.0\.1:\d+", address)
    for r, log in enumerate(logs):
        assert log.startswith(f"{r} {address} 3 cpu ")
        assert log.split()[-2] == "--xla_force_host_platform_device_count=2"
    scratch = {log.split()[-1] for log in logs}
    assert len(scratch) == 3 and not any(map(os.path.exists, scratch))


def test_one_gpu_each(tmp_path, monkeypatch):
    code = "print(os.environ['CUDA_VISIBLE_DEVICES'], 'JAX_PLATFORMS' in os.environ)"
    monkeypatch.delenv("JAX_PLATFORMS", raising=False)
    for visible, want in ((None, "0101"), ("6,7", "6767")):
        if visible:
            monkeypatch.setenv("CUDA_VISIBLE_DEVICES", visible)
        else:
            monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)
        assert run("-n", 4, "--gpus", 2, "--logs", tmp_path, *python(code))[0] == 0
        for r in range(4):
            assert (tmp_path / f"rank{r}.log").read_text() == f"{want[r]} False\n"


def test_a_rank_fails(tmp_path):
    code = "print('I am', rank); sys.exit([0, 3, 2][rank])"
    status, output = run("-n", 3, "--logs", tmp_path, *python(code))
    assert status == 3
    for r, want in enumerate((0, 3, 2)):
        log = tmp_path / f"rank{r}.log"
        assert f"== rank {r}, end of {log}\nI am {r}\n" in output
        assert re.search(rf"rank {r}: exit {want} after [\d.]+ s, log {log}\n", output)


def test_a_rank_hangs(tmp_path):
    code = "rank == 1 and time.sleep(100)"
    start_s = time.monotonic()
    status, output = run("-n", 2, "--deadline-s", 1, "--logs", tmp_path, *python(code))
    assert status == 124 and time.monotonic() - start_s < 10
    assert "rank 0: exit 0" in output and "rank 1: stopped at the deadline of 1 s" in output
    assert 'File "<string>", line 1 in <module>' in output  # where it hung


@pytest.mark.parametrize("number", [signal.SIGKILL, signal.SIGSEGV])
def test_a_rank_dies_by_a_signal(tmp_path, number):
    code = f"rank == 1 and os.kill(os.getpid(), {int(number)}); time.sleep(100)"
    status, output = run("-n", 2, "--grace-s", 0.3, "--logs", tmp_path, *python(code))
    assert status == 128 + number
    assert "rank 0: stopped because rank 1 had failed" in output
    assert f"rank 1: died by {number.name}" in output


def is_locked(path):
    with path.open("a") as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            return True
    return False


def wait_until(condition, timeout_s=20):
    end_s = time.monotonic() + timeout_s
    while not condition():
        assert time.monotonic() < end_s, "waited in vain"
        time.sleep(0.02)


@pytest.mark.parametrize("how", ["end", "deadline", "terminated", "interrupted"])
def test_nobody_is_left_behind(tmp_path, how):
    """Each rank starts a child that holds a lock as long as it lives."""
    child = (
        "import fcntl, pathlib, sys, time; f = open(sys.argv[1], 'w'); "
        "fcntl.flock(f, fcntl.LOCK_EX); pathlib.Path(sys.argv[1] + '.held').touch(); "
        "time.sleep(100)"
    )
    code = (
        f"import subprocess; p = {str(tmp_path)!r} + f'/lock{{rank}}'; "
        f"subprocess.Popen([sys.executable, '-c', {child!r}, p])\n"
        "while not os.path.exists(p + '.held'): time.sleep(0.02)\n"
        f"time.sleep({0 if how == 'end' else 100})"
    )
    deadline_s = 2 if how == "deadline" else 60
    command = launch("-n", 2, "--deadline-s", deadline_s, "--logs", tmp_path, *python(code))
    launcher = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT)
    locks = [tmp_path / f"lock{r}" for r in range(2)]
    wait_until(lambda: all(os.path.exists(f"{lock}.held") for lock in locks))
    if how == "terminated":
        launcher.terminate()
    elif how == "interrupted":
        launcher.send_signal(signal.SIGINT)
    launcher.communicate(timeout=30)
    want = {"end": 0, "deadline": 124, "terminated": 143, "interrupted": 130}[how]
    assert launcher.returncode == want
    wait_until(lambda: not any(map(is_locked, locks)))  # the kernel is done with the dead


@pytest.mark.parametrize(
    "processes, devices, selection",
    [
        (2, 4, "not formats and not float32 and not (every_operation and Auto)"),
        pytest.param(
            *(4, 1, "every and not capacity and not shard_map or initialize"),
            marks=pytest.mark.extensive,
        ),
    ],
)
def test_exchange_between_processes(tmp_path, processes, devices, selection):
    shape = "-n", processes, "--devices-per-process", devices, "--deadline-s", 120
    tests = "pytest", "-q", "-k", selection, TESTS / "multi"
    status, output = run(*shape, "--logs", tmp_path, "--", *tests)
    assert status == 0, output
    ends = {(tmp_path / f"rank{r}.log").read_text().splitlines()[-1] for r in range(processes)}
    counts = {re.match(r"(\d+) passed(, \d+ deselected)? in ", end)[1] for end in ends}
    assert len(counts) == 1 and int(counts.pop()) >= 3
