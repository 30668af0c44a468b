# SPDX-License-Identifier: Apache-2.0
"""Parts of the report's page: charts of HTML and inline SVG, legible at any width.

Labels are HTML beside the plots, so that they keep their size where plots shrink.
"""

import base64
import html
import struct
import zlib

import numpy as np

from ._report_numbers import MEASURABLE_US

# Load over an equal share: blue below 1, red above; pale where all is well.
_STOPS = np.array([[33, 90, 160], [139, 180, 217], [244, 243, 239], [232, 152, 120], [176, 42, 36]])
HOTTEST = 2.0  # and above
_LINES = ("#3b6fd4", "#c2570c", "#2f855a", "#8a4fbf", "#b8860b", "#0e7c86", "#c0356f", "#5b6470")


def escape(text) -> str:
    """Text as HTML."""
    return html.escape(str(text))


def section(title: str, finding: str, *parts: str) -> str:
    """A part of the page: what it is about, what it found, then how that looks."""
    return (
        f"<section><h2>{escape(title)}</h2><p class=finding>{finding}</p>{''.join(parts)}</section>"
    )


def tiles(entries: list[tuple[str, str, str]]) -> str:
    """The few numbers at the top: label, value, remark."""
    each = (
        f"<div class=tile><span class=label>{escape(label)}</span>"
        f"<span class=value>{escape(value)}</span><span class=remark>{escape(remark)}</span></div>"
        for label, value, remark in entries
    )
    return f"<div class=tiles>{''.join(each)}</div>"


def heat_map(title: str, rows: np.ndarray, steps: int, row_name: str) -> str:
    """Shares `[windows, rows]` over time: time to the right, a row for each expert or rank."""
    count = rows.shape[1]
    picture = _png(_colours(rows.T))
    few = np.unique(np.linspace(0, count - 1, min(count, 8)).round().astype(int))
    labels = [(f"{(row + 0.5) / count:.2%}", str(row)) for row in few]
    height = min(max(14 * count, 56), 224)
    what = f"{title}: load of {count} {row_name}s over {steps} steps, over an equal share"
    plot = f'<img src="{picture}" alt="{escape(what)}" style="height:{height}px">'
    return _framed(title, plot, labels, _step_labels(steps), row_name)


def heat_legend() -> str:
    """What the colours of `heat_map` mean."""
    ramp = _png(_colours(np.linspace(0, HOTTEST, 64)[None]))
    return (
        "<div class=legend><span>idle</span>"
        f'<img src="{ramp}" alt="colours from idle, blue, over an equal share, pale, to twice '
        'that, red"><span>2 × and more</span><span class=middle>an equal share is pale</span></div>'
    )


def line_chart(title: str, lines: np.ndarray, names: list[str], steps: int, unit: str) -> str:
    """Lines `[windows, lines]` over time, from zero up."""
    top = _ceiling(float(np.nanmax(lines, initial=0)))
    x = np.linspace(0, 1000, 2 * len(lines) + 1)[1::2]  # middles of the windows
    if len(lines) == 1:
        x, lines = np.array([0, 1000]), np.repeat(lines, 2, 0)
    drawn = []
    for number, (name, line) in enumerate(zip(names, lines.T, strict=True)):
        points = " ".join(
            f"{a:.1f},{200 - 200 * b / top:.1f}" for a, b in zip(x, line, strict=True)
        )
        colour = _LINES[number % len(_LINES)]
        drawn.append(
            f'<polyline points="{points}" stroke="{colour}"><title>{escape(name)}</title></polyline>'
        )
    grid = "".join(f'<line x1="0" x2="1000" y1="{y}" y2="{y}"/>' for y in (0, 50, 100, 150, 200))
    plot = (
        f'<svg viewBox="0 0 1000 200" preserveAspectRatio="none" role="img" '
        f'aria-label="{escape(title)}"><g class=grid>{grid}</g>{"".join(drawn)}</svg>'
    )
    ticks = [(f"{1 - part:.0%}", f"{part * top:.3g}{unit}") for part in (0, 0.5, 1)]
    shown = names if 1 < len(names) <= len(_LINES) else []
    keys = "".join(
        f'<span><i style="background:{_LINES[n]}"></i>{escape(name)}</span>'
        for n, name in enumerate(shown)
    )
    return _framed(title, plot, ticks, _step_labels(steps)) + f"<div class=legend>{keys}</div>"


def matrix(title: str, values: np.ndarray, rows: list[str], most: float) -> str:
    """A heat map of waits `[N, R]` in µs with the numbers in it; NaN is left empty."""
    count = values.shape[1]
    head = "".join(f"<th scope=col>{rank}</th>" for rank in range(count))
    body = []
    for name, line in zip(rows, values, strict=True):
        cells = "".join(
            _cell(value, most, f"{name} waits for rank {rank}") for rank, value in enumerate(line)
        )
        short = escape(name.removeprefix("rank "))
        body.append(f"<tr><th scope=row>{short}</th>{cells}</tr>")
    dense = " dense" if max(values.shape) > 16 else ""
    return (
        f"<figure><figcaption>{escape(title)}</figcaption><div class=scroll>"
        f'<table class="matrix{dense}"><thead><tr><th></th><th class=axis colspan={count}>awaited '
        f"rank</th></tr><tr><th class=axis>waiting</th>{head}</tr></thead>"
        f"<tbody>{''.join(body)}</tbody></table></div></figure>"
    )


