"""Run many configurations of LLaMA-Factory's own `run_exp` in one child, and say how much every token counted.

From a test: ``run(stack("0.9.5"), [{"steps": 4, "checkpoint": "llava"}], trainfix=False, ranks=2)``.

The way is LLaMA-Factory's own from the files on: a checkpoint and a data set in a folder made on the spot, its reading,
its templates, its masking of the prompts, its collator, its trainer. The labels are read where a micro-batch enters
`training_step`; what the model and the trainer make of them is what is judged.
"""

from __future__ import annotations

import copy
import dataclasses
import functools
import gc
import importlib
import json
import os
import random
import tempfile
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from tests.support import stacks, trainer_runs
from tests.support.trainer_runs import Result

SPECIAL = {"<pad>": 0, "<end>": 1, "<unk>": 2, "<image>": 3}  # token ids; the words are "w4", "w5", ... up to "w63"
VOCABULARY = 64

_OLD_TRL = {"tyro": "0.9.35", "docstring_parser": "0.17.0", "shtab": "1.7.2", "typeguard": "4.4.4"}

# LLaMA-Factory -> what it is run with: the newest releases that it admits.
_COMPANIONS: Mapping[str, Mapping[str, str]] = {
    "0.8.3": {"transformers": "4.44.2", "trl": "0.9.6", "peft": "0.12.0", **_OLD_TRL},
    "0.9.0": {"transformers": "4.45.2", "trl": "0.9.6", "peft": "0.12.0", **_OLD_TRL},
    "0.9.1": {"transformers": "4.46.1", "trl": "0.9.6", "peft": "0.12.0", **_OLD_TRL},
    "0.9.2": {"transformers": "4.49.0", "trl": "0.9.6", "peft": "0.12.0", **_OLD_TRL},
    "0.9.3": {"transformers": "4.52.4", "trl": "0.9.6", "peft": "0.15.2", **_OLD_TRL},
    "0.9.4": {"transformers": "4.57.1", "trl": "0.24.0", "peft": "0.17.1"},
    "0.9.5": {"transformers": "5.6.0", "trl": "0.24.0", "peft": "0.18.1"},
}

run = functools.partial(trainer_runs.run, program="tests.support.llamafactory_runs")
"""`trainer_runs.run` with LLaMA-Factory's `run_exp`; configurations are this module's."""


def stack(llamafactory: str, **packages: str) -> list[Path]:
    """`stacks.stack` of a LLaMA-Factory release and what it is run with; `packages` win. Without torchaudio."""
    stand_in = Path(__file__).with_name("without_torchaudio")
    return [*stacks.stack(llamafactory=llamafactory, **{**_COMPANIONS[llamafactory], **packages}), stand_in]


def four_states(
    llamafactory: str, deepspeed: str, configurations: Sequence[Mapping[str, Any]], *, ranks: int = 1
) -> dict[str, list[Result]]:
    """The runs with nothing repaired, the "loss" alone, the "optimizer" (DeepSpeed) alone, and "both"."""
    from trainfix import advisories

    folders = stack(llamafactory, deepspeed=deepspeed)
    ids: dict[str, list[str]] = {"loss": [], "optimizer": []}
    for advisory in advisories.load_all():
        if advisory.fix is not None:
            ids["optimizer" if advisory.package == "deepspeed" else "loss"].append(advisory.id)
    states = {"nothing": [], "loss": ids["optimizer"], "optimizer": ids["loss"], "both": []}
    found = {}
    for state, disabled in states.items():
        env = {"TRAINFIX_DISABLE": ",".join(disabled)} if disabled else {}
        found[state] = run(folders, configurations, trainfix=state != "nothing", ranks=ranks, env=env)
    return found


@dataclasses.dataclass(frozen=True)
class Configuration(trainer_runs.Configuration):
    """One run of `run_exp`, as trainer_runs.Configuration says, but `arguments` are those of LLaMA-Factory's YAML.

    `checkpoint`: "text", a tiny Llama, or "llava", a tiny Llava with its processor. `stage`: "sft" or "pt".
    `template`: "empty" adds nothing to the texts, "llava" what Llava's chats look like, and a stand-in picture to every
    micro-batch. `images`: every row has a picture of its own. `before`: ``module:function`` that is called before
    `run_exp`; `prepare` is called when the training has begun.
    """

    checkpoint: str = "text"
    stage: str = "sft"
    template: str = "empty"
    images: bool = False
    before: str | None = None


