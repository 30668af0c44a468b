# SPDX-License-Identifier: Apache-2.0
"""CUDA groups of one process per GPU, through `tests/launch.py`: results, and what goes wrong."""

import os
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


UNSHARED = [("PREALLOCATE", "false"), ("ALLOCATOR", "platform"), ("ALLOCATOR", "cuda_async")]


@pytest.mark.parametrize("setting", UNSHARED, ids=str)
def test_every_allocator_in_one_process(setting):
    name, value = setting
    words = [sys.executable, "-m", "pytest", "-q", "-m", "multi", "-k", "loops or gradients"]
    done = subprocess.run(
        [*words, TESTS / "test_cuda.py"],
        env=os.environ | {f"XLA_PYTHON_CLIENT_{name}": value},
        capture_output=True,
        text=True,
        timeout=180,
    )
    assert done.returncode == 0 and "3 passed" in done.stdout, done.stdout + done.stderr


def test_an_allocator_that_processes_cannot_share(tmp_path, monkeypatch):
    monkeypatch.setenv("XLA_PYTHON_CLIENT_PREALLOCATE", "false")
    program = TESTS / "multi" / "fault_program.py"
    status, logs = launch(tmp_path, "python", program, "late", deadline_s=60)
    assert status != 0
    assert any("expected XLA_PYTHON_CLIENT_PREALLOCATE unset" in log for log in logs), logs


CACHED = """
import jax, numpy as np
from jax.sharding import PartitionSpec as P
import jax_ep
auto = (jax.sharding.AxisType.Auto,)
mesh = jax.make_mesh((len(jax.devices()),), ("expert",), axis_types=auto)
jax_ep.initialize(mesh)
def f(x, idx):
    d = jax_ep.dispatch(x, idx, num_experts=8, zero_tail=True)
    return jax_ep.combine(d.tokens, d.handle)
g = jax.jit(jax.shard_map(f, mesh=mesh, in_specs=P("expert"), out_specs=P("expert")))
n = 64 * mesh.size
x = np.arange(n * 256, dtype=np.float32).reshape(n, 256)
np.testing.assert_allclose(g(x, np.arange(n)[:, None].astype(np.int32) % 8), x)
jax_ep.check()
"""


def test_warm_compilation_cache(tmp_path):
    cache = {
        "JAX_COMPILATION_CACHE_DIR": str(tmp_path),
        "JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS": "0",
        "JAX_EXPLAIN_CACHE_MISSES": "1",
    }
    entries = []
    for _ in range(2):
        command = [sys.executable, "-c", CACHED]
        subprocess.run(command, env=os.environ | cache, check=True, timeout=120)
        entries.append(sorted(p.name for p in tmp_path.iterdir() if p.name.startswith("jit_f")))
    assert entries[0] and entries[0] == entries[1]
