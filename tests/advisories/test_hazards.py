"""The table of silent changes: every row is what the sources of the 47 releases show, and the queries find it."""

from __future__ import annotations

import json
import re
from functools import cache
from pathlib import Path

import pytest

from tests.support.releases import RELEASES, release
from trainfix import advisories
from trainfix.advisories import hazards
from trainfix.advisories.hazards import between, in_force
from trainfix.environment.configs import load_run as load
from trainfix.environment.runconfig import RunConfig
from trainfix.environment.runconfig.deepspeed import CHANGED_DEFAULTS

CONFIG, CONSTANTS, ENGINE = "runtime/config.py", "runtime/constants.py", "runtime/engine.py"
PRECISION, SCALER = "runtime/precision_config.py", "runtime/fp16/loss_scaler.py"
OFFLOAD, SCHEDULES, STAGE_3 = "runtime/zero/offload_config.py", "runtime/lr_schedules.py", "runtime/zero/stage3.py"
ORIGINAL_MUON = "runtime/zero/muon/original_muon.py"
SEQUENCE = r'^SEQ_PARALLEL_COMMUNICATION_DATA_TYPE = "seq_parallel_comm{}data_type"$'
IN_OPTIMIZER = r"^class DeepSpeedZeroOffloadOptimizerConfig.*?^    pin_memory: bool = {}$"
IN_PARAM = r"^class DeepSpeedZeroOffloadParamConfig(?:(?!^class).)*?^    pin_memory: bool = {}$"

# row -> ((file, what every release before has), (file, what every release from there on has)); a release has only one
# of the two. None: the releases before have nothing instead.
SHOWN_BY: dict[tuple[str, str | None], tuple[tuple[str, str] | None, tuple[str, str]]] = {
    ("0.14.5", None): (
        (ENGINE, r"lr_scheduler = self\._scheduler_from_config\(self\.optimizer\)\n\s+if lr_scheduler:"),
        (ENGINE, r"if self\.client_lr_scheduler:\n"),
    ),
    ("0.15.3", None): (None, (SCHEDULES, r"# Initialize lr in optimizer\n\s+if last_batch_iteration == -1:")),
    ("0.16.5", None): ((CONSTANTS, SEQUENCE.format("_")), (CONSTANTS, SEQUENCE.format("unication_"))),
    ("0.17.1", "fp16.initial_scale_power"): (
        (SCALER, r"^                 init_scale=2\*\*32,$"),
        (PRECISION, r"^    initial_scale_power: int = 16$"),
    ),
    ("0.17.1", "fp16.hysteresis"): (
        (SCALER, r"^                 delayed_shift=1,$"),
        (PRECISION, r"^    hysteresis: int = 2$"),
    ),
    ("0.17.2", "scheduler.params.warmup_max_lr"): (
        (SCHEDULES, r"^class WarmupLR\(object\).*?warmup_max_lr: float = 0\.001,.*?^class WarmupDecayLR"),
        (SCHEDULES, r"if warmup_max_lr is None:\n\s+warmup_max_lr = \[group\['lr'\] for"),
    ),
    ("0.17.6", "data_types.grad_accum_dtype"): (
        (
            ENGINE,
            r"if model_dtype == torch\.bfloat16 and not self\.zero_optimization\(\):\n\s+grad_accum_dtype = torch\.f",
        ),
        (ENGINE, r"if self\._config\.grad_accum_dtype is None:\n\s+grad_accum_dtype = model_dtype\n"),
    ),
    ("0.19.0", "optimizer.params.ns_method"): (None, (ORIGINAL_MUON, r'ns_method="gram"')),
    ("0.19.2", "data_types.buffer_dtype"): (
        (ENGINE, r"self\.module\.bfloat16\(\)"),
        (CONSTANTS, r"^BUFFER_DTYPE_DEFAULT = None$"),
    ),
    ("0.19.3", "gradient_clipping"): (
        (CONSTANTS, r"^GRADIENT_CLIPPING_DEFAULT = 0\.0?$"),
        (CONSTANTS, r"^GRADIENT_CLIPPING_DEFAULT = 1\.0$"),
    ),
    ("0.19.3", "bf16.check_grad_overflow"): (None, (PRECISION, r"^    check_grad_overflow: bool = True$")),
    ("0.19.5", "zero_optimization.offload_optimizer.pin_memory"): (
        (OFFLOAD, IN_OPTIMIZER.format("False")),
        (OFFLOAD, IN_OPTIMIZER.format("True")),
    ),
    ("0.19.5", "zero_optimization.offload_param.pin_memory"): (
        (OFFLOAD, IN_PARAM.format("False")),
        (OFFLOAD, IN_PARAM.format("True")),
    ),
    ("0.19.8", "data_types.keep_in_fp32_modules"): (None, (CONSTANTS, r'^KEEP_IN_FP32_MODULES_DEFAULT = "auto"$')),
    ("0.19.8", None): (None, (STAGE_3, r"if is_invalid_grad_norm\(scaled_global_grad_norm\):")),
}


@cache
def source(version: str, file: str) -> str:
    path = release(version) / "deepspeed" / file
    return path.read_text(encoding="utf-8") if path.exists() else ""


def shows(version: str, place: tuple[str, str]) -> bool:
    file, pattern = place
    return re.search(pattern, source(version, file), re.M | re.S) is not None


