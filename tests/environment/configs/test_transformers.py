"""The arguments of transformers' Trainer."""

from __future__ import annotations

import json

import pytest

from tests.support import stacks
from trainfix.environment.configs import load, load_run
from trainfix.environment.runconfig import UNKNOWN
from trainfix.environment.runconfig.deepspeed import DEVICE, STAGE, STEPS

ARGUMENTS = {"output_dir": "out", "learning_rate": 2e-5, "per_device_train_batch_size": 2}
AUTO = {
    "train_batch_size": "auto",
    "train_micro_batch_size_per_gpu": "auto",
    STEPS: "auto",
    "gradient_clipping": "auto",
    "bf16": {"enabled": "auto"},
    "fp16": {"enabled": "auto"},
    "optimizer": {"type": "AdamW", "params": {"lr": "auto"}},
    "scheduler": {"type": "WarmupLR", "params": {"warmup_max_lr": "auto", "warmup_num_steps": "auto"}},
    "zero_optimization": {"stage": 2, "offload_optimizer": {"device": "cpu"}, "reduce_bucket_size": "auto"},
}


def test_json_and_yaml_are_read_alike(run):
    text = "\n".join(f"{key}: {json.dumps(value)}" for key, value in ARGUMENTS.items())
    for config in (run("args.json", ARGUMENTS), run("args.yaml", text)):
        assert config.value("framework") == "transformers"
        assert config.value("task") is UNKNOWN


def test_a_value_has_its_key_and_line(run):
    config = run("args.yaml", "output_dir: out\nlearning_rate: 1.0e-5\nnum_train_epochs: 2\n")
    setting = config.setting("epochs")
    assert (setting.value, setting.because) == (2, "num_train_epochs = 2 (args.yaml)")
    assert setting.places[0].line == 3


@pytest.mark.parametrize(("key", "value"), [(STEPS, 1), ("label_smoothing_factor", 0.0), ("epochs", 3.0)])
def test_absent_arguments_are_trainers_defaults(run, key, value):
    setting = run("args.json", ARGUMENTS).setting(key)
    assert setting.value == value
    assert f"is not set (args.json): transformers takes {value}" in setting.because


def test_the_defaults_are_those_of_the_released_sources():
    for version in ("4.41.0", "4.46.3", "4.55.0", "5.6.0"):
        text = (stacks.folder("transformers", version) / "transformers/training_args.py").read_text(encoding="utf-8")
        for name, default in (
            ("gradient_accumulation_steps", "1"),
            ("num_train_epochs", "3.0"),
            ("max_grad_norm", "1.0"),
        ):
            after = text.split(f"\n    {name}: ", 1)[1][:120]
            assert f"default={default}," in after


@pytest.mark.parametrize(
    ("version", "value"), [("4.46.3", False), ("4.53.3", False), ("4.54.1", True), ("5.6.0", True)]
)
def test_average_tokens_across_devices_has_changed_its_default(run, version, value):
    config = run("args.json", ARGUMENTS)
    key = "average_tokens_across_devices"
    assert config.value(key) is UNKNOWN
    assert config.value(key, {"transformers": version}) is value
    text = (stacks.folder("transformers", version) / "transformers/training_args.py").read_text(encoding="utf-8")
    assert f"default={value}" in text.split(f"\n    {key}: ", 1)[1][:80]


def test_max_steps_decides_over_the_epochs(run):
    assert run("args.json", {**ARGUMENTS, "max_steps": 100}).value("epochs") is UNKNOWN
    assert run("args.json", {**ARGUMENTS, "max_steps": -1}).value("epochs") == 3.0


def test_a_number_written_as_text_is_a_number(run):
    assert run("args.json", {**ARGUMENTS, STEPS: "8"}).value(STEPS) == 8


@pytest.mark.parametrize("steps", [0, -2, 1.5, "many", True, [8], {"a": 1}])
def test_steps_that_are_none_are_open_and_quoted(run, steps):
    setting = run("args.json", {**ARGUMENTS, STEPS: steps}).setting(STEPS)
    assert setting.value is UNKNOWN
    assert "not a positive whole number" in setting.because


def test_without_deepspeed_accelerate_may_still_choose_it(run):
    config = run("args.json", ARGUMENTS)
    for key in ("deepspeed", STAGE, DEVICE):
        assert config.value(key) is UNKNOWN
        assert "accelerate's config may choose DeepSpeed" in config.setting(key).because
        assert "--config" in config.setting(key).because


@pytest.mark.parametrize("empty", [None, "", {}])
def test_an_empty_deepspeed_is_none(run, empty):
    assert run("args.json", {**ARGUMENTS, "deepspeed": empty}).value("deepspeed") is UNKNOWN


def test_accelerates_config_decides_where_the_arguments_do_not(write):
    args = write("args.json", {**ARGUMENTS, STEPS: 4, "max_grad_norm": 0.5})
    acc = write("acc.yaml", "distributed_type: DEEPSPEED\nnum_processes: 4\ndeepspeed_config: {zero_stage: 1}\n")
    (config,) = load([args, acc])
    assert [config.value(key) for key in ("deepspeed", "ranks", STAGE, STEPS, "gradient_clipping")] == [
        True,
        4,
        1,
        4,
        0.5,
    ]
    assert config.source == "args.json + acc.yaml"
    (config,) = load([args, write("acc.yaml", "distributed_type: MULTI_GPU\nnum_processes: 4\n")])
    assert config.value("deepspeed") is False


