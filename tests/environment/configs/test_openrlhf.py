"""OpenRLHF's command lines: what its flags make of DeepSpeed's config, in the old names and in those since 0.10.2."""

from __future__ import annotations

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from trainfix.environment.configs import ConfigError, load, openrlhf
from trainfix.environment.configs.documents import Document
from trainfix.environment.runconfig import UNKNOWN, RunConfig
from trainfix.environment.runconfig.deepspeed import (
    ACCUMULATION_TYPE,
    CLIPPING,
    DEVICE,
    MODEL_TYPE,
    OVERLAP,
    STAGE,
    STEPS,
)

SFT = """set -x

read -r -d '' training_commands <<EOF
openrlhf.cli.train_sft \\
   --train_batch_size 256 \\
   --micro_train_batch_size 2 \\
   --pretrain meta-llama/Meta-Llama-3-8B \\
   --zero_stage 2 \\
   --max_epochs 1 \\
   --bf16 \\
   --load_checkpoint \\
   --gradient_checkpointing
EOF
    # --adam_offload

if [[ ${1} != "slurm" ]]; then
    deepspeed --num_gpus 8 --module $training_commands
fi
"""
PPO = """ray job submit --address="http://127.0.0.1:8265" \\
   --runtime-env-json='{"working_dir": "/openrlhf"}' \\
   -- python3 -m openrlhf.cli.train_ppo_ray \\
   --actor.num_nodes 1 \\
   --actor.num_gpus_per_node 4 \\
   --critic.num_nodes 1 \\
   --critic.num_gpus_per_node 2 \\
   --train.micro_batch_size 8 \\
   --train.batch_size 128 \\
   --ds.zero_stage 3 \\
   --ds.adam_offload
"""


@pytest.fixture
def flags(run):
    """The run of one command of OpenRLHF."""

    def flags(words: str, program: str = "train_sft", launcher: str = "deepspeed --num_gpus 4 --module") -> RunConfig:
        return run("train.sh", f"{launcher} openrlhf.cli.{program} {words}\n")

    return flags


def because(config: RunConfig, key: str) -> str:
    return config.setting(key).because


def test_an_example_of_openrlhf_s_own_is_read(run):
    config = run("train_sft_llama.sh", SFT)
    keys = ("framework", "task", "deepspeed", "ranks", "epochs", STAGE, DEVICE, MODEL_TYPE, STEPS, CLIPPING)
    assert [config.value(key) for key in keys] == ["openrlhf", "sft", True, 8, 1, 2, "none", "bf16", 16, 1.0]
    assert because(config, STAGE) == "--zero_stage 2 (train_sft_llama.sh)"
    assert because(config, DEVICE) == "--adam_offload is not given (train_sft_llama.sh)"
    assert because(config, STEPS) == (
        "gradient_accumulation_steps = 16: --train_batch_size 256 / (--micro_train_batch_size 2 x 8 ranks) "
        "(train_sft_llama.sh)"
    )
    assert config.setting(STAGE).places[0].line == 8


def test_the_actor_and_the_critic_are_two_runs_where_their_ranks_differ(write):
    actor, critic = load([write("ppo.sh", PPO)])
    assert [(one.value("task"), one.value("ranks"), one.value(STEPS)) for one in (actor, critic)] == [
        ("ppo", 4, 4),
        ("ppo", 2, 8),
    ]
    assert (actor.value(STAGE), actor.value(DEVICE), actor.value("optimizer.type")) == (3, "cpu", "adamw")


@pytest.mark.parametrize("words", ["--critic.num_gpus_per_node 4", "--algo.advantage.estimator group_norm"])
def test_one_run_is_enough_where_the_critic_is_trained_as_the_actor_or_not_at_all(write, words):
    (config,) = load([write("ppo.sh", PPO.rstrip() + f" {words}\n")])
    assert config.value("ranks") == 4


def test_the_critic_s_own_clipping_makes_a_run_of_its_own(write):
    runs = load([write("ppo.sh", PPO.rstrip() + " --critic.num_gpus_per_node 4 --critic.max_norm 0.5\n")])
    assert [one.value(CLIPPING) for one in runs] == [1.0, 0.5]


