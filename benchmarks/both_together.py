"""The loss and the optimizer, wrong together and repaired one by one: `make both`.

Each stack trains a tiny model on answers of very different lengths through its framework's own trainer, with
DeepSpeed's ZeRO-2 and CPU offload, in four states: nothing repaired, the loss only, the optimizer only, both. What the
optimizer consumed in the first window is compared with the exact token-weighted gradient. The rows go to stdout and to
docs/both-together.json, the chart to docs/both-together.png.
"""

from __future__ import annotations

import json
import platform
import sys
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from datetime import date
from importlib.metadata import version
from pathlib import Path
from typing import Any

from tests.support import llamafactory_runs, openrlhf_runs, trl_runs
from trainfix.advisories import load_all

ROOT = Path(__file__).resolve().parents[1]
TABLE = ROOT / "docs" / "both-together.json"
PICTURE = TABLE.with_suffix(".png")

Row = dict[str, Any]

# A tiny Llava with its processor: with these pins a text model's loss is exact already.
MULTIMODAL: Mapping[str, Any] = {
    "steps": 8,
    "rows": 16,
    "checkpoint": "llava",
    "template": "llava",
    "deepspeed": {"stage": 2, "offload": True},
}


@dataclass(frozen=True)
class Stack:
    """One framework with one DeepSpeed: its folders, what runs it, and the run's configuration."""

    name: str
    folders: Sequence[Path]
    run: Callable[..., list[Row]]
    configuration: Mapping[str, Any]


def stacks() -> list[Stack]:
    """Pairs that the frameworks' own pins allow. TRL 0.24's loss is exact; there the optimizer alone is wrong."""
    return [
        Stack(
            "OpenRLHF 0.9.10, DeepSpeed 0.18.9",
            openrlhf_runs.stack("0.9.10", deepspeed="0.18.9"),
            openrlhf_runs.run,
            openrlhf_runs.BOTH,
        ),
        Stack(
            "LLaMA-Factory 0.9.4, DeepSpeed 0.16.9",
            llamafactory_runs.stack("0.9.4", deepspeed="0.16.9"),
            llamafactory_runs.run,
            MULTIMODAL,
        ),
        Stack(
            "LLaMA-Factory 0.9.5, DeepSpeed 0.18.4",
            llamafactory_runs.stack("0.9.5", deepspeed="0.18.4"),
            llamafactory_runs.run,
            MULTIMODAL,
        ),
        Stack(
            "TRL 0.11.4, DeepSpeed 0.16.9",
            trl_runs.stack(trl="0.11.4", transformers="4.45.2", deepspeed="0.16.9"),
            trl_runs.run,
            trl_runs.BOTH,
        ),
        Stack(
            "TRL 0.24.0, DeepSpeed 0.18.9",
            trl_runs.stack(trl="0.24.0", transformers="4.57.6", deepspeed="0.18.9"),
            trl_runs.run,
            trl_runs.BOTH,
        ),
    ]


def states() -> dict[str, str | None]:
    """What is repaired -> TRAINFIX_DISABLE; None is a run without trainfix."""
    repaired = [one for one in load_all() if one.fix is not None]
    optimizer = ",".join(one.id for one in repaired if one.package == "deepspeed")
    loss = ",".join(one.id for one in repaired if one.package != "deepspeed")
    return {"nothing": None, "loss only": optimizer, "optimizer only": loss, "both": ""}


def measure(stack: Stack) -> list[Row]:
    """The four rows of one stack."""
    rows = []
    for state, disabled in states().items():
        env = {"TRAINFIX_DISABLE": disabled or ""}
        (result,) = stack.run(stack.folders, [stack.configuration], trainfix=disabled is not None, env=env)
        if result["error"] is not None:
            raise SystemExit(f"{stack.name}, {state} repaired: {result['error']}")
        window = result["windows"][0]
        rows.append({
            "stack": stack.name,
            "repaired": state,
            **{key: window[key] for key in ("relative_error", "cosine", "norm_ratio", "tokens", "coefficients")},
        })  # fmt: skip
    return rows


def line(row: Row) -> str:
    """One row for people."""
    numbers = f"{row['relative_error']:14.2g} {row['cosine']:7.3f} {row['norm_ratio']:11.3f}"
    coefficients = " ".join(f"{value:6.2f}" for value in row["coefficients"])
    return f"  {row['repaired']:<15}{numbers}   {coefficients}"


def draw(rows: Sequence[Row]) -> None:
    """A row of four charts per stack: the coefficient of every micro-batch, 1 is right."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    names = list(dict.fromkeys(row["stack"] for row in rows))
    labels = list(states())
    size = (11, 2.1 * len(names) + 0.4)
    figure, grid = plt.subplots(len(names), len(labels), figsize=size, squeeze=False, layout="constrained")
    for axes, row in zip((one for line in grid for one in line), rows, strict=True):
        places = range(len(row["tokens"]))
        axes.bar(places, row["coefficients"], color="#4c72b0" if row["relative_error"] < 1e-3 else "#c44e52")
        axes.axhline(1, color="black", linewidth=0.8, linestyle="dashed")
        axes.set_xticks(places, row["tokens"], fontsize=7)
        axes.set_title(f"{row['repaired']}: error {row['relative_error']:.2g}", fontsize=9)
        axes.spines[["top", "right"]].set_visible(False)
        axes.set_yscale("symlog", linthresh=1)
        axes.set_ylim(0, 20)
        axes.set_yticks([0, 0.5, 1, 10], ["0", "0.5", "1", "10"], fontsize=7)
    for line_of_axes, name in zip(grid, names, strict=True):
        line_of_axes[0].set_ylabel(name.replace(", ", "\n"), fontsize=8)
    for axes in grid[-1]:
        axes.set_xlabel("trained tokens of each micro-batch", fontsize=8)
    figure.suptitle("Weight of each micro-batch in the gradient that the optimizer consumed: 1 is right", fontsize=11)
    figure.savefig(PICTURE, dpi=120)


def main() -> int:
    rows: list[Row] = []
    for stack in stacks():
        print(f"{stack.name}\n  repaired       relative error  cosine  norm ratio   coefficients", flush=True)
        for row in measure(stack):
            rows.append(row)
            print(line(row), flush=True)
    about = {"date": date.today().isoformat(), "python": platform.python_version(), "torch": version("torch")}
    TABLE.write_text(json.dumps({**about, "rows": rows}, indent=1) + "\n", encoding="utf-8")
    draw(rows)
    print(f"saved: {TABLE.relative_to(ROOT)}, {PICTURE.relative_to(ROOT)}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
