"""The one way in which a suite is measured: tasks, pictures without and with control on the same seeds, values.

A suite is data (`Suite`). `measure` draws its pictures, also of the variants, and compares; every result says as well
what gets worse: prompt fidelity, diversity, time and memory.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any, Generic, Literal, TypeVar

import numpy as np
from PIL import Image

import attnctrl
from attnctrl.controls import CONTROLS
from attnctrl.errors import SelectionError
from attnctrl.execute.bench import interleaved
from attnctrl.metrics import result
from attnctrl.metrics.memory import peak_bytes
from attnctrl.metrics.stats import Better, Metric
from attnctrl.pipelines.runner import Counter, Positions, Progress, Runner
from attnctrl.region import Region

from .compare import CONTROLLED, VANILLA, Way, compared, prefix

Split = Literal["test", "tune"]
Fields = Mapping[str, Mapping[str, Any]]
"""What acts: names of controls and their fields. What belongs to a task, its regions, comes on top."""
Stack = Callable[["Runner", Sequence["Picture"]], list[attnctrl.Control]]
"""What acts, made for a batch of pictures on a pipeline."""


@dataclass(frozen=True)
class Drawing:
    """What acts where a batch of the pipeline is more than the pictures that are asked for.

    Attributes:
        draw: (runner, pictures of whole tasks, called with the number of pictures done) -> images.
    """

    draw: Callable[[Runner, Sequence[Picture], Callable[[int], None] | None], list[np.ndarray]]


Acting = Fields | Stack | Drawing
Images = Sequence[np.ndarray]
T = TypeVar("T")

HELD_OUT = 77_000_000
"""Seeds from here on are those of suites; training draws from smaller ones."""
SPLITS: Mapping[str, int] = {"tune": 100_019, "test": 200_033}
"""First number of each split. Settings are chosen on "tune" and reported on "test"."""
COMMON: Mapping[str, Better] = {"prompt_fidelity": "higher", "diversity": "higher"}
"""What every suite measures of its pictures beside its own metrics."""


@dataclass(frozen=True)
class Picture:
    """One picture of a task: what to draw, from which seed, where, and the reference pictures that it is shown.

    `positions` is where the model finds the references under control, see `attnctrl.pipelines.references`; without, it
    finds them at the corner, as stock Kontext does. `worded` are the regions with their texts as the prompt has them.
    """

    prompt: str
    seed: int
    regions: Sequence[Region] = ()
    references: Sequence[np.ndarray] = ()
    positions: Positions = "corner"
    worded: Sequence[Region] = ()


@dataclass(frozen=True)
class Whole(Generic[T]):
    """A number that only a whole set of pictures has.

    Attributes:
        better: its direction.
        read: (task, its images) -> what the number is made of.
        of: what was read of several tasks -> the number; a task may be there more than once, as the same object.
    """

    better: Better
    read: Callable[[T, Images], Any]
    of: Callable[[Sequence[Any]], float]

    def reads(self, tasks: Sequence[T], drawn: Sequence[Images]) -> list[Any]:
        """What is read of each task."""
        return [self.read(task, images) for task, images in zip(tasks, drawn, strict=True)]


@dataclass(frozen=True)
class Suite(Generic[T]):
    """What is measured.

    Attributes:
        name: as in `attnctrl eval`.
        sample: random generator -> a task. The same generator gives the same task.
        pictures: (task, its seed) -> the pictures it wants, for all tasks equally many.
        values: (task, images, images of the same seeds without control) -> a value for each metric.
        better: the direction of each of these metrics.
        fidelity: (task, images) -> how much of the prompts they show, in [0, 1].
        whole: metrics of whole sets of pictures.
        controls: what acts.
        variants: what else can be measured; where that differs by model, a function of what runs it.
        rivals: variants with which the suite's own control is compared as well, where both are measured: metrics under
            "over_NAME.", the variant's value in the place of the plain one.
        runs: settings of the runner that are other than the model's own, by the names of `Runner`'s fields.
    """

    name: str
    sample: Callable[[np.random.Generator], T]
    pictures: Callable[[T, int], Sequence[Picture]]
    values: Callable[[T, Images, Images], dict[str, float]]
    better: Mapping[str, Better]
    fidelity: Callable[[T, Images], float]
    whole: Mapping[str, Whole[T]] = field(default_factory=dict)
    controls: Acting = field(default_factory=dict)
    variants: Mapping[str, Acting] | Callable[[Runner], Mapping[str, Acting]] = field(default_factory=dict)
    rivals: Sequence[str] = ()
    runs: Mapping[str, Any] = field(default_factory=dict)

    @property
    def directions(self) -> Mapping[str, Better]:
        """Of its own metrics and the common ones."""
        return {**self.better, **COMMON}

    def task(self, split: Split, index: int) -> tuple[T, int]:
        """Task `index` of a split, and its seed."""
        seed = HELD_OUT + SPLITS[split] + index
        return self.sample(np.random.default_rng([SPLITS[split], index, *self.name.encode()])), seed


@dataclass(frozen=True)
class Options:
    """How a suite is measured.

    Attributes:
        split: which tasks.
        variants: also those of the suite, or the named ones of them.
        controls: other ones than the suite's, on "tune" alone.
        first: number of the first task, so that parts of a measurement can be drawn by several processes
            (`attnctrl.toybox.pooled`).
        rows: add the values of every task, and what metrics of the whole set are made of.
        grid: called with a picture of the first tasks for people to look at.
    """

    split: Split = "test"
    variants: bool | Sequence[str] = False
    controls: Acting | None = None
    rows: bool = False
    first: int = 0
    grid: Callable[[Image.Image], object] | None = None

    def __post_init__(self) -> None:
        if self.controls is not None and self.split != "tune":
            raise ValueError("settings are chosen on split 'tune', never on 'test': name the split or leave controls.")


def measure(
    suite: Suite[Any],
    runner: Runner,
    model: str,
    seeds: int,
    progress: Progress | None = None,
    options: Options = Options(),
) -> dict[str, Any]:
    """The suite's result on a loaded pipeline, from `seeds` tasks; see `attnctrl.metrics.result`."""
    begin = time.monotonic()
    runner = replace(runner, **suite.runs)
    numbered = range(options.first, options.first + seeds)
    tasks, numbers = zip(*(suite.task(options.split, index) for index in numbered), strict=True)
    wanted = [suite.pictures(task, number) for task, number in zip(tasks, numbers, strict=True)]
    settings = _settings(suite, options, runner)
    tick = Counter((1 + len(settings)) * sum(map(len, wanted)), progress)
    drawn = {VANILLA: _draw(runner, wanted, {}, tick)}
    ratios: dict[str, Metric] = {}
    for label, controls in settings.items():
        drawn[label] = _draw(runner, wanted, controls, tick)
        ratios[f"{prefix(label)}time_ratio"] = _single("lower", 1.0, time_ratio(runner, wanted, controls))
        ratios[f"{prefix(label)}memory_ratio"] = _single("lower", 1.0, _memory(runner, wanted, controls))
    ways = {label: _way(suite, tasks, images, drawn[VANILLA]) for label, images in drawn.items()}
    if options.grid is not None:
        options.grid(_grid(wanted, drawn))
    found = result(suite.name, model, seeds, time.monotonic() - begin, {**compared(suite, ways), **ratios})
    found["split"] = options.split
    if options.rows:
        found["rows"] = [
            _row(number, asked, {label: way.row(index) for label, way in ways.items()})
            for index, (number, asked) in enumerate(zip(numbered, wanted, strict=True))
        ]
    return found


