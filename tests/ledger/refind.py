"""The errors of the catalogue, found again by a ledger that knows none of them, and their repaired selves as control.

python -m tests.ledger.refind [--render] [ID...]

Each error is run on a real release with trainfix's repairs off and the ledger on: within two audited windows of the
first one in which the gradient is wrong (by the experiment's own float64 reference), a window must not balance. Then
the same release repaired: every window must balance. TF-0601 has no repair but to stop; its control is a window of one
micro-batch, which is right. TF-0009 is a loss of precision: a remark, no alarm. The table goes to docs/ledger.json and,
with that of tests.ledger.mutations, to docs/ledger.md (--render: only this).
"""

from __future__ import annotations

import argparse
import importlib
import json
import subprocess
import sys
import tempfile
from collections.abc import Mapping
from dataclasses import dataclass, field
from datetime import date
from pathlib import Path
from typing import Any

from tests.matrix.bands import PROGRAMS
from tests.support import experiment, stacks, trainer_runs
from tests.support.releases import release

DOCS = Path(__file__).resolve().parents[2] / "docs"
TABLE, MUTATIONS, PAGE = DOCS / "ledger.json", DOCS / "ledger-mutations.json", DOCS / "ledger.md"
_BEGIN, _END = "<!-- ledger -->\n", "<!-- /ledger -->\n"
AUDITED = 8
_WRONG = 1e-3
_LONGEST = 110


@dataclass(frozen=True)
class Again:
    """One error on one release. packages: what is laid over the environment, DeepSpeed alone for its own experiment.
    control: a run without repairs whose configuration is right, where there is no repair."""

    id: str
    packages: Mapping[str, str]
    configuration: Mapping[str, Any]
    ranks: int = 1
    remark: bool = False
    control: Mapping[str, Any] | None = None
    program: str = field(default="")

    @property
    def name(self) -> str:
        packages = " + ".join(f"{name} {version}" for name, version in self.packages.items())
        return f"{self.id} on {packages}" + (f", {self.ranks} ranks" if self.ranks > 1 else "")


_GA4: Mapping[str, Any] = {"steps": 4}
_FP32_SUMS = {"data_types": {"grad_accum_dtype": "fp32"}, "communication_data_type": "fp32"}
_LOOP = "tests.ledger.loops"

CASES = (
    Again("TF-0001", {"deepspeed": "0.18.9"}, {"ga": 8}),
    Again("TF-0001", {"deepspeed": "0.16.4"}, {"ga": 4, "dtype": "bf16"}, ranks=2),
    Again("TF-0002", {"deepspeed": "0.18.2"}, {"ga": 4, "offload": False}),
    Again("TF-0003", {"deepspeed": "0.18.9"}, {"ga": 4, "driver": "accelerate"}),
    Again("TF-0004", {"deepspeed": "0.18.9"}, {"ga": 2, "mask": "10"}),
    Again("TF-0005", {"deepspeed": "0.18.9"}, {"ga": 4, "stage": 3, "mask": "0110"}),
    Again("TF-0005", {"deepspeed": "0.19.8"}, {"ga": 4, "stage": 3, "offload": False, "mask": "0111"}),
    Again("TF-0006", {"deepspeed": "0.18.9"}, {"ga": 3, "stage": 1, "dtype": "bf16", "extra": _FP32_SUMS}, ranks=2),
    Again("TF-0008", {"transformers": "4.57.1", "deepspeed": "0.18.3"}, {"steps": 4, "deepspeed": {"stage": 1}}),
    Again("TF-0101", {"openrlhf": "0.9.10"}, {"rows": 16}),
    Again("TF-0102", {"openrlhf": "0.10.3"}, {"rows": 16}),
    Again("TF-0103", {"openrlhf": "0.11.1"}, {"steps": 4, "rows": 6, "epochs": 2}),
    Again("TF-0201", {"llamafactory": "0.9.4"}, {"steps": 4, "checkpoint": "llava"}),
    Again("TF-0202", {"llamafactory": "0.9.5"}, {"steps": 4, "arguments": {"use_asft_loss": True}}),
    Again("TF-0203", {"llamafactory": "0.9.2"}, _GA4, ranks=2),
    Again("TF-0301", {"trl": "0.18.2", "transformers": "4.52.4"}, _GA4, ranks=2),
    Again("TF-0401", {"transformers": "4.45.2"}, {"steps": 8}),
    Again("TF-0402", {"transformers": "4.51.3"}, _GA4, ranks=2),
    Again("TF-0403", {"transformers": "4.48.3", "deepspeed": "0.16.9"}, {"steps": 4, "deepspeed": {"stage": 1}}),
    Again("TF-0404", {"transformers": "5.5.3"}, {"steps": 8}),
    Again("TF-0405", {"transformers": "5.14.1"}, {"steps": 4, "rows": 8, "arguments": {"label_smoothing_factor": 0.1}}),
    Again(
        "TF-0406",
        {"transformers": "4.53.3"},
        {"steps": 4, "rows": 6, "prepare": "tests.support.prepared:takes_no_count"},
    ),
    Again(
        "TF-0501",
        {"accelerate": "1.7.0", "transformers": "4.49.0", "deepspeed": "0.16.9"},
        {"steps": 4, "rows": 6, "epochs": 3, "deepspeed": {"stage": 1}},
    ),
    Again("TF-0601", {"torchao": "0.18.0"}, {"micro_batches": 8}, control={"micro_batches": 1}, program=_LOOP),
    Again(
        "TF-0009",
        {"deepspeed": "0.19.6"},
        {"ga": 4, "dtype": "bf16", "extra": {"data_types": {"grad_accum_dtype": "fp32"}}},
        remark=True,
        control={"ga": 4, "extra": {"data_types": {"grad_accum_dtype": "fp32"}}},
    ),
)


