"""``trainfix xray``: the ledger over the first optimizer steps of any script, and a verdict."""

from __future__ import annotations

import argparse
import json
import os
import re
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from trainfix.cli import base

_POLL_SECONDS = 0.5
_IMPORTS = re.compile(r"^[ \t]*(?:import|from)[ \t]+trainfix\b", re.MULTILINE)
EXITS = {"balanced": base.OK, "not balanced": base.UNREPAIRED, "could not tell": base.UNDECIDED}


class Repairs(NamedTuple):
    """TRAINFIX for the command, and why."""

    mode: str
    because: str


def options(parser: argparse.ArgumentParser) -> None:
    """The command line of xray."""
    parser.usage = "trainfix xray [-h] [--version] [--steps N] [-o HTML] [--json FILE] -- COMMAND..."
    parser.epilog = (
        "Exit codes: 0 every audited window balances; 1 one does not; 2 usage; 3 it could not tell. The command runs "
        "to its end, and its report is there as soon as the windows are: interrupt it (Ctrl-C) if you want no more. "
        "trainfix's repairs are on in it only where they would be without xray: TRAINFIX is set, the environment is "
        "enabled, or the script imports trainfix."
    )
    parser.add_argument("--steps", type=_count, default=2, metavar="N", help="optimizer steps to audit (default: 2)")
    parser.add_argument("-o", "--output", metavar="HTML", help="write a report with charts, one self-contained file")
    parser.add_argument("--json", metavar="FILE", help="write everything that was measured")
    parser.add_argument("command", nargs=argparse.REMAINDER, metavar="COMMAND", help="the command and its arguments")


def _count(word: str) -> int:
    if not word.isdecimal() or int(word) < 1:
        raise argparse.ArgumentTypeError(f"{word!r} is no number of steps: give 1 or more")
    return int(word)


def run(args: argparse.Namespace) -> int:
    """Run the command under the ledger, say what it showed, and return the exit code."""
    from trainfix.activation import launch

    command = args.command[args.command[:1] == ["--"] :]
    if not command:
        raise base.UsageError(
            "trainfix xray needs a command: trainfix xray [--steps N] -- COMMAND..., "
            "for example trainfix xray -- torchrun --nproc-per-node 8 train.py"
        )
    for path in (args.output, args.json):
        base.check_output(path)
    for text in launch.warnings(command, os.environ):
        print(f"trainfix: {text}", file=sys.stderr)
    repairs = _repairs(command, os.environ)
    with tempfile.TemporaryDirectory(prefix="trainfix-xray-") as folder:
        ledger = f"first:{args.steps},action=warn,out={folder}"
        environ = launch.environment(os.environ) | {"TRAINFIX": repairs.mode, "TRAINFIX_LEDGER": ledger}
        is_written = False

        def look() -> None:
            """Write the report as soon as all windows are there."""
            nonlocal is_written
            records = _records(Path(folder))
            if not is_written and (args.output or args.json) and _most(records) >= args.steps:
                is_written = True
                _write(_report(command, repairs, records, None), args)
                print("trainfix xray: the command goes on, its windows are audited", file=sys.stderr)

        ended = _watched(command, environ, look)
        report = _report(command, repairs, _records(Path(folder)), ended)
    sys.stdout.write(_text(report, args))
    sys.stdout.flush()
    _write(report, args)
    return int(report["exit"])


def _repairs(command: Sequence[str], environ: Mapping[str, str]) -> Repairs:
    """Whether trainfix repairs this run without us: then it does with us."""
    import site

    from trainfix.activation.found import active_in

    if environ.get("TRAINFIX"):
        return Repairs(environ["TRAINFIX"], f"TRAINFIX={environ['TRAINFIX']}")
    active = active_in([*site.getsitepackages(), site.getusersitepackages()], environ)
    if active:
        return Repairs("on", active)
    for script in _scripts(command):
        try:
            if _IMPORTS.search(script.read_text(encoding="utf-8", errors="replace")):
                return Repairs("on", f"{script} imports trainfix")
        except OSError:
            continue
    return Repairs("off", "nothing in the command turns them on; TRAINFIX=on does")


def _scripts(command: Sequence[str]) -> Iterator[Path]:
    """The Python files that the command names, also as modules."""
    for before, word in zip(("", *command), command, strict=False):
        path = Path(f"{word.replace('.', os.sep)}.py" if before in ("-m", "--module") else word)
        if path.suffix == ".py" and path.is_file():
            yield path


