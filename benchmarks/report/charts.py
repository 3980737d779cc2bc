"""The pictures. The title of each says whether its numbers are counted, measured (and on what) or computed."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from benchmarks import counters
from benchmarks.report import model
from benchmarks.report.results import Result

UP, DOWN, OTHER = "#dd8452", "#4c72b0", "#55a868"


class Chart(NamedTuple):
    """A saved picture. basis: `counted`, `measured on ...` or `computed, not measured`."""

    file: Path
    title: str
    basis: str


def draw_all(results: Sequence[Result], folder: Path) -> list[Chart]:
    """What the results have numbers for, and the model."""
    drawn = list[Chart]()
    for result in results:
        if result.kind == "counted":
            drawn.append(_draw(folder, "bytes", "Bytes per element and optimizer step", "counted", _bytes, result))
        elif result.file.stem == "host_accumulate":
            title = "Adding a bf16 gradient on the host: time / time of the base"
            drawn.append(_draw(folder, "host-accumulate", title, _measured(result), _host_accumulate, result))
        elif result.kind == "measured" and result.steps:
            drawn.extend(_of_gpu(result, folder))
    drawn.append(
        _draw(folder, "model", "Seconds on the link per optimizer step", "computed, not measured", _model, None)
    )
    return drawn


def _of_gpu(result: Result, folder: Path) -> list[Chart]:
    known: dict[str, tuple[str, Callable[[Any, Result], None], str]] = {
        "links": ("The link, by size of a copy", _links, "speeds"),
        "path": ("The copy path alone: ms per micro-batch", _path, ""),
        "end_to_end": ("Tokens per second / the broken release's", _speed, ""),
        "interference": ("A matrix product's time while gradients are carried / alone", _slowdown, ""),
    }
    title, paint, step = known.get(result.file.stem, ("", None, ""))
    if paint is None or (step and not result.rows(step)):
        return []
    name = f"{result.file.parent.name}-{result.file.stem}"
    return [_draw(folder, name, title, _measured(result), paint, result)]


def _measured(result: Result) -> str:
    return f"measured on {result.hardware}"


def _draw(
    folder: Path, name: str, title: str, basis: str, paint: Callable[[Any, Any], None], result: Result | None
) -> Chart:
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    figure, axes = plt.subplots(figsize=(9, 4.2), layout="constrained")
    paint(axes, result)
    axes.spines[["top", "right"]].set_visible(False)
    axes.set_title(f"{title}\n{basis}", fontsize=10)
    file = folder / f"{name}.png"
    figure.savefig(file, dpi=110)
    plt.close(figure)
    return Chart(file, title, basis)


def _bytes(axes: Any, result: Result) -> None:
    rows = result.content["rows"]
    labels = [f"{row['variant']}, GA {row['accumulation']}" for row in rows]
    up = [counters.per_element(row, "host_to_device_bytes") for row in rows]
    down = [counters.per_element(row, "device_to_host_bytes") for row in rows]
    axes.barh(labels, up, color=UP, label="to the device")
    axes.barh(labels, down, left=up, color=DOWN, label="to the host")
    axes.invert_yaxis()
    axes.tick_params(axis="y", labelsize=7)
    axes.legend(frameon=False)


def _host_accumulate(axes: Any, result: Result) -> None:
    sizes = result.content["sizes"]
    names = list(dict.fromkeys(name for size in sizes for name in size["ways"]))
    height = 0.8 / len(sizes)
    for number, size in enumerate(sizes):
        places = [names.index(name) + number * height for name in size["ways"]]
        axes.barh(
            places, [way["ratio"] for way in size["ways"].values()], height, label=f"{size['elements']:,} elements"
        )
    axes.set_yticks([place + 0.4 - height / 2 for place in range(len(names))], names, fontsize=7)
    axes.invert_yaxis()
    axes.axvline(1, color="black", linewidth=0.8, linestyle="dashed")
    axes.legend(frameon=False, fontsize=8)


def _links(axes: Any, result: Result) -> None:
    rows = result.rows("speeds")
    for key, label, color in (
        ("to_device_gb_s", "to the device", UP),
        ("to_host_gb_s", "to the host", DOWN),
        ("both_each_gb_s", "both at once, each", OTHER),
    ):
        axes.plot([row["bytes"] for row in rows], [row[key] for row in rows], marker="o", label=label, color=color)
    axes.set_xscale("log", base=2)
    axes.set_xlabel("bytes")
    axes.set_ylabel("GB/s")
    axes.legend(frameon=False)


def _path(axes: Any, result: Result) -> None:
    rows = [row for row in result.rows() if "micro_batch_ms" in row]
    axes.barh([f"{row['model']}: {row['way']}" for row in rows], [row["micro_batch_ms"] for row in rows], color=DOWN)
    axes.invert_yaxis()
    axes.tick_params(axis="y", labelsize=7)


def _speed(axes: Any, result: Result) -> None:
    rows = [row for row in result.rows() if "speed_over_broken" in row]
    ratios = [row["speed_over_broken"] for row in rows]
    middle = [one["median"] for one in ratios]
    errors = [[one["median"] - one["low"] for one in ratios], [one["high"] - one["median"] for one in ratios]]
    labels = [f"{row['model']} GA {row['accumulation']}: {row['variant']}" for row in rows]
    axes.errorbar(middle, labels, xerr=errors, fmt="o", color=DOWN, capsize=3)
    axes.axvline(1, color="black", linewidth=0.8, linestyle="dashed")
    axes.invert_yaxis()
    axes.tick_params(axis="y", labelsize=7)


def _slowdown(axes: Any, result: Result) -> None:
    rows = result.rows()
    axes.barh([row["way"] for row in rows], [row["slowdown"]["median"] for row in rows], color=DOWN)
    axes.axvline(1, color="black", linewidth=0.8, linestyle="dashed")
    axes.invert_yaxis()
    axes.tick_params(axis="y", labelsize=7)


def _model(axes: Any, _: None) -> None:
    rate = model.LINKS["PCIe 5 x16"]
    for name, design in model.DESIGNS.items():
        times = [model.seconds(design, steps, rate) for steps in model.ACCUMULATIONS]
        axes.plot(model.ACCUMULATIONS, times, marker="o", label=name)
    axes.set_xscale("log", base=2)
    axes.set_yscale("log")
    axes.set_xticks(model.ACCUMULATIONS, [str(steps) for steps in model.ACCUMULATIONS])
    axes.set_xlabel(f"accumulation steps; {rate:g} GB/s each way")
    axes.legend(frameon=False, fontsize=8)
