"""What a test changes before `run_exp`, or when the training has begun: called in the child."""

from __future__ import annotations

import importlib
import inspect
import types
from typing import Any


def revert_and_apply(trainer: Any, configuration: Any) -> None:
    """`trainfix.revert` in the middle of the second window, `trainfix.apply` in the middle of the third.

    What is applied on a training under way is there for the window after the next: nothing of it comes by before.
    """
    from transformers import TrainerCallback

    import trainfix

    class Change(TrainerCallback):  # type: ignore[misc]
        done = 0

        def on_substep_end(self, args: Any, state: Any, control: Any, **_: Any) -> None:
            if state.global_step == 1 and self.done == 0:
                trainfix.revert("TF-0201", "TF-0202")
                self.done = 1
            if state.global_step == 2 and self.done == 1:
                trainfix.apply("TF-0201", "TF-0202")
                self.done = 2

    trainer.add_callback(Change())


def own_loss() -> None:
    """A trainer of the user's own, whose loss is that of LLaMA-Factory's, halved."""
    workflow: Any = importlib.import_module("llamafactory.train.sft.workflow")
    base: Any = importlib.import_module("llamafactory.train.sft.trainer").CustomSeq2SeqTrainer

    class Halved(base):  # type: ignore[misc]
        def compute_loss(self, *args: Any, **named: Any) -> Any:
            return super().compute_loss(*args, **named) / 2

    workflow.CustomSeq2SeqTrainer = Halved


def give_back() -> None:
    workflow: Any = importlib.import_module("llamafactory.train.sft.workflow")
    workflow.CustomSeq2SeqTrainer = importlib.import_module("llamafactory.train.sft.trainer").CustomSeq2SeqTrainer


def unknown_forward() -> None:
    """A model that computes its loss in a way that nobody can tell from its source."""
    llava: Any = importlib.import_module("transformers.models.llava.modeling_llava").LlavaForConditionalGeneration
    forward = llava.forward
    namespace: dict[str, Any] = {"forward": forward}
    exec("def handed_on(self, *args, **named):\n    return forward(self, *args, **named)", namespace)
    llava.forward = namespace["handed_on"]


def is_untouched(trainer: Any, configuration: Any) -> None:
    """Nothing of LLaMA-Factory's trainers, nor of this one, has been replaced or wrapped."""
    sft: Any = importlib.import_module("llamafactory.train.sft.trainer").CustomSeq2SeqTrainer
    pt: Any = importlib.import_module("llamafactory.train.pt.trainer").CustomTrainer
    for cls in (sft, pt):
        for name, function in vars(cls).items():
            if inspect.isfunction(function):
                assert type(function) is types.FunctionType, name
                assert function.__code__.co_filename == inspect.getsourcefile(cls), name
                assert not hasattr(function, "__wrapped__"), name
    assert not {"get_batch_samples", "compute_loss"} & set(vars(trainer))
