"""``trainfix xray``: a script's first steps, a verdict, a page."""

from __future__ import annotations

import json
import os
import signal
import socket
import subprocess
import sys
import time
from html.parser import HTMLParser
from pathlib import Path

import jsonschema
import pytest

from trainfix.cli import main, xray, xray_page

ROOT = Path(__file__).resolve().parents[2]
SCHEMA = json.loads((ROOT / "src" / "trainfix" / "schemas" / "xray.schema.json").read_text())

SCRIPT = """
import sys
import torch
{more}
torch.manual_seed(0)
model = torch.nn.Sequential(torch.nn.Linear(8, 8), torch.nn.Tanh(), torch.nn.Linear(8, 1))
optimizer = torch.optim.AdamW(model.parameters())
for window in range(4):
    for number in range(3):
        kept = [None if one.grad is None else one.grad.clone() for one in model.parameters()]
        generator = torch.Generator().manual_seed(10 * window + number)
        model(torch.randn(4, 8, generator=generator)).square().mean().backward()
        if number == 1 and "drop" in sys.argv:
            for one, old in zip(model.parameters(), kept):
                one.grad = old
    optimizer.step()
    optimizer.zero_grad()
print("trained")
"""


@pytest.fixture
def env(tmp_path, monkeypatch):
    for name in list(os.environ):
        if name.startswith("TRAINFIX"):
            monkeypatch.delenv(name)
    monkeypatch.chdir(tmp_path)
    return tmp_path


def script(folder, more="", name="train.py"):
    (folder / name).write_text(SCRIPT.format(more=more))
    return name


def run_xray(capfd, *words):
    code = main(["xray", *words])
    captured = capfd.readouterr()
    return code, captured.out, captured.err


class Page(HTMLParser):
    """Text and tags of a page; unbalanced tags are an error."""

    def __init__(self, text):
        super().__init__()
        self.words, self.open, self.sources = [], [], []
        self.feed(text)
        assert self.open == []

    def handle_starttag(self, tag, attrs):
        self.sources += [value for name, value in attrs if name in ("src", "href")]
        if tag not in ("meta", "br", "rect", "line"):
            self.open.append(tag)

    def handle_endtag(self, tag):
        if tag in ("rect", "line"):
            return
        assert self.open.pop() == tag

    def handle_data(self, data):
        self.words.append(data)


def test_a_right_script_balances(env, capfd):
    code, out, err = run_xray(capfd, "--", sys.executable, script(env))
    assert code == 0, err
    assert out.startswith("trained\ntrainfix xray: balanced, 2 windows\n")
    assert "  repairs: off (nothing in the command turns them on; TRAINFIX=on does)" in out


def test_a_wrong_script_does_not_and_the_reports_say_where(env, capfd):
    code, out, _ = run_xray(capfd, "-o", "x.html", "--json", "x.json", "--", sys.executable, script(env), "drop")
    assert code == 1
    assert "trainfix xray: NOT BALANCED in 2 of 2 windows" in out
    assert "  window 1 (AdamW): micro-batch 2 of 3 is dropped" in out
    report = json.loads(Path("x.json").read_text())
    jsonschema.validate(report, SCHEMA)
    assert (report["exit"], report["state"], report["command_ended"]) == (1, "not balanced", 0)
    found = [row["coefficient"] for row in report["windows"][0]["micro_batches"]]
    assert found == pytest.approx([1, 0, 1], abs=1e-3)
    page = Page(Path("x.html").read_text())
    assert page.sources == []
    text = " ".join(page.words)
    assert "micro-batch 2 of 3 is dropped" in text
    assert "rank 0" in text


def test_the_number_of_steps_is_what_was_asked_for(env, capfd):
    code, out, _ = run_xray(capfd, "--steps", "3", "--", sys.executable, script(env))
    assert (code, "balanced, 3 windows" in out) == (0, True)


def test_a_command_without_a_step_cannot_be_told(env, capfd):
    code, out, _ = run_xray(capfd, "--json", "x.json", "--", sys.executable, "-c", "import torch, sys; sys.exit(5)")
    assert code == 3
    assert "no optimizer step of a torch model was seen: the command ended with exit code 5" in out
    jsonschema.validate(json.loads(Path("x.json").read_text()), SCHEMA)


@pytest.mark.parametrize(
    ("words", "said"),
    [
        ((), "trainfix xray needs a command"),
        (("--steps", "0", "--", "true"), "'0' is no number of steps: give 1 or more"),
        (("--stepps", "2", "--", "true"), "did you mean --steps?"),
        (("--", "no-such-command-anywhere"), "'no-such-command-anywhere' cannot be started"),
        (("-o", "none/x.html", "--", "true"), "is not a directory"),
    ],
)
def test_bad_usage_is_named(env, capfd, words, said):
    code, _, err = run_xray(capfd, *words)
    assert code == 2
    assert said in err


