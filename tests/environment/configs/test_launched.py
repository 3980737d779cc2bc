"""Scripts that start Trainer, TRL, LLaMA-Factory or axolotl: the command line holds over the config that it names."""

from __future__ import annotations

from contextlib import suppress
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from trainfix.environment.configs import ConfigError, launched, load
from trainfix.environment.configs.documents import Document
from trainfix.environment.runconfig import UNKNOWN, RunConfig
from trainfix.environment.runconfig.deepspeed import CLIPPING, DEVICE, STAGE, STEPS

FACTORY = """model_name_or_path: m
stage: sft
do_train: true
finetuning_type: full
deepspeed: examples/ds_z2.json
dataset: alpaca
output_dir: out
per_device_train_batch_size: 1
gradient_accumulation_steps: 2
bf16: true
"""
DEEPSPEED = {
    "zero_optimization": {"stage": 2, "offload_optimizer": {"device": "cpu"}},
    "gradient_accumulation_steps": "auto",
    "train_micro_batch_size_per_gpu": "auto",
    "gradient_clipping": "auto",
}
ARGUMENTS = "--output_dir o --per_device_train_batch_size 2"


@pytest.fixture
def script(write, run):
    """The run of a script beside a DeepSpeed config and LLaMA-Factory's."""

    def script(text: str) -> RunConfig:
        write("examples/ds_z2.json", DEEPSPEED)
        write("examples/x.yaml", FACTORY)
        return run("train.sh", text)

    return script


def test_llamafactory_s_config_holds_with_the_command_s_changes(script):
    config = script("FORCE_TORCHRUN=1 llamafactory-cli train examples/x.yaml \\\n  gradient_accumulation_steps=8\n")
    keys = ("framework", "task", STAGE, DEVICE, STEPS, "train_micro_batch_size_per_gpu")
    assert [config.value(key) for key in keys] == ["llamafactory", "sft", 2, "cpu", 8, 1]
    assert config.setting(STEPS).because == "gradient_accumulation_steps = 8 (train.sh)"
    assert config.setting("task").because == "stage = sft (examples/x.yaml)"
    assert config.setting(STEPS).places[0].file == "train.sh"


def test_llamafactory_s_own_script_under_torchrun_is_known_by_its_config(script):
    config = script("torchrun --nproc_per_node 4 src/train.py examples/x.yaml")
    assert [config.value(key) for key in ("framework", "ranks", STEPS)] == ["llamafactory", 4, 2]


def test_llamafactory_s_arguments_may_all_stand_on_the_command_line(script):
    words = "--stage dpo --do_train --model_name_or_path m --finetuning_type lora --gradient_accumulation_steps 4"
    config = script(f"deepspeed --num_gpus 2 src/train.py --deepspeed examples/ds_z2.json {words}")
    assert [config.value(key) for key in ("framework", "task", STAGE, STEPS)] == ["llamafactory", "dpo", 2, 4]


def test_trainer_s_arguments_fill_what_deepspeed_s_config_leaves_to_them(script):
    config = script(
        f"torchrun --nproc_per_node 8 run_clm.py {ARGUMENTS} --deepspeed examples/ds_z2.json --max_grad_norm 0.5"
    )
    keys = ("framework", "ranks", STAGE, DEVICE, STEPS, "train_micro_batch_size_per_gpu", CLIPPING)
    assert [config.value(key) for key in keys] == ["transformers", 8, 2, "cpu", 1, 2, 0.5]


def test_whose_trainer_an_unknown_script_uses_is_open(script):
    config = script(f"torchrun train.py {ARGUMENTS} --gradient-accumulation-steps 8")
    assert config.value(STEPS) == 8
    assert config.value("framework") is UNKNOWN
    assert config.setting("framework").because == (
        "train.py (train.sh, line 1) decides whether transformers' Trainer trains, TRL's or its own loop"
    )
    assert config.setting("deepspeed").because == (
        "--deepspeed is not given (train.sh, line 1), but train.py may choose DeepSpeed itself"
    )


def test_accelerate_s_options_build_the_deepspeed_config(script):
    launcher = "accelerate launch --num_processes 4 --use_deepspeed --zero_stage 2 --offload_optimizer_device cpu"
    config = script(f"GA=8\n{launcher} \\\n train.py {ARGUMENTS} --gradient_accumulation_steps $GA")
    assert [config.value(key) for key in ("deepspeed", "ranks", STAGE, DEVICE, STEPS)] == [True, 4, 2, "cpu", 8]


def test_accelerate_s_config_holds_under_its_options(write, script):
    write("acc.yaml", "distributed_type: DEEPSPEED\nnum_processes: 8\ndeepspeed_config:\n  zero_stage: 3\n")
    config = script(f"accelerate launch --config_file acc.yaml --zero_stage 2 train.py {ARGUMENTS}")
    assert [config.value(key) for key in ("deepspeed", "ranks", STAGE)] == [True, 8, 2]


def test_a_loop_of_its_own_is_known_by_its_deepspeed_config_only(script):
    config = script("deepspeed --num_gpus 2 own.py --deepspeed --deepspeed_config examples/ds_z2.json --epochs 3")
    assert [config.value(key) for key in ("deepspeed", "ranks", STAGE, STEPS)] == [True, 2, 2, UNKNOWN]


