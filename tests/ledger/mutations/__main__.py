"""How many faults in gradients and loss weights does the ledger find, how soon, and how often is it wrong?

python -m tests.ledger.mutations [--only NAME] [--json FILE]

Each fault is an edit of an installed framework or of a user's loop, and runs beside the same run without the edit: if
the consumed gradient is the same in both, the fault is broken and the command fails. A fault is found if one of the
first two windows in which it is active does not balance; a window before them that does not is a false alarm. A healthy
run is right if every window balances. See faults.py and healthy.py.
"""

from __future__ import annotations

import argparse
import json
import sys
import time
from pathlib import Path
from typing import Any

from tests.ledger.mutations import runs
from tests.ledger.mutations.faults import BEYOND, FAULTS, Fault
from tests.ledger.mutations.healthy import ACCUSED, BY_NAME, HEALTHY, Run


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", metavar="NAME", action="append", help="faults and healthy runs of this name, or part")
    parser.add_argument("--json", metavar="FILE", type=Path, help="write the table here too")
    arguments = parser.parse_args()
    only = arguments.only or [""]
    begin = time.monotonic()
    faults = [one for one in (*FAULTS, *BEYOND) if any(part in one.name for part in only)]
    healthy = [one for one in (*HEALTHY, *ACCUSED) if any(part in one.name for part in only)]
    table = audit(faults, healthy)
    table["seconds"] = round(time.monotonic() - begin)
    print(text(table))
    if arguments.json is not None:
        arguments.json.write_text(json.dumps(table, indent=1) + "\n")
    rows = [row for name in ("faults", "beyond", "healthy", "accused") for row in table[name]]
    return 1 if any(row["broken"] for row in rows) else 0


def audit(faults: list[Fault], healthy: list[Run]) -> dict[str, Any]:
    """Run them all; the rows, and the rates."""
    wanted = {run.name: run for run in healthy} | {one.run: BY_NAME[one.run] for one in faults}
    found = runs.perform([*map(runs.of_run, wanted.values()), *map(runs.of_fault, faults)])
    rows = [fault_row(one, found[one.run], found[one.name]) for one in faults if one not in BEYOND]
    beyond = [fault_row(one, found[one.run], found[one.name]) for one in faults if one in BEYOND]
    right = [healthy_row(run, found[run.name]) for run in healthy if run not in ACCUSED]
    accused = [healthy_row(run, found[run.name]) for run in healthy if run in ACCUSED]
    counted = [row for row in rows if not row["broken"]]
    hits = [row for row in counted if row["found"]]
    windows = sum(row["windows"] for row in right)
    alarms = sum(len(row["alarms"]) for row in right) + sum(row["too_early"] for row in counted)
    rates = {
        "faults": len(counted),
        "found": len(hits),
        "detection_rate": _share(len(hits), len(counted)),
        "windows_to_detect": {str(n): sum(row["after"] == n for row in hits) for n in (1, 2)},
        "healthy_runs": len(right),
        "healthy_windows": windows,
        "false_alarms": alarms,
        "could_not_tell": sum(len(row["unclear"]) for row in right),
        "false_alarm_rate": _share(alarms, windows),
    }
    return {"rates": rates, "faults": rows, "beyond": beyond, "healthy": right, "accused": accused}


def fault_row(fault: Fault, right: runs.Found, wrong: runs.Found) -> dict[str, Any]:
    active, change = runs.changed(right, wrong, BY_NAME[fault.run].windows) if right.error is None else (None, 0.0)
    reason = right.error or wrong.error or ("" if active else "the consumed gradient is the same without the edit")
    in_time = [one for one in wrong.verdicts if active and active <= one["window"] <= active + 1]
    hit = next((one for one in in_time if one["state"] == "not balanced"), None)
    early = [one for one in wrong.verdicts if active and one["window"] < active and one["state"] == "not balanced"]
    notes = [text for one in in_time for text in (*one["unclear"], *one["remarks"])]
    return {
        "fault": fault.name,
        "family": fault.family,
        "edits": sorted({edit.module for edit in fault.edits}),
        "kind": "framework" if fault.in_framework else "loop",
        "run": fault.run,
        "ranks": BY_NAME[fault.run].ranks,
        "frozen": fault.frozen,
        "active_from": active,
        "change": float(f"{change:.2g}"),
        "found": hit is not None,
        "window": hit and hit["window"],
        "too_early": len(early),
        "after": hit and hit["window"] - active + 1,
        "said": "; ".join(hit["problems"]) if hit else "; ".join(dict.fromkeys([*notes, *wrong.notes])),
        "why_not": "" if hit else fault.why_not,
        "broken": reason,
    }


def healthy_row(run: Run, found: runs.Found) -> dict[str, Any]:
    missing = found.error is None and len(found.verdicts) != run.verdicts
    short = f"{len(found.verdicts)} verdicts, not {run.verdicts}: {'; '.join(found.notes)}" if missing else ""
    return {
        "run": run.name,
        "ranks": run.ranks,
        "windows": len(found.verdicts),
        "alarms": [one["problems"] for one in found.verdicts if one["state"] == "not balanced"],
        "unclear": [one["unclear"] for one in found.verdicts if one["state"] == "could not tell"],
        "broken": found.error or short,
    }


def _share(part: int, whole: int) -> float | None:
    return round(part / whole, 4) if whole else None


def text(table: dict[str, Any]) -> str:
    lines = [f"{'found':9} {'family':12} {'edit of':9} ranks  fault"]
    for row in table["faults"]:
        lines += _fault_lines(row)
    if table["beyond"]:
        lines.append("\nbeyond what double entry can see, and not counted:")
        for row in table["beyond"]:
            lines += _fault_lines(row)
    lines.append(f"\n{'healthy':52} ranks windows")
    lines += map(_healthy_line, table["healthy"])
    if table["accused"]:
        lines.append("\nright where they are meant so, which a window does not show, and not counted:")
        lines += map(_healthy_line, table["accused"])
    rates = table["rates"]
    lines.append(
        f"\n{rates['found']} of {rates['faults']} faults found ({_percent(rates['detection_rate'])}), "
        f"{rates['windows_to_detect']['1']} in the first window in which they are active, "
        f"{rates['windows_to_detect']['2']} in the second; {rates['false_alarms']} false alarms and "
        f"{rates['could_not_tell']} times unclear in {rates['healthy_windows']} windows of {rates['healthy_runs']} "
        f"healthy runs ({_percent(rates['false_alarm_rate'])})"
    )
    return "\n".join(lines)


def _healthy_line(row: dict[str, Any]) -> str:
    told = row["broken"] or "; ".join(text for one in (*row["alarms"], *row["unclear"]) for text in one) or "balanced"
    return f"{row['run']:52} {row['ranks']:5} {row['windows']:7}  {told[:200]}"


def _fault_lines(row: dict[str, Any]) -> list[str]:
    mark = "BROKEN" if row["broken"] else f"window {row['window']}" if row["found"] else "NO"
    told = row["broken"] or (row["said"] if row["found"] else f"{row['why_not']} (said: {row['said'] or 'nothing'})")
    short = told if len(told) < 200 else told[:197] + "..."
    head = f"{mark:9} {row['family']:12} {row['kind']:9} {row['ranks']:5}  {row['fault']}"
    active = f" from window {row['active_from']}" if row["active_from"] not in (None, 1) else ""
    return [f"{head}{' [frozen]' if row['frozen'] else ''}{active}", f"{'':40}{short}"]


def _percent(share: float | None) -> str:
    return "none" if share is None else f"{share:.1%}"


if __name__ == "__main__":
    sys.exit(main())
