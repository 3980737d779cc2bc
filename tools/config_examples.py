"""Read every example config in checkouts of the projects that trainfix reads, and write what became of each.

    python tools/config_examples.py huggingface/trl@COMMIT=FOLDER ...

FOLDER is a checkout, or the files of one. Writes docs/config-examples.json (a row per file: what it was read as and its
main values, or the reason why it was rejected) and docs/config-examples.md. Needs no network.
"""

from __future__ import annotations

import argparse
import json
import os
import sys
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path

from trainfix.environment import configs
from trainfix.environment.configs.documents import read
from trainfix.environment.runconfig import UNKNOWN, RunConfig

DOCS = Path(__file__).resolve().parents[1] / "docs"
TABLE, PAGE = DOCS / "config-examples.json", DOCS / "config-examples.md"
# Whatever lies elsewhere is no example: tests, continuous integration, documentation, the packages themselves.
ELSEWHERE = {"tests", "test", "docs", "docker", "blogs", "requirements", "environment.yml", "CITATION.cff"}
SUFFIXES = (".json", ".yaml", ".yml")
SHOWN = (
    "framework",
    "task",
    "deepspeed",
    "ranks",
    "gradient_accumulation_steps",
    "zero_optimization.stage",
    "zero_optimization.offload_optimizer.device",
    "bf16.enabled",
)
HEAD = """\
# Example configs of the projects

Every JSON and YAML file that these repositories ship outside their tests and documentation, and every shell script that
starts OpenRLHF, given to `trainfix doctor --config`. Each is read, or rejected with a reason;
[config-examples.json](config-examples.json) has a row per file. Written by `python tools/config_examples.py`.
"""


def main(arguments: Sequence[str]) -> int:
    """Read all examples, write the table and its page."""
    parser = argparse.ArgumentParser(description="read the example configs of other projects")
    parser.add_argument("checkouts", nargs="+", metavar="OWNER/NAME@COMMIT=FOLDER")
    rows: list[dict[str, object]] = []
    for checkout in parser.parse_args(arguments).checkouts:
        name, _, folder = checkout.partition("=")
        repository, _, commit = name.partition("@")
        rows += [{"repository": repository, "commit": commit, **row} for row in _rows(Path(folder).resolve())]
    TABLE.write_text("[\n" + ",\n".join(map(json.dumps, rows)) + "\n]\n", encoding="utf-8")
    PAGE.write_text(page(rows), encoding="utf-8")
    print(f"{len(rows)} files: {sum('kind' in row for row in rows)} read -> {TABLE}", file=sys.stderr)
    return 0


def _rows(folder: Path) -> Iterator[dict[str, object]]:
    """What became of each example of one checkout, which stays the current folder: configs name others from there."""
    os.chdir(folder)
    for file in sorted(path.relative_to(folder) for path in folder.rglob("*") if _is_example(path)):
        if not any(part in ELSEWHERE or part.startswith(".") for part in file.parts):
            yield {"file": str(file), **_result(str(file))}


def _is_example(path: Path) -> bool:
    """A config by its name, or a shell script that starts OpenRLHF."""
    if not path.is_file():
        return False
    return path.suffix in SUFFIXES or (path.suffix == ".sh" and "openrlhf" in path.read_text("utf-8", "replace"))


def _result(file: str) -> dict[str, object]:
    try:
        runs = configs.load([file])
    except configs.ConfigError as error:
        return {"rejected": str(error)}
    document = read(file)
    kind = next(reader.KIND for reader in configs.READERS if reader.recognises(document))
    return {"kind": kind, "runs": [_values(run) for run in runs]}


def _values(run: RunConfig) -> Mapping[str, object]:
    found = {key: run.value(key) for key in SHOWN}
    return {key: "unknown" if value is UNKNOWN else value for key, value in found.items() if value is not None}


def page(rows: Sequence[Mapping[str, object]]) -> str:
    """The table's page: counts, and what was rejected."""
    return "\n".join(_page(rows)) + "\n"


def _page(rows: Sequence[Mapping[str, object]]) -> Iterator[str]:
    yield HEAD
    yield "| repository | commit | files | read as | rejected |\n|---|---|---|---|---|"
    for repository in dict.fromkeys(row["repository"] for row in rows):
        mine = [row for row in rows if row["repository"] == repository]
        kinds = Counter(str(row["kind"]) for row in mine if "kind" in row)
        read = ", ".join(f"{kind} {count}" for kind, count in kinds.most_common())
        rejected = sum("rejected" in row for row in mine)
        yield f"| {repository} | {str(mine[0]['commit'])[:10]} | {len(mine)} | {read} | {rejected} |"
    yield "\n## Rejected\n"
    for row in rows:
        if "rejected" in row:
            yield f"- {row['repository']}: {row['rejected']!s}"


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
