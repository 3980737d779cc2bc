"""accelerate's config: how a program is started, and the DeepSpeed config that accelerate builds."""

from __future__ import annotations

import pytest

from trainfix.environment.configs import ConfigError, load, load_run
from trainfix.environment.runconfig import UNKNOWN
from trainfix.environment.runconfig.deepspeed import DEVICE, MODEL_TYPE, STAGE, STEPS

ZERO2 = """\
compute_environment: LOCAL_MACHINE
deepspeed_config:
  gradient_accumulation_steps: 4
  gradient_clipping: 0.5
  offload_optimizer_device: cpu
  offload_param_device: none
  zero3_init_flag: false
  zero_stage: 2
distributed_type: DEEPSPEED
mixed_precision: bf16
num_machines: 1
num_processes: 8
"""


def test_a_deepspeed_section_is_the_config_that_accelerate_builds(run):
    config = run("acc.yaml", ZERO2)
    assert [
        config.value(key) for key in ("deepspeed", "ranks", STAGE, DEVICE, STEPS, "gradient_clipping", MODEL_TYPE)
    ] == [*(True, 8, 2, "cpu", 4, 0.5, "bf16")]


def test_a_value_names_accelerates_key_and_its_line(run):
    config = run("acc.yaml", ZERO2)
    setting = config.setting(STAGE)
    assert setting.because == "deepspeed_config.zero_stage = 2 (acc.yaml)"
    assert setting.places[0].line == 8
    assert config.setting("deepspeed").because == "distributed_type = DEEPSPEED (acc.yaml)"


def test_an_empty_section_is_stage_2_without_offload(run):
    config = run("acc.yaml", "distributed_type: DEEPSPEED\nnum_processes: 2\n")
    assert (config.value(STAGE), config.value(DEVICE)) == (2, "none")
    assert "deepspeed_config.zero_stage is not set (acc.yaml): accelerate takes 2" in config.setting(STAGE).because


def test_a_window_that_the_section_does_not_set_is_the_programs(run):
    config = run("acc.yaml", "distributed_type: DEEPSPEED\nnum_processes: 2\n")
    assert config.value(STEPS) is UNKNOWN
    assert "leaves it to the program" in config.setting(STEPS).because


@pytest.mark.parametrize("kind", ["MULTI_GPU", "FSDP", "MULTI_CPU", "XLA"])
def test_any_other_distributed_type_is_no_deepspeed_even_with_a_section(run, kind):
    config = run("acc.yaml", ZERO2.replace("DEEPSPEED", kind))
    assert config.value("deepspeed") is False
    assert config.value("ranks") == 8
    assert config.setting("deepspeed").because == f"distributed_type = {kind} (acc.yaml)"


@pytest.mark.parametrize("no", ["'NO'", "NO"])
def test_distributed_type_no_starts_one_process_whatever_num_processes_says(run, no):
    config = run("acc.yaml", f"distributed_type: {no}\nnum_processes: 8\n")
    assert (config.value("ranks"), config.value("deepspeed")) == (1, False)


def test_a_distributed_type_that_accelerate_does_not_have_is_open(run):
    config = run("acc.yaml", "distributed_type: MANY\nnum_processes: 2\n")
    assert config.value("deepspeed") is UNKNOWN
    assert config.value(STAGE) is UNKNOWN


@pytest.mark.parametrize("processes", ["num_machines: 1", "num_processes: -1"])
def test_processes_that_the_command_line_gives_are_open(run, processes):
    config = run("acc.yaml", f"distributed_type: MULTI_GPU\n{processes}\n")
    assert config.value("ranks") is UNKNOWN
    assert "accelerate launch" in config.setting("ranks").because


@pytest.mark.parametrize(("size", "ranks"), [(1, 4), (2, UNKNOWN)])
def test_processes_that_share_a_model_are_no_ranks(run, size, ranks):
    text = f"distributed_type: FSDP\nnum_processes: 4\nparallelism_config:\n  parallelism_config_tp_size: {size}\n"
    assert run("acc.yaml", text).value("ranks") == ranks


def test_a_deepspeed_file_is_read_and_the_section_fills_its_auto_only(write):
    write("ds.json", {"zero_optimization": {"stage": "auto", "offload_optimizer": {"device": "none"}}, STEPS: "auto"})
    text = "distributed_type: DEEPSPEED\nnum_processes: 2\nmixed_precision: fp16\ndeepspeed_config:\n"
    text += "  deepspeed_config_file: ds.json\n  zero_stage: 3\n  offload_optimizer_device: cpu\n"
    config = load_run(write("acc.yaml", text))
    assert (config.value(STAGE), config.value(DEVICE)) == (3, "none")
    assert config.value("fp16.enabled") is True
    assert config.value(STEPS) is UNKNOWN


def test_a_deepspeed_file_that_is_not_there_leaves_all_of_it_open(run):
    text = "distributed_type: DEEPSPEED\nnum_processes: 2\ndeepspeed_config:\n  deepspeed_config_file: gone.json\n"
    config = run("acc.yaml", text)
    assert config.value("deepspeed") is True
    assert config.value(STAGE) is UNKNOWN
    assert config.value("bf16.enabled") is UNKNOWN
    assert "gone.json" in config.setting(STAGE).because


def test_fp8_trains_in_bf16(run):
    assert run("acc.yaml", ZERO2.replace("bf16", "fp8")).value(MODEL_TYPE) == "bf16"


def test_the_old_key_fp16_is_mixed_precision(run):
    text = ZERO2.replace("mixed_precision: bf16", "fp16: true")
    assert run("acc.yaml", text).value(MODEL_TYPE) == "fp16"


@pytest.mark.parametrize("steps", ["'4'", "4.0"])
def test_numbers_are_read_as_accelerate_does_from_its_environment(run, steps):
    assert run("acc.yaml", ZERO2.replace("steps: 4", f"steps: {steps}")).value(STEPS) == 4


@pytest.mark.parametrize("steps", ["many", "[4]", "1.5"])
def test_a_number_that_is_none_is_open_and_quoted(run, steps):
    config = run("acc.yaml", ZERO2.replace("steps: 4", f"steps: {steps}"))
    assert config.value(STEPS) is UNKNOWN
    assert "nothing that accelerate takes" in config.setting(STEPS).because


def test_a_programs_own_deepspeed_config_is_used_and_the_section_is_not(write):
    write("ds.json", {"zero_optimization": {"stage": 1}})
    args = write("args.json", {"output_dir": "o", "learning_rate": 1e-5, "deepspeed": "ds.json"})
    (config,) = load([args, write("acc.yaml", ZERO2)])
    assert (config.value(STAGE), config.value(DEVICE), config.value("ranks")) == (1, "none", 8)


def test_a_file_without_distributed_type_is_refused_as_accelerate_does(write):
    with pytest.raises(ConfigError, match="no distributed_type"):
        load([write("acc.yaml", "num_processes: 2\n")], kind="accelerate")
