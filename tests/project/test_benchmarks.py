"""The GPU benchmarks and the report, as far as they can be run without a GPU."""

import argparse
import json
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from benchmarks.gpu import common, end_to_end, kernel, links, models, path, run
from benchmarks.gpu.ratios import ratio
from benchmarks.report import __main__ as report
from benchmarks.report import model
from tests.support import releases

ROOT = Path(__file__).resolve().parents[2]
SCRIPTS = ("links", "kernel", "interference", "path", "end_to_end", "run")
without_gpu = pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU here")


def saved(folder, script):
    return json.loads((folder / f"{script}.json").read_text(encoding="utf-8"))


# The scripts


@pytest.mark.parametrize("script", SCRIPTS)
def test_every_script_says_what_it_does(script):
    command = [sys.executable, str(ROOT / "benchmarks" / "gpu" / f"{script}.py"), "--help"]
    environment = {"PYTHONPATH": f"{ROOT / 'src'}:{ROOT}", "PATH": ""}
    done = subprocess.run(command, env=environment, capture_output=True, text=True, check=True)
    assert "--out" in done.stdout
    assert "--rehearse" in done.stdout


@without_gpu
@pytest.mark.parametrize("main", [links.main, path.main, kernel.main, run.main])
def test_without_a_gpu_the_error_says_so_and_nothing_is_written(main, tmp_path, capsys):
    assert main(["--out", str(tmp_path)]) == 2
    assert "finds no GPU here" in capsys.readouterr().err
    assert not list(tmp_path.iterdir())


def test_an_unknown_step_is_named(tmp_path, capsys):
    assert links.main(["speed", "--rehearse", "--out", str(tmp_path)]) == 2
    assert "no step speed; there are speeds, pageable, pin" in capsys.readouterr().err


def test_what_is_saved_is_not_run_again(tmp_path, capsys):
    assert links.main(["pageable", "--rehearse", "--out", str(tmp_path)]) == 0
    before = saved(tmp_path, "links")
    assert links.main(["pageable", "pin", "--rehearse", "--out", str(tmp_path)]) == 0
    assert "links pageable: saved already" in capsys.readouterr().err
    after = saved(tmp_path, "links")
    assert after["steps"]["pageable"] == before["steps"]["pageable"]
    assert set(after["steps"]) == {"pageable", "pin"}


def test_a_step_that_fails_is_not_saved_and_the_others_are(tmp_path, capsys):
    def fail(*_):
        raise RuntimeError("no such link")

    def work(*_):
        return [{"answer": 42}]

    steps = {"bad": common.Step(1, fail), "good": common.Step(1, work)}
    options = common.parser("", steps).parse_args(["--rehearse", "--out", str(tmp_path)])
    assert common.main("made-up", "", steps, options) == 1
    assert set(saved(tmp_path, "made-up")["steps"]) == {"good"}
    assert "no such link" in capsys.readouterr().err


def test_a_rehearsal_never_passes_for_a_measurement(tmp_path):
    assert links.main(["pin", "--rehearse", "--out", str(tmp_path)]) == 0
    content = saved(tmp_path, "links")
    assert content["kind"] == "rehearsal"
    assert {"torch", "driver", "processor", "cores"} <= set(content["steps"]["pin"]["about"])
    assert content["steps"]["pin"]["date"].endswith("+00:00")


def test_the_kernels_check_finds_the_right_bits_in_every_case(tmp_path):
    assert kernel.main(["correct", "--rehearse", "--out", str(tmp_path)]) == 0
    rows = saved(tmp_path, "kernel")["steps"]["correct"]["rows"]
    assert len(rows) == 3 * 2 * 5
    assert all(row["bitwise"] and row["squares_repeat"] and row["squares_relative_error"] < 1e-12 for row in rows)


def test_the_kernels_check_finds_a_wrong_bit(monkeypatch, tmp_path):
    class Wrong(kernel.TorchAdder):
        def add(self, segments, squares=None):
            super().add(segments, squares)
            segments[-1].destination[-1] *= 1 + 2**-23

    monkeypatch.setattr(kernel, "makers", lambda place: [("wrong", lambda device: Wrong())])
    assert kernel.main(["correct", "--rehearse", "--out", str(tmp_path)]) == 0
    assert not any(row["bitwise"] for row in saved(tmp_path, "kernel")["steps"]["correct"]["rows"])


