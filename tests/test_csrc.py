# SPDX-License-Identifier: Apache-2.0
"""The C++ tests that need no GPU: plan arithmetic, row grants, layout of the control block."""

import pathlib
import shutil
import subprocess

import pytest

CSRC = pathlib.Path(__file__).parent.parent / "csrc"


@pytest.mark.skipif(shutil.which("c++") is None, reason="no C++ compiler")
def test_host_tests(tmp_path):
    program = tmp_path / "host_test"
    sources = [CSRC / "tests/host_test.cc", CSRC / "plan/host_plan.cc"]
    build = ["c++", "-std=c++17", "-O1", "-Wall", "-Wextra", "-Werror", *sources, "-o", program]
    subprocess.run(build, check=True, timeout=120)
    result = subprocess.run([program], capture_output=True, text=True, timeout=60)
    assert result.returncode == 0 and "host tests passed" in result.stdout, result.stdout
