"""Did things land where they should, and what did that do to the rest of the picture.

Boxes are (x0, y0, x1, y1) in fractions. A colour map is int [H, W]: the class of every pixel, -1 for none.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence

import numpy as np

Box = tuple[float, float, float, float]


def pixel_box(box: Box, height: int, width: int) -> np.ndarray:
    """Pixels of a box as bool [H, W]: those whose centre lies in it."""
    x = (np.arange(width) + 0.5) / width
    y = (np.arange(height) + 0.5) / height
    return ((y >= box[1]) & (y < box[3]))[:, None] & ((x >= box[0]) & (x < box[2]))[None]


def inclusion_ratio(colors: np.ndarray, boxes: Sequence[Box], wanted: Sequence[int]) -> float:
    """Share of a subject's colour that lies in its box, mean over subjects.

    Args:
        colors: colour map.
        boxes: one for each subject.
        wanted: the class of each subject's colour.

    Returns:
        In [0, 1]. A colour that is nowhere counts 0: what is absent is not included.
    """
    return _mean(_ratio((colors == index) & box, colors == index) for index, box in _pairs(colors, boxes, wanted))


def fill_ratio(colors: np.ndarray, boxes: Sequence[Box], wanted: Sequence[int]) -> float:
    """Share of each box that its subject's colour covers, mean over subjects, in [0, 1]; see `inclusion_ratio`."""
    return _mean(_ratio((colors == index) & box, box) for index, box in _pairs(colors, boxes, wanted))


def background_similarity(image: np.ndarray, other: np.ndarray, boxes: Sequence[Box]) -> float:
    """1 - mean absolute difference / 255 of two pictures uint8 [H, W, 3] outside of all boxes; 1 if nothing is outside.

    Raises:
        ValueError: The pictures differ in size.
    """
    if image.shape != other.shape:
        raise ValueError(f"pictures of one size are compared; found {image.shape} and {other.shape}.")
    outside = ~_union(boxes, *image.shape[:2])
    if not outside.any():
        return 1.0
    return 1.0 - float(np.abs(image[outside].astype(float) - other[outside].astype(float)).mean()) / 255


def seam(image: np.ndarray, regions: np.ndarray, ignore: np.ndarray | None = None) -> float:
    """How much stronger the picture steps at the edges of regions than elsewhere on the ground.

    Args:
        image: uint8 [H, W, 3].
        regions: bool [N, H, W], the pixels of each region as the model divides them (whole tokens).
        ignore: bool [H, W], subjects: steps that touch them are left out, so are those within two pixels of them.

    Returns:
        Mean absolute difference of neighbours across edges less that of all other neighbours, as a share of 255. 0 when
        either kind is nowhere on the ground.
    """
    ground = np.ones(image.shape[:2], dtype=bool) if ignore is None else ~_grown(ignore, 2)
    value = image.astype(float)
    on_edge, elsewhere = [], []
    for axis in (0, 1):
        step = np.abs(np.diff(value, axis=axis)).mean(-1)
        edge = (np.diff(regions.astype(np.int8), axis=axis + 1) != 0).any(0)
        low, high = (np.s_[:-1], np.s_[1:]) if axis == 0 else (np.s_[:, :-1], np.s_[:, 1:])
        valid = ground[low] & ground[high]
        on_edge.append(step[edge & valid])
        elsewhere.append(step[~edge & valid])
    at, off = np.concatenate(on_edge), np.concatenate(elsewhere)
    return float(at.mean() - off.mean()) / 255 if at.size and off.size else 0.0


def _pairs(colors: np.ndarray, boxes: Sequence[Box], wanted: Sequence[int]) -> list[tuple[int, np.ndarray]]:
    if len(boxes) != len(wanted) or not boxes:
        raise ValueError(f"each box needs a colour; found {len(boxes)} boxes and {len(wanted)} colours.")
    return [(index, pixel_box(box, *colors.shape)) for index, box in zip(wanted, boxes, strict=True)]


def _ratio(part: np.ndarray, whole: np.ndarray) -> float:
    count = int(whole.sum())
    return int(part.sum()) / count if count else 0.0


def _mean(values: Iterable[float]) -> float:
    return float(np.mean(list(values)))


def _union(boxes: Sequence[Box], height: int, width: int) -> np.ndarray:
    covered = np.zeros((height, width), dtype=bool)
    for box in boxes:
        covered |= pixel_box(box, height, width)
    return covered


def _grown(mask: np.ndarray, pixels: int) -> np.ndarray:
    """`mask` widened by so many pixels in the four directions and between."""
    for _ in range(pixels):
        padded = np.pad(mask, 1)
        rows = padded[:-2] | padded[1:-1] | padded[2:]
        mask = rows[:, :-2] | rows[:, 1:-1] | rows[:, 2:]
    return mask
