# SPDX-License-Identifier: Apache-2.0
"""Between virtual nodes, in processes of one rank each: NVSHMEM's life, dispatch and combine.

All are on one host, so ranks reach each other by P2P. No NIC is involved.
"""

import shutil
import subprocess

import pytest
from test_cuda_processes import TESTS, launch

from jax_ep import _rdma_library

pytestmark = pytest.mark.multi
PROGRAM = TESTS / "multi" / "rdma_program.py"


@pytest.fixture(autouse=True)
def library():
    try:
        _rdma_library.open_library()
    except RuntimeError as missing:
        pytest.skip(str(missing))


@pytest.mark.parametrize("scenario", ["works", "refused"])
def test_all_live(tmp_path, scenario):
    status, logs = launch(tmp_path, "python", PROGRAM, scenario, deadline_s=90)
    assert status == 0 and all("survived" in log for log in logs), "\n".join(logs)


@pytest.mark.parametrize("scenario", ["killed", "killed_at_start"])
def test_the_others_survive_a_death(tmp_path, scenario):
    _, logs = launch(tmp_path, "python", PROGRAM, scenario, deadline_s=90)
    assert "survived" in logs[0], "\n".join(logs)


def mps_runs():
    """Whether processes share a GPU at one time: NVIDIA's MPS answers."""
    if shutil.which("nvidia-cuda-mps-control") is None:
        return False
    asked = subprocess.run(
        ["nvidia-cuda-mps-control"], input="get_server_list", capture_output=True, text=True
    )
    return asked.returncode == 0


def nodes(tmp_path, num_nodes, node_ranks, *steps):
    """Exit status and each rank's log of `nodes_program.py`."""
    processes = num_nodes * node_ranks
    if processes > 2 and not mps_runs():
        pytest.skip("ranks that share a GPU need MPS: nvidia-cuda-mps-control -d")
    command = ("python", TESTS / "nodes_program.py", "--gpus-per-node", node_ranks, *steps)
    return launch(tmp_path, *command, processes=processes, deadline_s=180)


@pytest.mark.parametrize("num_nodes, node_ranks", [(2, 1), (2, 2), (4, 2), (2, 4)])
def test_operations(tmp_path, num_nodes, node_ranks):
    steps = ["exchange", "gradients", "errors", "faults", "again"]
    status, logs = nodes(tmp_path, num_nodes, node_ranks, *steps)
    assert status == 0 and all("checks passed" in log for log in logs), "\n".join(logs)


@pytest.mark.parametrize("num_nodes, node_ranks", [(2, 1), (2, 2), (4, 2), (2, 4)])
def test_small_batches(tmp_path, num_nodes, node_ranks):
    status, logs = nodes(tmp_path, num_nodes, node_ranks, "decode")
    assert status == 0 and all("checks passed" in log for log in logs), "\n".join(logs)


def test_both_paths_at_full_size(tmp_path):
    status, logs = nodes(tmp_path, 2, 1, "timing")
    assert status == 0 and "timing ratio" in logs[0], "\n".join(logs)


def test_a_killed_rank(tmp_path):
    _, logs = nodes(tmp_path, 2, 1, "killed")
    assert "survived" in logs[0], "\n".join(logs)