def _watched(command: Sequence[str], environ: dict[str, str], look: Callable[[], object]) -> int:
    """Run the command to its end, calling `look` now and then. Returns its exit code. Raises UsageError."""
    sys.stdout.flush()
    try:
        child = subprocess.Popen(command, env=environ)
    except OSError as error:
        raise base.UsageError(f"{command[0]!r} cannot be started: {error.strerror}") from None
    before = signal.signal(signal.SIGTERM, lambda number, _: child.send_signal(number))
    try:
        while True:
            try:
                return child.wait(_POLL_SECONDS)
            except subprocess.TimeoutExpired:
                look()
            except KeyboardInterrupt:  # the command has it too: it may end in its own time
                time.sleep(_POLL_SECONDS)
    finally:
        signal.signal(signal.SIGTERM, before)


def _records(folder: Path) -> list[dict[str, Any]]:
    """What the processes of the command have written so far; a line that is being written is left for later."""
    found = []
    for file in sorted(folder.glob("ledger-*.jsonl")):
        for line in file.read_text(encoding="utf-8").splitlines(keepends=True):
            if line.endswith("\n"):
                found.append({"process": file.stem.removeprefix("ledger-"), **json.loads(line)})
    return found


def _most(records: Sequence[Mapping[str, Any]]) -> int:
    return max((record["window"] for record in records if record["kind"] == "window"), default=0)


def _report(
    command: Sequence[str], repairs: Repairs, records: Sequence[dict[str, Any]], ended: int | None
) -> dict[str, Any]:
    from trainfix import __version__

    windows = [record for record in records if record["kind"] == "window"]
    notes = [record["text"] for record in records if record["kind"] == "note"]
    remarks = [record["text"] for record in records if record["kind"] == "remark"]
    states = [window["state"] for window in windows]
    if "not balanced" in states:
        state = "not balanced"
    elif not windows or notes or "could not tell" in states:
        state = "could not tell"
    else:
        state = "balanced"
    if not windows:
        notes.append("no optimizer step of a torch model was seen" + _because(ended))
    return {
        "schema": 1,
        "trainfix": __version__,
        "command": list(command),
        "repairs": repairs.mode,
        "repairs_because": repairs.because,
        "command_ended": ended,
        "exit": EXITS[state],
        "state": state,
        "notes": notes,
        "remarks": remarks,
        "windows": windows,
    }


def _because(ended: int | None) -> str:
    if not ended:
        return ""
    return f": the command was ended by signal {-ended}" if ended < 0 else f": the command ended with exit code {ended}"


def _text(report: Mapping[str, Any], args: argparse.Namespace) -> str:
    """The short verdict."""
    windows = report["windows"]
    wrong = sum(window["state"] == "not balanced" for window in windows)
    count = f" in {wrong} of {len(windows)} windows" if wrong else f", {len(windows)} windows" if windows else ""
    lines = [f"trainfix xray: {report['state'].upper() if wrong else report['state']}{count}"]
    for window in windows:
        told = window["problems"] or window["unclear"] or ["balanced"]
        lines += [f"  window {window['window']} ({window['optimizer']}): {text}" for text in told]
    remarks = dict.fromkeys(remark for window in [*windows, report] for remark in window["remarks"])
    lines += [f"  remark: {remark}" for remark in remarks]
    lines += [f"  note: {note}" for note in dict.fromkeys(report["notes"])]
    lines.append(f"  repairs: {report['repairs']} ({report['repairs_because']})")
    if windows and report["command_ended"]:
        lines.append(f"  the command{_because(report['command_ended']).removeprefix(': the command')}")
    if wrong:
        lines.append("  next: `trainfix doctor` knows the errors that are catalogued, and which of them it repairs")
    if not args.output:
        lines.append("  -o FILE writes a report with charts")
    return "\n".join(lines) + "\n"


def _write(report: Mapping[str, Any], args: argparse.Namespace) -> None:
    from trainfix.cli import xray_page

    if args.output:
        base.write_report(xray_page.html(report), args.output)
    if args.json:
        base.write_report(json.dumps(report, indent=1) + "\n", args.json)


COMMANDS = (("xray", "audit the first optimizer steps of any script", options, run),)