def bars(
    title: str, head: list[str], rows: list[tuple[str, list[tuple[str, float, float]]]]
) -> str:
    """A table of times: in each cell, of a name, p50 and a bar of it, p99 as the bar's pale end."""
    most = max((p99 for _, cells in rows for _, _, p99 in cells if p99 == p99), default=1.0)
    lines = []
    for name, cells in rows:
        shown = "".join(_time_cell(*cell, most) for cell in cells)
        lines.append(f"<tr><th scope=row>{escape(name)}</th>{shown}</tr>")
    columns = "".join(f"<th scope=col>{escape(name)}</th>" for name in head)
    return (
        f"<figure><figcaption>{escape(title)}</figcaption><table class=times><thead><tr><td></td>"
        f"{columns}</tr></thead><tbody>{''.join(lines)}</tbody></table></figure>"
    )


def counts(title: str, names: list[str], values: np.ndarray) -> str:
    """Counts as bars, one below the other."""
    most = max(int(values.max()), 1)
    lines = "".join(
        f"<tr><th scope=row>{escape(name)}</th><td>{int(value):,}</td><td><span class=bar>"
        f"<b style='width:{value / most:.1%}'></b></span></td></tr>"
        for name, value in zip(names, values, strict=True)
    )
    return (
        f"<figure><figcaption>{escape(title)}</figcaption><table class=counts><tbody>{lines}</tbody>"
        "</table></figure>"
    )


def number(value: float) -> str:
    """Three digits that matter, never an exponent."""
    if value != value:
        return "–"
    if value >= 1000:
        return f"{value:,.0f}"
    return f"{value:.0f}" if value >= 100 else f"{value:.1f}" if value >= 10 else f"{value:.2f}"


def _time_cell(label: str, p50: float, p99: float, most: float) -> str:
    if not p99 >= MEASURABLE_US:
        return f'<td data-label="{escape(label)}" class=none>–</td>'
    return (
        f'<td data-label="{escape(label)}"><span class=numbers><b>{number(p50)}</b>'
        f"<span>{number(p99)}</span></span><span class=bar><i style='width:{p99 / most:.1%}'></i>"
        f"<b style='width:{p50 / most:.1%}'></b></span></td>"
    )


def _cell(value: float, most: float, what: str) -> str:
    if value != value:
        return "<td class=self></td>"
    part = min(value / most, 1.0) if most > 0 else 0.0
    tone = " class=hot" if part > 0.55 else ""
    short = f"{value:.0f}" if value >= 9.95 else f"{value:.1f}"
    return (
        f'<td{tone} style="--v:{part:.3f}" title="{escape(what)}: {number(value)} µs">{short}</td>'
    )


def _framed(title, plot, y_labels, x_labels, y_name: str = "") -> str:
    """A plot with labels at its left, `(top, text)`, and below it."""
    left = "".join(f'<span style="top:{top}">{escape(text)}</span>' for top, text in y_labels)
    below = "".join(f"<span>{escape(text)}</span>" for text in x_labels)
    name = " <small>from top to bottom</small>" if y_name else ""
    return (
        f"<figure><figcaption>{escape(title)}{name}</figcaption><div class=frame><div class=y>{left}"
        f"</div><div class=plot>{plot}</div><div class=x>{below}</div></div></figure>"
    )


def _step_labels(steps: int) -> list[str]:
    return ["step 1", f"{steps // 2:,}", f"{steps:,}"] if steps > 3 else ["step 1", f"{steps:,}"]


def _ceiling(value: float) -> float:
    """The next round number."""
    if value <= 0:
        return 1.0
    unit = 10.0 ** np.floor(np.log10(value))
    return float(
        next(m * unit for m in (1, 1.5, 2, 3, 4, 5, 6, 8, 10) if m * unit >= value * 0.9999)
    )


def _colours(values: np.ndarray) -> np.ndarray:
    """Shares to RGB `[..., 3]`."""
    at = np.clip(values / HOTTEST, 0, 1) * (len(_STOPS) - 1)
    low = np.minimum(at.astype(int), len(_STOPS) - 2)
    part = (at - low)[..., None]
    return (_STOPS[low] * (1 - part) + _STOPS[low + 1] * part).round().astype(np.uint8)


def _png(pixels: np.ndarray) -> str:
    """RGB `[height, width, 3]` as a data URI."""
    height, width = pixels.shape[:2]
    lines = np.concatenate([np.zeros((height, 1), np.uint8), pixels.reshape(height, -1)], 1)

    def chunk(kind: bytes, data: bytes) -> bytes:
        return (
            struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))
        )

    data = (
        b"\x89PNG\r\n\x1a\n"
        + chunk(b"IHDR", struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0))
        + chunk(b"IDAT", zlib.compress(lines.tobytes(), 9))
        + chunk(b"IEND", b"")
    )
    return f"data:image/png;base64,{base64.b64encode(data).decode()}"
