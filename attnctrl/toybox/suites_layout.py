"""`attnctrl eval layout` and `isolation`: two told subjects in two boxes, the plain prompt against boxes, same seeds.

In `layout` the subjects differ in shape and colour and stand apart. In `isolation` they share their shape and stand
close together, so that what is told of one runs into the other.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from attnctrl.controls import Control
from attnctrl.metrics import background_similarity, fill_ratio, inclusion_ratio, seam
from attnctrl.metrics.layout import pixel_box
from attnctrl.phrases import in_prompt
from attnctrl.pipelines.runner import Runner
from attnctrl.presets import default_preset, preset
from attnctrl.region import Region, membership

from . import world
from .data import TOKEN_PIXELS
from .detect import color_detections
from .scorer import Expected, Reading, agrees, match, read_picture
from .scorer_color import COLOR_NAMES
from .suite import Acting, Images, Picture, Suite

Box = tuple[float, float, float, float]

VARIANTS: dict[str, Acting] = {
    "separate": {"isolate": {"window": (0.0, 0.5), "background": "shared"}, "regions": {}},
    "regions_only": {"regions": {}},
    "parted_always": {"isolate": {"background": "isolated"}, "regions": {}},
}
"""What else can be measured, all with texts that are encoded each by itself: isolation that ends half-way, so that
seams can heal; none; and regions and background parted from start to end.
"""
BOX, CLOSE_BOX = 0.42, 0.36
_SLACK = 0.04
"""How far a box may lie from the middle of its half of the canvas."""
_SIDE_BY_SIDE = (((0.25, 0.5), (0.75, 0.5)), ((0.5, 0.25), (0.5, 0.75)))
_CORNERS = (((0.25, 0.25), (0.75, 0.75)), ((0.75, 0.25), (0.25, 0.75)))
_CLOSE = (((0.31, 0.5), (0.69, 0.5)), ((0.5, 0.31), (0.5, 0.69)))


@dataclass(frozen=True)
class Task:
    """Two told subjects, (shape, colour, pattern or None) each, their boxes, and the ground."""

    subjects: tuple[tuple[str, str, str | None], ...]
    boxes: tuple[Box, ...]
    background: str

    @property
    def phrases(self) -> list[str]:
        """The subjects in words, as the world's captions tell them: "a dotted red circle top left"."""
        pairs = zip(self.subjects, self.boxes, strict=True)
        return [
            " ".join(filter(None, ("a", pattern, color, shape, _place(box)))) for (shape, color, pattern), box in pairs
        ]

    @property
    def worded(self) -> list[Region]:
        return [Region(phrase, box=box) for phrase, box in zip(self.phrases, self.boxes, strict=True)]

    @property
    def prompt(self) -> str:
        return ", ".join([*self.phrases, f"{self.background} background"])

    @property
    def expected(self) -> list[Expected]:
        return [Expected(*subject) for subject in self.subjects]

    @property
    def regions(self) -> list[Region]:
        # a region reads nothing but its own text, so the text names the ground as well
        texts = [f"{phrase}, {self.background} background" for phrase in self.phrases]
        return [Region(text, box=box) for text, box in zip(texts, self.boxes, strict=True)]


def sample_layout(rng: np.random.Generator) -> Task:
    """Different shapes and colours, boxes side by side, one above the other, or at opposite corners."""
    shapes = rng.choice(world.SHAPES, 2, replace=False)
    colors = rng.choice(list(world.COLORS), 2, replace=False)
    subjects = tuple((str(s), str(c), None) for s, c in zip(shapes, colors, strict=True))
    return _task(rng, subjects, (*_SIDE_BY_SIDE, *_CORNERS), BOX, _SLACK)


def sample_isolation(rng: np.random.Generator) -> Task:
    """One shape, different colours and patterns, boxes that nearly touch."""
    shape = str(rng.choice(world.SHAPES))
    colors = rng.choice(list(world.COLORS), 2, replace=False)
    patterns = rng.choice(world.PATTERNS, 2, replace=False)
    subjects = tuple((shape, str(c), str(p)) for c, p in zip(colors, patterns, strict=True))
    return _task(rng, subjects, _CLOSE, CLOSE_BOX, 0.0)


def _task(rng: np.random.Generator, subjects: Any, arrangements: Any, side: float, slack: float) -> Task:
    centers = arrangements[int(rng.integers(len(arrangements)))]
    boxes = tuple(_box(centers[i], side, rng.uniform(-slack, slack, 2)) for i in rng.permutation(2))
    return Task(subjects, boxes, str(rng.choice(list(world.BACKGROUNDS))))


def _place(box: Box) -> str:
    x, y = (box[0] + box[2]) / 2, (box[1] + box[3]) / 2
    return world.WorldSubject("circle", "red", "solid", x, y, BOX / 2).place_word


def _box(center: tuple[float, float], side: float, moved: np.ndarray) -> Box:
    # 0.25 - 0.21 - 0.04 = 0: the box stays on the canvas, up to rounding.
    x0, y0 = (float(np.clip(v - side / 2, 0, 1 - side)) for v in (center[0] + moved[0], center[1] + moved[1]))
    return (x0, y0, x0 + side, y0 + side)


def _pictures(task: Task, seed: int) -> list[Picture]:
    return [Picture(task.prompt, seed, task.regions, worded=task.worded)]


def worded_preset(runner: Runner, pictures: Sequence[Picture], name: str = "", **options: Any) -> list[Control]:
    """The preset called `name`, else the default of `LayoutPipeline`, with texts that are words of the prompt."""
    length = runner.max_sequence_length
    scenes = [in_prompt(runner.pipe, one.prompt, one.worded, max_sequence_length=length) for one in pictures]
    return preset(name or default_preset(runner.pipe), scenes, **options)


