# SPDX-License-Identifier: Apache-2.0
"""`python -m jax_ep report`: statistics files to one HTML page, and PNGs."""

import importlib.util
import sys
from pathlib import Path

from . import _report_page, _stats_file
from ._report_numbers import Summary, summarise


def main(files: list[str], out: str | None, png: bool) -> int:
    """Read the files of a run's processes, write page and pictures; returns the exit status."""
    try:
        summary = load(files)
    except (OSError, ValueError) as error:
        print(error, file=sys.stderr)
        return 2
    page = Path(out) if out else Path(files[0]).with_suffix(".html")
    if not page.absolute().parent.is_dir():
        print(f"--out: expected a file in an existing directory, got {out!r}", file=sys.stderr)
        return 2
    for path in write(summary, page, png=png):
        print(f"wrote {path}")
    if png and not _has_matplotlib():
        print("no PNGs: they need matplotlib (pip install matplotlib), and there is none")
    print(_report_page.slow_sentence(summary) if summary.operations else "no timings were recorded")
    return 0


def load(files: list[str]) -> Summary:
    """What the files of a run's processes say together.

    Raises:
        OSError, ValueError: naming the file, with expected and got.
    """
    run = _stats_file.merge([_stats_file.read(file) for file in files], files)
    try:
        return summarise(run)
    except ValueError as error:
        raise ValueError(f"{', '.join(files)}: {error}") from None


def write(summary: Summary, page: Path, *, png: bool) -> list[Path]:
    """Write the page and, if there is matplotlib, pictures beside it; returns what was written."""
    page.write_text(_report_page.page(summary), encoding="utf-8")
    if not png or not _has_matplotlib():
        return [page]
    from . import _report_pictures

    return [page, *_report_pictures.draw(summary, page)]


def _has_matplotlib() -> bool:
    return importlib.util.find_spec("matplotlib") is not None