def _row(number: int, asked: Sequence[Picture], told: Mapping[str, tuple[Any, Any]]) -> dict[str, Any]:
    """What is told of one task: its values in each way of drawing, and what metrics of whole sets read of it."""
    values = {label: own for label, (own, _) in told.items()}
    reads = {label: read for label, (_, read) in told.items()}
    return {"task": number, "prompts": [one.prompt for one in asked], **values, "whole": reads}


def _settings(suite: Suite[Any], options: Options, runner: Runner) -> dict[str, Acting]:
    """Controls by the label of their way of drawing."""
    first = suite.controls if options.controls is None else options.controls
    variants = suite.variants(runner) if callable(suite.variants) else suite.variants
    asked = options.variants if not isinstance(options.variants, bool) else variants if options.variants else ()
    if unknown := [name for name in asked if name not in variants]:
        raise SelectionError(
            f"suite {suite.name!r} has no variant {unknown[0]!r}; it has {', '.join(variants) or 'none'}."
        )
    return {**({CONTROLLED: first} if first else {}), **{name: variants[name] for name in asked}}


def _way(suite: Suite[Any], tasks: Sequence[Any], drawn: Sequence[Images], plain: Sequence[Images]) -> Way:
    """What is measured of one way of drawing."""
    found = []
    for index, (task, images) in enumerate(zip(tasks, drawn, strict=True)):
        # a picture that is alone in its task is compared with its neighbour's
        others = images if len(images) > 1 else [*images, *drawn[(index + 1) % len(drawn)]]
        common = {"prompt_fidelity": suite.fidelity(task, images), "diversity": diversity(others)}
        found.append({**suite.values(task, images, plain[index]), **common})
    return Way(found, {name: one.reads(tasks, drawn) for name, one in suite.whole.items()})


def diversity(images: Images) -> float:
    """Mean distance of pictures from each other: root mean square of the difference of 8 x 8 thumbnails in [0, 1]."""
    small = np.stack([_thumbnail(image) for image in images])
    pairs = [(a, b) for a in range(len(small)) for b in range(a)]
    return float(np.mean([np.sqrt(((small[a] - small[b]) ** 2).mean()) for a, b in pairs])) if pairs else 0.0


