"""The DeepSpeed JSON config: what its keys mean to DeepSpeed, and clear words for a file that cannot be read."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from tests.support.defaults import Missing, default_of
from tests.support.releases import RELEASES, release
from trainfix.environment.configs import ConfigError
from trainfix.environment.configs import load_run as load
from trainfix.environment.runconfig import UNKNOWN, RunConfig
from trainfix.environment.runconfig.deepspeed import (
    ACCUMULATION_TYPE,
    CHANGED_DEFAULTS,
    CLIPPING,
    CONTIGUOUS,
    DEFAULTS,
    DEVICE,
    MANAGED,
    MODEL_TYPE,
    OVERLAP,
    STAGE,
    STAIRS,
    STEPS,
    ZENFLOW,
    decides,
)


@pytest.fixture
def config(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    """Writes ds.json in an empty current folder and loads it by that name."""
    monkeypatch.chdir(tmp_path)

    def write(content: object) -> RunConfig:
        Path("ds.json").write_text(content if isinstance(content, str) else json.dumps(content))
        return load("ds.json")

    return write


def at(release: str | None) -> dict[str, str]:
    """The versions that a default of DeepSpeed's may depend on."""
    return {} if release is None else {"deepspeed": release}


def zero(**section: object) -> dict[str, object]:
    return {"train_micro_batch_size_per_gpu": 1, "zero_optimization": section}