def run(case: Again) -> dict[str, Any]:
    """The row of one case: what the ledger said without the repair, and with it."""
    without, windows = _audited(case, case.configuration, repaired=False)
    first = next((number for number, one in enumerate(windows, 1) if _is_wrong(one)), None)
    found = next((one["window"] for one in without if one["state"] == "not balanced"), None)
    control = case.configuration if case.control is None else case.control
    repaired, _ = _audited(case, control, repaired=case.control is None)
    said = next((one["problems"] for one in without if one["problems"]), [])
    remarks = sorted({text for one in without for text in one["remarks"]})
    in_time = found is not None and (first is None or found <= first + 1)
    alarms = [one["problems"] or one["unclear"] for one in repaired if one["state"] != "balanced"]
    return {
        "id": case.id,
        "packages": dict(case.packages),
        "ranks": case.ranks,
        "wrong_from_window": first,
        "found_in_window": found,
        "said": said,
        "remarks": remarks,
        "windows": len(without),
        "control_windows": len(repaired),
        "control_alarms": alarms,
        "as_wanted": (bool(remarks) and found is None if case.remark else in_time) and bool(repaired) and not alarms,
        "date": date.today().isoformat(),
    }


def _is_wrong(window: Mapping[str, Any]) -> bool:
    return bool(window.get("relative_error", 0) > _WRONG)


def _audited(case: Again, configuration: Mapping[str, Any], *, repaired: bool) -> tuple[list[Any], list[Any]]:
    """What the ledger wrote, window by window, and the experiment's own windows."""
    with tempfile.TemporaryDirectory() as folder:
        ledger = f"first:{AUDITED},out={folder}"
        env = {"TRAINFIX": "on" if repaired else "off", "TRAINFIX_LEDGER": ledger, "TRAINFIX_QUIET": "1"}
        windows = _run(case, configuration, env)
        lines = [line for file in Path(folder).glob("ledger-*.jsonl") for line in file.read_text().splitlines()]
    records = [json.loads(line) for line in lines]
    notes = [record["text"] for record in records if record["kind"] == "note"]
    if notes:
        print(f"  note: {'; '.join(notes)}", file=sys.stderr)
    return [record for record in records if record["kind"] == "window"], windows