def layout_values(task: Task, images: Images, plain: Images) -> dict[str, float]:
    """`inclusion_ratio`, `fill_ratio`, `background_similarity`, `seam`: see `attnctrl.metrics`; the vanilla background
    is compared with itself. `presence`: share of told subjects that have a found one of their colour, each its own;
    `binding`: of all that is told of them, wherever they are; `placement`: and their centre lies in the box.
    """
    (image,), (other,) = images, plain
    reading = read_picture(image)
    seen = color_detections(reading.colors, [color for _, color, _ in task.subjects])
    return {
        "inclusion_ratio": inclusion_ratio(seen, task.boxes),
        "fill_ratio": fill_ratio(seen, task.boxes),
        "background_similarity": background_similarity(other, image, task.boxes),
        "seam": seam(image, _token_regions(task, image.shape[:2]), _not_ground(reading)),
        **subject_values(task, reading),
    }


def subject_values(task: Task, reading: Reading) -> dict[str, float]:
    """`presence`, `binding` and `placement`: shares of the told subjects."""
    present, bound, placed = [], [], []
    for want, box, found in zip(task.expected, task.boxes, match(task.expected, reading.subjects), strict=True):
        right = agrees(want, found)
        x, y = found.center if found else (-1.0, -1.0)
        present.append(found is not None and found.color == want.color)
        bound.append(right)
        placed.append(right and box[0] <= x <= box[2] and box[1] <= y <= box[3])
    return {name: float(np.mean(v)) for name, v in (("presence", present), ("binding", bound), ("placement", placed))}


def isolation_values(task: Task, images: Images, plain: Images) -> dict[str, float]:
    """The leakage matrix of two subjects, each row of which is one box: `own`, the share of its coloured pixels that
    have its subject's colour, `leak`, that of the other subject's; `pattern_leak`: share of subjects that are seen with
    the other's pattern.
    """
    (image,) = images
    reading = read_picture(image)
    own, leak = np.diagonal(matrix := leakage(reading, task)), matrix[[0, 1], [1, 0]]
    seen = match([Expected(color=color) for _, color, _ in task.subjects], reading.subjects)
    patterns = [pattern for _, _, pattern in task.subjects]
    taken = [found is not None and found.pattern == other for found, other in zip(seen, patterns[::-1], strict=True)]
    layout = layout_values(task, images, plain)
    kept = {name: layout[name] for name in ("inclusion_ratio", "binding", "background_similarity", "seam")}
    return {"own": float(own.mean()), "leak": float(leak.mean()), "pattern_leak": float(np.mean(taken)), **kept}


def leakage(reading: Reading, task: Task) -> np.ndarray:
    """[2, 2]: of the coloured pixels in box i, the share that has the colour of subject j; zeros for an empty box."""
    rows = []
    for box in task.boxes:
        inside = reading.colors[pixel_box(box, *reading.colors.shape)]
        coloured = max(1, int((inside >= 0).sum()))
        rows.append([(inside == COLOR_NAMES.index(color)).sum() / coloured for _, color, _ in task.subjects])
    return np.array(rows, dtype=float)


def fidelity(task: Task, images: Images) -> float:
    """Share of the told attributes, subjects' and ground's, that are found where nothing says where they should be."""
    reading = read_picture(images[0])
    return told_share(task.expected, task.background, reading)


def told_share(expected: Sequence[Expected], background: str, reading: Reading) -> float:
    """Share of the told shapes, colours, patterns and of the ground that a picture shows, each subject matched once."""
    right = [reading.background == background]
    for want, found in zip(expected, match(expected, reading.subjects), strict=True):
        pairs = [(getattr(want, name), getattr(found, name, None)) for name in ("shape", "color", "pattern")]
        right += [told == seen for told, seen in pairs if told is not None]
    return float(np.mean(right))


def _not_ground(reading: Reading) -> np.ndarray:
    mask = reading.colors >= 0
    for found in reading.subjects:
        mask = mask | found.mask
    return mask


def _token_regions(task: Task, size: tuple[int, ...]) -> np.ndarray:
    """Pixels bool [N, H, W] of the tokens that belong to each region."""
    grid = (size[0] // TOKEN_PIXELS, size[1] // TOKEN_PIXELS)
    member = np.asarray(membership(task.regions, grid)).astype(bool).reshape(len(task.boxes), *grid)
    return member.repeat(TOKEN_PIXELS, axis=1).repeat(TOKEN_PIXELS, axis=2)


LAYOUT = Suite(
    name="layout",
    sample=sample_layout,
    pictures=_pictures,
    values=layout_values,
    better={
        "inclusion_ratio": "higher",
        "binding": "higher",
        "presence": "higher",
        "placement": "higher",
        "fill_ratio": "higher",
        "background_similarity": "higher",
        "seam": "lower",
    },
    fidelity=fidelity,
    controls=worded_preset,
    variants=VARIANTS,
)
ISOLATION = Suite(
    name="isolation",
    sample=sample_isolation,
    pictures=_pictures,
    values=isolation_values,
    better={
        "own": "higher",
        "leak": "lower",
        "pattern_leak": "lower",
        "inclusion_ratio": "higher",
        "binding": "higher",
        "background_similarity": "higher",
        "seam": "lower",
    },
    fidelity=fidelity,
    controls=worded_preset,
    variants=VARIANTS,
)
