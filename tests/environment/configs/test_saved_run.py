"""What a training has saved: folders of checkpoints, and trainer_state.json."""

from __future__ import annotations

import pickle
from pathlib import Path

import pytest

from trainfix.environment.configs import ConfigError, load, load_run
from trainfix.environment.runconfig import UNKNOWN
from trainfix.environment.runconfig.deepspeed import STAGE, STEPS

STATE = {"epoch": 0.5, "global_step": 75, "log_history": [], "max_steps": 150, "num_train_epochs": 2, "save_steps": 75}


class Trap:
    """Leaves a mark when it is unpickled."""

    def __reduce__(self):
        return (Path.touch, (Path("opened"),))


@pytest.fixture
def checkpoint(write):
    """Writes a checkpoint with these files beside its state and its pickle."""

    def checkpoint(*names: str, folder: str = "out/checkpoint-75") -> str:
        write(f"{folder}/trainer_state.json", STATE)
        Path(folder, "training_args.bin").write_bytes(pickle.dumps(Trap()))
        for name in names:
            write(f"{folder}/{name}", "")
        return folder

    return checkpoint


def test_a_state_alone_tells_the_epochs(run):
    config = run("trainer_state.json", STATE)
    assert config.value("epochs") == 2
    for key in ("framework", "task", STEPS, "deepspeed", "ranks"):
        assert config.value(key) is UNKNOWN
    assert "TRL, LLaMA-Factory and axolotl" in config.setting("framework").because


def test_the_pickle_is_never_opened_and_that_is_said(checkpoint):
    config = load_run(checkpoint("optimizer.pt"))
    assert not Path("opened").exists()
    assert config.value(STEPS) is UNKNOWN
    assert "training_args.bin, a pickle, which trainfix never opens" in config.setting(STEPS).because
    assert "--config" in config.setting(STEPS).because


def test_the_newest_checkpoint_of_a_run_speaks(checkpoint):
    checkpoint("rng_state.pth", folder="out/checkpoint-9")
    checkpoint("rng_state_0.pth", "rng_state_1.pth", folder="out/checkpoint-10")
    assert load_run("out").value("ranks") == 2


@pytest.mark.parametrize(
    ("names", "ranks"), [(["rng_state.pth"], 1), (["rng_state_0.pth", "rng_state_1.pth"], 2), ([], UNKNOWN)]
)
def test_every_rank_saves_its_random_state(checkpoint, names, ranks):
    assert load_run(checkpoint(*names)).value("ranks") == ranks


def test_trainers_own_optimizer_is_no_deepspeed(checkpoint):
    setting = load_run(checkpoint("optimizer.pt")).setting("deepspeed")
    assert setting.value is False
    assert "Trainer, not DeepSpeed, has saved the optimizer" in setting.because


def test_without_an_optimizer_nobody_can_tell(checkpoint):
    config = load_run(checkpoint())
    assert config.value("deepspeed") is UNKNOWN
    assert config.value(STAGE) is UNKNOWN


def zero(step: int, ranks: int, *, stage: int, bf16: bool = True) -> list[str]:
    """The names that DeepSpeed gives its files."""
    prefix = "bf16_" if bf16 else ""
    states = [f"{prefix}zero_pp_rank_{rank}_mp_rank_00_optim_states.pt" for rank in range(ranks)]
    models = [f"zero_pp_rank_{rank}_mp_rank_00_model_states.pt" for rank in range(ranks)] if stage == 3 else []
    return [
        "zero_to_fp32.py",
        "latest",
        *(f"global_step{step}/{name}" for name in [*states, *(models or ["mp_rank_00_model_states.pt"])]),
    ]


@pytest.mark.parametrize(("stage", "known"), [(2, UNKNOWN), (3, 3)])
def test_deepspeeds_files_tell_the_ranks_and_stage_3(checkpoint, stage, known):
    config = load_run(checkpoint(*zero(75, 4, stage=stage)))
    assert [config.value(key) for key in ("deepspeed", "ranks", STAGE, "bf16.enabled")] == [True, 4, known, True]
    assert config.value("zero_optimization.offload_optimizer.device") is UNKNOWN


def test_files_without_bf16_leave_it_open(checkpoint):
    assert load_run(checkpoint(*zero(75, 1, stage=2, bf16=False))).value("bf16.enabled") is UNKNOWN


def test_an_engine_without_zero(checkpoint):
    config = load_run(checkpoint("global_step75/mp_rank_00_model_states.pt"))
    assert (config.value("deepspeed"), config.value(STAGE)) == (True, 0)


def test_zero_to_fp32_alone_shows_deepspeed(checkpoint):
    config = load_run(checkpoint("zero_to_fp32.py"))
    assert config.value("deepspeed") is True
    assert config.value(STAGE) is UNKNOWN


def test_a_deepspeed_config_beside_it_answers_what_the_files_do_not(checkpoint, write):
    ds = write("ds.json", {"zero_optimization": {"stage": 2, "offload_optimizer": {"device": "cpu"}}, STEPS: 8})
    configs = load([checkpoint(*zero(75, 4, stage=2)), ds])
    assert any((one.value(STAGE), one.value(STEPS)) == (2, 8) for one in configs)


def test_the_runs_config_beside_it_is_joined_with_it(checkpoint, write):
    write("ds.json", {STEPS: "auto", "zero_optimization": {"stage": 2}})
    args = write("args.json", {"output_dir": "out", "save_steps": 75, STEPS: 4, "deepspeed": "ds.json"})
    (config,) = load([args, checkpoint(*zero(75, 4, stage=2))])
    values = [config.value(key) for key in ("framework", "ranks", "epochs", STEPS, STAGE)]
    assert values == ["transformers", 4, 2, 4, 2]


def test_arguments_saved_as_yaml_are_read(checkpoint, write):
    checkpoint("optimizer.pt", "rng_state_0.pth", "rng_state_1.pth")
    text = "model_name_or_path: m\nstage: sft\ndo_train: true\nfinetuning_type: lora\ngradient_accumulation_steps: 8\n"
    write("out/training_args.yaml", text)
    config = load_run("out")
    assert [config.value(key) for key in ("framework", STEPS, "ranks", "deepspeed")] == ["llamafactory", 8, 2, False]


def test_any_other_folder_is_an_error_still(here):
    Path("empty").mkdir()
    with pytest.raises(ConfigError, match="empty is a directory"):
        load_run("empty")


def test_a_folder_that_is_no_checkpoint_is_not_taken_for_one(write):
    write("data/config.json", {"hidden_size": 8})
    with pytest.raises(ConfigError, match="is a directory"):
        load_run("data")


def test_a_checkpoint_that_links_to_itself_is_an_error_or_read(here):
    Path("loop").mkdir()
    Path("loop/checkpoint-1").symlink_to("checkpoint-1")
    with pytest.raises(ConfigError):
        load_run("loop")
