# SPDX-License-Identifier: Apache-2.0
"""CUDA groups of one process per GPU, through `tests/launch.py`: results, and what goes wrong."""

import pathlib
import subprocess
import sys

import pytest

pytestmark = pytest.mark.multi
TESTS = pathlib.Path(__file__).parent


def launch(tmp_path, *command, processes=2, deadline_s=120):
    """Exit status and each rank's log."""
    options = ["-n", processes, "--gpus", 2, "--deadline-s", deadline_s, "--grace-s", 25]
    words = [sys.executable, TESTS / "launch.py", *options, "--logs", tmp_path, "--", *command]
    done = subprocess.run(list(map(str, words)), capture_output=True, text=True, timeout=200)
    logs = [(tmp_path / f"rank{r}.log").read_text() for r in range(processes)]
    return done.returncode, logs


def test_exchange(tmp_path):
    status, logs = launch(tmp_path, "pytest", "-q", "-x", TESTS / "multi")
    assert status == 0, "\n".join(logs)


@pytest.mark.parametrize("scenario", ["late", "shapes"])
def test_fault_and_recovery(tmp_path, scenario):
    status, logs = launch(tmp_path, "python", TESTS / "multi" / "fault_program.py", scenario)
    assert status == 0 and all("survived" in log for log in logs), "\n".join(logs)


def test_killed_peer(tmp_path):
    _, logs = launch(tmp_path, "python", TESTS / "multi" / "fault_program.py", "killed")
    assert "survived" in logs[0], "\n".join(logs)
