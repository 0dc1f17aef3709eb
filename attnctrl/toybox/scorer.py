"""Reads a picture of the toy world back: its subjects (shape, colour, pattern, place), its ground, how it is drawn.

No training: the scorer knows how the world draws. It tolerates what generated pictures do (blur, other colours, noise)
and says "I do not know" (None) rather than guess: a shape that fits badly, or hardly better than another, has no name.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from scipy import ndimage
from scipy.optimize import linear_sum_assignment

from ..metrics.layout import mask_box
from .scorer_color import COLOR_NAMES, Classes, classify
from .scorer_shape import fit_patterns, fit_shapes
from .scorer_style import Evidence, Style, measure_style, read_style
from .world import SHAPES

MIN_AREA = 0.006
"""Smallest subject, as a share of the picture; the smallest star the world draws (radius 0.12) covers 0.0198."""
MIN_OVERLAP = {**dict.fromkeys(SHAPES, 0.8), "star": 0.75, "circle": 0.87}
"""Intersection over union that a shape needs to be named. A star has twice the outline of a circle of its area, so blur
costs it twice as much; a circle is what any melted blob resembles most, so it has to fit better."""
MIN_LEAD = 0.025
"""Lead over the second best shape that a shape needs to be named."""

Box = tuple[float, float, float, float]


@dataclass(frozen=True, eq=False)
class Found:
    """A subject that was read.

    Attributes:
        shape, color, pattern: words of the world; None where the scorer does not know.
        box: (x0, y0, x1, y1) in fractions.
        mask: bool [H, W].
        confidence: of the shape, in [0, 1]: how well it fits, less how well the next one does.
    """

    shape: str | None
    color: str | None
    pattern: str | None
    box: Box
    mask: np.ndarray
    confidence: float

    @property
    def center(self) -> tuple[float, float]:
        """(x, y) of the box's centre, in fractions."""
        return (self.box[0] + self.box[2]) / 2, (self.box[1] + self.box[3]) / 2


@dataclass(frozen=True, eq=False)
class Reading:
    """`subjects`: what was found, largest first; `background`: a word; `colors`: int8 [H, W], index into `COLOR_NAMES`
    of every pixel that shows a palette colour, else -1; `style`: how it is drawn; `evidence`: what says so."""

    subjects: tuple[Found, ...]
    background: str
    colors: np.ndarray
    style: Style
    evidence: Evidence


@dataclass(frozen=True)
class Expected:
    """A subject that should be there; None is untold and fits anything."""

    shape: str | None = None
    color: str | None = None
    pattern: str | None = None


def read_picture(image: np.ndarray) -> Reading:
    """Read a picture.

    Args:
        image: uint8 [H, W, 3], 32 pixels or more a side.

    Raises:
        ValueError: It is no such array.
    """
    if image.dtype != np.uint8 or image.ndim != 3 or image.shape[2] != 3 or min(image.shape[:2]) < 32:
        raise ValueError(f"a picture is uint8 [H, W, 3] of at least 32 x 32; found {image.dtype} {image.shape}.")
    classes = classify(image)
    found = [one for color in np.unique(classes.color[classes.color >= 0]) for one in _subjects(classes, int(color))]
    found.sort(key=lambda one: -int(one.mask.sum()))
    masks = np.array([one.mask for one in found], dtype=bool).reshape(-1, *image.shape[:2])
    evidence = measure_style(image, masks, classes.background)
    return Reading(tuple(found), classes.background, classes.color, read_style(evidence), evidence)


_NEAR = np.ones((3, 3), dtype=bool)


def _subjects(classes: Classes, color: int) -> list[Found]:
    """The subjects of one colour. A piece without a shape that falls apart into pieces that all have one is these."""
    mask = classes.color == color
    # Noise inside a subject is closed; pixels of another colour never are.
    closed = ndimage.binary_closing(np.pad(mask, 2), _NEAR)[2:-2, 2:-2] & ((classes.color == -1) | mask)
    found = []
    for piece in _pieces(closed, _NEAR):
        one = _describe(piece, color, classes)
        found += [one] if one.shape else _split(piece, mask, color, classes) or [one]
    return found