def test_on_the_path_every_tier_leaves_the_same_bits_and_the_broken_way_leaves_others(tmp_path):
    assert path.main(["7B-quarter", "--rehearse", "--out", str(tmp_path)]) == 0
    rows = {row["way"]: row for row in saved(tmp_path, "path")["steps"]["7B-quarter"]["rows"]}
    ours = {rows[f"trainfix, {tier}"]["sum_sha256"] for tier in path.FAST}
    assert len(ours) == 1
    assert rows["broken"]["sum_sha256"] not in ours
    # Eight equal gradients add up to eight of them, of which the broken way keeps two: exactly, in these numbers.
    assert rows["upstream"]["norm"] == rows["trainfix, ring"]["norm"] == 4 * rows["broken"]["norm"]


@pytest.mark.slow
def test_end_to_end_trainfix_trains_as_without_offload_and_the_broken_release_does_not(tmp_path):
    options = argparse.Namespace(out=tmp_path, release=[f"0.18.9={releases.release('0.18.9')}"])
    only = ("broken", "trainfix, resident", "no offload")
    rows = end_to_end.measure("0.5B", 4, common.Place(rehearsal=True), options, only)
    found = {row["variant"]: row for row in rows}
    assert set(found) == set(only)
    assert found["trainfix, resident"]["norm_error"] < 1e-2 < 0.2 < found["broken"]["norm_error"]
    assert "TF-0001" in found["trainfix, resident"]["repaired"]
    assert "resident" in found["trainfix, resident"]["carried_by"][0]
    assert set(found["trainfix, resident"]["speed_over_broken"]) == {"median", "low", "high"}
    assert not list(tmp_path.glob("*.log"))


# What they compute with


@pytest.mark.parametrize(("name", "count"), [("0.5B", 494_032_768), ("1.5B", 1_543_714_304), ("7B", 7_615_616_512)])
def test_the_lists_of_parameters_are_those_of_qwen(name, count):
    assert sum(models.elements(models.MODELS[name])) == count


def test_the_network_has_the_parameters_of_its_list():
    sizes = models.MODELS["tiny"]
    assert [tuple(one.shape) for one in models.Llama(sizes).parameters()] == list(models.shapes(sizes))
    assert models.Llama(sizes)(torch.zeros(1, 8, dtype=torch.long)).item() > 0


def test_a_share_is_cut_at_its_edge():
    assert models.share([5, 4, 3], 2) == [5, 1]
    assert models.share([5, 4, 3], 1) == [5, 4, 3]


def test_buckets_are_filled_from_the_last_parameter_on():
    assert models.buckets([9, 2, 2, 2], 4) == [[3, 2], [1], [0]]


def test_a_ratio_is_taken_turn_by_turn():
    found = ratio([2.0, 4.0, 8.0], [1.0, 2.0, 4.0])
    assert found == (2.0, 2.0, 2.0)
    low, high = ratio([1.0, 1.1, 0.9, 1.0, 1.2], [1.0] * 5)[1:]
    assert 0.9 <= low < 1.0 < high <= 1.2
    with pytest.raises(ValueError, match="2 turns of one way cannot be paired with 1 of the other"):
        ratio([1.0, 2.0], [1.0])


def test_variants_come_in_groups_that_fit_each_with_the_first():
    assert end_to_end.groups(["a", "b", "c", "d"], 3) == [["a", "b", "c"], ["a", "d"]]
    assert end_to_end.groups(["a", "b", "c"], 0) == [["a", "b"], ["a", "c"]]


# The plan


def test_the_plan_has_every_step_of_every_script_once_and_each_is_shorter_than_ten_minutes():
    planned = [(task.script, task.step) for task in run.tasks()]
    assert len(planned) == len(set(planned))
    scripts = {script: __import__(f"benchmarks.gpu.{script}", fromlist=["STEPS"]) for script in SCRIPTS[:-1]}
    assert set(planned) == {(script, step) for script, module in scripts.items() for step in module.STEPS}
    assert all(task.seconds < 600 for task in run.tasks())


