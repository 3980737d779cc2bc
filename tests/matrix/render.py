"""docs/matrix.json and docs/losses.json -> the page docs/supported-versions.md and the tables in README.md."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import groupby

from tests.matrix import ROOT, Row, load, losses

BEGIN, END = "<!-- matrix:begin -->", "<!-- matrix:end -->"
PAGE, README = ROOT / "docs" / "supported-versions.md", ROOT / "README.md"

_NAMES = {
    "accelerate": "accelerate",
    "llamafactory": "LLaMA-Factory",
    "openrlhf": "OpenRLHF",
    "transformers": "transformers",
    "trl": "TRL",
}


def _outcome(row: Row) -> str:
    if row["complaints"]:
        return "; ".join(row["complaints"])
    if row["wrong_before"]:
        return f"{len(row['wrong_before'])} of {row['configurations']} configurations wrong before, 0 after"
    return "right before, untouched"


def _affected(row: Row) -> str:
    return ", ".join(row["affected"]) or "none"


def _span(first: str, last: str) -> str:
    return first if first == last else f"{first} to {last}"


def bands(rows: list[Row]) -> str:
    """The short table: neighbouring releases with the same verdicts and outcome in one line."""
    lines = ["| DeepSpeed | errors that trainfix repairs | run without and with trainfix |", "|---|---|---|"]
    for (errors, outcome), band in groupby(rows, key=lambda row: (_affected(row), _outcome(row))):
        releases = [row["release"] for row in band]
        lines.append(f"| {_span(releases[0], releases[-1])} | {errors} | {outcome} |")
    return "\n".join(lines)


def bands_of_losses(rows: Sequence[Row]) -> str:
    """The short table of losses: neighbouring bands with the same errors in one line, what was run in them added up."""
    lines = [
        "| package | releases | errors that trainfix repairs or stops | runs without and with trainfix |",
        "|---|---|---|---|",
    ]
    for (package, errors), group in groupby(rows, key=lambda row: (row["package"], _affected(row))):
        of_group = list(group)
        span = _span(of_group[0]["band"][0], of_group[-1]["band"][1])
        complaints = [text for row in of_group for text in row["complaints"]]
        wrong, runs = (sum(counts) for counts in zip(*map(_counts, of_group), strict=True))
        stops = {id for row in of_group for id in row["affected"]} <= losses.stopping()
        then = "each stopped with trainfix" if stops else "0 after"
        outcome = f"{wrong} of {runs} wrong before, {then}" if wrong else f"{runs} right before, untouched"
        lines.append(f"| {_NAMES[package]} | {span} | {errors} | {'; '.join(complaints) or outcome} |")
    return "\n".join(lines)


def _counts(row: Row) -> tuple[int, int]:
    return len(row["wrong_before"]), row["configurations"]


def page(rows: list[Row], of_losses: Sequence[Row]) -> str:
    """The long tables: one line per release of DeepSpeed, and one per stack that was run for the losses."""
    lines = [
        "# Supported versions",
        "",
        "Made by `make matrix`; each row is one release, really run on the CPU accelerator, without and with trainfix,",
        "on one rank and on two: the configurations of `tests/matrix/cases.py`. Errors are those that trainfix",
        "repairs. Identical counts the configurations whose consumed gradients and parameters are bitwise the same",
        "with trainfix as without. Six of them are run again on each other way of the",
        "[gradient copy](gradient-copy.md); other bits than torch's are a complaint.",
        "",
        *_table("DeepSpeed", "errors", rows, [(row["release"], _affected(row)) for row in rows]),
        "",
        "## Losses",
        "",
        "The trainers of each package, run in the same way: the bands and configurations of `tests/matrix/bands.py`. A",
        "band holds releases that share their errors; its rows are the releases that were run, with what lay beside",
        "them. Wrong: the gradient that the optimizer consumed is more than 0.1 % off that of (the sum of the trained",
        "tokens' losses) / (their number), or a logged loss more than 0.1 % off the window's. Identical: all that was",
        "measured, and what was logged, is the same with trainfix as without.",
        "",
        *_table("package | band | run", "errors", of_losses, [_what(row) for row in of_losses]),
    ]
    return "\n".join(lines) + "\n"


def _what(row: Row) -> tuple[str, ...]:
    beside = ", ".join(f"{name} {version}" for name, version in row["beside"].items())
    run = f"{row['release']} with {beside}" if beside else str(row["release"])
    return _NAMES[row["package"]], _span(*row["band"]), run, _affected(row)


def _table(first: str, second: str, rows: Sequence[Row], what: Sequence[tuple[str, ...]]) -> list[str]:
    head = f"| {first} | {second} | wrong before | wrong after | identical | complaints | run on | torch | Python |"
    lines = [head, "|" + "---|" * (head.count("|") - 1)]
    for row, begin in zip(rows, what, strict=True):
        cells = (
            *begin,
            ", ".join(row["wrong_before"]) or "none",
            ", ".join(row["wrong_after"]) or "none",
            f"{row['identical']} of {row['configurations']}",
            "; ".join(row["complaints"]) or "none",
            row["date"],
            row["torch"],
            row["python"],
        )
        lines.append("| " + " | ".join(cells) + " |")
    return lines


def rendered() -> dict[str, str]:
    """File name -> the text it should have now."""
    rows, of_losses = list(load().values()), list(losses.load().values())
    readme = README.read_text()
    before, _, rest = readme.partition(BEGIN)
    _, _, after = rest.partition(END)
    tables = "\n\n".join([bands(rows), *([bands_of_losses(of_losses)] if of_losses else [])])
    return {str(PAGE): page(rows, of_losses), str(README): f"{before}{BEGIN}\n{tables}\n{END}{after}"}
