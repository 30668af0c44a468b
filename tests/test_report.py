# SPDX-License-Identifier: Apache-2.0
"""`python -m jax_ep report`: its numbers, the page's structure, and the page in a real browser."""

import dataclasses
import html
import html.parser
import pathlib
import re
import shutil
import subprocess

import numpy as np
import pytest

from jax_ep import _report_page, _report_parts, _stats_file
from jax_ep.__main__ import main
from jax_ep._report_numbers import summarise
from jax_ep._stats import OPERATIONS
from jax_ep._stats_file import Header, Run, bucket

DISPATCH = OPERATIONS.index("dispatch")
CHROMIUM = next(
    filter(None, map(shutil.which, ("chromium-headless-shell", "chromium", "chromium-browser", "google-chrome"))),
    None,
)  # fmt: skip
VOID = {"meta", "img", "line", "br"}


def a_run(ranks=4, experts=16, layers=2, steps=6, groups=1, slow=2, **header):
    """A run whose rank `slow` is late by 50 µs, and whose expert 3 of layer 1 is hot."""
    header = Header(
        "a run", layers, experts, ranks, groups, **{"devices": "GPUs", "steps": steps} | header
    )
    shapes = header.shapes()
    load = np.full(shapes["load"], 100)
    load[:, -1, 3] = 300
    dropped = np.zeros(shapes["dropped"], int)
    dropped[:1, -1, 0] = 40
    durations = np.zeros(shapes["durations"], int)
    waits = np.zeros(shapes["waits"], int)
    for device in range(header.num_devices):
        on_time = device % ranks != slow
        for _ in range(100):
            times = np.array([60_000 if on_time else 10_000, 100_000, 80_000])
            for phase, ns in enumerate([*times, times.sum()]):
                durations[DISPATCH, phase, device, bucket(ns)] += 1
        waits[DISPATCH, device] = 100 * 3_000
        if on_time and slow is not None:
            waits[DISPATCH, device, slow] = 100 * 50_000
        waits[DISPATCH, device, device % ranks] = 0
    return Run(header, load, dropped, durations, waits, waits // 50, np.zeros(shapes["lost"], int))


def without_timings(run):
    return dataclasses.replace(run, durations=0 * run.durations, waits=0 * run.waits)


def test_numbers():
    summary = summarise(a_run())
    share = 300 / ((15 * 100 + 300) / 16)
    assert summary.experts[0, 1, 3] == pytest.approx(share) and summary.experts[0, 0, 3] == 1
    assert summary.imbalance[-1, 1] == pytest.approx(600 / 450)
    assert summary.dropped[0] == 40 / (1600 + 1800) and not summary.dropped[1:].any()
    (dispatch,) = summary.operations
    assert dispatch.count == 400
    assert [phase.name for phase in dispatch.phases] == ["wait", "push", "expand", "total"]
    wait, push, _, total = dispatch.phases
    assert push.p50 == push.p99 == pytest.approx(100, rel=0.023)
    assert wait.by_device[2, 0] == pytest.approx(10, rel=0.023)
    assert total.p50 == pytest.approx(240, rel=0.023)
    np.testing.assert_allclose(dispatch.waits_us[0], [0, 3, 50, 3])


def test_every_operation_has_a_row():
    run = a_run()
    run.durations[...] = run.durations[DISPATCH]
    summary = summarise(run)
    assert [o.name for o in summary.operations] == list(OPERATIONS)
    text = " ".join(Structure(_report_page.page(summary)).text)
    assert all(f"{name} (400)" in text for name in OPERATIONS)


def test_the_slow_rank_is_named():
    slow = summarise(a_run()).slow
    assert (
        slow.device == 2
        and slow.wait_us == pytest.approx(50)
        and slow.others_us == pytest.approx(3)
    )
    assert "Rank 2 is slow" in _report_page.slow_sentence(summarise(a_run()))
    two = summarise(a_run(groups=2))
    assert _report_page.slow_sentence(two).startswith("Rank 2 of group 0 is slow")
    assert summarise(a_run(ranks=2, slow=1)).slow.device == 1
    assert summarise(a_run(slow=None)).slow is None
    assert summarise(without_timings(a_run())).slow is None
    tiny = a_run()
    tiny.waits[...] //= 100  # 0.5 µs of 240
    assert summarise(tiny).slow is None


class Structure(html.parser.HTMLParser):
    """Checks that tags nest, and notes what the page would load."""

    def __init__(self, page):
        super().__init__()
        self.open, self.loads, self.text, self.tags = [], [], [], []
        self.feed(page)
        assert self.open == []

    def handle_starttag(self, tag, attrs):
        self.tags.append(tag)
        self.loads += [value for name, value in attrs if name in ("src", "href", "xlink:href")]
        if tag not in VOID:
            self.open.append(tag)

    def handle_startendtag(self, tag, attrs):
        self.tags.append(tag)

    def handle_endtag(self, tag):
        assert self.open and self.open[-1] == tag, (tag, self.open)
        self.open.pop()

    def handle_data(self, data):
        self.text.append(data)


RUNS = {
    "full": a_run(),
    "two groups": a_run(groups=2),
    "many": a_run(ranks=32, experts=64, layers=7, steps=300, window=2, slow=None),
    "no timings": without_timings(a_run(steps=1)),
    "no steps": a_run(steps=0),
}


@pytest.mark.parametrize("name", RUNS)
def test_page_is_whole_and_loads_nothing(name):
    summary = summarise(RUNS[name])
    structure = Structure(_report_page.page(summary))
    assert all(link.startswith("data:image/png;base64,") for link in structure.loads)
    text = " ".join(structure.text)
    assert "@import" not in text and "url(" not in text and "script" not in structure.tags
    assert "nan" not in text and "Load" in text
    assert ("Drops" in text) == bool(structure.loads) == bool(summary.header.steps)
    assert ("No timings" in text) == (not summary.operations)
    cells = summary.header.num_devices * summary.header.num_ranks
    tables = (3 if summary.operations else 0) + (1 if summary.header.steps else 0)
    assert structure.tags.count("table") == tables
    if summary.operations:
        assert structure.tags.count("td") >= cells and "Who waits for whom" in text


def test_names_cannot_become_markup():
    header = dataclasses.replace(a_run().header, run="<script>x</script>&")
    page = _report_page.page(summarise(dataclasses.replace(a_run(), header=header)))
    assert "<script" not in page and html.escape("<script>x</script>&") in page


def test_colours_and_numbers():
    blue, pale, red = _report_parts._colours(np.array([0.0, 1.0, 5.0])).astype(int)
    assert blue[2] > blue[0] + 80 and red[0] > red[2] + 80 and min(pale) > 230
    for value, shown in ((0.004, "0.00"), (4.444, "4.44"), (44.44, "44.4"), (444.4, "444"), (44444, "44,444"), (np.nan, "–")):  # fmt: skip
        assert _report_parts.number(value) == shown
    assert [_report_parts._ceiling(v) for v in (0, 0.9, 1.2, 2.4, 310, 1e-3)] == [
        1,
        1,
        1.5,
        3,
        400,
        1e-3,
    ]


def write(run, path):
    _stats_file.write(path, run, replace=True)
    return str(path)


def test_command_writes_page_and_pictures(tmp_path, capsys):
    file = write(a_run(), tmp_path / "run.npz")
    assert main(["report", file]) == 0
    out = capsys.readouterr().out
    for name in ("run.html", "run-load.png", "run-waits.png", "run-phases.png"):
        assert (tmp_path / name).stat().st_size > 4000 and f"{name}\n" in out
    assert "Rank 2 is slow" in out
    assert main(["report", file, "--no-png", "--out", str(tmp_path / "other.html")]) == 0
    assert (tmp_path / "other.html").read_text() == (tmp_path / "run.html").read_text()
    assert main(["report", write(without_timings(a_run()), tmp_path / "cpu.npz")]) == 0
    assert "no timings were recorded" in capsys.readouterr().out
    assert not list(tmp_path.glob("cpu-waits*"))


def test_files_of_processes_make_one_page(tmp_path, capsys):
    run = a_run()
    files = []
    for process in (0, 1):
        header = dataclasses.replace(run.header, process=process)
        mine = (np.arange(4) // 2 == process)[None, None, :, None]
        part = dataclasses.replace(run, header=header, durations=run.durations * mine)
        files.append(write(part, tmp_path / f"{process}.npz"))
    assert main(["report", *files, "--no-png", "--out", str(tmp_path / "all.html")]) == 0
    assert "dispatch (400)" in (tmp_path / "all.html").read_text()
    other = write(a_run(experts=32, process=1), tmp_path / "other.npz")
    assert main(["report", files[0], other]) == 2
    assert "expected statistics of the same model" in capsys.readouterr().err
    assert not (tmp_path / "0.html").exists()


def test_empty_and_broken_runs_are_errors(tmp_path, capsys):
    empty = write(without_timings(a_run(steps=0)), tmp_path / "empty.npz")
    cut = tmp_path / "cut.npz"
    cut.write_bytes(pathlib.Path(empty).read_bytes()[:-30])
    for file, message in (
        (
            empty,
            "empty.npz: expected statistics of at least one step or operation, got an empty run",
        ),
        (str(cut), "cut.npz: expected a statistics file of jax_ep, got one that is truncated"),
        (str(tmp_path / "absent.npz"), "No such file"),
    ):
        assert main(["report", file]) == 2
        assert message in capsys.readouterr().err
    assert (
        main(["report", write(a_run(), tmp_path / "run.npz"), "--out", "/nonexistent/x.html"]) == 2
    )
    assert "--out: expected a file in an existing directory" in capsys.readouterr().err
    assert not list(tmp_path.glob("*.html"))


def browse(*options):
    command = [CHROMIUM, "--no-sandbox", "--disable-gpu", "--hide-scrollbars", *options]
    return subprocess.run(command, capture_output=True, text=True, timeout=120, check=True).stdout


@pytest.mark.skipif(CHROMIUM is None, reason="no chromium (apt install chromium-headless-shell)")
@pytest.mark.parametrize("width", [400, 1400])
@pytest.mark.parametrize("name", ["full", "many"])
def test_page_in_a_browser(name, width, tmp_path):
    """It renders, nothing sticks out at either width, and every chart has its size."""
    page = _report_page.page(summarise(RUNS[name]))
    probe = """<script>
    const box = e => e.getBoundingClientRect();
    const wide = [...document.querySelectorAll("body *")].filter(e =>
      !e.closest(".scroll") && !e.closest("svg") && box(e).right > innerWidth + 1);
    const flat = [...document.querySelectorAll("img, svg")].filter(e =>
      !e.closest("details") && (box(e).width < 100 || box(e).height < 10));
    document.title = `${innerWidth} ${document.documentElement.scrollWidth} ${wide.length} ` +
      `${flat.length} ${[...document.images].filter(i => i.naturalWidth == 0).length}`;
    </script></body>"""
    path = tmp_path / "page.html"
    path.write_text(page.replace("</body>", probe))
    dom = browse(f"--window-size={width},1000", "--dump-dom", f"file://{path}")
    inner, scroll, wide, flat, broken = map(
        int, re.search(r"<title>([\d ]+)</title>", dom)[1].split()
    )
    assert inner == width and scroll <= width and (wide, flat, broken) == (0, 0, 0)
    picture = tmp_path / "page.png"
    browse(f"--window-size={width},1000", f"--screenshot={picture}", f"file://{path}")
    assert picture.stat().st_size > 20_000
