"""transformers 4.46 to 4.54: each token of a window counts the same, on every rank, in every window, for every backend.

From 4.46 on (#34191, #34198) Trainer reads a window's micro-batches before the first backward, in `get_batch_samples`,
counts their tokens, and lets the model divide its sum by that count. What went wrong around it, and what repaired it:

- TF-0402: the count is the rank's own, and the ranks' means are averaged (#34373 added `average_tokens_across_devices`
  in 4.46.2, off; #39395 turned it on in 4.54.0). Here: the count over all ranks, divided by the number of ranks.
- TF-0403: 4.46.2 to 4.48.3 under DeepSpeed: the engine divides by the steps what is right already. #35808 (4.49.0) and
  we ask it not to.
- TF-0407: 4.47.0 (#34915) and 4.48.0 (#35438) do not hand the count on to the model. We put it
  into the micro-batch, whose keys are the arguments of the model.
- TF-0408: to 4.47.1, a model that takes no count: nobody divides by the steps. TF-0406: later, the configured steps
  divide also a shorter window (to 4.54.1). We weigh such a micro-batch's mean with its tokens.
- TF-0409: to 4.51.3 the length of an epoch's last window is computed from the number of rows and not of micro-batches:
  it may be read too short, and never ends in a step (#37923, 4.52.1). We always read all there is.
- TF-0410: 4.46: optimizer steps do not know of epochs, the count and the reduction over ranks do. We let windows go on
  across epochs, as the steps do: what an epoch leaves over waits for the next one.
- TF-0411: 4.46.2 asks DDP not to reduce the window's last micro-batch, where it means all the others: what that one
  adds stays the rank's own (4.46.3 turned the condition round). We let DDP reduce the last one, too.

A decision holds for a whole window: it is made where the window is read.

Delete this folder when no supported framework allows transformers older than 4.55.
"""

from __future__ import annotations

from trainfix.engine.contract import Fix, Guard, Target
from trainfix.fixes.transformers.windows.division import DIVIDES, TRAINER
from trainfix.fixes.transformers.windows.reached import REACHED, own, repairs
from trainfix.fixes.transformers.windows.repair import build
from trainfix.fixes.transformers.windows.state import in_window


def _target(name: str, *shapes: str) -> Target:
    return Target(TRAINER + name, frozenset(shapes))


# The comments are the first releases that have each shape.
FIX = Fix(
    name="transformers.windows",
    package="transformers",
    advisories=tuple(REACHED),
    requires={"transformers": ">=4.46.0,<4.55"},
    targets=(
        _target(
            "get_batch_samples",
            "10f044afdaec",  # 4.46.1
            "7bf9428ee7d5",  # 4.46.2
            "e6dab75dfcb1",  # 4.47.1
            "220e4786b6fe",  # 4.48.0
            "7d2d4440cd8c",  # 4.48.1
            "f3b4f02fe4fa",  # 4.50.0
            "48854b6d0656",  # 4.51.0
            "cae9e7fbe7ea",  # 4.53.0
        ),
        _target("training_step", *DIVIDES),
    ),
    relies_on=(
        _target(
            "compute_loss",
            "fbca8c85c759",  # 4.46.1
            "b65365e4f75c",  # 4.46.2
            "80fd3bfe1297",  # 4.49.0
            "c3bd3b186680",  # 4.53.0
            "babd934e9607",  # 4.54.0
        ),
        _target(
            "_inner_training_loop",
            "de44d4ab4466",  # 4.46.1
            "2ccfb878d2e3",  # 4.46.2
            "3d891afecc80",  # 4.46.3
            "34c42fe8324d",  # 4.47.0
            "bc61e1e66eb7",  # 4.47.1
            "8b3df53bec8a",  # 4.49.0
            "727783622bc2",  # 4.50.0
            "bf786ec5b5b2",  # 4.51.0
            "bf92e1c2f8cd",  # 4.52.1
            "75dfc041c554",  # 4.53.0
            "c423785745f2",  # 4.53.1
            "a402b4b5b1fb",  # 4.54.0
        ),
        Target("accelerate.accelerator:Accelerator.backward", frozenset({"cc7950cf28b9", "fa989e4da879"})),
    ),
    guards=(Guard(TRAINER + "__init__", REACHED),),
    build=build,
    repairs=repairs,
    group=lambda trainer: None,
    in_window=in_window,
    own=own,
    limits="apex, SageMaker, DataParallel and tensor, context or sequence parallel runs are left as they are",
)