@pytest.mark.parametrize(
    ("old", "new", "key", "value"),
    [
        ("--zero_stage 3", "--ds.zero_stage 3", STAGE, 3),
        ("", "--ds.zpg 1", STAGE, 2),
        ("--adam_offload", "--ds.adam_offload", DEVICE, "cpu"),
        ("--overlap_comm", "--ds.overlap_comm", OVERLAP, True),
        ("--max_norm 0.5", "--max_norm 0.5", CLIPPING, 0.5),
        ("--grad_accum_dtype fp32 --bf16", "--ds.grad_accum_dtype fp32", ACCUMULATION_TYPE, "fp32"),
        ("--bf16", "--ds.param_dtype bf16", MODEL_TYPE, "bf16"),
        ("--param_dtype fp16", "--ds.param_dtype fp16", MODEL_TYPE, "fp16"),
        ("--deepcompile", "--ds.deepcompile", "compile.deepcompile", True),
        ("--zpg 4", "--ds.zpg 4", "zero_optimization.zero_hpz_partition_size", 4),
        ("--max_epochs 3", "--train.max_epochs 3", "epochs", 3),
        ("--pretrain_mode", "--model.pretrain_mode_enable", "task", "pt"),
        ("--train_batch_size 64", "--train.batch_size 64", STEPS, 2),
        ("--train_batch_size=64 --train_batch_size 32", "--train.batch_size=32", STEPS, 1),
        ("--ring_attn_size 2", "--ds.ring_attn_size 2", "ranks", 2),
        ("--ring_attn_size 2", "--ds.ring_attn_size 2", STEPS, 8),
        ("--ds_tensor_parallel_size 2", "--ds.tensor_parallel_size 2", "ranks", 2),
    ],
)
def test_a_flag_means_the_same_under_its_old_and_its_new_name(flags, old, new, key, value):
    assert flags(old).value(key) == value
    assert flags(new).value(key) == value