def _run(case: Again, configuration: Mapping[str, Any], env: Mapping[str, str]) -> list[Any]:
    if case.program:
        folders = [stacks.folder(name, version) for name, version in case.packages.items()]
        command = [sys.executable, "-m", case.program, json.dumps(configuration)]
        variables = stacks.environment(*folders, trainfix=True) | dict(env)
        done = subprocess.run(command, env=variables, capture_output=True, text=True, timeout=300, check=False)
        if done.returncode:
            raise RuntimeError(f"{case.name}: {done.stderr[-2000:]}")
        found: list[Any] = json.loads(done.stdout.splitlines()[-1])
        return found
    if list(case.packages) == ["deepspeed"]:
        options = {"ranks": case.ranks, "trainfix": True}
        wanted = {"windows": 3, **configuration}
        (result,) = experiment.run(release(case.packages["deepspeed"]), [wanted], env=env, **options)
    else:
        package = next(iter(case.packages))
        program: Any = importlib.import_module(PROGRAMS[package])
        stack = getattr(program, "stack", stacks.stack)
        how = {"ranks": case.ranks, "program": PROGRAMS[package], "timeout": 300}
        (result,) = trainer_runs.run(stack(**case.packages), [configuration], trainfix=True, env=env, **how)
    if result["error"]:
        raise RuntimeError(f"{case.name}: {result['error']}")
    return list(result["windows"])


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("ids", nargs="*", help="advisories (default: all)")
    parser.add_argument("--render", action="store_true", help="write the tables into docs/ledger.md, and run nothing")
    arguments = parser.parse_args()
    if arguments.render:
        render()
        return 0
    wanted, rows = arguments.ids, []
    for case in CASES:
        if not wanted or case.id in wanted:
            rows.append(run(case))
            print(_line(case, rows[-1]), flush=True)
    if not wanted:
        TABLE.write_text(json.dumps(rows, indent=1) + "\n")
        render()
    return 0 if all(row["as_wanted"] for row in rows) else 1


def render() -> None:
    """Put the tables into docs/ledger.md."""
    page = PAGE.read_text()
    begin, end = page.index(_BEGIN) + len(_BEGIN), page.index(_END)
    PAGE.write_text(page[:begin] + rendered() + page[end:])


def rendered() -> str:
    """The tables as they stand in docs/ledger.md."""
    rows, found = json.loads(TABLE.read_text()), json.loads(MUTATIONS.read_text())
    lines = ["| error | on | found in window | what was said | the same, repaired |", "|---|---|---|---|---|"]
    for row in rows:
        on = ", ".join(f"{name} {version}" for name, version in row["packages"].items())
        on += f", {row['ranks']} ranks" if row["ranks"] > 1 else ""
        when = (
            f"{row['found_in_window']} (wrong from {row['wrong_from_window']})"
            if row["found_in_window"]
            else "a remark"
        )
        said = (row["said"] or row["remarks"])[0]
        said = said if len(said) < _LONGEST else said[: said.rindex(" ", 0, _LONGEST)] + " ..."
        lines.append(f"| {row['id']} | {on} | {when} | {said} | {row['control_windows']} windows balance |")
    rates, faults = found["rates"], found["faults"]
    blind = [fault["found"] for fault in faults if fault["frozen"]]
    families: dict[str, list[bool]] = {}
    for fault in faults:
        families.setdefault(fault["family"], []).append(fault["found"])
    lines += [
        "",
        f"Of {rates['faults']} faults of our own, {sum(one['kind'] == 'framework' for one in faults)} of them edits of "
        f"installed framework code, {rates['found']} are found ({rates['detection_rate']:.1%}), "
        f"{rates['windows_to_detect']['1']} of them in the first window in which they are active and "
        f"{rates['windows_to_detect']['2']} in the second. In {rates['healthy_windows']} windows of "
        f"{rates['healthy_runs']} healthy runs: {rates['false_alarms']} false alarms, {rates['could_not_tell']} times "
        f"unclear. The last {len(blind)} faults were written without a look at the ledger, after its rules and "
        f"thresholds were fixed: {sum(blind)} of them are found.",
        "",
        "| family | faults | found |",
        "|---|---:|---:|",
        *(f"| {family} | {len(own)} | {sum(own)} |" for family, own in families.items()),
        "",
        *(f"- Missed: {one['fault']}. {one['why_not']}" for one in faults if not one["found"]),
        *(f"- Not counted, as double entry cannot see it: {one['fault']}. {one['why_not']}" for one in found["beyond"]),
        *(f"- Not counted, right where it is meant so: {one['run']}." for one in found["accused"]),
    ]
    return "\n".join(lines) + "\n"


def _line(case: Again, row: Mapping[str, Any]) -> str:
    when = f"found in window {row['found_in_window']}" if row["found_in_window"] else "no alarm"
    wrong = f"wrong from window {row['wrong_from_window']}" if row["wrong_from_window"] else "not judged"
    said = (row["said"] or row["remarks"] or [""])[0]
    control = "; ".join(str(one) for one in row["control_alarms"]) or f"{row['control_windows']} windows balance"
    mark = "ok " if row["as_wanted"] else "NOT"
    return f"{mark} {case.name}: {wrong}, {when}: {said}\n      control: {control}"


if __name__ == "__main__":
    sys.exit(main())