def _thumbnail(image: np.ndarray) -> np.ndarray:
    return np.asarray(Image.fromarray(image).resize((8, 8), Image.Resampling.BOX), dtype=float) / 255


def _single(better: Better, vanilla: float, controlled: float | None = None) -> Metric:
    """An entry for a number that has no samples, and so no interval."""
    delta = None if controlled is None else controlled - vanilla
    return {"vanilla": vanilla, "controlled": controlled, "delta": delta, "ci95": None, "better": better}


def build_controls(acting: Fields | Stack, runner: Runner, pictures: Sequence[Picture]) -> list[attnctrl.Control]:
    """Controls for a batch of pictures, each sample with its own regions."""
    if callable(acting):
        return acting(runner, pictures)
    scenes = {"regions": [list(one.regions) for one in pictures]}
    kinds: Mapping[str, Any] = CONTROLS
    return [kinds[name](**values, **(scenes if kinds[name].brings_regions else {})) for name, values in acting.items()]


def _draw(
    runner: Runner, wanted: Sequence[Sequence[Picture]], acting: Acting, tick: Callable[[int], None]
) -> list[Images]:
    """Images of each task."""
    images = draw_pictures(runner, [one for pictures in wanted for one in pictures], acting, tick, len(wanted))
    each = len(wanted[0])
    return [images[at : at + each] for at in range(0, len(images), each)]


def draw_pictures(
    runner: Runner, wanted: Sequence[Picture], acting: Acting, done: Any = None, tasks: int = 1
) -> list[np.ndarray]:
    """Images of the pictures of so many tasks. Pictures of a task that show equally many references share a batch."""
    if isinstance(acting, Drawing):
        return acting.draw(runner, wanted, done)
    images: dict[int, np.ndarray] = {}
    for count in sorted({len(one.references) for one in wanted}):
        places = [index for index, one in enumerate(wanted) if len(one.references) == count]
        alike, each = [wanted[index] for index in places], len(places) // tasks
        whole = runner.with_batch(max(each, runner.batch // each * each))
        images |= zip(places, _alike(whole, alike, acting, done), strict=True)
    return [images[index] for index in range(len(wanted))]


def _alike(runner: Runner, wanted: Sequence[Picture], acting: Fields | Stack, done: Any) -> list[np.ndarray]:
    """Images of pictures with equally many references."""

    def around(start: int, stop: int) -> Any:
        return attnctrl.attach(runner.pipe, build_controls(acting, runner, wanted[start:stop]))

    def shown(start: int, stop: int) -> Any:
        part = wanted[start:stop]
        positions = part[0].positions if acting else "corner"
        return runner.showing([one.references for one in part], positions, [one.regions for one in part])

    prompts, seeds = [one.prompt for one in wanted], [one.seed for one in wanted]
    return runner.draw(prompts, seeds, around if acting else None, done, shown if wanted[0].references else None)


def time_ratio(runner: Runner, wanted: Sequence[Sequence[Picture]], acting: Acting, repeats: int = 5) -> float:
    """Seconds of a batch of whole tasks in four steps, with control over without: medians of an interleaved run."""
    pictures = [one for task in wanted[: max(1, runner.batch // len(wanted[0]))] for one in task]
    short = runner.with_steps(4)
    calls = {
        "plain": lambda: draw_pictures(short, pictures, {}),
        "steered": lambda: draw_pictures(short, pictures, acting),
    }
    seconds = interleaved(calls, repeats)
    return seconds["steered"] / seconds["plain"]


def _memory(runner: Runner, wanted: Sequence[Sequence[Picture]], acting: Acting) -> float:
    """Peak bytes of one picture group's two steps with control, over those without."""
    short = runner.with_steps(2)

    def run(steering: Acting) -> int:
        return peak_bytes(lambda: draw_pictures(short, wanted[0], steering))

    return run(acting) / run({})


def _grid(wanted: Sequence[Sequence[Picture]], drawn: Mapping[str, Sequence[Images]], most: int = 8) -> Image.Image:
    """The first tasks, a column for each way of drawing, with regions on controlled pictures."""
    from attnctrl.pictures import draw_regions, enlarge, grid

    rows, labels = [], []
    each = len(wanted[0])
    for index, pictures in enumerate(wanted[: max(1, most // each)]):
        for number, asked in enumerate(pictures):
            row = [enlarge(Image.fromarray(images[index][number]), 192) for images in drawn.values()]
            rows.append([row[0], *(draw_regions(one, asked.regions, names=False) for one in row[1:])])
            labels.append(asked.prompt if len(asked.prompt) < 40 else f"{asked.prompt[:39]}…")
    return grid(rows, labels, list(drawn), side=192)
