"""The curve of docs/perturb.md: `python docs/curves.py` draws what `attnctrl eval guidance --variants` measured.

One panel for each model that was measured so: binding and Frechet distance over the scale of the perturbed branch, from
none (0) to too much, with the model's own guidance as a line across. Drawn with Pillow from benchmarks/results/.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from diagrams import GREY, INK, KINDS, canvas, write
from PIL import Image, ImageDraw

ROOT = Path(__file__).parent.parent
OUT = Path(__file__).parent / "guidance-curve.png"
MODELS = ("toy-sd", "toy-sd3", "toy-flux")
PANEL, GAP, TOP = (230, 170), 60, 70
METRICS = {"binding": KINDS["A"], "frechet": KINDS["B"]}


def points(metrics: dict[str, Any], name: str) -> list[tuple[float, float]]:
    """(scale, value) of a metric: without a branch, and for each scale that was measured."""
    scales = {key.split(".")[0] for key in metrics if key.startswith("scale_")}
    found = [(0.0, metrics[name]["vanilla"])]
    found += [(float(one[6:].replace("_", ".")), metrics[f"{one}.{name}"]["controlled"]) for one in scales]
    return sorted(found)


def panel(draw: ImageDraw.ImageDraw, left: float, model: str, metrics: dict[str, Any], name: str, top: float) -> None:
    """One metric of one model; steps of the scale stand at equal distances."""
    curve, own = points(metrics, name), metrics[f"cfg.{name}"]["controlled"]
    most = max([value for _, value in curve] + [own, 1.0 if name == "binding" else 0.0])
    width, height = PANEL

    def at(number: float, value: float) -> tuple[float, float]:
        return left + width * number / (len(curve) - 1), top + height * (1 - value / most)

    draw.rectangle((left, top, left + width, top + height), outline=GREY)
    draw.line([at(0, own), at(len(curve) - 1, own)], fill=GREY, width=2)
    line = [at(number, value) for number, (_, value) in enumerate(curve)]
    draw.line(line, fill=METRICS[name], width=3)
    for (x, y), (scale, value) in zip(line, curve, strict=True):
        draw.ellipse((x - 4, y - 4, x + 4, y + 4), fill=METRICS[name], outline=INK)
        write(draw, (x - 8, y - 20 if y > top + 24 else y + 6), f"{value:.2f}", 11)
        write(draw, (x - 6, top + height + 4), f"{scale:g}", 11)
    write(draw, (left, top - 20), f"{model}: {name}")


def curve(models: Sequence[str] = MODELS) -> Image.Image:
    """The whole picture."""
    width = GAP + len(models) * (PANEL[0] + GAP)
    image, draw = canvas(
        width, TOP + 2 * (PANEL[1] + GAP) + 10, "A perturbed branch, by its scale; grey: the model's own guidance"
    )
    for number, model in enumerate(models):
        stored = json.loads((ROOT / "benchmarks" / "results" / f"guidance-{model}.json").read_text(encoding="utf-8"))
        for row, name in enumerate(METRICS):
            panel(draw, GAP + number * (PANEL[0] + GAP), model, stored["metrics"], name, TOP + row * (PANEL[1] + GAP))
    return image


if __name__ == "__main__":
    curve().save(OUT)