def test_values_are_flat_dotted_keys_as_written(config):
    read = config(zero(stage=2, offload_optimizer={"device": "cpu", "pin_memory": True}, offload_param={}))
    assert read.source == "ds.json"
    assert read.values == {
        "deepspeed": True,
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


def test_other_keys_are_read_as_written_and_absent_ones_have_deepspeeds_default(config):
    read = config({"bf16": {"enabled": True}, "zero_optimization": {"reduce_scatter": "auto"}})
    assert read.value("bf16.enabled") is True
    assert read.value("zero_optimization.reduce_scatter") is UNKNOWN
    assert read.setting("fp16.enabled").value is False
    assert read.setting("fp16.enabled").because == "fp16.enabled is not set (ds.json): DeepSpeed takes false"
    assert read.value("optimizer.type") is None
    assert read.value("a.key.of.nobody") is None


@pytest.mark.parametrize(
    ("content", "key", "value", "word"),
    [
        ({"bf16": {"enabled": 1}}, "bf16.enabled", True, "bf16.enabled = 1"),
        ({"bf16": {"enabled": "true"}}, "bf16.enabled", UNKNOWN, "neither true nor false"),
        ({"bf16": {}}, "bf16.enabled", False, "not set"),
        ({"bf16": None}, "bf16.enabled", False, "not set"),
        ({"bf16": "auto"}, "bf16.enabled", UNKNOWN, '"auto"'),
        ({"bfloat16": {"enabled": True}}, "bf16.enabled", True, "bfloat16.enabled = true"),
        ({"bfloat16": {"enabled": True}, "bf16": {"enabled": False}}, "bf16.enabled", False, "bf16.enabled = false"),
        ({"fp16": {"loss_scale": "0"}}, "fp16.loss_scale", UNKNOWN, "not a number"),
        ({"optimizer": {"type": "AdamW"}}, "optimizer.type", "adamw", "optimizer.type = AdamW"),
        ({"optimizer": {"type": "SGD"}}, "optimizer.type", "SGD", "optimizer.type = SGD"),
        ({"optimizer": {"type": "auto"}}, "optimizer.type", UNKNOWN, '"auto"'),
        (
            {"optimizer": {"type": "Adam", "params": {"torch_adam": True}}},
            "optimizer.type",
            "torch_adam",
            "optimizer.params.torch_adam = true",
        ),
        ({"torch_autocast": {"dtype": "torch.bfloat16"}}, "torch_autocast.dtype", "bf16", "= torch.bfloat16"),
        ({"torch_autocast": {"enabled": True}}, "torch_autocast.dtype", None, "not set"),
        (zero(stage=2, zenflow={"topk_ratio": 0.1}), ZENFLOW, True, "zenflow is set"),
        (zero(stage=2, zenflow=None), ZENFLOW, False, "zenflow = null"),
        (zero(stage=2), ZENFLOW, False, "not set"),
        (zero(stage=2, zenflow="auto"), ZENFLOW, UNKNOWN, '"auto"'),
        (zero(stage=3, cpu_offload_param=True), "zero_optimization.offload_param.device", "cpu", "the old name"),
        (zero(stage=3), "zero_optimization.offload_param.device", "none", "not set"),
        ({}, STAIRS, 0, "cycle_first_stair_count is not set"),
        ({"scheduler": {"params": {"cycle_first_stair_count": 4}}}, STAIRS, 4, "cycle_first_stair_count = 4"),
        ({"scheduler": {"params": {"cycle_second_stair_count": 2}}}, STAIRS, 2, "cycle_second_stair_count = 2"),
        ({"scheduler": {"params": {"cycle_second_stair_count": None}}}, STAIRS, 0, "first_stair_count is not set"),
        ({"scheduler": {"params": "auto"}}, STAIRS, UNKNOWN, '"auto"'),
        (zero(stage="auto", offload_optimizer={"device": "nvme"}), DEVICE, UNKNOWN, "the stage is not known"),
    ],
)
def test_a_key_as_deepspeed_reads_it(config, content, key, value, word):
    setting = config(content).setting(key)
    assert setting.value is value if isinstance(value, bool) or value is UNKNOWN else setting.value == value
    assert word in setting.because


@pytest.mark.parametrize(
    ("section", "overlaps", "word"),
    [
        ({"stage": 3}, True, "DeepSpeed takes true in stage 3"),
        ({"stage": 2}, False, "DeepSpeed takes false below stage 3"),
        ({}, False, "below stage 3"),
        ({"stage": 3, "overlap_comm": None}, True, "in stage 3"),
        ({"stage": 3, "overlap_comm": False}, False, "overlap_comm = false"),
        ({"stage": 3, "overlap_comm": "auto"}, UNKNOWN, "auto"),
        ({"stage": "auto"}, UNKNOWN, "zero_optimization.stage"),
    ],
)
def test_overlap_as_deepspeed_derives_it(config, section, overlaps, word):
    setting = config(zero(**section)).setting(OVERLAP)
    assert setting.value is overlaps
    assert word in setting.because


@pytest.mark.parametrize(
    ("section", "contiguous"),
    [
        ({"stage": 2}, True),
        ({"stage": 2, "contiguous_gradients": False}, False),
        ({"stage": 2, "contiguous_gradients": False, "offload_optimizer": {"device": "cpu"}}, True),
        ({"stage": 3, "contiguous_gradients": False, "offload_optimizer": {"device": "cpu"}}, False),
        ({"stage": 2, "contiguous_gradients": False, "offload_optimizer": {"device": "auto"}}, UNKNOWN),
    ],
)
def test_contiguous_gradients_as_deepspeed_takes_them(config, section, contiguous):
    assert config(zero(**section)).value(CONTIGUOUS) is contiguous


BF16 = {"bf16": {"enabled": True}}


@pytest.mark.parametrize(
    ("content", "release", "kind"),
    [
        ({}, None, "fp32"),
        ({"fp16": {"enabled": True}}, None, "fp16"),
        (BF16 | zero(stage=1), None, "bf16"),
        (BF16, "0.17.5", "fp32"),
        (BF16, "0.17.6", "bf16"),
        (BF16, None, UNKNOWN),
        (BF16 | zero(stage="auto"), "0.17.5", UNKNOWN),
        (BF16 | zero(stage="auto"), "0.19.8", "bf16"),
        ({"bf16": {"enabled": "auto"}}, "0.19.8", UNKNOWN),
        (BF16 | {"data_types": {"grad_accum_dtype": "torch.float32"}}, None, "fp32"),
        (BF16 | {"data_types": {"grad_accum_dtype": "half"}}, None, "fp16"),
        (BF16 | {"data_types": {"grad_accum_dtype": None}}, "0.19.8", "bf16"),
        (BF16 | {"data_types": {"grad_accum_dtype": "float64"}}, "0.19.8", UNKNOWN),
    ],
)
def test_type_of_the_accumulated_gradient_as_deepspeed_derives_it(config, content, release, kind):
    setting = config(content).setting(ACCUMULATION_TYPE, at(release))
    assert setting.value == kind
    assert "ds.json" in setting.because


def test_type_of_the_model_follows_the_two_switches(config):
    assert [config(one).value(MODEL_TYPE) for one in ({}, BF16, {"fp16": {"enabled": True}})] == [
        "fp32",
        "bf16",
        "fp16",
    ]
    assert config({"fp16": {"enabled": "auto"}, "bf16": {"enabled": "auto"}}).value(MODEL_TYPE) is UNKNOWN


def test_a_default_that_changed_needs_the_release(config):
    read = config({})
    assert [read.value(CLIPPING, at(one)) for one in ("0.14.0", "0.19.2", "0.19.3", "0.20.dev0")] == [0, 0, 1, 1]
    assert read.value(CLIPPING) is read.value(CLIPPING, at("main")) is UNKNOWN
    assert read.setting(CLIPPING, at("0.19.8")).because == (
        "gradient_clipping is not set (ds.json): DeepSpeed takes 1.0 from 0.19.3 on"
    )
    assert read.setting(CLIPPING).because.endswith("DeepSpeed takes 0.0 before 0.19.3, 1.0 from there on")
    assert config({CLIPPING: 0.5}).value(CLIPPING, at("0.14.0")) == 0.5


def test_unmanaged_accumulation_is_read_from_0_19_4_on(config):
    read = config({MANAGED: False})
    assert [read.value(MANAGED, at(one)) for one in ("0.19.3", "0.19.4", None)] == [True, False, UNKNOWN]
    assert read.setting(MANAGED, at("0.19.3")).because == (
        "managed_gradient_accumulation = false (ds.json): DeepSpeed before 0.19.4 does not read it"
    )
    assert config({}).value(MANAGED) is config({MANAGED: True}).value(MANAGED) is True
    assert [config({MANAGED: "auto"}).value(MANAGED, at(one)) for one in ("0.19.3", "0.19.4")] == [True, UNKNOWN]


def test_a_file_decides_a_key_that_it_sets_or_leaves_to_the_program(config):
    read = config({"bfloat16": {"enabled": True}, "gradient_clipping": "auto", "fp16": "auto", "optimizer": None})
    assert [key for key in ("bf16.enabled", CLIPPING, "fp16.hysteresis", "optimizer.type") if decides(read, key)] == [
        "bf16.enabled",
        CLIPPING,
        "fp16.hysteresis",
    ]


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("", ["ds.json, line 1 column 1", "not valid JSON", "correct it"]),
        ('{"a": 1,\n  "b": }', ["ds.json, line 2 column 8", "not valid JSON"]),
        ('{"a": 1, // stage\n "b": 2}', ["ds.json, line 1 column 10", "no comments", "remove the comment"]),
        ("[1]", ["ds.json holds a list", "one JSON object"]),
        ("null", ["ds.json holds nothing", "one JSON object"]),
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
    with pytest.raises(ConfigError, match=r"\. is a directory: name the config file itself; it holds ds\.json"):
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


CONFIG, CONSTANTS, PRECISION = "runtime/config.py:", "runtime/constants.py:", "runtime/precision_config.py:"
ZERO = "runtime/zero/config.py:DeepSpeedZeroConfig."
OPTIMIZER = "runtime/zero/offload_config.py:DeepSpeedZeroOffloadOptimizerConfig."
PARAM = "runtime/zero/offload_config.py:DeepSpeedZeroOffloadParamConfig."
# key -> where the sources have its default; the first that a release has counts, and it may have none.
PLACES = {
    "amp.enabled": (f"{CONSTANTS}AMP_ENABLED_DEFAULT",),
    "bf16.check_grad_overflow": (f"{PRECISION}DeepSpeedBF16Config.check_grad_overflow",),
    "bf16.enabled": (f"{PRECISION}DeepSpeedBF16Config.enabled", f"{CONSTANTS}BFLOAT16_ENABLED_DEFAULT"),
    "compile.deepcompile": ("compile/config.py:CompileConfig.deepcompile",),
    "fp16.auto_cast": (f"{PRECISION}DeepSpeedFP16Config.auto_cast", f"{CONSTANTS}FP16_AUTO_CAST_DEFAULT"),
    "fp16.enabled": (f"{PRECISION}DeepSpeedFP16Config.enabled", f"{CONSTANTS}FP16_ENABLED_DEFAULT"),
    "fp16.loss_scale": (f"{PRECISION}DeepSpeedFP16Config.loss_scale", f"{CONSTANTS}FP16_LOSS_SCALE_DEFAULT"),
    "gradient_clipping": (f"{CONSTANTS}GRADIENT_CLIPPING_DEFAULT",),
    "gradient_predivide_factor": (f"{CONSTANTS}GRADIENT_PREDIVIDE_FACTOR_DEFAULT",),
    "managed_gradient_accumulation": (f"{CONSTANTS}MANAGED_GRADIENT_ACCUMULATION_DEFAULT",),
    "optimizer.legacy_fusion": (f"{CONSTANTS}LEGACY_FUSION_DEFAULT",),
    "prescale_gradients": (f"{CONSTANTS}PRESCALE_GRADIENTS_DEFAULT",),
    "sparse_gradients": (f"{CONSTANTS}SPARSE_GRADIENTS_DEFAULT",),
    "torch_autocast.enabled": (f"{CONSTANTS}TORCH_AUTOCAST_ENABLED_DEFAULT",),
    "zero_allow_untested_optimizer": (f"{CONSTANTS}ZERO_ALLOW_UNTESTED_OPTIMIZER_DEFAULT",),
    "zero_force_ds_cpu_optimizer": (f"{CONSTANTS}ZERO_FORCE_DS_CPU_OPTIMIZER_DEFAULT",),
    **{
        f"zero_optimization.{name}": (f"{ZERO}{name}",)
        for name in (
            *("stage", "contiguous_gradients", "elastic_checkpoint", "ignore_unused_parameters", "reduce_scatter"),
            *("round_robin_gradients", "use_multi_rank_bucket_allreduce", "zero_hpz_partition_size"),
            *("zero_quantized_gradients", "zero_quantized_weights"),
        )
    },
    **{
        f"zero_optimization.offload_optimizer.{name}": (f"{OPTIMIZER}{name}",)
        for name in ("device", "pin_memory", "ratio", "super_offload")
    },
    **{f"zero_optimization.offload_param.{name}": (f"{PARAM}{name}",) for name in ("device", "pin_memory")},
}


@pytest.mark.slow
@pytest.mark.parametrize("key", [*DEFAULTS, *CHANGED_DEFAULTS])
def test_a_default_is_that_of_all_releases(config, key):
    read = config({})
    found = {version: default_of(version, *PLACES[key]) for version in RELEASES}
    known = {version: default for version, default in found.items() if default is not Missing}
    assert RELEASES[-1] in known or key in ("amp.enabled", "sparse_gradients")  # dropped in 0.19.8
    assert known == {version: read.value(key, at(version)) for version in known}


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
    {**BATCH, **BF16},
    {**BATCH, "bfloat16": {"enabled": True}, "zero_optimization": {"stage": 1}},
    {**BATCH, "bf16": {"enabled": True}, "data_types": {"grad_accum_dtype": "float32"}},
    {**BATCH, "fp16": {"enabled": True}, "zero_optimization": {"stage": 3, "overlap_comm": None}},
    {**BATCH, "gradient_clipping": 0.5, "zero_optimization": {"stage": 3, "overlap_comm": False}},
]

