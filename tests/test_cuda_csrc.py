# SPDX-License-Identifier: Apache-2.0
"""The C++ tests on GPUs: random exchanges against the host, many in a row, graphs, faults, sanitizers.

They are built with CMake, or taken from the folder that JAX_EP_CSRC_BUILD names.
"""

import os
import pathlib
import re
import shutil
import subprocess

import pytest

pytestmark = pytest.mark.gpu
ROOT = pathlib.Path(__file__).parent.parent
SINGLE_LAUNCH = ["--single-launch", "--small"]


@pytest.fixture(scope="session")
def build(tmp_path_factory):
    """Folder of the built programs."""
    if given := os.environ.get("JAX_EP_CSRC_BUILD"):
        return pathlib.Path(given).resolve()
    folder = tmp_path_factory.mktemp("csrc")
    options = ["-DJAX_EP_TESTS=ON", "-DJAX_EP_CUDA_ARCHITECTURES=native"]
    subprocess.run(["cmake", "-S", ROOT, "-B", folder, *options], check=True, timeout=120)
    subprocess.run(["cmake", "--build", folder, "-j"], check=True, timeout=600)
    return folder


def run(*command, timeout_s=90):
    environment = os.environ | {"CUDA_DEVICE_MAX_CONNECTIONS": "32"}  # a hardware queue each rank
    done = subprocess.run(
        list(map(str, command)), capture_output=True, text=True, timeout=timeout_s, env=environment
    )
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


@pytest.mark.parametrize("ranks", [1, 2, 4, 8])
@pytest.mark.parametrize(
    "how",
    [[], ["--single-launch"], ["--slots"]],
    ids=["streams", "single launch", "small batches"],
)
def test_exchange_on_one_gpu(build, ranks, how):
    options = ["--cases", 20, "--ranks", ranks, "--seed", 10 + ranks, *how]
    assert "20 cases, 0 differences" in run(build / "exchange_test", *options)


@pytest.mark.multi
def test_exchange_on_two_gpus(build):
    out = run(build / "exchange_test", "--cases", 60, "--devices", 2, "--seed", 3)
    assert "60 cases, 0 differences" in out


@pytest.mark.multi
def test_small_batches_on_two_gpus(build):
    options = ["--slots", "--cases", 60, "--devices", 2, "--seed", 4]
    assert "60 cases, 0 differences" in run(build / "exchange_test", *options)


def sent_over_nvlink(report: str) -> list[int]:
    """Bytes that each GPU has sent, from `nvidia-smi nvlink -gt d`."""
    gpus = report.split("GPU ")[1:]
    return [1024 * sum(map(int, re.findall(r"Data Tx: (\d+) KiB", gpu))) for gpu in gpus]


@pytest.mark.multi
def test_one_copy_of_a_token_crosses_the_link(build):
    """By the links' own counters: rows pushed, and below 1 % of routing, weights and flags."""
    counters = ["nvidia-smi", "nvlink", "-gt", "d"]
    before = sent_over_nvlink(run(*counters))
    lines = re.findall(r"rank \d: .*", run(build / "exchange_bench"))
    after = sent_over_nvlink(run(*counters))
    assert len(lines) == 2
    for rank, line in enumerate(lines):
        _, dispatches, copies, combines, partials, hidden = map(int, re.findall(r"\d+", line))
        rows = (dispatches * copies + combines * partials) * hidden * 2
        assert rows <= after[rank] - before[rank] <= 1.01 * rows


DEVICES = [1, pytest.param(2, marks=pytest.mark.multi)]


@pytest.mark.parametrize("devices", DEVICES)
@pytest.mark.parametrize("name", ["fault_test", "slot_fault_test"])
def test_faults(build, name, devices):
    options = [] if devices == 1 else ["--devices", devices]
    assert "0 failures" in run(build / name, *options, timeout_s=180)


@pytest.mark.parametrize("devices", DEVICES)
def test_nothing_is_resident_between_start_and_done(build, devices):
    assert "\n0 failures" in run(build / "in_flight_test", "--devices", devices)


@pytest.mark.parametrize(
    "devices, ranks", [(1, 2), (1, 4), pytest.param(2, 2, marks=pytest.mark.multi)]
)
def test_replays_with_changing_routing(build, devices, ranks):
    options = ["--replays", 20000, "--devices", devices, "--ranks", ranks]
    assert "20000 replays, 0 differences" in run(build / "replay_test", *options)


def test_tiny_operations_in_a_row(build):
    assert "0 failures" in run(build / "repeat_test")


@pytest.mark.parametrize(
    ("tool", "options"),
    [
        ("memcheck", []),
        ("memcheck", ["--slots"]),
        # It takes a barrier that warps of a block reach at different instructions, as those of small
        # batches do, for one that some do not reach.
        ("synccheck", []),
        # It knows neither bar.arrive nor the mbarriers of bulk copies, which the others use.
        ("racecheck", ["--without-combine"]),
    ],
)
def test_sanitizer(build, tool, options):
    if shutil.which("compute-sanitizer") is None:
        pytest.fail("expected compute-sanitizer of the CUDA toolkit")
    command = ["compute-sanitizer", "--tool", tool, "--error-exitcode", 9]
    cases = ["--cases", 12, "--seed", 5, *SINGLE_LAUNCH, *options]
    run(*command, build / "exchange_test", *cases)
