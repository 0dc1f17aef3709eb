"""`attnctrl eval layout`: two subjects in two boxes, the plain prompt against boxes, on the same seeds."""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np

import attnctrl
from attnctrl.metrics import background_similarity, fill_ratio, inclusion_ratio, metric, result, seam
from attnctrl.metrics.stats import Better
from attnctrl.region import Region, membership

from . import world
from .scorer import Expected, Reading, agrees, match, read_picture
from .scorer_color import COLOR_NAMES
from .suites_run import Counter, Progress, Runner

Box = tuple[float, float, float, float]

CONTROL: dict[str, dict[str, Any]] = {"isolate": {"window": (0.0, 0.5), "background": "shared"}, "regions": {}}
"""What acts in the suite: fields of each control. Isolation ends half-way, so that seams can heal."""
VARIANTS: dict[str, dict[str, dict[str, Any]]] = {
    "regions_only": {"regions": {}},
    "parted_always": {"isolate": {"background": "isolated"}, "regions": {}},
}
"""What else can be measured: without isolation, and with regions and background parted from start to end."""
BOX = 0.42
_SLACK = 0.04
"""How far a box may lie from the middle of its half of the canvas."""
HELD_OUT = 77_100_019
BETTER: dict[str, Better] = {
    "inclusion_ratio": "higher",
    "binding": "higher",
    "presence": "higher",
    "placement": "higher",
    "fill_ratio": "higher",
    "background_similarity": "higher",
    "seam": "lower",
}


@dataclass(frozen=True)
class Task:
    """Two told subjects, (shape, colour) each, their boxes, and the prompt that names them and their places."""

    subjects: tuple[tuple[str, str], ...]
    boxes: tuple[Box, ...]
    background: str
    seed: int

    @property
    def phrases(self) -> list[str]:
        """The subjects in words, as the world's captions tell them: "a red circle top left"."""
        pairs = zip(self.subjects, self.boxes, strict=True)
        return [f"a {color} {shape} {_place(box)}" for (shape, color), box in pairs]

    @property
    def prompt(self) -> str:
        return ", ".join([*self.phrases, f"{self.background} background"])

    @property
    def regions(self) -> list[Region]:
        # a region reads nothing but its own text, so the text names the ground as well
        texts = [f"{phrase}, {self.background} background" for phrase in self.phrases]
        return [Region(text, box=box) for text, box in zip(texts, self.boxes, strict=True)]


def sample_task(index: int) -> Task:
    """Task `index`: different shapes and colours, boxes side by side, one above the other, or at opposite corners."""
    rng = np.random.default_rng([HELD_OUT, index])
    shapes = rng.choice(world.SHAPES, 2, replace=False)
    colors = rng.choice(list(world.COLORS), 2, replace=False)
    a, b = ((0.25, 0.5), (0.75, 0.5)), ((0.5, 0.25), (0.5, 0.75))
    arrangements = (a, b, ((0.25, 0.25), (0.75, 0.75)), ((0.75, 0.25), (0.25, 0.75)))
    centers = arrangements[int(rng.integers(len(arrangements)))]
    order = rng.permutation(2)
    boxes = tuple(_box(*centers[i], rng) for i in order)
    background = str(rng.choice(list(world.BACKGROUNDS)))
    subjects = tuple((str(s), str(c)) for s, c in zip(shapes, colors, strict=True))
    return Task(subjects, boxes, background, HELD_OUT + index)


def _place(box: Box) -> str:
    x, y = (box[0] + box[2]) / 2, (box[1] + box[3]) / 2
    return world.WorldSubject("circle", "red", "solid", x, y, BOX / 2).place_word


def _box(x: float, y: float, rng: np.random.Generator) -> Box:
    dx, dy = rng.uniform(-_SLACK, _SLACK, 2)
    half = BOX / 2
    # 0.25 - 0.21 - 0.04 = 0: the box stays on the canvas, up to rounding.
    x0, y0 = (float(np.clip(v - half, 0, 1 - BOX)) for v in (x + dx, y + dy))
    return (x0, y0, x0 + BOX, y0 + BOX)


