"""Doctor executes and imports nothing of what it examines, starts nothing, writes nothing, and never uses the network.

Asserted with Python's audit events, in a child that examines files and packages which would leave a mark if they ran.
"""

from __future__ import annotations

import json
import os
import pickle
import subprocess
import sys
from pathlib import Path

import pytest

SOURCE = Path(__file__).resolve().parents[2] / "src"

WATCH = """
import json, sys
seen = []
FORBIDDEN = ("socket.", "urllib.", "http.", "ftplib.", "smtplib.", "subprocess.", "pickle.", "ctypes.",
             "os.system", "os.exec", "os.fork", "os.posix_spawn", "os.remove", "os.rename", "os.mkdir", "shutil.")
def watch(event, args):
    examined = any(isinstance(one, (str, bytes)) and sys.argv[1] in str(one) for one in args)
    if event == "import" and args[0].partition(".")[0] in ("deepspeed", "torch", "transformers", "llamafactory"):
        seen.append([event, str(args[0])])
    elif event in ("exec", "compile") and any(sys.argv[1] in str(getattr(one, "co_filename", one)) for one in args):
        seen.append([event, str(args)])
    elif event.startswith(FORBIDDEN):
        seen.append([event, str(args)])
    elif event == "open" and isinstance(args[1], str) and set(args[1]) & set("wax+") and examined:
        seen.append([event, str(args)])
from trainfix.cli import main
sys.addaudithook(watch)
code = main(sys.argv[2:])
print(json.dumps([code, seen]), file=sys.stderr)
"""
MARK = "import pathlib; pathlib.Path(__file__).with_name('RAN').write_text('ran')\n"


class Trap:
    """Leaves a mark where somebody unpickles it."""

    def __init__(self, mark: Path) -> None:
        self.mark = mark

    def __reduce__(self):
        return Path.write_text, (self.mark, "ran")


@pytest.fixture
def trapped(tmp_path: Path) -> Path:
    """An environment, configs, a lock file and a checkpoint, all of them full of traps."""
    site = tmp_path / "venv" / "lib" / "python3.11" / "site-packages"
    for name, version in (("deepspeed", "0.18.9"), ("transformers", "4.46.3"), ("llamafactory", "0.9.4")):
        (site / name).mkdir(parents=True)
        (site / name / "__init__.py").write_text(MARK)
        metadata = site / f"{name}-{version}.dist-info" / "METADATA"
        metadata.parent.mkdir()
        metadata.write_text(f"Metadata-Version: 2.4\nName: {name}\nVersion: {version}\n")
    (tmp_path / "venv" / "pyvenv.cfg").write_text("home = /usr/bin\nversion = 3.11.7\n")
    (site / "trap.pth").write_text(f"import pathlib; pathlib.Path({str(site / 'RAN')!r}).write_text('ran')\n")
    for name in ("sitecustomize.py", "usercustomize.py"):
        (site / name).write_text(MARK)
    (tmp_path / "ds.json").write_text(json.dumps({"zero_optimization": {"stage": 2}}))
    (tmp_path / "train.yaml").write_text(
        "stage: sft\nmodel_name_or_path: a/model\nfinetuning_type: full\ndataset: d\noutput_dir: out\n"
        "deepspeed: ds.json\n"
    )
    mark = tmp_path / "RAN"
    (tmp_path / "train.sh").write_text(
        f"touch {mark}\nexport GA=$(touch {mark})\nllamafactory-cli train train.yaml gradient_accumulation_steps=$GA\n"
    )
    (tmp_path / "requirements.txt").write_text("deepspeed==0.18.9\nmine @ https://example.org/mine.whl\n-e ./venv\n")
    run = tmp_path / "checkpoint-3"
    run.mkdir()
    (run / "training_args.bin").write_bytes(pickle.dumps(Trap(mark)))
    (run / "trainer_state.json").write_text(json.dumps({"global_step": 3, "max_steps": 3, "log_history": []}))
    return tmp_path


@pytest.mark.parametrize(
    "argv",
    [
        ["--site", "venv", "--config", "train.yaml"],
        ["--site", "venv", "--config", "train.sh", "--format", "sarif"],
        ["--lock", "requirements.txt", "--config", "ds.json", "--format", "markdown"],
        ["--checkpoint", "checkpoint-3", "--config", "checkpoint-3", "--format", "json"],
        ["--config", "train.yaml", "--issue"],
    ],
    ids=lambda argv: " ".join(argv),
)
def test_doctor_touches_nothing_of_what_it_examines(trapped: Path, argv: list[str]) -> None:
    inherited = {key: value for key, value in os.environ.items() if not key.startswith(("TRAINFIX", "PYTHON"))}
    path = os.pathsep.join([str(SOURCE), *(["venv/lib/python3.11/site-packages"] if "--issue" in argv else [])])
    command = [sys.executable, "-c", WATCH, str(trapped), "doctor", *argv]
    done = subprocess.run(
        command,
        cwd=trapped,
        env=inherited | {"PYTHONPATH": path, "PYTHONDONTWRITEBYTECODE": "1"},
        capture_output=True,
        text=True,
        check=False,
    )
    code, seen = json.loads(done.stderr.splitlines()[-1])
    assert code in (0, 1, 3), done.stderr
    assert seen == []
    marks = [file for file in trapped.rglob("RAN") if "--issue" not in argv or file.parent.name != "site-packages"]
    assert marks == []


def test_the_watch_would_see_what_it_forbids(trapped: Path) -> None:
    """The same child, whose command is replaced by one that opens a socket, unpickles and imports."""
    file = "open(sys.argv[1] + '/checkpoint-3/training_args.bin', 'rb')"
    deed = f"import socket, pickle; socket.socket(); pickle.load({file})"
    child = WATCH.replace("code = main(sys.argv[2:])", f"code = 0\n{deed}\nimport deepspeed")
    path = os.pathsep.join([str(SOURCE), str(trapped / "venv" / "lib" / "python3.11" / "site-packages")])
    command = [sys.executable, "-S", "-c", child, str(trapped)]
    done = subprocess.run(command, env={**os.environ, "PYTHONPATH": path}, capture_output=True, text=True, check=False)
    _, seen = json.loads(done.stderr.splitlines()[-1])
    assert {"socket.__new__", "pickle.find_class", "import", "exec"} <= {event for event, _ in seen}
    assert (trapped / "RAN").exists()