# ---------------------------------------------------------------------------------------------------------------------
# From here on: in the child.


def perform(values: Mapping[str, Any], result: Result) -> None:
    """Train, and write into the result what `trainer_runs.run_trainer` writes, and `trainer`, the class that did it."""
    configuration = Configuration(**values)
    if configuration.deepspeed is not None:
        trainer_runs.start_deepspeed()
    llamafactory = _import()
    result["release"] = importlib.import_module("importlib.metadata").version("llamafactory")
    with tempfile.TemporaryDirectory(prefix="trainfix-") as folder:
        make_checkpoint(configuration, Path(folder))
        make_data(configuration, Path(folder))
        observer = _observer(configuration)
        if configuration.before is not None:
            trainer_runs.named(configuration.before)()
        try:
            llamafactory.run_exp(arguments(configuration, Path(folder)), callbacks=[observer])
        finally:
            observer.report(result)


def _import() -> Any:
    """`llamafactory.train.tuner`, which leaves the process group to us."""
    os.environ.update(DISABLE_VERSION_CHECK="1", HF_DATASETS_CACHE=tempfile.mkdtemp(prefix="trainfix-datasets-"))
    distributed: Any = importlib.import_module("torch.distributed")
    distributed.destroy_process_group = lambda *_, **__: None  # run_exp ends with it; the next run goes on
    return importlib.import_module("llamafactory.train.tuner")


def make_checkpoint(configuration: Configuration, folder: Path) -> None:
    """A random model in float32, the same every time, with its tokenizer and, for "llava", its processor."""
    import torch
    import transformers

    sizes: dict[str, Any] = {
        "vocab_size": VOCABULARY,
        "pad_token_id": SPECIAL["<pad>"],
        "eos_token_id": SPECIAL["<end>"],
        "hidden_size": 16,
        "intermediate_size": 32,
        "num_hidden_layers": 1,
        "num_attention_heads": 2,
        "num_key_value_heads": 1,
        "max_position_embeddings": 256,
        **configuration.model,
    }
    torch.manual_seed(0)
    language = transformers.LlamaConfig(**sizes)
    _tokenizer().save_pretrained(folder)
    if configuration.checkpoint == "text":
        transformers.LlamaForCausalLM(language).save_pretrained(folder)
        return
    vision = transformers.CLIPVisionConfig(
        hidden_size=16, intermediate_size=32, num_hidden_layers=2, num_attention_heads=2, image_size=8, patch_size=4
    )
    config = transformers.LlavaConfig(vision_config=vision, text_config=language, image_token_index=SPECIAL["<image>"])
    config.pad_token_id = SPECIAL["<pad>"]
    transformers.LlavaForConditionalGeneration(config).save_pretrained(folder)
    size = {"crop_size": {"height": 8, "width": 8}, "size": {"shortest_edge": 8}}
    pictures = _picture_processor(transformers)(**size)
    more = {"patch_size": 4, "vision_feature_select_strategy": "default", "num_additional_image_tokens": 1}
    transformers.LlavaProcessor(pictures, _tokenizer(), **more).save_pretrained(folder)


def _picture_processor(transformers: Any) -> Any:
    """Llava's, on Pillow; since 5.0 the plain name stands for the one on torchvision."""
    return getattr(transformers, "CLIPImageProcessorPil", transformers.CLIPImageProcessor)


def _tokenizer() -> Any:
    """One token per word."""
    from tokenizers import AddedToken, Tokenizer, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    words = {f"w{number}": number for number in range(len(SPECIAL), VOCABULARY)}
    plain = Tokenizer(models.WordLevel({**SPECIAL, **words}, unk_token="<unk>"))
    plain.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    plain.add_special_tokens([AddedToken(token, special=True) for token in SPECIAL])
    return PreTrainedTokenizerFast(
        tokenizer_object=plain, unk_token="<unk>", eos_token="<end>", pad_token="<pad>", padding_side="right"
    )


