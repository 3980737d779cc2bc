"""The DeepSpeed JSON config: what its keys mean to DeepSpeed, and clear words for a file that cannot be read."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from tests.support.releases import release
from trainfix.environment.runconfig import DEVICE, STAGE, STEPS, UNKNOWN, ConfigError, RunConfig, load


@pytest.fixture
def config(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    """Writes ds.json in an empty current folder and loads it by that name."""
    monkeypatch.chdir(tmp_path)

    def write(content: object) -> RunConfig:
        Path("ds.json").write_text(content if isinstance(content, str) else json.dumps(content))
        return load("ds.json")

    return write


def zero(**section: object) -> dict[str, object]:
    return {"train_micro_batch_size_per_gpu": 1, "zero_optimization": section}


def test_values_are_flat_dotted_keys_as_written(config):
    read = config(zero(stage=2, offload_optimizer={"device": "cpu", "pin_memory": True}, offload_param={}))
    assert read.source == "ds.json"
    assert read.values == {
        "train_micro_batch_size_per_gpu": 1,
        "zero_optimization.stage": 2,
        "zero_optimization.offload_optimizer.device": "cpu",
        "zero_optimization.offload_optimizer.pin_memory": True,
        "zero_optimization.offload_param": {},
    }


def test_a_value_is_named_with_its_key_and_file(config):
    assert config(zero(stage=2)).setting(STAGE).because == "zero_optimization.stage = 2 (ds.json)"


@pytest.mark.parametrize(
    ("content", "stage"),
    [
        ({}, 0),
        ({"zero_optimization": {}}, 0),
        ({"zero_optimization": {"stage": 3}}, 3),
        ({"zero_optimization": {"stage": "2"}}, 2),
        ({"zero_optimization": {"stage": 2.0}}, 2),
        ({"zero_optimization": True}, 1),
        ({"zero_optimization": False}, 0),
        ({"zero_optimization": "auto"}, UNKNOWN),
        ({"zero_optimization": {"stage": "auto"}}, UNKNOWN),
        ({"zero_optimization": {"stage": None}}, UNKNOWN),
        ({"zero_optimization": {"stage": 7}}, UNKNOWN),
        ({"zero_optimization": {"stage": [2]}}, UNKNOWN),
        ({"zero_optimization": {"stage": 1e400}}, UNKNOWN),
    ],
)
def test_stage_as_deepspeed_reads_it(config, content, stage):
    assert config(content).value(STAGE) == stage


@pytest.mark.parametrize(
    ("section", "device", "word"),
    [
        ({"stage": 2}, "none", "not set"),
        ({"stage": 2, "offload_optimizer": None}, "none", "not set"),
        ({"stage": 2, "offload_optimizer": {}}, "none", "not set"),
        ({"stage": 2, "offload_optimizer": {"device": "none"}}, "none", "none"),
        ({"stage": 2, "offload_optimizer": {"device": "cpu"}}, "cpu", "cpu"),
        ({"stage": 2, "cpu_offload": True}, "cpu", "the old name of offload_optimizer.device"),
        ({"stage": 2, "cpu_offload": False}, "none", "not set"),
        ({"stage": 2, "offload_optimizer": "auto"}, UNKNOWN, "auto"),
        ({"stage": 2, "offload_optimizer": {"device": "auto"}}, UNKNOWN, "auto"),
        ({"stage": 2, "offload_optimizer": {"device": "CPU"}}, UNKNOWN, "DeepSpeed knows none, cpu and nvme"),
        ({"stage": 3, "offload_optimizer": {"device": "nvme"}}, "nvme", "nvme"),
        ({"stage": 1, "offload_optimizer": {"device": "nvme"}}, "cpu", "NVMe offload does not exist in stages 1 and 2"),
        ({"stage": 2, "offload_optimizer": {"device": "nvme"}}, "cpu", "NVMe offload does not exist in stages 1 and 2"),
    ],
)
def test_offload_device_as_deepspeed_reads_it(config, section, device, word):
    setting = config(zero(**section)).setting(DEVICE)
    assert setting.value == device
    assert word in setting.because


@pytest.mark.parametrize(
    ("content", "steps", "word"),
    [
        ({STEPS: 8}, 8, "gradient_accumulation_steps = 8 (ds.json)"),
        ({STEPS: "auto"}, UNKNOWN, 'replaces "auto"'),
        ({STEPS: "8"}, UNKNOWN, "not a positive whole number"),
        ({STEPS: 0}, UNKNOWN, "not a positive whole number"),
        ({"train_micro_batch_size_per_gpu": 4}, 1, "DeepSpeed takes 1, as train_batch_size is not set either"),
        ({"train_batch_size": 4}, 1, "DeepSpeed takes 1, as train_micro_batch_size_per_gpu is not set either"),
        ({"train_micro_batch_size_per_gpu": 4, STEPS: None}, 1, "DeepSpeed takes 1"),
        (
            {"train_micro_batch_size_per_gpu": 4, "train_batch_size": 64},
            UNKNOWN,
            "64 / train_micro_batch_size_per_gpu 4 /",
        ),
        ({"train_micro_batch_size_per_gpu": "auto", "train_batch_size": "auto"}, UNKNOWN, 'train_batch_size is "auto"'),
        ({}, UNKNOWN, "neither is train_batch_size"),
        ({STEPS: 8, "elasticity": {"enabled": True}}, UNKNOWN, "elastic training chooses"),
        (
            {STEPS: 8, "zero_optimization": {"zenflow": {"update_interval": 4}}},
            4,
            "in place of gradient_accumulation_steps",
        ),
        ({STEPS: 8, "zero_optimization": {"zenflow": {}}}, UNKNOWN, "ZenFlow chooses"),
        ({STEPS: 8, "zero_optimization": {"zenflow": {"update_interval": "auto"}}}, UNKNOWN, "ZenFlow chooses"),
        ({STEPS: 8, "zero_optimization": {"zenflow": None}}, 8, "= 8 (ds.json)"),
    ],
)
def test_length_of_the_window_as_deepspeed_derives_it(config, content, steps, word):
    setting = config(content).setting(STEPS)
    assert setting.value == steps
    assert word in setting.because


def test_other_keys_are_read_as_written_and_absent_ones_have_no_value(config):
    read = config({"bf16": {"enabled": True}, "gradient_clipping": "auto"})
    assert read.value("bf16.enabled") is True
    assert read.value("gradient_clipping") is UNKNOWN
    assert read.value("fp16.enabled") is None


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("", ["ds.json, line 1 column 1", "not valid JSON", "correct it"]),
        ('{"a": 1,\n  "b": }', ["ds.json, line 2 column 8", "not valid JSON"]),
        ('{"a": 1, // stage\n "b": 2}', ["ds.json, line 1 column 10", "no comments", "remove the comment"]),
        ("[1]", ["ds.json holds a list", "one JSON object"]),
        ("null", ["ds.json holds null", "one JSON object"]),
        ('"auto"', ["ds.json holds a string", "one JSON object"]),
        ('{"a": {"b": 1, "b": 2}}', ["ds.json", "'b' stands twice", "remove one"]),
        ("[" * 100000, ["ds.json is not a usable JSON file"]),
    ],
)
def test_a_file_that_is_no_config_is_named_with_the_place_and_the_next_step(config, text, words):
    with pytest.raises(ConfigError) as caught:
        config(text)
    for word in words:
        assert word in str(caught.value)


def test_a_missing_file_names_its_neighbour(config):
    config({})
    with pytest.raises(ConfigError, match=r"dss\.json: no such file; did you mean ds\.json\?"):
        load("dss.json")


def test_a_directory_names_the_files_in_it(config):
    config({})
    with pytest.raises(ConfigError, match=r"\. is a directory: name the DeepSpeed JSON file itself; it holds ds\.json"):
        load(".")


def test_a_path_through_a_file_does_not_exist(config):
    config({})
    with pytest.raises(ConfigError, match=r"ds\.json/x\.json: no such file"):
        load("ds.json/x.json")


def test_an_unreadable_file_says_so(config):
    # /proc/self/mem opens and cannot be read, for root too; a file without permissions can be read by root.
    path = "ds.json" if os.geteuid() else "/proc/self/mem"
    config({})
    Path("ds.json").chmod(0)
    with pytest.raises(ConfigError, match=rf"cannot read {path}: .*; make it readable"):
        load(path)


def test_a_binary_file_says_so(config):
    Path("ds.json").write_bytes(b"\x80\x81")
    with pytest.raises(ConfigError, match=r"ds\.json is not UTF-8 text \(byte 0\)"):
        load("ds.json")


def test_a_yaml_file_is_told_apart(config):
    Path("accelerate.yaml").write_text("deepspeed_config:\n  zero_stage: 2\n")
    with pytest.raises(ConfigError, match=r"not JSON but YAML"):
        load("accelerate.yaml")


BATCH = {"train_micro_batch_size_per_gpu": 2}
# Every value here is one that we claim to know.
ASKED = [
    {**BATCH, STEPS: 8},
    {**BATCH},
    {"train_batch_size": 8},
    {**BATCH, STEPS: None},
    {**BATCH, "zero_optimization": True},
    {**BATCH, "zero_optimization": False},
    {**BATCH, "zero_optimization": {"stage": "2"}},
    {**BATCH, "zero_optimization": {"stage": 2.0, "offload_optimizer": None}},
    {**BATCH, "zero_optimization": {"stage": 2, "offload_optimizer": {}}},
    {**BATCH, "zero_optimization": {"stage": 2, "offload_optimizer": {"device": "cpu"}}},
    {**BATCH, "zero_optimization": {"stage": 3, "offload_optimizer": {"device": "nvme", "nvme_path": "/tmp"}}},
    {**BATCH, "zero_optimization": {"stage": 2, "cpu_offload": True}},
    {**BATCH, "zero_optimization": {"stage": 2, "cpu_offload": False}},
]

_ASK = """
import json, sys, torch
import deepspeed.comm.torch
sys.modules["deepspeed.comm.torch"].build_shm_op = lambda *_, **__: None
import deepspeed
from deepspeed.runtime.config import DeepSpeedConfig

