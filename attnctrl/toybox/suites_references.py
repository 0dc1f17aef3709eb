"""`attnctrl eval references`: does what a reference picture shows come into the picture, where told and nowhere else.

Stock Kontext pipelines take one reference; so do the plain pictures here.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from attnctrl.metrics import background_similarity, fill_ratio, identity_similarity, inclusion_ratio
from attnctrl.metrics.layout import Box

from . import world
from .data import REFERENCE_SIZE
from .detect import color_detections
from .embed import identity_embedding
from .scorer import Expected, match, read_picture
from .suite import Images, Picture, Suite
from .suites_layout import told_share

_BOXES: dict[str, Box] = {"left": (0.0, 0.0, 0.5, 1.0), "right": (0.5, 0.0, 1.0, 1.0)}


@dataclass(frozen=True)
class Task:
    """A place, a ground, the subject that the reference shows, and the one that replaces it."""

    place: str
    background: str
    subject: world.WorldSubject
    other: world.WorldSubject
    ground: str

    @property
    def prompt(self) -> str:
        return f"this thing {self.place}, {self.background} background"

    def reference(self, subject: world.WorldSubject) -> np.ndarray:
        """The picture of a subject alone, on the reference's own ground."""
        return world.render(world.WorldScene((subject,), self.ground), REFERENCE_SIZE, REFERENCE_SIZE).image


def sample(rng: np.random.Generator) -> Task:
    """Two subjects that differ in shape and colour."""
    shapes = rng.choice(world.SHAPES, 2, replace=False)
    colors = rng.choice(list(world.COLORS), 2, replace=False)
    patterns = rng.choice(world.PATTERNS, 2)
    subject, other = (
        world.WorldSubject(str(s), str(c), str(p), 0.5, 0.5, 0.4)
        for s, c, p in zip(shapes, colors, patterns, strict=True)
    )
    grounds = rng.choice(list(world.BACKGROUNDS), 2)
    return Task(str(rng.choice(list(_BOXES))), str(grounds[0]), subject, other, str(grounds[1]))


def _pictures(task: Task, seed: int) -> list[Picture]:
    """The same noise twice, with the reference and with the one that replaces it."""
    return [Picture(task.prompt, seed, reference=task.reference(one)) for one in (task.subject, task.other)]


def values(task: Task, images: Images, plain: Images) -> dict[str, float]:
    """`identity_similarity`: cosine of the found subject's identity and the reference's, 0 where there is none;
    `color`, `shape`: share of references whose attribute is found; `inclusion_ratio`, `fill_ratio`: of the reference's
    colour in the half that was told; `leak`: what replacing the reference changes in the other half, as a share of 255.
    """
    scores: dict[str, list[float]] = {name: [] for name in ("identity_similarity", "color", "shape")}
    ratios: dict[str, list[float]] = {"inclusion_ratio": [], "fill_ratio": []}
    box = _BOXES[task.place]
    for subject, image in zip((task.subject, task.other), images, strict=True):
        reading, picture = read_picture(image), task.reference(subject)
        (found,) = match([Expected(subject.shape, subject.color, subject.pattern)], reading.subjects)
        shown = read_picture(picture).subjects[0]
        own = identity_embedding(picture, shown)
        alike = 0.0 if found is None else identity_similarity(identity_embedding(image, found), own)
        scores["identity_similarity"].append(alike)
        scores["color"].append(found is not None and found.color == subject.color)
        scores["shape"].append(found is not None and found.shape == subject.shape)
        seen = color_detections(reading.colors, [subject.color])
        ratios["inclusion_ratio"].append(inclusion_ratio(seen, [box]))
        ratios["fill_ratio"].append(fill_ratio(seen, [box]))
    return {
        **{name: float(np.mean(one)) for name, one in (scores | ratios).items()},
        "leak": 1 - background_similarity(images[0], images[1], [box]),
        "background_similarity": background_similarity(plain[0], images[0], [box]),
    }


def fidelity(task: Task, images: Images) -> float:
    """Share of the told ground and the references' attributes that the pictures show."""
    pairs = zip((task.subject, task.other), images, strict=True)
    return float(
        np.mean([told_share([Expected(s.shape, s.color)], task.background, read_picture(i)) for s, i in pairs])
    )


REFERENCES = Suite(
    name="references",
    sample=sample,
    pictures=_pictures,
    values=values,
    better={
        "identity_similarity": "higher",
        "color": "higher",
        "shape": "higher",
        "inclusion_ratio": "higher",
        "fill_ratio": "higher",
        "leak": "lower",
        "background_similarity": "higher",
    },
    fidelity=fidelity,
)