def make_data(configuration: Configuration, folder: Path) -> None:
    """Rows of a prompt and an answer, whose k-th has ``lengths[k % ...]`` words."""
    tokens: Any = importlib.import_module("untouched.proofs.token_experiment")
    lengths: Sequence[int] = configuration.lengths or tokens.LENGTHS
    draw = random.Random(0)
    words = [f"w{number}" for number in range(len(SPECIAL), VOCABULARY)]
    rows: list[dict[str, Any]] = []
    for k in range(configuration.rows):
        prompt, answer = (" ".join(draw.choices(words, k=count)) for count in (4, lengths[k % len(lengths)]))
        rows.append({"instruction": f"{prompt} ", "input": "", "output": answer})
    if configuration.images:
        _draw_pictures(rows, folder)
    columns = {"prompt": "instruction", "query": "input", "response": "output"}
    if configuration.images:
        columns["images"] = "images"
    if configuration.stage == "pt":
        rows = [{"text": f"{row['instruction']}{row['output']}"} for row in rows]
        columns = {"prompt": "text"}
    (folder / "tiny.json").write_text(json.dumps(rows))
    info = {"tiny": {"file_name": "tiny.json", "columns": columns}}
    (folder / "dataset_info.json").write_text(json.dumps(info))


def _draw_pictures(rows: Sequence[dict[str, Any]], folder: Path) -> None:
    from PIL import Image

    for k, row in enumerate(rows):
        path = folder / f"{k}.png"
        Image.new("RGB", (64, 64), (20 * k % 256, 90, 7 * k % 256)).save(path)
        row.update(images=[str(path)], instruction=f"<image> {row['instruction']}")


def arguments(configuration: Configuration, folder: Path) -> dict[str, Any]:
    """What stands in the YAML."""
    wanted: dict[str, Any] = {
        "model_name_or_path": str(folder),
        "stage": configuration.stage,
        "do_train": True,
        "finetuning_type": "full",
        "dataset": "tiny",
        "dataset_dir": str(folder),
        "template": configuration.template,
        "cutoff_len": 256,
        "output_dir": str(folder / "out"),
        "overwrite_output_dir": True,
        "per_device_train_batch_size": configuration.rows_per_batch,
        "gradient_accumulation_steps": configuration.steps,
        "num_train_epochs": configuration.epochs,
        "max_steps": configuration.max_steps,
        "learning_rate": 1e-3,
        "lr_scheduler_type": "constant",
        "max_grad_norm": 0.0,
        "logging_steps": 1,
        "save_strategy": "no",
        "report_to": "none",
        "use_cpu": True,
        "bf16": False,
        "disable_tqdm": True,
        "disable_gradient_checkpointing": True,  # a copy of the model is asked for gradients one by one
        **({"disable_shuffling": not configuration.shuffle} if _can_be_in_order() else {}),
        **({"packing": False} if configuration.stage == "pt" else {}),
        **({"ddp_backend": "gloo"} if "RANK" in os.environ and configuration.deepspeed is None else {}),
        **configuration.arguments,
    }
    if configuration.deepspeed is not None:
        path = folder / "deepspeed.json"
        path.write_text(json.dumps(trainer_runs.deepspeed_config(configuration.deepspeed)))
        wanted["deepspeed"] = str(path)
    return wanted


def _can_be_in_order() -> bool:
    """Since 0.9.2."""
    known: Any = importlib.import_module("llamafactory.hparams").FinetuningArguments
    return "disable_shuffling" in {one.name for one in dataclasses.fields(known)}


