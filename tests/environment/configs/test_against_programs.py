"""What the released programs really make of these files, next to what trainfix reads in them."""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Mapping
from pathlib import Path

import pytest

from tests.support import stacks
from tests.support.releases import release
from trainfix.environment.configs import load
from trainfix.environment.configs.deepspeed import flat
from trainfix.environment.runconfig import UNKNOWN

pytestmark = pytest.mark.slow

# Each case in a process of its own, forked after the imports. accelerate's launcher turns its config into variables,
# and Trainer's arguments are built under them; then follow the two steps that Trainer and AcceleratorState take.
CHILD = """
import json, os, sys
from accelerate.commands.launch import _validate_launch_command, launch_command_parser
from accelerate.utils.launch import prepare_deepspeed_cmd_env
from transformers import TrainingArguments
from transformers.integrations.deepspeed import HfTrainerDeepSpeedConfig

def build(given, launcher):
    if launcher:
        arguments = launch_command_parser().parse_args(["--config_file", launcher, "train.py"])
        arguments = _validate_launch_command(arguments)[0]
        arguments.deepspeed_fields_from_accelerate_config = ""
        os.environ.update(prepare_deepspeed_cmd_env(arguments)[1])
    os.environ.update(MASTER_ADDR="127.0.0.1", MASTER_PORT="0", RANK="0", LOCAL_RANK="0", WORLD_SIZE="1")
    arguments = TrainingArguments(**given, output_dir="out", use_cpu=True, report_to=[])
    plugin = arguments.deepspeed_plugin
    if launcher:
        plugin.hf_ds_config = HfTrainerDeepSpeedConfig(plugin.hf_ds_config.config)
        plugin.deepspeed_config = plugin.hf_ds_config.config
        plugin.hf_ds_config.trainer_config_process(arguments)
    plugin.set_mixed_precision(os.environ.get("ACCELERATE_MIXED_PRECISION", "no"))
    return plugin.deepspeed_config

for name, case in json.loads(sys.argv[1]).items():
    child = os.fork()
    if child == 0:
        print("RESULT", json.dumps([name, build(*case)]), flush=True)
        os._exit(0)
    os.waitpid(child, 0)
"""
DS = {
    "train_micro_batch_size_per_gpu": "auto",
    "gradient_accumulation_steps": "auto",
    "gradient_clipping": "auto",
    "zero_optimization": {"stage": 2, "offload_optimizer": {"device": "cpu"}},
    "optimizer": {"type": "AdamW", "params": {"lr": "auto", "eps": "auto", "weight_decay": "auto"}},
    "scheduler": {"type": "WarmupLR", "params": {"warmup_min_lr": "auto", "warmup_max_lr": "auto"}},
}
SIXTEEN = {"bf16": {"enabled": "auto"}, "fp16": {"enabled": "auto"}}
# As written in the file, or what accelerate adds for itself and no reader needs.
UNREAD = {
    *("optimizer.type", "steps_per_print", "fp16.auto_cast"),
    "zero_optimization.stage3_gather_16bit_weights_on_model_save",
}
VALUES = {
    "bf16": True,
    "gradient_accumulation_steps": 8,
    "per_device_train_batch_size": 2,
    "max_grad_norm": 0.3,
    "learning_rate": 1e-4,
}
SECTION = "distributed_type: DEEPSPEED\nnum_processes: 1\nmixed_precision: {}\ndeepspeed_config: {}\n"
WITH_OFFLOAD = SECTION.format("bf16", "{offload_optimizer_device: cpu, gradient_clipping: 1.0}")
# Trainer's arguments, and accelerate's config if it launches.
CASES: Mapping[str, tuple[Mapping[str, object], str | None]] = {
    "defaults": ({"deepspeed": {**DS, **SIXTEEN}}, None),
    "values": ({"deepspeed": {**DS, **SIXTEEN}, **VALUES}, None),
    "no sections for 16 bits": ({"deepspeed": DS, "bf16": True}, None),
    "fp16": ({"deepspeed": {**DS, **SIXTEEN}, "fp16": True}, None),
    "evaluation in bf16": ({"deepspeed": {**DS, **SIXTEEN}, "bf16_full_eval": True}, None),
    "stage 1 from a section": ({**VALUES, "bf16": False}, SECTION.format("'no'", "{zero_stage: 1}")),
    "offload from a section": ({"bf16": True}, WITH_OFFLOAD),
    "an empty section": ({}, SECTION.format("'no'", "{}")),
    "a file beside the launcher's section": ({"deepspeed": {**DS, **SIXTEEN}, "bf16": True}, WITH_OFFLOAD),
}


@pytest.fixture(scope="module", params=["4.46.3", "4.55.0"])
def built(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Mapping[str, object]:
    """Case -> DeepSpeed's config as a release of transformers, with its accelerate, builds it."""
    folder = tmp_path_factory.mktemp("built")
    given = {}
    for number, (name, (arguments, launcher)) in enumerate(CASES.items()):
        file = folder / f"{number}.yaml"
        file.write_text(launcher or "")
        given[name] = (arguments, str(file) if launcher else None)
    folders = [*stacks.stack(transformers=request.param), release("0.18.9")]
    environment = stacks.environment(*folders, trainfix=False)
    command = [sys.executable, "-c", CHILD, json.dumps(given)]
    child = subprocess.run(command, env=environment, cwd=folder, capture_output=True, text=True, check=False)
    results = [line.removeprefix("RESULT ") for line in child.stdout.splitlines() if line.startswith("RESULT ")]
    found: dict[str, object] = dict(map(json.loads, results))
    assert found.keys() == CASES.keys(), child.stderr[-2000:]
    return found


@pytest.mark.parametrize("case", CASES)
def test_trainer_and_accelerate_build_what_trainfix_reads(write, here: Path, built, case):
    arguments, launcher = CASES[case]
    paths = [write("args.json", {**arguments, "output_dir": "out", "save_steps": 500})]
    (config,) = load([*paths, *([write("acc.yaml", launcher)] if launcher else [])])
    real = {key: value for key, value in flat(built[case]) if value is not None and key not in UNREAD}
    read = {key: config.value(key, {"deepspeed": "0.18.9"}) for key in real}
    unknown = {key for key, value in read.items() if value is UNKNOWN}
    assert len(real) > 6
    assert unknown <= {"train_batch_size"}
    assert {key: value for key, value in read.items() if key not in unknown} == {
        key: value for key, value in real.items() if key not in unknown
    }
