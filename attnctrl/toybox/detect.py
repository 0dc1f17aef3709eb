"""The scorer as a detector and an embedding for `attnctrl.metrics.detections`: exact for pictures of the toy world."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from ..metrics.detections import MetricError
from ..metrics.layout import Detection, mask_box
from . import world
from .embed import identity_embedding
from .scorer import Expected, Found, agrees, read_picture
from .scorer_color import COLOR_NAMES


def detect_subjects(image: np.ndarray, labels: Sequence[str]) -> list[Detection]:
    """The subjects of a picture of the world by what is told of them: "a dotted red circle", "circle", "red thing".

    Args:
        image: uint8 [H, W, 3], 32 pixels or more a side.
        labels: words of the world; what they leave open fits anything, words that are no attribute are passed over.

    Returns:
        One for each label and each subject that agrees with it, with its mask and the confidence of its shape.
    """
    subjects = read_picture(image).subjects
    return [
        Detection(label, one.box, one.mask, one.confidence)
        for label in dict.fromkeys(labels)
        for one in subjects
        if agrees(told(label), one)
    ]


def embed_subject(image: np.ndarray, found: Detection) -> np.ndarray:
    """`identity_embedding` of a detection, whose label tells its colour.

    Raises:
        MetricError: It has no mask.
    """
    if found.mask is None:
        raise MetricError(f"identity in the toy world is read from masks; '{found.label}' has none: detect it first.")
    known = told(found.label)
    subject = Found(known.shape, known.color, known.pattern, found.box, found.mask, found.score)
    return identity_embedding(image, subject)


def color_detections(colors: np.ndarray, wanted: Sequence[str]) -> list[Detection | None]:
    """All pixels of each colour as one detection, None where it is nowhere.

    Suites measure places by colour, which is read of subjects whose shape nobody could name.

    Args:
        colors: int [H, W], see `Reading.colors`.
        wanted: names of colours.
    """
    masks = [(name, colors == COLOR_NAMES.index(name)) for name in wanted]
    return [Detection(name, mask_box(mask), mask) if mask.any() else None for name, mask in masks]


def told(label: str) -> Expected:
    """What words tell of a subject; the last one of a kind counts."""
    words = label.split()
    kinds = (world.SHAPES, tuple(world.COLORS), world.PATTERNS)
    return Expected(*(next((word for word in reversed(words) if word in kind), None) for kind in kinds))
