"""axolotl's YAML."""

from __future__ import annotations

import json

import pytest

from trainfix.environment.configs import load_run
from trainfix.environment.runconfig import UNKNOWN
from trainfix.environment.runconfig.deepspeed import DEVICE, STAGE, STEPS

QLORA = """\
base_model: NousResearch/Meta-Llama-3-8B
datasets:
  - path: tatsu-lab/alpaca
    type: alpaca
sequence_len: 4096
sample_packing: true
micro_batch_size: 2
num_epochs: 4
bf16: true
"""
Z2 = {
    "zero_optimization": {"stage": 2, "offload_optimizer": {"device": "cpu"}},
    "train_micro_batch_size_per_gpu": "auto",
    STEPS: "auto",
    "gradient_clipping": "auto",
    "bf16": {"enabled": "auto"},
    "fp16": {"enabled": "auto"},
}


def test_what_it_says(run):
    config = run("a.yml", QLORA + f"{STEPS}: 4\n")
    assert [config.value(key) for key in ("framework", "task", STEPS, "epochs")] == ["axolotl", "sft", 4, 4]
    assert config.setting(STEPS).because == "gradient_accumulation_steps = 4 (a.yml)"
    assert config.setting("epochs").because == "num_epochs = 4 (a.yml)"
    assert config.setting("epochs").places[0].line == 8


def test_its_own_defaults(run):
    config = run("a.yml", QLORA.replace("num_epochs: 4\n", ""))
    assert (config.value(STEPS), config.value("epochs"), config.value("label_smoothing_factor")) == (1, 1.0, 0.0)
    assert config.setting(STEPS).because == "gradient_accumulation_steps is not set (a.yml): axolotl takes 1"


def test_the_window_is_the_batch_over_the_micro_batch(run):
    setting = run("a.yml", QLORA + "batch_size: 9\n").setting(STEPS)
    assert (setting.value, setting.because) == (4, "batch_size = 9 (a.yml) // micro_batch_size 2")


@pytest.mark.parametrize("size", ["1", "many"])
def test_a_batch_that_cannot_be_divided_is_open(run, size):
    assert run("a.yml", QLORA + f"batch_size: {size}\n").value(STEPS) is UNKNOWN


@pytest.mark.parametrize(
    ("line", "task"),
    [
        ("rl: dpo", "dpo"),
        ("rl: ipo", "dpo"),
        ("rl: grpo", "grpo"),
        ("reward_model: true", "rm"),
        ("process_reward_model: true", "prm"),
        ("pretraining_dataset: c4", "pt"),
        ("rl:", "sft"),
    ],
)
def test_the_task(run, line, task):
    assert run("a.yml", QLORA + line + "\n").value("task") == task


def test_without_deepspeed_there_is_none(run):
    setting = run("a.yml", QLORA).setting("deepspeed")
    assert setting.value is False
    assert "unless an accelerate config says otherwise" in setting.because


def test_its_deepspeed_configs_are_found_from_the_file_on_upwards(write):
    write("deepspeed_configs/zero2.json", Z2)
    text = QLORA + f"deepspeed: deepspeed_configs/zero2.json\n{STEPS}: 4\nmax_grad_norm: 0.5\n"
    config = load_run(write("examples/llama/a.yml", text))
    values = [config.value(key) for key in ("deepspeed", STAGE, DEVICE, STEPS, "gradient_clipping", "bf16.enabled")]
    assert values == [True, 2, "cpu", 4, 0.5, True]
    assert config.value("train_micro_batch_size_per_gpu") == 2
    assert config.value("fp16.enabled") is False


def test_one_that_was_not_fetched_leaves_all_of_it_open(run):
    config = run("a.yml", QLORA + "deepspeed: deepspeed_configs/zero2.json\n")
    assert config.value("deepspeed") is True
    assert config.value(STAGE) is UNKNOWN
    assert "no such file here" in config.setting(STAGE).because


def test_average_tokens_across_devices_is_off_since_0_12_2(run):
    config = run("a.yml", QLORA)
    key = "average_tokens_across_devices"
    assert config.value(key, {"axolotl": "0.16.1", "transformers": "5.6.0"}) is False
    assert config.value(key, {"axolotl": "0.12.1", "transformers": "4.55.0"}) is True
    assert config.value(key, {"axolotl": "0.8.1", "transformers": "4.51.3"}) is False
    assert config.value(key) is UNKNOWN


@pytest.mark.parametrize(
    ("lines", "bf16", "fp16"),
    [
        ("bf16: true", True, False),
        ("bf16: auto", UNKNOWN, UNKNOWN),
        ("bf16: auto\nfp16: true", False, True),
        ("bf16: auto\nfp16: false", UNKNOWN, False),
        ("bf16: full", True, False),
        ("bf16: false\nfp16: true", False, True),
        ("bfloat16: true", True, False),
        ("fp16: true", False, True),
        ("tf32: true", False, False),
    ],
)
def test_sixteen_bits(write, lines, bf16, fp16):
    write("ds.json", Z2)
    config = load_run(write("a.yml", QLORA.replace("bf16: true", lines) + "deepspeed: ds.json\n"))
    assert (config.value("bf16.enabled"), config.value("fp16.enabled")) == (bf16, fp16)


def test_json_after_all(run):
    config = run("a.json", {"base_model": "m", "micro_batch_size": 1, "num_epochs": 1, "sequence_len": 8})
    assert config.value("framework") == "axolotl"


def test_a_config_inside_is_read(run):
    text = QLORA + f"deepspeed: {json.dumps(Z2)}\n"
    assert run("a.yml", text).value(STAGE) == 2
