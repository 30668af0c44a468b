# SPDX-License-Identifier: Apache-2.0
"""`python -m jax_ep`."""

import json
import os
import pathlib
import shutil
import subprocess
import sys

import pytest

import jax_ep
from jax_ep import _ffi, _info


def command(*args):
    return subprocess.run(
        [sys.executable, "-m", "jax_ep", *args],
        capture_output=True,
        text=True,
        timeout=120,
        cwd=os.path.dirname(os.path.dirname(jax_ep.__file__)),
    )


def test_info():
    text = command("info")
    assert text.returncode == 0, text.stderr
    assert jax_ep.__version__ in text.stdout
    facts = json.loads(command("info", "--json").stdout)
    # A build that broke silently installs as pure Python: what the machine allows must be there.
    assert facts["build"]["extension"] == bool(shutil.which("c++")), facts["missing"]
    if facts["build"]["extension"]:
        assert facts["build"]["version"] == jax_ep.__version__
    assert facts["small_batches"][0].startswith("slots up to 128 tokens per rank")
    if facts["build"]["extension"] and shutil.which("nvcc"):
        assert facts["implementations"] == ["cuda", "xla"]
        assert "bytes on each of" in text.stdout and "peer p: done[p][chunk]" in text.stdout
    else:
        assert facts["implementations"] == ["xla"]
        assert any("CUDA kernels: not in this build" in m for m in facts["missing"])


@pytest.mark.skipif(not _ffi.has_cuda(), reason="this build found no nvcc")
def test_documented_control_block_is_the_one_in_the_code():
    page = pathlib.Path(__file__).parent.parent / "docs" / "control_block.md"
    assert "\n".join(_info.control_block(8)) in page.read_text()


@pytest.mark.newest
def test_memory():
    sizes = [
        "--tokens",
        "8",
        "--hidden",
        "128",
        "--experts",
        "16",
        "--top-k",
        "2",
        "--ranks",
        "64",
        "--samples",
        "2",
    ]
    wrong = command("memory", *sizes)
    assert wrong.returncode == 2
    assert "expected a multiple of the group's 64 ranks, got 16" in wrong.stderr
    right = command("memory", *sizes, "--ranks", "4", "--capacity-factor", "1", "--json")
    assert right.returncode == 0, right.stderr
    none, bound = json.loads(right.stdout)["bounds"]
    assert (none["rows"], bound["rows"]) == (64, 16)
    assert none["arrays"]["dispatch"]["tokens"] == {
        "shape": [64, 128],
        "dtype": "bfloat16",
        "bytes": 16384,
    }


def test_unknown_command():
    result = command("nonsense")
    assert result.returncode == 2 and "invalid choice" in result.stderr
