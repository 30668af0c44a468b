# SPDX-License-Identifier: Apache-2.0
"""The portable tests do run on GPUs where there are some, and on fewer devices than eight."""

import pathlib
import subprocess
import sys

import pytest

TESTS = pathlib.Path(__file__).parent
MARK = "\npytestmark = PORTABLE\n"
FILES = [p for p in sorted(TESTS.rglob("test_*.py")) if MARK in p.read_text()]


def run_pytest(*options):
    words = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", *map(str, options)]
    done = subprocess.run(words, capture_output=True, text=True, timeout=300, cwd=TESTS.parent)
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


def collected(*options):
    """Names of the portable files' tests, those for GPUs apart."""
    names = [n for n in run_pytest("--collect-only", *options, *FILES).splitlines() if "::" in n]
    gpu = [n for n in names if n.endswith(("[gpu]", "-gpu]"))]
    return gpu, [n for n in names if n not in gpu]


def test_the_choice_by_markers():
    """`-m "gpu or multi"` takes every test of every portable file, plain `pytest` none of them."""
    chosen, not_for_gpus = collected("-m", "gpu or multi")
    assert not not_for_gpus and len(FILES) >= 8
    for file in (*FILES, TESTS / "test_edges.py", TESTS / "multi" / "test_exchange.py"):
        name = file.relative_to(TESTS.parent).as_posix()
        assert any(test.startswith(f"{name}::") for test in chosen), name
    for_gpus, by_default = collected()
    assert not for_gpus and len(by_default) == len(chosen) >= 100


@pytest.mark.parametrize("devices", [1, pytest.param(2, marks=pytest.mark.extensive)])
def test_on_fewer_devices(devices):
    """As on that many GPUs; the whole files pass so, too: here is a part of them."""
    selection = "each_alone and 0-cpu or handle_leaves or initialize or two_axes or empty_rank"
    assert " passed" in run_pytest("--devices", devices, "-k", selection, *FILES)