def test_repairs_are_on_only_where_they_would_be_without_xray(env, monkeypatch):
    script(env, name="plain.py")
    script(env, "import trainfix", name="repaired.py")
    (env / "pack").mkdir()
    script(env / "pack", "from trainfix import status", name="inner.py")
    repairs = xray._repairs
    assert repairs(["python", "plain.py"], {}).mode == "off"
    assert repairs(["torchrun", "repaired.py"], {}) == ("on", "repaired.py imports trainfix")
    assert repairs(["python", "-m", "pack.inner"], {}).mode == "on"
    assert repairs(["python", "plain.py"], {"TRAINFIX": "warn"}) == ("warn", "TRAINFIX=warn")
    assert repairs(["python", "repaired.py"], {"TRAINFIX": "off"}).mode == "off"
    monkeypatch.setattr("trainfix.activation.found.active_in", lambda paths, environ: "trainfix enable")
    assert repairs(["python", "plain.py"], {}) == ("on", "trainfix enable")


def test_the_script_is_repaired_or_not_as_without_xray(env, capfd):
    say = "import trainfix; print('mode', __import__('trainfix.engine.finder').engine.finder.current.mode)"
    for name, more, mode in (("with.py", say, "on"), ("without.py", say.replace("import trainfix; ", "", 1), "off")):
        _, out, _ = run_xray(capfd, "--", sys.executable, script(env, more, name=name))
        assert f"mode {mode}\n" in out


def test_the_report_is_there_while_the_command_goes_on_and_an_interrupt_ends_it(env):
    words = [sys.executable, "-m", "trainfix", "xray", "-o", "x.html", "--", sys.executable, "long.py"]
    (env / "long.py").write_text(SCRIPT.format(more="") + "import time\ntime.sleep(300)\n")
    child = subprocess.Popen(words, stdout=subprocess.PIPE, text=True, start_new_session=True)
    for _ in range(600):
        if Path("x.html").exists():
            break
        time.sleep(0.1)
    assert child.poll() is None
    assert "balanced" in Path("x.html").read_text()
    os.killpg(child.pid, signal.SIGINT)
    out, _ = child.communicate(timeout=60)
    assert child.returncode == 0
    assert "trainfix xray: balanced, 2 windows" in out
    assert "the command was ended by signal 2" in out or "exit code" in out


TWO_RANKS = """
import torch
torch.distributed.init_process_group("gloo")
rank = torch.distributed.get_rank()
torch.manual_seed(0)
model = torch.nn.parallel.DistributedDataParallel(torch.nn.Linear(8, 1))
optimizer = torch.optim.AdamW(model.parameters())
for window in range(2):
    for number in range(3):
        generator = torch.Generator().manual_seed(100 * rank + 10 * window + number)
        loss = model(torch.randn(4, 8, generator=generator)).square().mean()
        if number < 2:
            with model.no_sync():
                loss.backward()
        else:
            loss.backward()
    optimizer.step()
    optimizer.zero_grad()
torch.distributed.barrier()
"""


@pytest.mark.slow
def test_a_launch_with_torchrun_shows_both_ranks_in_one_chart(env, capfd):
    Path("two.py").write_text(TWO_RANKS)
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    launch = [sys.executable, "-m", "torch.distributed.run", "--nproc-per-node", "2", "--master-port", str(port)]
    code, out, err = run_xray(capfd, "-o", "x.html", "--json", "x.json", "--", *launch, "two.py")
    assert (code, "balanced, 2 windows" in out) == (0, True), err
    rows = json.loads(Path("x.json").read_text())["windows"][0]["micro_batches"]
    assert [(row["rank"], row["micro_batch"]) for row in rows] == [(rank, k) for rank in (0, 1) for k in range(3)]
    text = Path("x.html").read_text()
    assert "rank 0" in text
    assert "rank 1" in text


def test_a_page_escapes_what_it_is_given():
    report = {
        "schema": 1,
        "trainfix": "0",
        "command": ["<script>alert(1)</script>"],
        "repairs": "off",
        "repairs_because": "&",
        "command_ended": 0,
        "exit": 3,
        "state": "could not tell",
        "notes": ["<b>"],
        "remarks": [],
        "windows": [],
    }
    page = xray_page.html(report)
    assert "<script>" not in page
    assert "&lt;b&gt;" in page