def test_trainers_default_window_replaces_auto_in_what_accelerate_builds(write):
    acc = write("acc.yaml", "distributed_type: DEEPSPEED\nnum_processes: 4\n")
    (config,) = load([write("args.json", ARGUMENTS), acc])
    assert config.value(STEPS) == 1
    assert config.value("gradient_clipping") == 1.0


def test_what_trainer_puts_in_place_of_auto(write):
    write("ds.json", AUTO)
    args = {**ARGUMENTS, "deepspeed": "ds.json", STEPS: 8, "bf16": True, "max_grad_norm": 0.3}
    config = load_run(write("args.json", args))
    expected = {
        STEPS: 8,
        "train_micro_batch_size_per_gpu": 2,
        "train_batch_size": UNKNOWN,
        "gradient_clipping": 0.3,
        "bf16.enabled": True,
        "fp16.enabled": False,
        "optimizer.params.lr": 2e-5,
        "scheduler.params.warmup_max_lr": 2e-5,
        "scheduler.params.warmup_num_steps": UNKNOWN,
        "zero_optimization.reduce_bucket_size": UNKNOWN,
        STAGE: 2,
        DEVICE: "cpu",
    }
    assert {key: config.value(key) for key in expected} == expected
    assert config.setting("gradient_clipping").because == "max_grad_norm = 0.3 (args.json)"
    assert "hidden size" in config.setting("zero_optimization.reduce_bucket_size").because


def test_defaults_replace_auto_too(write):
    write("ds.json", AUTO)
    config = load_run(write("args.json", {"output_dir": "o", "save_steps": 5, "deepspeed": "ds.json"}))
    assert config.value("train_micro_batch_size_per_gpu") == 8
    assert config.value("gradient_clipping") == 1.0
    assert config.value("bf16.enabled") is False
    assert "max_grad_norm is not set (args.json): transformers takes 1.0" in config.setting("gradient_clipping").because


def test_evaluation_in_16_bits_counts_where_the_config_says_auto(write):
    write("ds.json", AUTO)
    args = {**ARGUMENTS, "bf16_full_eval": True}
    assert load_run(write("args.json", {**args, "deepspeed": "ds.json"})).value("bf16.enabled") is True
    assert load_run(write("args.json", {**args, "deepspeed": {"zero_optimization": {}}})).value("bf16.enabled") is False


def test_bf16_also_holds_where_the_config_has_no_such_section(write):
    args = {**ARGUMENTS, "bf16": True, "deepspeed": {"zero_optimization": {"stage": 1}}}
    assert load_run(write("args.json", args)).value("bf16.enabled") is True


def test_a_config_inside_the_arguments_has_its_own_keys_and_lines(run):
    text = "output_dir: o\nlearning_rate: 1.0e-5\ndeepspeed:\n  zero_optimization:\n    stage: 3\n"
    config = run("args.yaml", text)
    setting = config.setting(STAGE)
    assert (setting.value, setting.places[0].line) == (3, 5)
    assert setting.because == "deepspeed.zero_optimization.stage = 3 (args.yaml)"
    assert config.value("deepspeed") is True


def test_a_config_as_json_text_is_read(run):
    config = run("args.json", {**ARGUMENTS, "deepspeed": json.dumps({"zero_optimization": {"stage": 3}})})
    assert config.value(STAGE) == 3


@pytest.mark.parametrize("wrong", ["{not json", ["ds.json"], 3, True])
def test_a_deepspeed_that_is_neither_is_open(run, wrong):
    config = run("args.json", {**ARGUMENTS, "deepspeed": wrong})
    assert config.value("deepspeed") is UNKNOWN
    assert "neither a file nor a section" in config.setting("deepspeed").because


def test_fsdp_is_no_deepspeed(run):
    config = run("args.json", {**ARGUMENTS, "fsdp": "full_shard auto_wrap"})
    assert config.value("deepspeed") is False
    assert "fsdp = full_shard auto_wrap (args.json)" in config.setting("deepspeed").because


def test_a_searched_batch_size_is_open(write):
    write("ds.json", AUTO)
    args = {**ARGUMENTS, "deepspeed": "ds.json", "auto_find_batch_size": True}
    assert load_run(write("args.json", args)).value("train_micro_batch_size_per_gpu") is UNKNOWN


def test_a_window_that_the_deepspeed_config_leaves_out_is_open_where_trainer_has_another(run, tmp_path):
    """accelerate's DeepSpeedPlugin writes 1 where the file has no steps, whatever Trainer counts itself."""
    (tmp_path / "ds.json").write_text('{"zero_optimization": {"stage": 2}}')
    eight = run("eight.json", {**ARGUMENTS, "deepspeed": "ds.json", STEPS: 8})
    assert eight.value(STEPS) is UNKNOWN
    assert eight.setting(STEPS).because == (
        "gradient_accumulation_steps is not set (ds.json): accelerate then takes 1 there, whatever the trainer does "
        '(eight.json: 8); set it to "auto"'
    )
    assert run("one.json", {**ARGUMENTS, "deepspeed": "ds.json"}).value(STEPS) == 1