def layout_suite(model: str, seeds: int, progress: Progress | None = None, *, variants: bool = False) -> dict[str, Any]:
    """Without against with `CONTROL`, `seeds` pairs of pictures.

    `inclusion_ratio`, `fill_ratio`, `background_similarity`, `seam`: see `attnctrl.metrics`; the vanilla background is
    compared with itself. `presence`: share of told subjects that have a found one of their colour, each its own;
    `binding`: of their colour and shape, wherever it is; `placement`: and its centre lies in the box.
    With `variants`, the same metrics of `VARIANTS`, as "<variant>.<metric>".
    """
    return measure_layout(Runner.load(model), model, seeds, progress, variants=variants)


def measure_layout(
    runner: Runner, model: str, seeds: int, progress: Progress | None = None, *, variants: bool = False
) -> dict[str, Any]:
    """As `layout_suite`, on a loaded pipeline."""
    begin = time.monotonic()
    tasks = [sample_task(index) for index in range(seeds)]
    settings = {"": CONTROL, **({f"{name}.": value for name, value in VARIANTS.items()} if variants else {})}
    tick = Counter((1 + len(settings)) * seeds, progress)
    plain = _draw(runner, tasks, None, tick)
    vanilla = [task_values(t, image, image, runner.grid) for t, image in zip(tasks, plain, strict=True)]
    metrics = {}
    for prefix, controls in settings.items():
        images = _draw(runner, tasks, controls, tick)
        steered = [task_values(t, i, p, runner.grid) for t, i, p in zip(tasks, images, plain, strict=True)]
        for name, better in BETTER.items():
            metrics[prefix + name] = metric([v[name] for v in vanilla], [v[name] for v in steered], better)
    return result("layout", model, seeds, time.monotonic() - begin, metrics)


def build_controls(fields: Mapping[str, Mapping[str, Any]], tasks: list[Task]) -> list[attnctrl.Control]:
    """Controls for a batch of tasks, each sample with the regions of its own task."""
    regions = {"regions": [task.regions for task in tasks]}
    kinds: dict[str, Callable[..., attnctrl.Control]] = {"isolate": attnctrl.Isolate, "regions": attnctrl.Regions}
    return [kinds[name](**values, **(regions if name == "regions" else {})) for name, values in fields.items()]


def _draw(
    runner: Runner, tasks: list[Task], fields: Mapping[str, Mapping[str, Any]] | None, tick: Counter
) -> list[np.ndarray]:
    def around(start: int, stop: int) -> Any:
        return attnctrl.attach(runner.pipe, build_controls(fields or {}, tasks[start:stop]))

    prompts, seeds = [t.prompt for t in tasks], [t.seed for t in tasks]
    return runner.draw(prompts, seeds, around if fields else None, tick)


def task_values(task: Task, image: np.ndarray, plain: np.ndarray, grid: tuple[int, int]) -> dict[str, float]:
    """All metrics of one picture; `plain` is the picture of the same seed without control, `grid` the image tokens."""
    reading = read_picture(image)
    wanted = [COLOR_NAMES.index(color) for _, color in task.subjects]
    return {
        "inclusion_ratio": inclusion_ratio(reading.colors, task.boxes, wanted),
        "fill_ratio": fill_ratio(reading.colors, task.boxes, wanted),
        "background_similarity": background_similarity(plain, image, task.boxes),
        "seam": seam(image, _token_regions(task, grid, image.shape[:2]), _not_ground(reading)),
        **subject_values(task, reading),
    }


def subject_values(task: Task, reading: Reading) -> dict[str, float]:
    """`presence`, `binding` and `placement`: shares of the told subjects."""
    expected = [Expected(shape, color) for shape, color in task.subjects]
    present, bound, placed = [], [], []
    for want, box, found in zip(expected, task.boxes, match(expected, reading.subjects), strict=True):
        right = agrees(want, found)
        x, y = found.center if found else (-1.0, -1.0)
        present.append(found is not None and found.color == want.color)
        bound.append(right)
        placed.append(right and box[0] <= x <= box[2] and box[1] <= y <= box[3])
    return {name: float(np.mean(v)) for name, v in (("presence", present), ("binding", bound), ("placement", placed))}


def _not_ground(reading: Reading) -> np.ndarray:
    mask = reading.colors >= 0
    for found in reading.subjects:
        mask = mask | found.mask
    return mask


def _token_regions(task: Task, grid: tuple[int, int], size: tuple[int, ...]) -> np.ndarray:
    """Pixels bool [N, H, W] of the tokens that belong to each region."""
    member = np.asarray(membership(task.regions, grid)).astype(bool).reshape(len(task.boxes), *grid)
    return member.repeat(size[0] // grid[0], axis=1).repeat(size[1] // grid[1], axis=2)
