"""One self-contained page, and its pictures, of everything saved under benchmarks/results.

    PYTHONPATH=. python -m benchmarks.report [-o DIR] [--results DIR]

Every table and picture says whether its numbers are counted, measured and on what, or computed. Needs matplotlib.
"""

from __future__ import annotations

import argparse
import base64
import sys
from collections.abc import Iterator, Sequence
from html import escape
from pathlib import Path

from benchmarks.report import charts, model
from benchmarks.report.charts import Chart
from benchmarks.report.results import Result, Row, read

ROOT = Path(__file__).resolve().parents[2]
STYLE = """body{font:15px/1.5 system-ui,sans-serif;max-width:1000px;margin:2em auto;padding:0 1em;color:#222}
table{border-collapse:collapse;font-size:12px;display:block;overflow-x:auto}td,th{border:1px solid #ccc;padding:2px 6px}
img{max-width:100%}.basis{display:inline-block;border-radius:3px;padding:0 .5em;font-size:12px;background:#dfe8f5}
.computed{background:#f5e6cc}"""


def page(results: Sequence[Result], drawn: Sequence[Chart]) -> str:
    """The HTML text; the pictures are in it."""
    return "\n".join(_page(results, drawn)) + "\n"


def _page(results: Sequence[Result], drawn: Sequence[Chart]) -> Iterator[str]:
    yield f"<!doctype html><html lang=en><meta charset=utf-8><title>trainfix benchmarks</title><style>{STYLE}</style>"
    yield "<h1>trainfix benchmarks</h1>"
    shown = [result for result in results if result.kind in ("counted", "measured")]
    on_gpu = [result for result in shown if result.steps]
    if not on_gpu:
        yield "<p><b>No time on a GPU has been measured yet.</b> benchmarks/gpu measures it; its README says how.</p>"
    for chart in drawn:
        data = base64.b64encode(chart.file.read_bytes()).decode()
        yield f"<h2>{escape(chart.title)}</h2>{_basis(chart.basis)}"
        yield f'<p><img alt="{escape(chart.title)}" src="data:image/png;base64,{data}">'
    yield "<h1>Tables</h1>"
    for result in shown:
        basis = "counted" if result.kind == "counted" else f"measured on {result.hardware}"
        yield f"<h2>{escape(result.file.stem)}</h2>{_basis(basis)}"
        for title, rows in _tables(result):
            yield f"<h3>{escape(title)}</h3>{_table(rows)}"
    yield f"<h2>The model</h2>{_basis('computed, not measured')}<ul>"
    yield from (f"<li>{escape(one)}</li>" for one in model.ASSUMPTIONS)
    yield f"</ul>{_table(list(_model_rows()))}"
    left_out = [result for result in results if result not in shown]
    if left_out:
        names = ", ".join(f"{result.file.name} ({result.kind})" for result in left_out)
        yield f"<p>Left out, for their numbers mean nothing: {escape(names)}.</p>"


def _basis(basis: str) -> str:
    kind = "computed" if basis.startswith("computed") else "made"
    return f'<span class="basis {kind}">{escape(basis)}</span>'


def _tables(result: Result) -> Iterator[tuple[str, list[Row]]]:
    """Whatever a file holds as lists of rows."""
    content = result.content
    for name, step in result.steps.items():
        yield f"{name}, {step['date']}", step["rows"]
    for name in ("rows", "runs"):
        if name in content:
            yield name, content[name]
    for size in content.get("sizes", []):
        yield f"{size['elements']:,} elements", [{"way": name, **way} for name, way in size["ways"].items()]


def _table(rows: Sequence[Row]) -> str:
    columns = list(dict.fromkeys(key for row in rows for key in row))
    head = "".join(f"<th>{escape(column.replace('_', ' '))}</th>" for column in columns)
    body = "".join(f"<tr>{''.join(f'<td>{escape(_text(row.get(key)))}</td>' for key in columns)}</tr>" for row in rows)
    return f"<table><tr>{head}</tr>{body}</table>"


def _text(value: object) -> str:
    if value is None:
        return ""
    if isinstance(value, float):
        return f"{value:.4g}"
    if isinstance(value, dict):
        return ", ".join(f"{key} {_text(one)}" for key, one in value.items())
    if isinstance(value, list):
        return " ".join(_text(one) for one in value)
    return str(value)


def _model_rows() -> Iterator[Row]:
    for link, rate in model.LINKS.items():
        for name, design in model.DESIGNS.items():
            times = {f"GA {steps}": model.seconds(design, steps, rate) for steps in model.ACCUMULATIONS}
            yield {"link": link, "design": name, **times}


def main(arguments: Sequence[str] | None = None) -> int:
    """0: the page is written; 2: there are no results to read."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("-o", "--output", type=Path, default=ROOT / "build" / "benchmarks", help="default: %(default)s")
    parser.add_argument("--results", type=Path, default=ROOT / "benchmarks" / "results", help="default: %(default)s")
    options = parser.parse_args(arguments)
    if not options.results.is_dir():
        print(f"error: {options.results} is no folder", file=sys.stderr)
        return 2
    options.output.mkdir(parents=True, exist_ok=True)
    results = read(options.results)
    drawn = charts.draw_all(results, options.output)
    file = options.output / "index.html"
    file.write_text(page(results, drawn), encoding="utf-8")
    print(f"{len(results)} results, {len(drawn)} pictures -> {file}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