def test_fifteen_minutes_are_enough_for_what_decides():
    seconds, reached = 15 * 60, set()
    left = list(run.tasks())
    while (task := run.next_task(left, seconds)) is not None:
        left.remove(task)
        reached.add((task.script, task.step))
        seconds -= task.seconds
    assert {("kernel", "correct"), ("interference", "tiers"), ("path", "1.5B"), ("end_to_end", "0.5B-ga8")} <= reached


def test_the_plan_says_what_is_done_and_what_is_left(tmp_path, capsys):
    assert links.main(["pin", "--rehearse", "--out", str(tmp_path)]) == 0
    assert run.main(["--list", "--rehearse", "--out", str(tmp_path)]) == 1
    lines = {tuple(line.split()[:2]): line.split()[-1] for line in capsys.readouterr().err.splitlines()}
    assert lines["links", "pin"] == "saved"
    assert lines["path", "0.5B"] == "left"
    assert ("end_to_end", "0.5B-ga8") not in lines  # no release was named


# The report


def test_the_report_of_the_saved_results_says_what_is_counted_and_what_is_computed(tmp_path):
    assert report.main(["-o", str(tmp_path)]) == 0
    text = (tmp_path / "index.html").read_text(encoding="utf-8")
    assert "computed, not measured" in text
    assert '<span class="basis made">counted</span>' in text
    assert {"bytes.png", "model.png"} <= {file.name for file in tmp_path.iterdir()}
    assert 'src="http' not in text
    assert "<link" not in text


def test_the_report_shows_no_rehearsal_and_says_that_no_gpu_was_measured(tmp_path):
    folder = tmp_path / "results"
    assert path.main(["7B-quarter", "--rehearse", "--out", str(folder)]) == 0
    assert report.main(["-o", str(tmp_path / "page"), "--results", str(folder)]) == 0
    text = (tmp_path / "page" / "index.html").read_text(encoding="utf-8")
    assert "No time on a GPU has been measured yet" in text
    assert "Left out, for their numbers mean nothing: path.json (rehearsal)" in text
    assert "measured on" not in text
    assert [file.name for file in (tmp_path / "page").glob("*.png")] == ["model.png"]


def test_the_report_shows_a_measurement_with_its_hardware(tmp_path):
    folder = tmp_path / "results" / "made-up-gpu"
    interval = {"median": 1.1, "low": 1.0, "high": 1.2}
    row = {"model": "0.5B", "accumulation": 8, "variant": "trainfix, ring", "speed_over_broken": interval}
    about = {"hardware": "Made-up GPU", "driver": "1.2.3", "torch": "2.11.0"}
    step = {"date": "2026-01-01T00:00:00+00:00", "seconds": 1.0, "about": about, "rows": [row]}
    folder.mkdir(parents=True)
    content = {"kind": "measured", "hardware": "Made-up GPU", "question": "", "steps": {"0.5B-ga8": step}}
    (folder / "end_to_end.json").write_text(json.dumps(content), encoding="utf-8")
    assert report.main(["-o", str(tmp_path / "page"), "--results", str(tmp_path / "results")]) == 0
    text = (tmp_path / "page" / "index.html").read_text(encoding="utf-8")
    assert "measured on Made-up GPU, 1.2.3, 2.11.0" in text
    assert "median 1.1, low 1, high 1.2" in text
    assert "No time on a GPU" not in text
    assert (tmp_path / "page" / "made-up-gpu-end_to_end.png").is_file()


def test_the_report_refuses_a_file_that_is_no_result(tmp_path):
    (tmp_path / "broken.json").write_text("{", encoding="utf-8")
    with pytest.raises(ValueError, match=r"broken\.json"):
        report.main(["-o", str(tmp_path / "page"), "--results", str(tmp_path)])


@pytest.mark.parametrize(
    ("design", "steps", "seconds"),
    [
        ("broken (0.15.2 to 0.18.9)", 8, 2.55),
        ("upstream's repair (0.19)", 8, 4.33),
        ("trainfix, ring", 8, 4.07),
        ("trainfix, host-add", 8, 2.04),
        ("trainfix, resident", 8, 0.51),
        ("upstream's repair (0.19)", 1, 0.51),
    ],
)
def test_the_models_seconds_are_bytes_over_the_link(design, steps, seconds):
    assert model.seconds(model.DESIGNS[design], steps, 55.0) == pytest.approx(seconds, abs=0.01)