_ASK = """
import json, sys, torch, types
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
    found += [config.zero_config.overlap_comm, config.bfloat16_config.enabled, config.gradient_clipping]
    engine = types.SimpleNamespace(_config=config, fp16_enabled=lambda: config.float16_config.enabled,
                                   bfloat16_enabled=lambda: config.bfloat16_config.enabled)
    types_found = deepspeed.DeepSpeedEngine.get_data_types(engine)
    print("config " + json.dumps([*found, *map(str, types_found)]))
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


TORCH_TYPES = {"fp32": "torch.float32", "fp16": "torch.float16", "bf16": "torch.bfloat16"}


@pytest.mark.slow
def test_deepspeed_0_18_9_itself_reads_the_configs_as_we_do(config, deepspeed_says):
    for content, found in zip(ASKED, deepspeed_says["config"], strict=True):
        read = config(content)
        keys = (STAGE, DEVICE, STEPS, OVERLAP, "bf16.enabled", CLIPPING, MODEL_TYPE, ACCUMULATION_TYPE)
        said = [read.value(key, at("0.18.9")) for key in keys]
        assert [TORCH_TYPES.get(value, value) for value in said] == found, content


@pytest.mark.slow
def test_nvme_offload_is_cpu_offload_in_stages_1_and_2_of_0_18_9(deepspeed_says):
    assert deepspeed_says["nvme"] == [["DeepSpeedZeroOptimizer", True, False]] * 2
