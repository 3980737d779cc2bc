"""docs/matrix.json -> the page docs/supported-versions.md and the table in README.md."""

from __future__ import annotations

from itertools import groupby

from tests.matrix import ROOT, Row, load

BEGIN, END = "<!-- matrix:begin -->", "<!-- matrix:end -->"
PAGE, README = ROOT / "docs" / "supported-versions.md", ROOT / "README.md"


def _outcome(row: Row) -> str:
    if row["complaints"]:
        return "; ".join(row["complaints"])
    if row["wrong_before"]:
        return f"{len(row['wrong_before'])} of {row['configurations']} configurations wrong before, 0 after"
    return "right before, untouched"


def _affected(row: Row) -> str:
    return ", ".join(row["affected"]) or "none"


def bands(rows: list[Row]) -> str:
    """The short table: neighbouring releases with the same verdicts and outcome in one line."""
    lines = ["| DeepSpeed | errors that trainfix repairs | run without and with trainfix |", "|---|---|---|"]
    for (errors, outcome), band in groupby(rows, key=lambda row: (_affected(row), _outcome(row))):
        releases = [row["release"] for row in band]
        span = releases[0] if len(releases) == 1 else f"{releases[0]} to {releases[-1]}"
        lines.append(f"| {span} | {errors} | {outcome} |")
    return "\n".join(lines)


def page(rows: list[Row]) -> str:
    """The long table: one line per release."""
    lines = [
        "# Supported versions",
        "",
        "Made by `make matrix`; each row is one release, really run on the CPU accelerator, without and with trainfix,",
        "on one rank and on two: the configurations of `tests/matrix/cases.py`. Errors are those that trainfix",
        "repairs. Identical counts the configurations whose consumed gradients and parameters are bitwise the same",
        "with trainfix as without.",
        "",
        "| DeepSpeed | errors | wrong before | wrong after | identical | complaints | run on | torch | Python |",
        "|---|---|---|---|---|---|---|---|---|",
    ]
    for row in rows:
        cells = (
            row["release"],
            _affected(row),
            ", ".join(row["wrong_before"]) or "none",
            ", ".join(row["wrong_after"]) or "none",
            f"{row['identical']} of {row['configurations']}",
            "; ".join(row["complaints"]) or "none",
            row["date"],
            row["torch"],
            row["python"],
        )
        lines.append("| " + " | ".join(cells) + " |")
    return "\n".join(lines) + "\n"


def rendered() -> dict[str, str]:
    """File name -> the text it should have now."""
    rows = list(load().values())
    readme = README.read_text()
    before, _, rest = readme.partition(BEGIN)
    _, _, after = rest.partition(END)
    return {str(PAGE): page(rows), str(README): f"{before}{BEGIN}\n{bands(rows)}\n{END}{after}"}
