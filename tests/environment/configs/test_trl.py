"""The YAML of TRL's commands."""

from __future__ import annotations

import pytest
import yaml

from tests.support import stacks
from trainfix.environment.configs import ConfigError, load, load_run, trl
from trainfix.environment.runconfig import UNKNOWN
from trainfix.environment.runconfig.deepspeed import STAGE, STEPS

SFT = "model_name_or_path: Qwen/Qwen3-0.6B\ndataset_name: trl-lib/Capybara\nlearning_rate: 1.0e-5\n"


def test_a_model_and_a_dataset_are_trl(run):
    config = run("sft.yaml", SFT)
    assert config.value("framework") == "trl"
    assert config.value(STEPS) == 1
    assert "TRL takes 1" in config.setting(STEPS).because


def test_the_command_is_open_unless_a_key_tells(run):
    config = run("sft.yaml", SFT)
    assert config.value("task") is UNKNOWN
    assert "trl sft, trl dpo" in config.setting("task").because


@pytest.mark.parametrize(
    ("line", "task"),
    [
        ("packing: true", "sft"),
        ("max_seq_length: 512", "sft"),
        ("rpo_alpha: 1.0", "dpo"),
        ("desirable_weight: 1.0", "kto"),
        ("scale_rewards: group", "grpo"),
        ("beta: 0.1", trl.PREFERENCES),
        ("num_generations: 8", trl.PREFERENCES),
        ("packing: true\nrpo_alpha: 1.0", UNKNOWN),
        ("packing: true\nbeta: 0.1", UNKNOWN),
    ],
)
def test_a_key_of_one_command_tells_the_task(run, line, task):
    assert run("c.yaml", SFT + line + "\n").value("task") == task


def test_the_keys_that_tell_are_those_of_the_wheel():
    folder = stacks.folder("trl", "0.24.0") / "trl" / "trainer"
    sft, dpo, grpo, kto = ((folder / f"{name}_config.py").read_text("utf-8") for name in ("sft", "dpo", "grpo", "kto"))
    for key in ("packing", "assistant_only_loss", "completion_only_loss", "eval_packing", "dataset_text_field"):
        assert f"\n    {key}: " in sft
        assert not any(f"\n    {key}: " in other for other in (dpo, grpo, kto))
    for key in trl.NOT_SFT - {"reward_funcs"}:
        assert f"\n    {key}: " not in sft
        assert any(f"\n    {key}: " in other for other in (dpo, grpo, kto))


def test_transformers_own_scripts_are_not_trl(run):
    text = SFT + "dataset_config_name: main\noutput_dir: o\nnum_train_epochs: 1\n"
    assert run("clm.yaml", text).value("framework") == "transformers"
    json = {"model_name_or_path": "m", "dataset_name": "d", "output_dir": "o", "do_train": True, "num_train_epochs": 1}
    assert run("clm.json", json).value("framework") == "transformers"


@pytest.mark.parametrize(("name", "stage", "steps"), [("zero1", 1, 1), ("zero2", 2, 4), ("zero3", 3, 4)])
def test_a_shipped_accelerate_config_is_known(run, name, stage, steps):
    config = run("sft.yaml", SFT + f"accelerate_config: {name}\n{STEPS}: {steps}\n")
    assert [config.value(key) for key in ("deepspeed", "ranks", STAGE, STEPS, "bf16.enabled")] == [
        True,
        8,
        stage,
        steps,
        True,
    ]
    assert config.source == f"sft.yaml + TRL's {name}.yaml"
    assert f"(TRL's {name}.yaml)" in config.setting(STAGE).because


@pytest.mark.parametrize(("name", "ranks"), [("fsdp1", 8), ("fsdp2", 8), ("multi_gpu", 8), ("single_gpu", 1)])
def test_the_other_shipped_ones_use_no_deepspeed(run, name, ranks):
    config = run("sft.yaml", SFT + f"accelerate_config: {name}\n")
    assert (config.value("deepspeed"), config.value("ranks")) == (False, ranks)


def test_the_shipped_ones_are_those_of_the_wheel():
    folder = stacks.folder("trl", "0.24.0") / "trl" / "accelerate_configs"
    assert {file.stem for file in folder.glob("*.yaml")} == set(trl.SHIPPED)
    for name, content in trl.SHIPPED.items():
        shipped = yaml.safe_load((folder / f"{name}.yaml").read_text(encoding="utf-8"))
        expected = {**trl.COMMON, **content}
        section = shipped.get("deepspeed_config")
        if section is not None:
            del section["deepspeed_multinode_launcher"]
        assert {key: shipped[key] for key in expected} == expected


def test_a_file_of_that_name_comes_first(write):
    write("zero2", "{}")
    with pytest.raises(ConfigError, match=r"^zero2 has no distributed_type"):
        load_run(write("sft.yaml", SFT + "accelerate_config: zero2\n"))


def test_a_file_of_the_users_is_followed(write):
    write("acc/my.yaml", "distributed_type: DEEPSPEED\nnum_processes: 2\ndeepspeed_config: {zero_stage: 1}\n")
    config = load_run(write("sft.yaml", SFT + "accelerate_config: acc/my.yaml\n"))
    assert (config.value(STAGE), config.value("ranks")) == (1, 2)


def test_one_that_is_not_there_is_an_error(write):
    with pytest.raises(ConfigError, match=r"names the accelerate config gone\.yaml"):
        load_run(write("sft.yaml", SFT + "accelerate_config: gone.yaml\n"))


def test_processes_in_the_config_win_over_the_launchers(run):
    assert run("sft.yaml", SFT + "accelerate_config: zero2\nnum_processes: 2\n").value("ranks") == 2


def test_bf16_is_trls_default_since_0_19(write):
    config = load_run(write("sft.yaml", SFT + "deepspeed: {zero_optimization: {stage: 2}}\n"))
    values = [config.value("bf16.enabled", {"trl": version}) for version in ("0.18.2", "0.19.0", "0.24.0")]
    assert values == [False, True, True]
    assert config.value("bf16.enabled") is UNKNOWN
    fp16 = load_run(write("sft.yaml", SFT + "fp16: true\ndeepspeed: {zero_optimization: {stage: 2}}\n"))
    assert (fp16.value("bf16.enabled"), fp16.value("fp16.enabled")) == (False, True)


def test_without_an_accelerate_config_deepspeed_is_open(run):
    config = run("sft.yaml", SFT)
    assert config.value("deepspeed") is UNKNOWN
    assert config.value(STAGE) is UNKNOWN


def test_a_launchers_config_beside_it_decides(write):
    acc = write("acc.yaml", "distributed_type: MULTI_GPU\nnum_processes: 3\n")
    (config,) = load([write("sft.yaml", SFT), acc])
    assert (config.value("deepspeed"), config.value("ranks")) == (False, 3)


def test_use_deepspeed_leaves_its_config_open(run):
    config = run("sft.yaml", SFT + "use_deepspeed: true\n")
    assert config.value("deepspeed") is UNKNOWN
    assert config.value(STAGE) is UNKNOWN
