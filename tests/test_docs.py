# SPDX-License-Identifier: Apache-2.0
"""The documentation's Python blocks and docstrings' examples run and print what they say they print;
the site has all pages and the whole API, without a warning."""

import contextlib
import doctest
import functools
import inspect
import io
import pathlib
import re
import subprocess
import sys

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import PartitionSpec as P

import jax_ep

ROOT = pathlib.Path(__file__).parent.parent
PAGES = sorted((ROOT / "docs").glob("*.md"))
BLOCK = re.compile(r"^```(\w+)?([^\n]*)\n(.*?)^```$", re.M | re.S)


def blocks(text):
    """(language, rest of the info string, code, line number, whether only a blank precedes it)."""
    end = 0
    for match in BLOCK.finditer(text):
        line = text[: match.start()].count("\n") + 1
        yield match[1], match[2].strip(), match[3], line, not text[end : match.start()].strip()
        end = match.end()


def test_pages_are_found_and_run_something():
    assert {"quickstart", "concepts", "memory", "sharp_bits"} <= {p.stem for p in PAGES}


@pytest.fixture
def no_groups():
    """A page is a program of its own."""
    jax_ep.finalize()
    yield
    jax_ep.finalize()


@pytest.mark.parametrize("page", PAGES, ids=lambda p: p.stem)
@pytest.mark.usefixtures("no_groups")
def test_blocks_run_and_print_what_the_page_says(page, monkeypatch):
    monkeypatch.chdir(ROOT)
    namespace, printed = {"__name__": page.stem}, None
    for language, info, code, line, adjacent in blocks(page.read_text()):
        where = f"{page.name}:{line}"
        if language == "python":
            if info.startswith("no-run"):
                assert re.fullmatch(r"no-run \(.+\)", info), f"{where}: no-run needs a (reason)"
                continue
            assert not info, f"{where}: unknown mark {info!r}"
            output = io.StringIO()
            with contextlib.redirect_stdout(output):
                exec(compile("\n" * line + code, page, "exec"), namespace)
            printed = output.getvalue()
        elif language == "text" and adjacent and printed is not None:
            assert printed == code, f"{where}: the block before it printed\n{printed}"
            printed = None


@pytest.mark.parametrize("page", [*PAGES, ROOT / "README.md"], ids=lambda p: p.stem)
def test_links_lead_somewhere(page):
    for target in re.findall(r"\]\(([^)#\s]+)(?:#[^)]*)?\)", page.read_text()):
        if "://" not in target:
            assert (page.parent / target).exists(), f"{page.name}: {target} does not exist"


def public(*modules):
    """Names and objects of the API: what modules list in `__all__`, or define."""
    for module in modules:
        for name, value in vars(module).items():
            listed = getattr(module, "__all__", None)
            own = getattr(value, "__module__", None) == module.__name__ and name[0] != "_"
            if not inspect.ismodule(value) and (own if listed is None else name in listed):
                yield f"{module.__name__}.{name}", value


API = dict(public(jax_ep, jax_ep.balance, jax_ep.reference, jax_ep.routing))
FUNCTIONS = {n: f for n, f in API.items() if inspect.isfunction(f) and ".reference." not in n}
# Shown by the first half's example, or nothing to show on host devices.
WITHOUT_EXAMPLE = {"dispatch_done", "combine_start", "combine_done", "check", "finalize", "stats"}


@pytest.mark.parametrize("name", FUNCTIONS)
@pytest.mark.usefixtures("no_groups")
def test_examples_of_docstrings(name):
    names = dict(jax=jax, jnp=jnp, np=np, jax_ep=jax_ep, P=P, functools=functools)
    finder = doctest.DocTestFinder(recurse=False)
    (test,) = finder.find(FUNCTIONS[name], name, module=False, globs=names)
    assert bool(test.examples) != (name.removeprefix("jax_ep.") in WITHOUT_EXAMPLE)
    output = io.StringIO()
    result = doctest.DocTestRunner().run(test, out=output.write)
    assert not result.failed, output.getvalue()


def test_site(tmp_path):
    command = [sys.executable, "-m", "sphinx", "-q", "-W", "--keep-going", ROOT / "docs", tmp_path]
    built = subprocess.run(command, capture_output=True, text=True, timeout=300)
    assert built.returncode == 0, built.stderr
    built_pages = {path.stem for path in tmp_path.glob("*.html")}
    assert built_pages >= {page.stem for page in PAGES} - {"README"}
    api = (tmp_path / "api.html").read_text()
    missing = [name for name in API if f'id="{name}"' not in api]
    assert not missing and len(API) > 30