@pytest.mark.parametrize(
    ("program", "micro", "epochs"),
    [
        ("train_sft", 8, 2),
        ("train_dpo", 8, 1),
        ("train_kto", 8, 1),
        ("train_kd", 8, 1),
        ("train_rm", 1, 1),
        ("train_prm", 1, 1),
        ("train_ppo", 4, 1),
    ],
)
def test_each_program_has_its_own_defaults(flags, program, micro, epochs):
    config = flags("--bf16", program)
    assert config.value("train_micro_batch_size_per_gpu") == micro
    assert (config.value("epochs"), config.value(STEPS)) == (epochs, 128 // (micro * 4))
    assert config.value("task") == program.removeprefix("train_")


@pytest.mark.parametrize(
    ("words", "release", "steps"),
    [
        ("--actor_num_nodes 1", None, UNKNOWN),
        ("--actor_num_nodes 1", "0.9.10", 4),
        ("--actor_num_nodes 1", "0.10.0", 16),
        ("--actor_num_nodes 1 --bf16", None, 4),
        ("--actor.num_nodes 1", None, 16),
    ],
)
def test_ppo_s_micro_batch_depends_on_the_release_unless_the_flags_tell_it(flags, words, release, steps):
    config = flags(words, "train_ppo_ray", "python3 -m")
    versions = {} if release is None else {"openrlhf": release}
    assert config.value("ranks") == 8  # the default
    assert config.value(STEPS, versions) == steps


@pytest.mark.parametrize(("release", "enabled"), [(None, UNKNOWN), ("0.9.1.post1", False), ("0.9.2", True)])
def test_without_a_flag_the_data_type_depends_on_the_release(flags, release, enabled):
    config = flags("--zero_stage 2")
    assert config.value("bf16.enabled", {} if release is None else {"openrlhf": release}) == enabled
    assert because(config, "bf16.enabled") == (
        "--param_dtype is not given (train.sh): OpenRLHF takes bf16: false before openrlhf 0.9.2, true from 0.9.2 on"
    )


def test_before_0_10_2_openrlhf_passes_its_own_optimizer_and_then_deepspeed_builds_it(flags):
    assert flags("--zero_stage 2").value("optimizer.type") is None
    assert flags("--ds.zero_stage 2").value("optimizer.type") == "adamw"
    assert flags("--ds.zero_stage 2 --optim muon").value("optimizer.type") == "muon"


def test_dynamic_batches_leave_deepspeed_no_window(flags):
    config = flags("--use_dynamic_batch --train_batch_size 1024", "train_ppo_ray", "python3 -m")
    assert config.value(STEPS) == 1
    assert because(config, STEPS) == (
        "--use_dynamic_batch (train.sh): OpenRLHF has DeepSpeed accumulate nothing, and calls backward() several times "
        "per step"
    )


def test_a_second_data_set_for_the_actor_doubles_its_window(flags, write):
    words = "--bf16 --micro_train_batch_size 4 --pretrain_data x --critic_num_gpus_per_node 8"
    runs = load([write("ppo.sh", f"python -m openrlhf.cli.train_ppo_ray {words}")])
    assert [one.value(STEPS) for one in runs] == [8, 4]


def test_unknown_ranks_leave_the_window_open_with_the_numbers_that_are_known(flags):
    config = flags("--train_batch_size 128 --micro_train_batch_size 2", launcher="deepspeed --module")
    assert config.value(STEPS) is UNKNOWN
    assert because(config, STEPS) == (
        "--train_batch_size 128 / (--micro_train_batch_size 2 x ranks), and the number of ranks is not said (train.sh, "
        "line 1): deepspeed takes all GPUs that it finds; --num_gpus is not given"
    )


@pytest.mark.parametrize(
    ("words", "key", "why"),
    [
        ("--zero_stage $STAGE", STAGE, "--zero_stage $STAGE (train.sh): the script alone does not say what $STAGE is"),
        ("--zero_stage two", STAGE, "--zero_stage two (train.sh) is not a whole number, which OpenRLHF refuses"),
        ("--zero_stage", STAGE, "--zero_stage (train.sh) has no value"),
        ("--adam_off", DEVICE, "--adam_off (train.sh) may be short for --adam_offload; write it in full"),
        ("--bf16 $MORE", DEVICE, "--adam_offload is not in train.sh itself, but $MORE there may hold it"),
        ('--max_epochs 1 "$@"', STAGE, "--zero_stage is not in train.sh itself, but $@ there may hold it"),
        ("--pretrain ${MORE[@]}", STAGE, "--zero_stage is not in train.sh itself, but ${MORE[@]} there may hold it"),
        ("--train_batch_size 100", STEPS, "no whole number of micro-batches, which DeepSpeed refuses"),
        ("--ring_attn_size 3", "ranks", "is no whole number of data-parallel ranks"),
    ],
)
def test_what_the_script_alone_does_not_tell_is_open_and_says_why(flags, words, key, why):
    config = flags(words)
    assert config.value(key) is UNKNOWN
    assert why in because(config, key)


def test_a_flag_that_is_given_holds_beside_words_that_are_not_known(flags):
    assert flags('--zero_stage 3 --gradient_checkpointing "$@"').value(STAGE) == 3


def test_a_value_that_is_not_known_is_no_further_flag(flags):
    assert flags("--pretrain $MODEL --save_path $OUT --bf16").value(DEVICE) == "none"


def test_several_trainings_of_a_script_are_several_runs(write):
    script = "python -m openrlhf.cli.batch_inference --zero_stage 0\n" + "".join(
        f"deepspeed --num_gpus 2 --module openrlhf.cli.{name} --bf16\n" for name in ("train_sft", "train_dpo")
    )
    assert [one.value("task") for one in load([write("all.sh", script)])] == ["sft", "dpo"]


@pytest.mark.parametrize(
    ("script", "words"),
    [
        (
            "python -m openrlhf.cli.serve_rm --port 5000",
            "x.sh, line 1: openrlhf.cli.serve_rm trains nothing; name the script that starts the training",
        ),
        ("docker run -v x:/openrlhf image bash", "x.sh starts no training of OpenRLHF"),
        (
            "cd /openrlhf\nsource ./train_dpo.sh slurm\nsrun torchrun -m ${training_commands}",
            "line 3: torchrun starts ${training_commands}, which this script does not set; it reads ./train_dpo.sh",
        ),
    ],
)
def test_a_script_that_trains_nothing_is_refused_with_the_next_step(write, script, words):
    with pytest.raises(ConfigError) as refused:
        load([write("x.sh", script)])
    assert words in str(refused.value)


def test_a_program_newer_than_the_catalogue_has_open_defaults(flags):
    config = flags("--ds.zero_stage 2", "train_new")
    assert (config.value(STAGE), config.value("task"), config.value(STEPS)) == (2, "new", UNKNOWN)


NAMES = [
    "--zero_stage",
    "--ds.zero_stage",
    "--adam_offload",
    "--bf16",
    "--param_dtype",
    "--train_batch_size",
    "--max_norm",
]
NAMES += ["--micro_train_batch_size", "--ring_attn_size", "--ds.tensor_parallel_size", "--use_dynamic_batch", "--optim"]
NAMES += [
    "--actor_num_nodes",
    "--critic.num_gpus_per_node",
    "--advantage_estimator",
    "--pretrain_data",
    "--grad_accum_dtype",
]
VALUES = [
    "",
    "1",
    "2",
    "0",
    "-1",
    "9" * 20,
    "1e999",
    "nan",
    "$X",
    "bf16",
    "gae",
    "'",
    '"$@"',
    "\x1b[2J",
    "٣",
    "=",
    "1_0",
]


@settings(max_examples=300, deadline=None)
@given(
    st.sampled_from(["train_sft", "train_ppo_ray", "train_ppo", "train_new", "serve_rm"]),
    st.lists(
        st.tuples(st.sampled_from(NAMES), st.sampled_from(["=", " "]), st.sampled_from(VALUES) | st.text(max_size=5))
    ),
)
def test_any_flags_are_read_or_refused_and_their_reasons_are_one_printable_line(program, words):
    script = f"python -m openrlhf.cli.{program} " + " ".join("".join(one) for one in words)
    try:
        drafts = openrlhf.read(Document("x.sh", script, {}))
    except ConfigError:
        return
    for draft in drafts:
        config = RunConfig(draft.source, draft.values, draft.origins)
        for key in draft.values:
            assert config.setting(key).because.isprintable()
            config.value(key, {"openrlhf": "0.9.10", "deepspeed": "0.18.9"})
