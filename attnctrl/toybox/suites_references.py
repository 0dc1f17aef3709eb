"""`attnctrl eval references`: does what reference pictures show come into the picture, where told and nowhere else.

A task asks for one thing, then for two, three and four, each with a reference of its own. The plain pictures are shown
the same references one after the other, as Kontext would take them: nothing but the prompt says which goes where.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from functools import partial

import numpy as np
from scipy import ndimage

from attnctrl.metrics import background_similarity, fill_ratio, identity_similarity, inclusion_ratio
from attnctrl.metrics.layout import Area, Box
from attnctrl.metrics.stats import Better
from attnctrl.pipelines.runner import Positions
from attnctrl.region import Region

from . import world
from .data import REFERENCE_SIZE
from .detect import color_detections
from .embed import identity_embedding
from .scorer import Expected, Found, Reading, match, read_picture
from .scorer_style import CLEAR
from .suite import Acting, Images, Picture, Suite
from .suites_layout import told_share, worded_preset

_BOXES: dict[str, Box] = {
    "left": (0.0, 0.0, 0.5, 1.0),
    "right": (0.5, 0.0, 1.0, 1.0),
    "top left": (0.0, 0.0, 0.5, 0.5),
    "top right": (0.5, 0.0, 1.0, 0.5),
    "bottom": (0.0, 0.5, 1.0, 1.0),
    "bottom left": (0.0, 0.5, 0.5, 1.0),
    "bottom right": (0.5, 0.5, 1.0, 1.0),
}
_PLACES: dict[int, tuple[str, ...]] = {
    2: ("left", "right"),
    3: ("top left", "top right", "bottom"),
    4: ("top left", "top right", "bottom left", "bottom right"),
}
"""Where several things go: they share the whole canvas, in the same places in all tasks."""
COUNTS = (1, *_PLACES)
VARIANTS: Mapping[str, Acting] = {
    "weight_1": partial(worded_preset, name="references", reference_weight=1.0),
    "lamic": partial(worded_preset, name="lamic"),
    "separate": {"isolate": {"branch": "all"}, "regions": {}},
}
"""What else can be measured: references that count once, LAMIC as published, and texts encoded each by itself."""
POSITIONS: Positions = "corner"


@dataclass(frozen=True)
class Cast:
    """Things that references show.

    Attributes:
        places: of each thing, in words.
        background: the ground that is told.
        subjects: what each reference shows.
        grounds: the ground of each reference.
        replaced: index of the reference that is replaced by another in the second picture.
        other: what that one shows.
    """

    places: tuple[str, ...]
    background: str
    subjects: tuple[world.WorldSubject, ...]
    grounds: tuple[str, ...]
    replaced: int
    other: world.WorldSubject

    @property
    def prompt(self) -> str:
        return ", ".join([*(f"this thing {place}" for place in self.places), f"{self.background} background"])

    @property
    def boxes(self) -> list[Box]:
        return [_BOXES[place] for place in self.places]

    @property
    def regions(self) -> list[Region]:
        # a region reads nothing but its own text, so the text names the ground as well
        texts = [f"this thing {place}, {self.background} background" for place in self.places]
        return [Region(text, box=box, reference=k) for k, (text, box) in enumerate(zip(texts, self.boxes, strict=True))]

    @property
    def worded(self) -> list[Region]:
        pairs = zip(self.places, self.boxes, strict=True)
        return [Region(f"this thing {place}", box=box, reference=k) for k, (place, box) in enumerate(pairs)]

    @property
    def swapped(self) -> Cast:
        """The same with the other reference in the place of the replaced one."""
        subjects = list(self.subjects)
        subjects[self.replaced] = self.other
        return replace(self, subjects=tuple(subjects))

    @property
    def references(self) -> tuple[np.ndarray, ...]:
        """The picture of each thing alone, on a ground of its own."""
        scenes = [world.WorldScene((one,), ground) for one, ground in zip(self.subjects, self.grounds, strict=True)]
        return tuple(world.render(scene, REFERENCE_SIZE, REFERENCE_SIZE).image for scene in scenes)


Task = tuple[Cast, ...]


def sample(rng: np.random.Generator) -> Task:
    """A cast of each of `COUNTS`; within one, shapes and colours differ."""
    return tuple(_cast(rng, count) for count in COUNTS)


def _cast(rng: np.random.Generator, count: int) -> Cast:
    shapes = rng.choice(world.SHAPES, count + 1, replace=False)
    colors = rng.choice(list(world.COLORS), count + 1, replace=False)
    patterns = rng.choice(world.PATTERNS, count + 1)
    *subjects, other = (
        world.WorldSubject(str(s), str(c), str(p), 0.5, 0.5, 0.4)
        for s, c, p in zip(shapes, colors, patterns, strict=True)
    )
    background, *grounds = (str(one) for one in rng.choice(list(world.BACKGROUNDS), 1 + count))
    places = _PLACES.get(count) or (str(rng.choice(["left", "right"])),)
    return Cast(places, background, tuple(subjects), tuple(grounds), int(rng.integers(count)), other)


def _pictures(task: Task, seed: int) -> list[Picture]:
    """The same noise twice for each cast, with its references and with one of them replaced."""
    return [
        Picture(one.prompt, seed, one.regions, one.references, POSITIONS, one.worded)
        for cast in task
        for one in (cast, cast.swapped)
    ]


def values(task: Task, images: Images, plain: Images) -> dict[str, float]:
    """`cast_values` of each cast; from two things on, names end in their number."""
    found: dict[str, float] = {}
    for index, (count, cast) in enumerate(zip(COUNTS, task, strict=True)):
        pair = slice(2 * index, 2 * index + 2)
        found |= {name + _suffix(count): value for name, value in cast_values(cast, images[pair], plain[pair]).items()}
    return found


def _suffix(count: int) -> str:
    return "" if count == 1 else f"_{count}"


def cast_values(cast: Cast, images: Images, plain: Images) -> dict[str, float]:
    """`identity_similarity`: cosine of the found subject's identity and its reference's, 0 where there is none;
    `color`, `shape`: share of references whose attribute is found; `inclusion_ratio`, `fill_ratio`: of the reference's
    colour in its box; `leak`: what replacing one reference changes outside of its own box, as a share of 255;
    `background_similarity` to the plain picture, with what either shows of the subjects masked out of both, rims and
    all: ground begins where it does for the scorer's reading of styles.
    """
    scores: dict[str, list[float]] = {name: [] for name in ("identity_similarity", "color", "shape")}
    ratios: dict[str, list[float]] = {"inclusion_ratio": [], "fill_ratio": []}
    for one, image in zip((cast, cast.swapped), images, strict=True):
        reading = read_picture(image)
        seen = match([Expected(s.shape, s.color, s.pattern) for s in one.subjects], reading.subjects)
        for subject, reference, found in zip(one.subjects, one.references, seen, strict=True):
            scores["identity_similarity"].append(_identity(reference, image, found))
            scores["color"].append(found is not None and found.color == subject.color)
            scores["shape"].append(found is not None and found.shape == subject.shape)
        colors = color_detections(reading.colors, [subject.color for subject in one.subjects])
        ratios["inclusion_ratio"].append(inclusion_ratio(colors, cast.boxes))
        ratios["fill_ratio"].append(fill_ratio(colors, cast.boxes))
    things = [area for image in (plain[0], images[0]) for area in _things(read_picture(image))]
    return {
        **{name: float(np.mean(one)) for name, one in (scores | ratios).items()},
        "leak": 1 - background_similarity(images[0], images[1], [cast.boxes[cast.replaced]]),
        "background_similarity": background_similarity(plain[0], images[0], things),
    }


def _identity(reference: np.ndarray, image: np.ndarray, found: Found | None) -> float:
    if found is None:
        return 0.0
    own = identity_embedding(reference, read_picture(reference).subjects[0])
    return identity_similarity(identity_embedding(image, found), own)


def _things(reading: Reading) -> list[Area]:
    return [ndimage.distance_transform_edt(~one.mask) < CLEAR for one in reading.subjects]


def fidelity(task: Task, images: Images) -> float:
    """Share of the told ground and the references' attributes that the pictures show."""
    shown = [one for cast in task for one in (cast, cast.swapped)]
    return float(np.mean([_told(one, image) for one, image in zip(shown, images, strict=True)]))


def _told(cast: Cast, image: np.ndarray) -> float:
    return told_share([Expected(s.shape, s.color) for s in cast.subjects], cast.background, read_picture(image))


_BETTER: dict[str, Better] = {
    "identity_similarity": "higher",
    "color": "higher",
    "shape": "higher",
    "inclusion_ratio": "higher",
    "fill_ratio": "higher",
    "leak": "lower",
    "background_similarity": "higher",
}
REFERENCES = Suite(
    name="references",
    sample=sample,
    pictures=_pictures,
    values=values,
    better={name + _suffix(count): way for count in COUNTS for name, way in _BETTER.items()},
    fidelity=fidelity,
    controls=partial(worded_preset, name="references"),
    variants=VARIANTS,
)
