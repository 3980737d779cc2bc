"""LLaMA-Factory's training arguments, and those of its v1 trainer."""

from __future__ import annotations

import json

import pytest

from tests.support import stacks
from trainfix.environment.configs import ConfigError, llamafactory, load, load_run
from trainfix.environment.runconfig import UNKNOWN
from trainfix.environment.runconfig.deepspeed import DEVICE, STAGE, STEPS

SFT = {
    "model_name_or_path": "Qwen/Qwen3-4B",
    "stage": "sft",
    "do_train": True,
    "finetuning_type": "lora",
    "dataset": "identity",
    "template": "qwen3",
    "cutoff_len": 2048,
    "output_dir": "saves",
    "gradient_accumulation_steps": 8,
    "num_train_epochs": 2.0,
    "bf16": True,
}
V1 = {"model": "Qwen/Qwen3-0.6B", "train_dataset": "data.yaml", "output_dir": "out", "micro_batch_size": 1}
Z2 = {
    "zero_optimization": {"stage": 2, "offload_optimizer": {"device": "cpu"}},
    STEPS: "auto",
    "bf16": {"enabled": "auto"},
}


def as_yaml(content: dict[str, object]) -> str:
    return "".join(f"{key}: {json.dumps(value)}\n" for key, value in content.items())


@pytest.mark.parametrize("name", ["sft.yaml", "sft.json"])
def test_yaml_and_json_are_read_alike(run, name):
    config = run(name, as_yaml(SFT) if name.endswith("yaml") else SFT)
    values = [config.value(key) for key in ("framework", "task", STEPS, "epochs", "use_asft_loss")]
    assert values == ["llamafactory", "sft", 8, 2.0, False]


def test_without_deepspeed_the_run_has_none_as_torchrun_is_started(run):
    setting = run("sft.yaml", as_yaml(SFT)).setting("deepspeed")
    assert setting.value is False
    assert "deepspeed is not set (sft.yaml): llamafactory-cli, which starts torchrun, takes false" in setting.because


def test_llamafactory_cli_starts_torchrun_and_never_accelerate():
    text = (stacks.folder("llamafactory", "0.9.5") / "llamafactory" / "launcher.py").read_text(encoding="utf-8")
    assert "torchrun" in text
    assert "accelerate" not in text


def test_a_launcher_that_is_given_too_decides(write):
    acc = write("acc.yaml", "distributed_type: DEEPSPEED\nnum_processes: 2\n")
    (config,) = load([write("sft.yaml", as_yaml(SFT)), acc])
    assert (config.value("deepspeed"), config.value(STAGE), config.value("ranks")) == (True, 2, 2)


def test_a_deepspeed_path_is_looked_for_from_the_checkouts_root_too(write):
    write("examples/deepspeed/ds_z2.json", Z2)
    path = write("examples/train/sft.yaml", as_yaml({**SFT, "deepspeed": "examples/deepspeed/ds_z2.json"}))
    config = load_run(path)
    assert [config.value(key) for key in ("deepspeed", STAGE, DEVICE, STEPS, "bf16.enabled")] == [
        True,
        2,
        "cpu",
        8,
        True,
    ]


def test_a_deepspeed_path_relative_to_the_file_is_found(write, monkeypatch, here):
    write("configs/ds.json", Z2)
    write("configs/sft.yaml", as_yaml({**SFT, "deepspeed": "ds.json"}))
    monkeypatch.chdir(here / "configs")
    write("below/x", "")
    monkeypatch.chdir(here / "configs" / "below")
    assert load_run("../sft.yaml").value(STAGE) == 2


@pytest.mark.parametrize("stage", llamafactory.STAGES)
def test_the_stage_is_the_task(run, stage):
    assert run("c.yaml", as_yaml({**SFT, "stage": stage})).value("task") == stage


