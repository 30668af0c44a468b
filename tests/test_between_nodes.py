# SPDX-License-Identifier: Apache-2.0
"""The kernels between nodes on an emulated machine, over a network that does the worst it may."""

import pathlib
import shutil
import subprocess

import pytest

CSRC = pathlib.Path(__file__).parent.parent / "csrc"


@pytest.fixture(scope="module")
def nodes_test(tmp_path_factory):
    if shutil.which("nvcc") is None:
        pytest.skip("no nvcc, whose headers have CUDA's types and FP8 conversions for the host")
    program = tmp_path_factory.mktemp("emulation") / "nodes_test"
    sources = [CSRC / "tests/emulation/nodes_test.cc", CSRC / "tests/emulation/machine.cc"]
    host = "-ffp-contract=off,-U_FORTIFY_SOURCE,-pthread,-Wall,-Wextra,-Werror,-Wno-unknown-pragmas"
    build = ["nvcc", "-std=c++17", "-O1", "-DJAX_EP_EMULATION", "-Xcompiler", host]
    build += [*sources, CSRC / "plan/host_plan.cc", "-o", program]
    subprocess.run(build, check=True, timeout=200)
    return program


@pytest.mark.parametrize("options", [["--cases", "8"], ["--faults"]], ids=["exchange", "faults"])
def test_results_and_faults(nodes_test, options):
    result = subprocess.run([nodes_test, *options], capture_output=True, text=True, timeout=150)
    assert result.returncode == 0, result.stdout
    assert " 0 differences" in result.stdout or " 0 failures" in result.stdout, result.stdout
