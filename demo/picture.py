"""Draws the micro-batch coefficients before and after the fix: `python demo/picture.py REPORT.json PICTURE.png`.

REPORT.json is what `trainfix prove --format json` writes; the first proof in it is drawn.
"""

from __future__ import annotations

import json
import sys
from pathlib import Path

SIDES = (("before", "without trainfix", "#c44e52"), ("after", "with trainfix", "#4c72b0"))
BAR = 0.38


def draw(report: Path, picture: Path) -> None:
    """One pair of bars per micro-batch; 1 is right, 0 is dropped."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    proof = json.loads(report.read_text(encoding="utf-8"))["proofs"][0]
    figure, axes = plt.subplots(figsize=(8, 3.6), layout="constrained")
    for position, (side, label, colour) in enumerate(SIDES):
        coefficients = proof[side]["coefficients"]
        places = [number + (position - 0.5) * BAR for number in range(1, len(coefficients) + 1)]
        error = proof[side]["relative_error"]
        bars = axes.bar(places, coefficients, BAR, color=colour, label=f"{label} (relative error {error:.2g})")
        axes.bar_label(bars, [f"{round(value, 3) + 0:g}" for value in coefficients], padding=2, fontsize=8)
    axes.axhline(1, color="black", linewidth=0.8, linestyle="dashed")
    axes.set_xticks(range(1, len(coefficients) + 1))
    axes.set_xlabel("micro-batch of the window")
    axes.set_ylabel("coefficient in the gradient\nthat the optimizer received")
    axes.set_ylim(min(0, *proof["before"]["coefficients"]) - 0.02, max(1, *proof["before"]["coefficients"]) + 0.2)
    axes.set_title(f"{proof['id']} on {proof['package']} {proof['installed']}: 1 is right, 0 is dropped", fontsize=11)
    axes.spines[["top", "right"]].set_visible(False)
    figure.legend(loc="outside lower center", ncols=2, frameon=False)
    picture.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(picture, dpi=120)


if __name__ == "__main__":
    draw(Path(sys.argv[1]), Path(sys.argv[2]))
