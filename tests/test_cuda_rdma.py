# SPDX-License-Identifier: Apache-2.0
"""NVSHMEM's life in processes of one GPU each: start, stop, and what goes wrong.

All are on one host, so ranks reach each other by P2P. No NIC is involved.
"""

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
