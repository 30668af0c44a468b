# SPDX-License-Identifier: Apache-2.0
"""The documentation's Python blocks run, in order, and print what their pages say they print."""

import contextlib
import io
import pathlib
import re

import pytest

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