def _observer(configuration: Configuration) -> Any:
    """A callback, as any user may hand one to `run_exp`, that watches the training from its beginning on."""
    import transformers

    tokens: Any = importlib.import_module("untouched.proofs.token_experiment")

    class Observer(transformers.TrainerCallback):  # type: ignore[misc]
        trainer: Any = None
        watch: Any = None

        def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
            trainer = next(
                one for one in gc.get_objects() if isinstance(one, transformers.Trainer) and one.state is state
            )
            self.trainer, model = trainer, kwargs["model"]
            self.watch = _watch(tokens, trainer, model)
            trainer.training_step = _learning(trainer.training_step, self.watch)
            optimizer = trainer.deepspeed.optimizer if trainer.deepspeed is not None else trainer.optimizer
            while hasattr(optimizer, "optimizer"):
                optimizer = optimizer.optimizer
            trainer_runs.judge_steps(optimizer, self.watch, lambda: trainer)
            if configuration.prepare is not None:
                trainer_runs.named(configuration.prepare)(trainer, configuration)

        def report(self, result: Result) -> None:
            if self.trainer is None:
                return
            trainer, watch = self.trainer, self.watch
            result["trainer"] = f"{type(trainer).__module__}:{type(trainer).__qualname__}"
            result["accepts_loss_kwargs"] = getattr(trainer, "model_accepts_loss_kwargs", None)
            result["windows"], result["left_over"] = watch.windows, len(watch.seen)
            result["logs"] = [{key: one[key] for key in ("loss", "grad_norm", "train_loss") if key in one}
                              for one in trainer.state.log_history]  # fmt: skip
            del trainer.training_step
            if configuration.deepspeed is not None:
                trainer.accelerator.free_memory()
            self.trainer = self.watch = None

    return Observer()


def _learning(step: Callable[..., Any], watch: Any) -> Callable[..., Any]:
    """`training_step` that first lets `watch` learn the micro-batch as it is, padded."""

    def learning(model: Any, inputs: Mapping[str, Any], *args: Any, **named: Any) -> Any:
        watch.learn_batch(inputs)
        return step(model, inputs, *args, **named)

    return learning


def _watch(tokens: Any, trainer: Any, model: Any) -> Any:
    """The Watch for the loss that this run is to have."""
    import torch

    wanted = trainer.finetuning_args
    against_first = getattr(wanted, "use_asft_loss", False)
    by_likelihood = against_first or getattr(wanted, "use_dft_loss", False)

    def weighted_by_likelihood(logits: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
        losses: torch.Tensor = tokens.cross_entropy(logits, labels)
        return losses * torch.exp(-losses).detach()

    class Watch(tokens.Watch):  # type: ignore[misc, name-defined]
        """It learns its rows as they come. With ASFT, how far the model has moved away is part of a token's loss."""

        def __init__(self) -> None:
            super().__init__(model, losses=weighted_by_likelihood if by_likelihood else tokens.cross_entropy)
            self.pictures: dict[tuple[int, ...], Any] = {}
            self.first = copy.deepcopy(self.twin)
            self.twin.register_forward_pre_hook(self._with_pictures, with_kwargs=True)

        def learn_batch(self, inputs: Mapping[str, Any]) -> None:
            rows = inputs["input_ids"].tolist()
            pairs = zip(rows, inputs["labels"].tolist(), strict=True)
            self.learn({"input_ids": ids, "labels": labels} for ids, labels in pairs)
            if "pixel_values" in inputs and len(rows) == 1:
                self.pictures[tuple(rows[0])] = inputs["pixel_values"].double()

        def _with_pictures(self, twin: Any, args: Any, named: dict[str, Any]) -> Any:
            known = self.pictures.get(tuple(named["input_ids"][0].tolist()))
            return args, named if known is None else {**named, "pixel_values": known}

        def judge(self, *args: Any, **named: Any) -> Any:
            for labels, pictures in tokens._from_all_ranks([(self.labels, self.pictures)]):
                self.labels.update(labels)
                self.pictures.update(pictures)
            return super().judge(*args, **named)

        def _sum(self, ids: tuple[int, ...]) -> Any:
            loss = super()._sum(ids)
            if not against_first:
                return loss
            kept = torch.tensor(self.labels[ids][1:]) != tokens.IGNORED
            own, first = (one(input_ids=torch.tensor([ids])).logits[0, :-1][kept] for one in (self.twin, self.first))
            away = torch.nn.functional.kl_div(own.log_softmax(-1), first.detach().softmax(-1), reduction="sum")
            return loss + wanted.asft_alpha * away

    return Watch()


if __name__ == "__main__":
    trainer_runs.main(perform)
