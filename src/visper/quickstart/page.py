"""A self-contained HTML page: tables, curves and pictures, no script and nothing to fetch."""

from __future__ import annotations

import base64
import html
import io
from collections.abc import Mapping, Sequence

from PIL import Image

STYLE = """
body{font:16px/1.5 system-ui,sans-serif;color:#1c2330;max-width:1080px;margin:2rem auto;padding:0 1rem}
h1{font-size:1.9rem;margin-bottom:.2rem}h2{margin-top:2.4rem;border-bottom:1px solid #d8dde6;padding-bottom:.2rem}
table{border-collapse:collapse;margin:.8rem 0}td,th{padding:.3rem .8rem;text-align:left;border-bottom:1px solid #e4e8ef}
th{font-weight:600;background:#f4f6fa}td.number{text-align:right;font-variant-numeric:tabular-nums}
.good{color:#146c43;font-weight:600}.bad{color:#a3341f;font-weight:600}.note{color:#5a6475;font-size:.92rem}
.sheet{display:grid;gap:6px;align-items:center;overflow-x:auto}
.sheet div{font-size:.78rem;color:#5a6475;text-align:center}
.sheet img{width:100%;image-rendering:pixelated;border-radius:3px;display:block}
.curves{display:flex;flex-wrap:wrap;gap:14px}.curve{border:1px solid #e4e8ef;border-radius:6px;padding:6px 8px}
.curve b{font-size:.82rem;font-weight:600}pre{background:#f4f6fa;padding:.7rem;border-radius:6px;overflow-x:auto}
"""


def page(title: str, lead: str, sections: Sequence[tuple[str, str]]) -> str:
    """The whole document from ``(heading, inner HTML)`` sections."""
    body = "".join(f"<h2>{html.escape(heading)}</h2>{inner}" for heading, inner in sections)
    return (
        f"<!doctype html><html lang='en'><meta charset='utf-8'><title>{html.escape(title)}</title>"
        f"<meta name='viewport' content='width=device-width'><style>{STYLE}</style>"
        f"<h1>{html.escape(title)}</h1><p class='note'>{html.escape(lead)}</p>{body}</html>"
    )


def note(text: str) -> str:
    """A paragraph of explanation."""
    return f"<p class='note'>{html.escape(text)}</p>"


def table(
    header: Sequence[str], rows: Sequence[Sequence[object]], flags: Mapping[tuple[int, int], str] | None = None
) -> str:
    """A table; numbers are set right; ``flags`` gives cells (row, column) a class such as ``good``."""
    head = "".join(f"<th>{html.escape(name)}</th>" for name in header)
    lines = []
    for r, row in enumerate(rows):
        cells = []
        for c, value in enumerate(row):
            number = isinstance(value, (int, float)) or (isinstance(value, str) and value[:1].isdigit())
            names = " ".join(filter(None, ("number" if number else "", (flags or {}).get((r, c), ""))))
            cells.append(f"<td class='{names}'>{html.escape(str(value))}</td>")
        lines.append(f"<tr>{''.join(cells)}</tr>")
    return f"<table><tr>{head}</tr>{''.join(lines)}</table>"


def picture(image: Image.Image, scale: int = 2) -> str:
    """An image, kept in the page itself."""
    enlarged = image.convert("RGB").resize((image.width * scale, image.height * scale), Image.Resampling.NEAREST)
    buffer = io.BytesIO()
    enlarged.save(buffer, "PNG", optimize=True)
    return f"<img alt='' src='data:image/png;base64,{base64.b64encode(buffer.getvalue()).decode()}'>"


def sheet(header: Sequence[str], rows: Sequence[Sequence[Image.Image]]) -> str:
    """A grid of pictures with a caption over each column."""
    captions = "".join(f"<div>{html.escape(name)}</div>" for name in header)
    cells = "".join(picture(image) for row in rows for image in row)
    columns = f"grid-template-columns:repeat({len(header)},minmax(64px,1fr))"
    return f"<div class='sheet' style='{columns}'>{captions}{cells}</div>"


def curve(name: str, points: Sequence[tuple[float, float]], width: int = 240, height: int = 96) -> str:
    """One curve as SVG with its range written beside it; nothing is smoothed."""
    xs, ys = [x for x, _ in points], [y for _, y in points]
    left, right, low, high = min(xs), max(xs), min(ys), max(ys)
    across, up = (right - left) or 1.0, (high - low) or 1.0
    path = " ".join(
        f"{4 + (x - left) / across * (width - 8):.1f},{height - 4 - (y - low) / up * (height - 8):.1f}"
        for x, y in points
    )
    return (
        f"<div class='curve'><b>{html.escape(name)}</b> <span class='note'>{ys[0]:.3g} to {ys[-1]:.3g} "
        f"in {right:g} steps</span><br><svg width='{width}' height='{height}' role='img'>"
        f"<polyline points='{path}' fill='none' stroke='#2f5fd0' stroke-width='1.6'/></svg></div>"
    )


def curves(logs: Sequence[Mapping[str, float]], skip: Sequence[str] = ()) -> str:
    """A curve for every logged value with more than one point."""
    names = sorted({name for entry in logs for name in entry} - {"step", "epoch", *skip})
    drawn = []
    for name in names:
        points = [(entry["step"], entry[name]) for entry in logs if name in entry]
        if len(points) > 1:
            drawn.append(curve(name, points))
    return f"<div class='curves'>{''.join(drawn)}</div>"
