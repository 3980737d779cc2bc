"""xray's report as one HTML file: the coefficients (micro-batch x rank), the tokens' weights, and a table.

Nothing is loaded from anywhere. What a cell shows by colour stands in it as a number.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from html import escape
from typing import Any

Window = Mapping[str, Any]

_STYLE = """
:root { color-scheme: light dark; --ink: #1c1f24; --soft: #667080; --line: #d8dde4; --ground: #fff;
  --right: #dbe7f3; --low: #f0a35e; --high: #a98bd6; --bad: #b3261e; --good: #1b7a43; }
@media (prefers-color-scheme: dark) { :root { --ink: #e6e9ee; --soft: #9aa5b4; --line: #39414d; --ground: #15181d;
  --right: #29405a; --low: #a35f1f; --high: #6a4da0; --bad: #ff8a80; --good: #7bd8a0; } }
body { font: 15px/1.5 system-ui, sans-serif; color: var(--ink); background: var(--ground); margin: 2rem auto;
  max-width: 62rem; padding: 0 1rem; }
h1 { font-size: 1.3rem; margin-bottom: 0 } h2 { font-size: 1.05rem; margin: 2rem 0 .3rem }
.bad { color: var(--bad) } .good { color: var(--good) } .soft { color: var(--soft) }
code { font-size: .9em; overflow-wrap: anywhere }
.chart { overflow-x: auto } svg text { font: 12px system-ui, sans-serif; fill: var(--ink) }
svg .soft { fill: var(--soft) } .cell { stroke: var(--ground); stroke-width: 2 }
table { border-collapse: collapse; margin-top: .5rem } td, th { border-bottom: 1px solid var(--line);
  padding: .15rem .8rem .15rem 0; text-align: right; font-variant-numeric: tabular-nums } th { font-weight: 600 }
"""

_CELL, _BAR, _LEFT = 62, 120, 90
_MOST = 64  # micro-batches of a rank in a chart; the table has them all


def html(report: Mapping[str, Any]) -> str:
    """The page for what `trainfix xray --json` writes."""
    wrong = report["state"] != "balanced"
    parts = [
        "<!doctype html><html lang='en'><head><meta charset='utf-8'>",
        "<meta name='viewport' content='width=device-width, initial-scale=1'>",
        f"<title>trainfix xray: {escape(report['state'])}</title><style>{_STYLE}</style></head><body>",
        f"<h1>trainfix xray: <span class='{'bad' if wrong else 'good'}'>{escape(report['state'])}</span></h1>",
        f"<p class='soft'><code>{escape(' '.join(report['command']))}</code><br>trainfix {escape(report['trainfix'])}, "
        f"its repairs {escape(report['repairs'])} ({escape(report['repairs_because'])})</p>",
        *(f"<p>{escape(note)}</p>" for note in dict.fromkeys([*report["notes"], *report["remarks"]])),
        *(part for window in report["windows"] for part in _window(window)),
        "<h2>How to read it</h2><p class='soft'>A coefficient is the weight with which a micro-batch's gradient "
        "reached the optimizer: 1 is right, 0 is dropped, 2 is counted twice. A token's weight is that with which it "
        "entered the loss, relative to the mean: 1 is right.</p>",
        "</body></html>\n",
    ]
    return "\n".join(parts)


def _window(window: Window) -> Iterator[str]:
    look = "good" if window["state"] == "balanced" else "bad"
    yield (
        f"<h2>Window {window['window']}, {escape(window['optimizer'])}: "
        f"<span class='{look}'>{escape(window['state'])}</span></h2><ul>"
    )
    for key, kind in (("problems", "bad"), ("unclear", "bad"), ("remarks", "soft")):
        yield from (f"<li class='{kind}'>{escape(text)}</li>" for text in window[key])
    yield "</ul>"
    rows = window["micro_batches"]
    if rows:
        yield "<h3>Micro-batch coefficients</h3>" + _grid(rows)
    if any(row.get("token_weight") is not None for row in rows):
        yield "<h3>Token weights</h3>" + _bars(rows)
    yield "<details><summary>Table</summary>" + _table(rows) + "</details>"
    if window["parameters"]:
        named = (
            f"<li><code>{escape(name)}</code> {'more arrives than came in' if value is None else f'{value:.4g}'}</li>"
            for name, value in window["parameters"].items()
        )
        yield "<h3>Parameters that are off, and by which factor</h3><ul>" + "".join(named) + "</ul>"


def _by_rank(rows: Sequence[Mapping[str, Any]]) -> dict[int, list[Mapping[str, Any]]]:
    ranks: dict[int, list[Mapping[str, Any]]] = {}
    for row in rows:
        ranks.setdefault(row["rank"], []).append(row)
    return {rank: own[:_MOST] for rank, own in ranks.items()}


def _grid(rows: Sequence[Mapping[str, Any]]) -> str:
    ranks = _by_rank(rows)
    columns = max(map(len, ranks.values()))
    cells = [
        f"<text class='soft' x='{_LEFT + _CELL * number + _CELL / 2}' y='14' text-anchor='middle'>{number + 1}</text>"
        for number in range(columns)
    ]
    for line, (rank, own) in enumerate(ranks.items()):
        top = 22 + 32 * line
        cells.append(f"<text x='0' y='{top + 20}'>rank {rank}</text>")
        for number, row in enumerate(own):
            value, left = row["coefficient"], _LEFT + _CELL * number
            cells.append(
                f"<g><rect class='cell' x='{left}' y='{top}' width='{_CELL}' height='30' fill='{_colour(value)}'/>"
                f"<text x='{left + _CELL / 2}' y='{top + 20}' text-anchor='middle'>{value:.3g}</text>"
                f"<title>rank {rank}, micro-batch {row['micro_batch'] + 1}: {value:.6g}</title></g>"
            )
    return _svg(_LEFT + _CELL * columns, 24 + 32 * len(ranks), cells)


def _bars(rows: Sequence[Mapping[str, Any]]) -> str:
    """Each micro-batch's token weight, on a scale of powers of two around 1."""
    shown = [row for own in _by_rank(rows).values() for row in own if row.get("token_weight") is not None]
    heights = [math.log2(max(abs(row["token_weight"]), 2**-8)) for row in shown]
    reach = max(1.0, *(abs(height) for height in heights))
    middle = 20 + _BAR / 2
    marks = [
        f"<line x1='{_LEFT}' x2='{_LEFT + _CELL * len(shown)}' y1='{middle}' y2='{middle}' stroke='var(--soft)'/>",
        f"<text x='0' y='{middle + 4}'>1 = right</text>",
    ]
    for number, (row, height) in enumerate(zip(shown, heights, strict=True)):
        left, size = _LEFT + _CELL * number, max(1.5, abs(height) / reach * _BAR / 2)
        top = middle - size if height > 0 else middle
        centre = left + _CELL / 2
        marks += [
            f"<rect x='{left + 8}' width='{_CELL - 16}' y='{top:.1f}' height='{size:.1f}' "
            f"fill='{_colour(row['token_weight'])}'/>",
            f"<text x='{centre}' y='{(top - 4) if height > 0 else (top + size + 13):.1f}' text-anchor='middle'>"
            f"{row['token_weight']:.3g}</text>",
            f"<text class='soft' x='{centre}' y='{_BAR + 58}' text-anchor='middle'>"
            f"{row['rank']}:{row['micro_batch'] + 1}</text>",
            f"<text class='soft' x='{centre}' y='{_BAR + 74}' text-anchor='middle'>{row['tokens']} tok.</text>",
        ]
    return _svg(_LEFT + _CELL * len(shown), _BAR + 80, marks)


def _svg(width: float, height: float, marks: Sequence[str]) -> str:
    return f"<div class='chart'><svg width='{width}' height='{height}' role='img'>{''.join(marks)}</svg></div>"


def _colour(value: float) -> str:
    if abs(value - 1) <= 0.02:
        return "var(--right)"
    return "var(--low)" if value < 1 else "var(--high)"


def _table(rows: Sequence[Mapping[str, Any]]) -> str:
    columns = {
        "rank": "rank",
        "micro_batch": "micro-batch",
        "coefficient": "coefficient",
        "tokens": "trained tokens",
        "token_weight": "token weight",
        "weight_sum": "sum of weights",
        "loss_per_token": "loss per token",
    }
    head = "".join(f"<th>{escape(name)}</th>" for name in columns.values())
    lines = ("<tr>" + "".join(f"<td>{_cell(key, row.get(key))}</td>" for key in columns) + "</tr>" for row in rows)
    return f"<table><tr>{head}</tr>{''.join(lines)}</table>"


def _cell(key: str, value: Any) -> str:
    if value is None:
        return ""
    return str(value + 1 if key == "micro_batch" else value) if isinstance(value, int) else f"{value:.4g}"