@pytest.mark.slow
@pytest.mark.parametrize("row", SHOWN_BY, ids=lambda row: f"{row[0]}-{row[1]}")
def test_a_row_is_what_the_sources_of_the_releases_show(row: tuple[str, str | None]) -> None:
    before, after = SHOWN_BY[row]
    older, newer = RELEASES[: RELEASES.index(row[0])], RELEASES[RELEASES.index(row[0]) :]
    assert [version for version in RELEASES if shows(version, after)] == list(newer)
    if before is not None:
        assert [version for version in RELEASES if shows(version, before)] == list(older)


def test_every_row_of_the_table_is_shown_and_well_formed() -> None:
    rows = hazards.load_all()
    assert {(one.release, one.key) for one in rows} == set(SHOWN_BY)
    for one in rows:
        assert one.url.startswith("https://github.com/deepspeedai/DeepSpeed/")
        assert (one.before == one.after) == (one.key is None)
        assert one.affects in ("numbers", "memory")
        assert not one.does.endswith(".") and not one.did.endswith(".")


def test_the_defaults_that_a_config_is_read_with_are_those_of_the_table() -> None:
    table = {one.key: (one.before, (one.release, one.after)) for one in hazards.load_all()}
    assert {key: table[key] for key in CHANGED_DEFAULTS} == dict(CHANGED_DEFAULTS)


@pytest.fixture
def config(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.chdir(tmp_path)

    def write(**content: object) -> RunConfig:
        Path("ds.json").write_text(json.dumps(content))
        return load("ds.json")

    return write


@pytest.mark.parametrize(
    ("installed", "target", "keys"),
    [
        ("0.19.2", "0.19.3", ["gradient_clipping", "bf16.check_grad_overflow"]),
        ("0.19.3", "0.19.4", []),
        ("0.17.5", "0.19.0", ["data_types.grad_accum_dtype", "optimizer.params.ns_method"]),
        ("0.19.8", "0.19.8", []),
        ("0.20.0", "0.19.8", []),
        ("0.19.2+local", "0.19.3", ["gradient_clipping", "bf16.check_grad_overflow"]),
        ("main", "0.19.8", []),
    ],
)
def test_between_two_releases_lie_the_changes_of_the_later_ones(installed: str, target: str, keys: list[str]) -> None:
    assert [one.key for one in between("deepspeed", installed, target)] == keys
    assert between("another", installed, target) == ()


def test_a_change_is_one_sentence() -> None:
    clipping, overflow = between("deepspeed", "0.19.2", "0.19.3")
    assert clipping.change == (
        "gradient_clipping defaults to 1.0 instead of 0.0 from 0.19.3 (#8068): DeepSpeed clips at 1.0; before, it did "
        "not clip"
    )
    assert overflow.change.endswith("(only if bf16.enabled = true, zero_optimization.stage = 1 or 2)")
    (norm,) = (one for one in between("deepspeed", "0.19.7", "0.19.8") if one.key is None)
    assert norm.change.startswith("from 0.19.8 DeepSpeed skips a step whose gradient norm is inf or NaN")


def test_a_config_leaves_only_the_changes_that_it_may_notice(config) -> None:
    def keys(*configs: RunConfig) -> list[str | None]:
        return [one.key for one in between("deepspeed", "0.17.0", "0.17.6", configs)]

    assert keys(config(fp16={"enabled": True}, zero_optimization={"stage": 1})) == [
        "fp16.initial_scale_power",
        "fp16.hysteresis",
    ]
    scaled = config(fp16={"enabled": True, "hysteresis": 2}, zero_optimization={"stage": 1})
    assert keys(scaled) == []  # with one of the five keys set, DeepSpeed took the documented defaults before, too
    assert keys(config(fp16={"enabled": True, "loss_scale": 1024}, zero_optimization={"stage": 1})) == []
    plain_bf16 = config(bf16={"enabled": True})
    assert keys(plain_bf16) == ["data_types.grad_accum_dtype"]
    assert keys(config(bfloat16={"enabled": True})) == ["data_types.grad_accum_dtype"]
    assert keys(scaled, plain_bf16) == ["data_types.grad_accum_dtype"]


def test_a_config_that_settles_the_conditions_leaves_none_to_be_named(config) -> None:
    bf16 = {"bf16": {"enabled": True}}
    certain, possible = config(**bf16), config(bf16={"enabled": "auto"})
    for configs, left in (((certain,), 0), ((possible,), 1), ((possible, certain), 0)):
        (one,) = (one for one in between("deepspeed", "0.17.5", "0.17.6", configs))
        assert len(one.triggers) == left


def test_in_force_is_what_a_file_leaves_implicit(config) -> None:
    found = {one.key: one for one in in_force("deepspeed", "0.19.8", config(zero_optimization={"stage": 2}))}
    assert found.keys() == {"gradient_clipping"}
    assert found["gradient_clipping"].in_force("0.19.8", "ds.json") == (
        "gradient_clipping is not set (ds.json): DeepSpeed 0.19.8 clips at 1.0; before 0.19.3 it did not clip"
    )
    assert in_force("deepspeed", "0.19.2", config(zero_optimization={"stage": 2})) == ()
    assert in_force("torch", "2.13.0", config()) == ()


def test_a_damaged_table_is_named_with_the_next_step(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    table = tmp_path / "hazards.json"
    monkeypatch.setattr(hazards, "TABLE", table)
    for text in ("", "[{}]", '[{"release": "0.1", "surprise": 1}]'):
        table.write_text(text)
        hazards.load_all.cache_clear()
        with pytest.raises(advisories.RecordError, match="reinstall") as error:
            hazards.load_all()
        assert str(table) in str(error.value)
    monkeypatch.undo()
    hazards.load_all.cache_clear()
