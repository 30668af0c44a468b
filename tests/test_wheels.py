# SPDX-License-Identifier: Apache-2.0
"""The wheels of a release, installed where there is no compiler, and parts that do not fit."""

import importlib.util
import json
import os
import pathlib
import subprocess
import sys
import sysconfig
import venv
import zipfile

import pytest

import jax_ep
from jax_ep import _ffi

ROOT = pathlib.Path(__file__).parent.parent
SYSTEM = {"libc", "libdl", "libgcc_s", "libm", "libpthread", "librt", "libstdc++"}
SYSTEM |= {"ld-linux-x86-64", "ld-linux-aarch64"}
LOWER = """
import jax, jax.numpy as jnp, jax_ep
from jax.sharding import AbstractMesh, AxisType, PartitionSpec as P

def body(x, idx):
    return jax_ep.dispatch(x, idx, num_experts=4, config=jax_ep.Config(decode_tokens=0)).tokens

mesh = AbstractMesh((2,), ("expert",), axis_types=(AxisType.Auto,))
f = jax.jit(jax.shard_map(body, mesh=mesh, in_specs=P("expert"), out_specs=P("expert")))
operands = jax.ShapeDtypeStruct((8, 128), jnp.bfloat16), jax.ShapeDtypeStruct((8, 2), jnp.int32)
print(f.trace(*operands).lower(lowering_platforms=("cuda",)).as_text())
"""
with_cuda = pytest.mark.skipif(not _ffi.has_cuda(), reason="this build found no nvcc")


def run(*command, **changes):
    """Output of a command, which must succeed."""
    words = list(map(str, command))
    result = subprocess.run(words, capture_output=True, text=True, timeout=300, **changes)
    assert result.returncode == 0, result.stdout + result.stderr
    return result.stdout


@pytest.fixture(scope="module")
def wheels(tmp_path_factory):
    """Those of jax-ep and its CUDA part, the latter from what this installation has compiled."""
    out = tmp_path_factory.mktemp("wheels")
    compiled = pathlib.Path(importlib.util.find_spec("jax_ep._ext").origin).parent
    options = ["--no-build-isolation", "--compiled", compiled, "--out", out]
    quickly = os.environ | {"SKBUILD_CMAKE_DEFINE": "JAX_EP_UNOPTIMIZED=ON"}
    printed = run(sys.executable, ROOT / "packaging" / "build_wheels.py", *options, env=quickly)
    return [pathlib.Path(line) for line in printed.split()]


@pytest.fixture(scope="module")
def python(wheels, tmp_path_factory):
    """Runs Python in an environment of its own: the wheels, and this one's other packages."""
    folder = tmp_path_factory.mktemp("environment")
    venv.create(folder, with_pip=False)
    own = folder / "bin" / "python"
    pip = [sys.executable, "-m", "pip", "--python", own, "install", "-q", "--no-index", "--no-deps"]
    run(*pip, *wheels)
    site = run(own, "-c", "import sysconfig; print(sysconfig.get_path('purelib'))").strip()
    pathlib.Path(site, "others.pth").write_text(
        sysconfig.get_path("purelib")
    )  # without its editable jax_ep
    empty = folder / "empty"
    empty.mkdir()
    hidden = ("PATH", "CC", "CXX", "CUDA_HOME", "PYTHONPATH")
    environment = {k: v for k, v in os.environ.items() if k not in hidden} | {"PATH": str(empty)}
    return lambda *words: run(own, *words, cwd=empty, env=environment)


@with_cuda
def test_wheels_have_what_they_should(wheels):
    plain, part = (zipfile.ZipFile(wheel) for wheel in wheels)
    version = jax_ep.__version__
    metadata = plain.read(f"jax_ep-{version}.dist-info/METADATA").decode()
    assert f'Requires-Dist: jax-ep-cuda13=={version}; extra == "cuda13"' in metadata
    assert f'Requires-Dist: jax-ep-cuda12=={version}; extra == "cuda12"' in metadata
    assert any(name.startswith("jax_ep/_ext.") for name in plain.namelist())
    files = [name for name in part.namelist() if ".dist-info/" not in name]
    package = files[0].split("/")[0]
    assert package.startswith("jax_ep_cuda") and {name.split("/")[0] for name in files} == {package}
    assert not any(name.startswith(("lib/", "nvidia/")) or "cudart" in name for name in files)


@with_cuda
@pytest.mark.parametrize("which", [0, 1])
def test_libraries_want_nothing_of_cuda(wheels, which, tmp_path):
    zipfile.ZipFile(wheels[which]).extractall(tmp_path)
    (library,) = tmp_path.glob("*/_ext.*so")
    lines = run("readelf", "-d", library).splitlines()
    asked = {line.split("[")[1].partition(".so")[0] for line in lines if "NEEDED" in line}
    assert asked and asked <= SYSTEM, asked


@with_cuda
def test_they_work_without_a_compiler(python):
    facts = json.loads(python("-m", "jax_ep", "info", "--json"))
    assert facts["implementations"] == ["cuda", "xla"] and facts["missing"] == []
    assert facts["build"]["package"].startswith("jax_ep_cuda")
    assert "jax_ep_dispatch" in python("-c", LOWER)


@with_cuda
@pytest.mark.extensive  # as test_demo.py runs it
def test_the_demo_runs(python):
    out = python("-m", "jax_ep", "demo", "--size", "small", "--steps", "3", "--out", "demo.png")
    assert "after 3 steps" in out


def part(folder, name, text):
    package = folder / name
    package.mkdir()
    (package / "__init__.py").touch()
    (package / "_ext.py").write_text(text)


GOOD = f"handlers = dict\nbuild_facts = lambda: dict(version={jax_ep.__version__!r}, cuda='12.9')"
OLD = "handlers = dict\nbuild_facts = lambda: dict(version='0.0.9', cuda='13.0')"
BROKEN = "raise ImportError('libstdc++.so.6: version not found')"


@pytest.fixture
def parts(tmp_path, monkeypatch):
    """Installs parts beside a jax_ep without CUDA, and says what of them is taken and missing."""
    load = _ffi._load
    no_own = lambda package: (None, None) if package == "jax_ep" else load(package)
    monkeypatch.setattr(_ffi, "_load", no_own)
    monkeypatch.syspath_prepend(tmp_path)

    def choose(**texts):
        for name, text in texts.items():
            part(tmp_path, name, text)
        importlib.invalidate_caches()
        ext, missing = _ffi._choose()
        return getattr(ext, "__package__", None), missing

    yield choose
    for name in [n for n in sys.modules if n.startswith("jax_ep_cuda")]:
        del sys.modules[name]


def test_a_part_that_fits(parts):
    assert parts(jax_ep_cuda12=GOOD) == ("jax_ep_cuda12", ())


def test_a_part_of_another_version(parts):
    package, missing = parts(jax_ep_cuda13=OLD)
    assert package is None
    want = f"jax-ep-cuda13: expected version {jax_ep.__version__}, as jax-ep has it, got 0.0.9"
    assert missing[0] == want and missing[-1].startswith("CUDA kernels: ")


def test_a_part_that_does_not_load(parts):
    package, missing = parts(jax_ep_cuda13=BROKEN, jax_ep_cuda12=GOOD)
    assert package == "jax_ep_cuda12"
    assert missing == ("jax-ep-cuda13: built but not loadable: libstdc++.so.6: version not found",)


def test_no_part(parts):
    package, (extension, kernels) = parts()
    assert package is None and extension.startswith("compiled extension: not built")
    assert 'pip install "jax-ep[cuda13]"' in kernels