def test_the_stages_and_the_defaults_are_those_of_the_released_sources(run):
    folder = stacks.folder("llamafactory", "0.9.5") / "llamafactory" / "hparams"
    text = (folder / "finetuning_args.py").read_text(encoding="utf-8")
    assert 'stage: Literal["pt", "sft", "rm", "ppo", "dpo", "kto"] = field(\n        default="sft"' in text
    assert "use_asft_loss: bool = field(\n        default=False" in text
    without = {key: value for key, value in SFT.items() if key != "stage"}
    setting = run("c.yaml", as_yaml(without)).setting("task")
    assert (setting.value, setting.because) == ("sft", "stage is not set (c.yaml): LLaMA-Factory takes sft")


def test_an_unknown_stage_is_open(run):
    setting = run("c.yaml", as_yaml({**SFT, "stage": "grpo"})).setting("task")
    assert setting.value is UNKNOWN
    assert "LLaMA-Factory knows pt, sft, rm, ppo, dpo, kto" in setting.because


@pytest.mark.parametrize(("written", "value"), [(True, True), ("true", True), (False, False), ("maybe", UNKNOWN)])
def test_use_asft_loss(run, written, value):
    assert run("c.yaml", as_yaml({**SFT, "use_asft_loss": written})).value("use_asft_loss") is value


@pytest.mark.parametrize(
    ("content", "word"),
    [
        ({"model_name_or_path": "m", "template": "qwen3", "export_dir": "out"}, "exports a model"),
        ({"model_name_or_path": "m", "template": "qwen3", "infer_backend": "vllm"}, "serves a model"),
        ({**SFT, "do_train": False, "do_predict": True}, "predicts"),
        ({"model_name_or_path": "m", "template": "qwen3"}, "neither a dataset nor an output_dir"),
    ],
)
def test_what_trains_nothing_is_rejected_with_the_reason(write, content, word):
    with pytest.raises(ConfigError, match=rf"^c\.yaml trains nothing: .*{word}"):
        load_run(write("c.yaml", as_yaml(content)))


def test_fp8_without_bf16_is_open(write):
    write("ds.json", Z2)
    content = {**SFT, "bf16": False, "fp8": True, "deepspeed": "ds.json"}
    assert load_run(write("c.yaml", as_yaml(content))).value("bf16.enabled") is UNKNOWN


def test_the_v1_trainer_has_a_window_of_one_without_global_batch_size(run):
    config = run("v1.yaml", as_yaml({**V1, "dist_config": {"name": "fsdp2"}}))
    values = [config.value(key) for key in ("framework", "task", STEPS, "epochs", "deepspeed")]
    assert values == ["llamafactory-v1", UNKNOWN, 1, 3, False]
    assert config.setting("deepspeed").because == "dist_config.name = fsdp2 (v1.yaml)"


@pytest.mark.parametrize(
    "more", [{"global_batch_size": 16}, {"batching_strategy": "dynamic_batching"}, {"global_batch_size": "x"}]
)
def test_the_v1_trainers_window_is_open_where_it_depends_on_ranks_or_data(run, more):
    assert run("v1.yaml", as_yaml({**V1, "dist_config": None, **more})).value(STEPS) is UNKNOWN


def test_the_v1_trainer_under_deepspeed(write):
    write("ds.json", Z2)
    content = {**V1, "global_batch_size": 1, "dist_config": {"name": "deepspeed", "config_file": "ds.json"}}
    config = load_run(write("v1.yaml", as_yaml(content)))
    assert [config.value(key) for key in ("deepspeed", STAGE, STEPS, "bf16.enabled")] == [True, 2, 1, True]


def test_the_v1_trainer_under_deepspeed_without_its_config_is_open(run):
    config = run("v1.yaml", as_yaml({**V1, "dist_config": {"name": "deepspeed"}}))
    assert config.value("deepspeed") is True
    assert config.value(STAGE) is UNKNOWN


def test_a_v1_export_is_rejected(write):
    with pytest.raises(ConfigError, match="trains nothing"):
        load_run(write("v1.yaml", as_yaml({"model": "m", "peft_config": {"name": "lora", "export_dir": "out"}})))