def _pieces(mask: np.ndarray, structure: np.ndarray | None = None) -> list[np.ndarray]:
    """Connected pieces that are large enough, without rims and specks."""
    labels, count = ndimage.label(mask, structure)
    areas = np.bincount(labels.ravel(), minlength=count + 1)
    kept = []
    for index in range(1, count + 1):
        if areas[index] >= MIN_AREA * mask.size:
            piece = labels == index
            # An outline, or the seam between two colours, is nowhere three pixels thick.
            if ndimage.binary_erosion(piece, _NEAR).sum() >= 0.12 * areas[index]:
                kept.append(piece)
    return kept


def _split(piece: np.ndarray, mask: np.ndarray, color: int, classes: Classes) -> list[Found]:
    """Subjects of one colour that touch: `piece` parted where it is thin; empty unless every part has a shape."""
    inside = piece & mask
    for depth in range(6):
        core = ndimage.binary_erosion(inside, iterations=depth) if depth else inside
        labels, count = ndimage.label(core)
        if count < 2:
            continue
        if depth:
            # Every pixel goes to the nearest core.
            nearest = ndimage.distance_transform_edt(labels == 0, return_distances=False, return_indices=True)
            labels = np.where(inside, labels[tuple(nearest)], 0)
        parts = [part for index in range(1, count + 1) for part in _pieces(labels == index, _NEAR)]
        found = [_describe(part, color, classes) for part in parts]
        if len(found) > 1 and all(one.shape for one in found):
            return found
    return []


def _describe(mask: np.ndarray, color: int, classes: Classes) -> Found:
    fits = fit_shapes(mask)
    (best, shape, _), (second, _, _) = fits[:2]
    known = best >= MIN_OVERLAP[shape] and best - second >= MIN_LEAD
    return Found(
        shape=shape if known else None,
        color=COLOR_NAMES[color],
        pattern=_pattern_of(mask, classes),
        box=mask_box(mask),
        mask=mask,
        confidence=float(np.clip(best * min(1.0, (best - second) / 0.1), 0, 1)),
    )


def _pattern_of(mask: np.ndarray, classes: Classes) -> str | None:
    """Solid when hardly anything is light; else the pattern whose layout explains the light pixels clearly best."""
    inside = ndimage.binary_erosion(mask, np.ones((3, 3)))
    inside = inside & (classes.color >= 0)
    if inside.sum() < 12:
        return None
    light = classes.light
    share = float((light[inside] > 0.5).mean())
    if share < 0.06:
        return "solid"
    fits = sorted(((score, name) for name, score in fit_patterns(light, inside).items()), reverse=True)
    if len(fits) < 2 or fits[0][0] < 0.5 or fits[0][0] - fits[1][0] < 0.05:
        return None
    return fits[0][1]


def agrees(expected: Expected, found: Found | None) -> bool:
    """Whether everything that is told is there, and known to be."""
    if found is None:
        return False
    pairs = ((expected.shape, found.shape), (expected.color, found.color), (expected.pattern, found.pattern))
    return all(told is None or told == seen for told, seen in pairs)


def match(expected: Sequence[Expected], found: Sequence[Found]) -> list[Found | None]:
    """For each expected subject the found one that is taken for it, each used once; None when there are too few.

    The assignment agrees wholly for as many subjects as can be, then in as many shapes and colours, then patterns.
    """
    value = np.array([[_likeness(e, f) for f in found] for e in expected]).reshape(len(expected), len(found))
    rows, columns = linear_sum_assignment(value, maximize=True)
    taken = dict(zip(rows.tolist(), columns.tolist(), strict=True))
    return [found[taken[i]] if i in taken else None for i in range(len(expected))]


def _likeness(expected: Expected, found: Found) -> float:
    shape = expected.shape is None or expected.shape == found.shape
    color = expected.color is None or expected.color == found.color
    pattern = expected.pattern is None or expected.pattern == found.pattern
    # Colour wins a tie against shape, as it is read more surely.
    return 4.0 * agrees(expected, found) + 1.1 * color + shape + 0.2 * pattern