def test_trl_s_command_tells_the_task_and_reads_its_config(write, script):
    write("x.yaml", "model_name_or_path: m\ndataset_name: d\ngradient_accumulation_steps: 2\n")
    config = script("trl dpo --config x.yaml --gradient_accumulation_steps 4 --output_dir o")
    assert [config.value(key) for key in ("framework", "task", STEPS)] == ["trl", "dpo", 4]


@pytest.mark.parametrize("start", ["axolotl train", "accelerate launch --num_processes 2 -m axolotl.cli.train"])
def test_axolotl_s_config_holds_with_the_command_s_changes(write, script, start):
    write("x.yml", "base_model: m\nmicro_batch_size: 1\nnum_epochs: 1\ngradient_accumulation_steps: 2\n")
    config = script(f"{start} x.yml --gradient-accumulation-steps 4 --deepspeed examples/ds_z2.json")
    assert [config.value(key) for key in ("framework", STEPS, STAGE)] == ["axolotl", 4, 2]


def test_a_config_that_is_not_there_leaves_all_open(script):
    config = script("llamafactory-cli train missing.yaml")
    assert config.value("framework") == "llamafactory"
    for key in ("deepspeed", STEPS, STAGE):
        assert config.value(key) is UNKNOWN
        assert config.setting(key).because == (
            "missing.yaml (train.sh, line 1): no such file here, beside it or above it"
        )


def test_an_unknown_script_may_have_defaults_of_its_own(script):
    config = script(
        "python finetune.py --base_model m --output_dir o --learning_rate 1e-4 --batch_size 128 --micro_batch 4"
    )
    assert config.value(STEPS) is UNKNOWN
    assert config.setting(STEPS).because == (
        "gradient_accumulation_steps is not set (train.sh), and finetune.py may choose it itself"
    )


def test_trainer_s_own_parser_is_known_by_arguments_that_no_other_loop_has(script):
    config = script(f"torchrun $HERE/train.py {ARGUMENTS} --save_strategy no --overwrite_output_dir")
    assert (config.value(STEPS), config.value("label_smoothing_factor")) == (1, 0.0)


@pytest.mark.parametrize("end", ['"$@"', "$EXTRA", "--bf16 $EXTRA", "--deepspeed $@"])
def test_words_that_are_not_known_may_hold_any_argument(script, end):
    config = script(f"torchrun run_clm.py {ARGUMENTS} {end}")
    assert config.value(STEPS) is UNKNOWN
    assert " in train.sh may hold it" in config.setting(STEPS).because
    assert config.value("label_smoothing_factor") is UNKNOWN


def test_a_value_that_is_not_known_is_open(script):
    config = script(f"torchrun run_clm.py {ARGUMENTS} --gradient_accumulation_steps $GA --save_steps $S")
    assert config.value(STEPS) is UNKNOWN
    assert config.setting(STEPS).because.startswith("gradient_accumulation_steps = $GA (train.sh)")
    assert config.value("label_smoothing_factor") == 0.0


def test_all_trainings_of_a_script_are_read(write):
    text = f"torchrun run_clm.py {ARGUMENTS}\npython -m openrlhf.cli.train_sft --bf16\npython prepare.py --x 1\n"
    assert [one.value("framework") for one in load([write("all.sh", text)])] == ["transformers", "openrlhf"]


@pytest.mark.parametrize("text", ["python prepare.py --output_dir x\n", "pip install deepspeed\n", "#!/bin/bash\n", ""])
def test_a_script_without_a_training_is_no_config(write, text):
    with pytest.raises(ConfigError, match="looks like no config that trainfix knows"):
        load([write("x.sh", text)])


def test_a_script_without_a_training_says_so_when_it_is_named_one(write):
    with pytest.raises(ConfigError, match=r"^x\.sh starts no training that trainfix knows"):
        load([write("x.sh", "python prepare.py")], "command")


def test_a_broken_config_that_a_command_names_is_refused_with_its_own_words(write):
    write("x.yaml", "a: [")
    with pytest.raises(ConfigError, match=r"^x\.yaml, line 1"):
        load([write("train.sh", "llamafactory-cli train x.yaml")])


@settings(max_examples=200, deadline=None)
@given(
    st.sampled_from(["torchrun t.py", "accelerate launch --use_deepspeed t.py", "llamafactory-cli train", "trl sft"]),
    st.lists(
        st.tuples(
            st.sampled_from(
                ["--deepspeed", "--gradient_accumulation_steps", "--bf16", "--output_dir", "--config", "a", "--x"]
            ),
            st.sampled_from(["=", " "]),
            st.sampled_from(["8", "$X", "x.yaml", "{", '"$@"', "\x1b[2J", "nan", "/", "true"]) | st.text(max_size=5),
        )
    ),
)
def test_any_command_line_is_read_or_refused(start, words):
    script = f"{start} " + " ".join("".join(one) for one in words)
    document = Document("x.sh", script, {})
    with suppress(ConfigError):
        for draft in launched.read(document) if launched.recognises(document) else ():
            config = RunConfig(draft.source, draft.values, draft.origins)
            assert all(config.setting(key).because.isprintable() for key in draft.values)


@settings(max_examples=100, deadline=None)
@given(st.binary(max_size=300))
def test_any_bytes_are_read_or_refused(tmp_path_factory, content):
    file: Path = tmp_path_factory.getbasetemp() / "bytes.sh"
    file.write_bytes(content)
    with suppress(ConfigError):
        load([str(file)])
