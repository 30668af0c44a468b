# SPDX-License-Identifier: Apache-2.0
"""Dependencies point down only, and each boundary is one module."""

import pathlib
import re

ROOT = pathlib.Path(__file__).parent.parent


def sources(folder, *endings):
    return [p for p in (ROOT / folder).rglob("*") if p.suffix in endings]


def offenders(paths, pattern, allowed=()):
    return [p.name for p in paths if p.name not in allowed and re.search(pattern, p.read_text())]


def test_only_ffi_imports_the_extension():
    python = sources("jax_ep", ".py")
    assert len(python) > 10
    assert offenders(python, r"\b_ext\b", {"_ffi.py"}) == []


def test_only_jax_compat_touches_jax_internals_and_versions():
    python = sources("jax_ep", ".py") + sources("examples", ".py")
    assert offenders(python, r"jax\._src", {"_jax_compat.py"}) == []
    assert offenders(python, r"jax\.__version", {"_jax_compat.py", "_info.py"}) == []


def test_csrc_knows_neither_xla_nor_python():
    code = sources("csrc", ".cu", ".cuh", ".cc", ".h")
    assert offenders(code, r"xla/|nanobind|Python\.h|\.\./xla_ffi") == []
    assert offenders(code, r"\basm\b", {"ptx.cuh"}) == []


def test_xla_ffi_has_no_kernels():
    code = sources("xla_ffi", ".cc", ".h", ".cu")
    assert code and offenders(code, r"__global__|<<<") == []


def test_library_does_not_import_its_tests_or_examples():
    python = [p for p in sources("jax_ep", ".py") if not p.name.startswith("_demo")]
    assert offenders(python, r"^\s*(from|import) (tests|examples|flax|optax)\b") == []
