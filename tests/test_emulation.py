# SPDX-License-Identifier: Apache-2.0
"""Kernels on an emulated machine: those between nodes over a network, those of small batches over
memory and a network, and those of large ones over memory, that do the worst they may."""

import pathlib
import shutil
import subprocess

import pytest

CSRC = pathlib.Path(__file__).parent.parent / "csrc"


def build(program, block_threads, sources):
    if shutil.which("nvcc") is None:
        pytest.skip("no nvcc, whose headers have CUDA's types and FP8 conversions for the host")
    sources = [program.name, "machine", "weak_memory", *sources]
    host = "-ffp-contract=off,-U_FORTIFY_SOURCE,-pthread,-Wall,-Wextra,-Werror,-Wno-unknown-pragmas"
    command = ["nvcc", "-std=c++17", "-O1", f"-DJAX_EP_EMULATION={block_threads}"]
    command += ["-Xcompiler", host, *(CSRC / f"tests/emulation/{name}.cc" for name in sources)]
    command += [CSRC / "plan/host_plan.cc", "-o", program]
    subprocess.run(command, check=True, timeout=200)
    return program


@pytest.fixture(scope="module")
def nodes_test(tmp_path_factory):
    return build(tmp_path_factory.mktemp("emulation") / "nodes_test", 64, [])


@pytest.fixture(scope="module")
def slots_test(tmp_path_factory):
    program = tmp_path_factory.mktemp("emulation") / "slots_test"
    kernels = (CSRC / "tests/emulation").glob("*slot_*.cc")  # as CMakeLists.txt has it
    return build(program, 128, [kernel.stem for kernel in kernels])


@pytest.fixture(scope="module")
def combine_test(tmp_path_factory):
    return build(tmp_path_factory.mktemp("emulation") / "combine_test", 224, ["combine"])


@pytest.fixture(scope="module")
def dispatch_test(tmp_path_factory):
    program = tmp_path_factory.mktemp("emulation") / "dispatch_test"
    return build(program, 64, ["dispatch", "plan"])


def check(program, options):
    result = subprocess.run([program, *options], capture_output=True, text=True, timeout=150)
    assert result.returncode == 0, result.stdout
    assert " 0 differences" in result.stdout or " 0 failures" in result.stdout, result.stdout


@pytest.mark.parametrize("options", [["--cases", "5"], ["--faults"]], ids=["exchange", "faults"])
def test_results_and_faults(nodes_test, options):
    check(nodes_test, options)


@pytest.mark.parametrize(
    "options",
    [
        ["--cases", "4"],
        ["--faults"],
        ["--ranks", "2", "--local", "1", "--cases", "6"],
        pytest.param(["--ranks", "4", "--local", "2", "--cases", "4"], marks=pytest.mark.extensive),
        ["--ranks", "2", "--local", "1", "--faults", "--seed", "3"],
    ],
    ids=["exchange", "faults", "two nodes", "two nodes of two", "faults of two nodes"],
)
def test_small_batches(slots_test, options):
    check(slots_test, options)


@pytest.mark.extensive  # compile for as long as they run
@pytest.mark.parametrize("options", [["--cases", "20"], ["--faults"]], ids=["exchange", "faults"])
@pytest.mark.parametrize("operation", ["combine", "dispatch"])
def test_large_batches(operation, options, request):
    check(request.getfixturevalue(f"{operation}_test"), options)