torch.distributed.init_process_group("gloo", store=torch.distributed.HashStore(), rank=0, world_size=1)
deepspeed.init_distributed(dist_backend="gloo", verbose=False)
for content in json.load(sys.stdin):
    config = DeepSpeedConfig(content)
    offload = config.zero_config.offload_optimizer
    device = offload.device if offload else "none"
    found = [int(config.zero_optimization_stage), device, config.gradient_accumulation_steps]
    print("config " + json.dumps(found))
for stage in (1, 2):
    model = torch.nn.Linear(4, 1)
    zero = {"stage": stage, "offload_optimizer": {"device": "nvme"}}
    config = {"train_micro_batch_size_per_gpu": 1, "zero_allow_untested_optimizer": True, "zero_optimization": zero}
    config["zero_force_ds_cpu_optimizer"] = False
    engine, *_ = deepspeed.initialize(model=model, optimizer=torch.optim.AdamW(model.parameters()), config=config)
    offloaded, swapped = engine.optimizer.cpu_offload, engine.zero_nvme_offload_optimizer()
    print("nvme " + json.dumps([type(engine.optimizer).__name__, offloaded, swapped]))
"""


@pytest.fixture(scope="module")
def deepspeed_says() -> dict[str, list[list[object]]]:
    """What DeepSpeed 0.18.9 makes of ASKED, and of NVMe offload in stages 1 and 2, on one rank."""
    env = {**os.environ, "PYTHONPATH": str(release("0.18.9")), "DS_ACCELERATOR": "cpu", "OMP_NUM_THREADS": "1"}
    env |= {"RANK": "0", "LOCAL_RANK": "0", "WORLD_SIZE": "1", "LOCAL_SIZE": "1"}
    argv = [sys.executable, "-c", _ASK]
    answer = subprocess.run(argv, input=json.dumps(ASKED), env=env, capture_output=True, text=True, check=False)
    said: dict[str, list[list[object]]] = {"config": [], "nvme": []}
    for line in answer.stdout.splitlines():
        kind, _, value = line.partition(" ")
        if kind in said:
            said[kind].append(json.loads(value))
    assert answer.returncode == 0, answer.stderr
    return said


@pytest.mark.slow
def test_deepspeed_0_18_9_itself_reads_the_configs_as_we_do(config, deepspeed_says):
    for content, found in zip(ASKED, deepspeed_says["config"], strict=True):
        read = config(content)
        assert [read.value(STAGE), read.value(DEVICE), read.value(STEPS)] == found, content


@pytest.mark.slow
def test_nvme_offload_is_cpu_offload_in_stages_1_and_2_of_0_18_9(deepspeed_says):
    assert deepspeed_says["nvme"] == [["DeepSpeedZeroOptimizer", True, False]] * 2
