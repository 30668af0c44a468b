# SPDX-License-Identifier: Apache-2.0
"""An installation made without a C++ compiler: pure Python, and it says so."""

import json
import os
import pathlib
import shutil
import subprocess
import sys
import sysconfig

import pytest

import jax_ep

ROOT = pathlib.Path(__file__).parent.parent
EXCHANGE = """
import jax, jax_ep, numpy as np
from jax.sharding import Mesh, PartitionSpec as P

print(jax_ep.__file__)
x = np.arange(64, dtype=np.float32).reshape(2, 4, 8)
idx = np.arange(16, dtype=np.int32).reshape(2, 4, 2) * 5 % 4
want = jax_ep.reference.dispatch(x, idx, num_experts=4)

def body(x, idx):
    d = jax_ep.dispatch(x, idx, num_experts=4)
    return d.tokens, jax_ep.combine(d.tokens, d.handle)

mesh = Mesh(np.array(jax.devices()[:2]), ("expert",))
f = jax.shard_map(body, mesh=mesh, in_specs=P("expert"), out_specs=P("expert"))
tokens, combined = jax.jit(f)(x.reshape(8, 8), idx.reshape(8, 2))
np.testing.assert_array_equal(tokens, want.tokens.reshape(-1, 8))
np.testing.assert_array_equal(combined, jax_ep.reference.combine(want.tokens, want.plan).reshape(8, 8))
"""


def run(*command, **changes):
    """Output of a command, which must succeed."""
    result = subprocess.run(
        list(map(str, command)), capture_output=True, text=True, timeout=120, **changes
    )
    assert result.returncode == 0, result.stdout + result.stderr
    return result.stdout


@pytest.fixture(scope="module")
def installed(tmp_path_factory):
    """A folder with nothing but jax_ep, built with compilers that always fail."""
    folder = tmp_path_factory.mktemp("install")
    pip = (sys.executable, "-m", "pip", "--disable-pip-version-check")
    build = ["wheel", "--no-deps", "-C", f"build-dir={folder}/build", "-w", folder]
    if shutil.which("cmake"):  # else pip fetches one
        build.append("--no-build-isolation")
    no_compiler = shutil.which("false")
    run(*pip, *build, ROOT, env=os.environ | {"CC": no_compiler, "CXX": no_compiler})
    (wheel,) = folder.glob("*.whl")
    assert wheel.name == f"jax_ep-{jax_ep.__version__}-py3-none-any.whl"
    run(*pip, "install", "--no-deps", "--target", folder / "site", wheel)
    return folder / "site"


@pytest.fixture
def python(installed, tmp_path):
    """Runs Python in an empty folder; without `site`, lest an editable jax_ep comes first."""
    path = os.pathsep.join([str(installed), sysconfig.get_path("purelib")])
    env = os.environ | {"PYTHONPATH": path}
    return lambda *arguments: run(sys.executable, "-S", *arguments, cwd=tmp_path, env=env)


def test_info_says_that_the_extension_is_missing(python):
    facts = json.loads(python("-m", "jax_ep", "info", "--json"))
    assert facts["jax_ep"] == jax_ep.__version__
    assert facts["implementations"] == ["xla"] and not facts["build"]["extension"]
    (missing,) = (m for m in facts["missing"] if m.startswith("compiled extension: "))
    assert "`pip install` found no working C++ compiler" in missing


def test_it_works(python, installed):
    assert python("-c", EXCHANGE).strip() == str(installed / "jax_ep" / "__init__.py")
