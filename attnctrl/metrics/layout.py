"""Did things land where they should, and what did that do to the rest of the picture.

What is in a picture is a list of detections, one for each thing that was asked for, None for what was not found; see
`detections` for where they come from. Boxes are (x0, y0, x1, y1) as shares of width and height.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass

import numpy as np

Box = tuple[float, float, float, float]
Area = Box | np.ndarray
"""A box, or the pixels of a mask: bool [H, W]."""


@dataclass(frozen=True, eq=False)
class Detection:
    """A thing that was found.

    Attributes:
        label: what was asked for.
        box: (x0, y0, x1, y1) in shares.
        mask: its pixels, bool [H, W]; None where the detector only gives boxes.
        score: of the detector, the higher the surer.

    Raises:
        ValueError: The box is not on the picture, or the mask is no such array.
    """

    label: str
    box: Box
    mask: np.ndarray | None = None
    score: float = 1.0

    def __post_init__(self) -> None:
        x0, y0, x1, y1 = self.box
        if not (0 <= x0 <= x1 <= 1 and 0 <= y0 <= y1 <= 1):
            raise ValueError(
                f"'{self.label}' was detected in {self.box}; a box is (x0, y0, x1, y1) as shares of the picture with "
                "0 <= x0 <= x1 <= 1 and the same for y. Divide pixels by the width and height."
            )
        if self.mask is not None and (self.mask.dtype != bool or self.mask.ndim != 2):
            raise ValueError(f"the mask of '{self.label}' is {self.mask.dtype} {self.mask.shape}; give bool [H, W].")

    @property
    def area(self) -> Area:
        """Its mask, or its box where there is none."""
        return self.box if self.mask is None else self.mask


def pixel_box(box: Box, height: int, width: int) -> np.ndarray:
    """Pixels of a box as bool [H, W]: those whose centre lies in it."""
    x = (np.arange(width) + 0.5) / width
    y = (np.arange(height) + 0.5) / height
    return ((y >= box[1]) & (y < box[3]))[:, None] & ((x >= box[0]) & (x < box[2]))[None]


def mask_box(mask: np.ndarray) -> Box:
    """Box in shares around the True pixels of `mask` [H, W]; zeros if there are none."""
    rows, columns = np.flatnonzero(mask.any(1)), np.flatnonzero(mask.any(0))
    if rows.size == 0:
        return (0.0, 0.0, 0.0, 0.0)
    height, width = mask.shape
    return (columns[0] / width, rows[0] / height, (columns[-1] + 1) / width, (rows[-1] + 1) / height)


def iou(box: Box, other: Box) -> float:
    """Intersection over union of two boxes, in [0, 1]."""
    common, first, second = _overlap(box, other)
    return _ratio(common, first + second - common)


def generalised_iou(box: Box, other: Box) -> float:
    """`iou` less the share of the common hull that neither covers (arXiv 1902.09630), in [-1, 1]."""
    common, first, second = _overlap(box, other)
    hull = _size((min(box[0], other[0]), min(box[1], other[1]), max(box[2], other[2]), max(box[3], other[3])))
    return iou(box, other) - 1 + _ratio(first + second - common, hull)


def inclusion_ratio(found: Sequence[Detection | None], targets: Sequence[Area]) -> float:
    """IN-R, mean over things of |D and B| / |D|: the share of a thing that lies in its target.

    Two boxes are compared exactly; where either is a mask, pixels are counted, and a pixel belongs to a box when its
    centre does.

    Args:
        found: D of each thing, None for what was not found.
        targets: B of each thing.

    Returns:
        In [0, 1]. What was not found counts 0: what is absent is not included.

    Raises:
        ValueError: The two differ in number, are empty, or their masks differ in size.
    """
    return _mean(_ratio(common, own) for common, own, _ in _overlaps(found, targets))


def fill_ratio(found: Sequence[Detection | None], targets: Sequence[Area]) -> float:
    """FI-R, mean over things of |D and B| / |B|: the share of a target that its thing covers; see `inclusion_ratio`."""
    return _mean(_ratio(common, target) for common, _, target in _overlaps(found, targets))


def background_similarity(image: np.ndarray, other: np.ndarray, things: Sequence[Area]) -> float:
    """1 - mean absolute difference / 255 of two pictures outside of all things; 1 if nothing is outside.

    Args:
        image, other: uint8 [H, W, 3].
        things: what is masked out of both: the areas of the detections of both pictures, or the targets.

    Raises:
        ValueError: The pictures, or a mask, differ in size.
    """
    if image.shape != other.shape:
        raise ValueError(f"pictures of one size are compared; found {image.shape} and {other.shape}.")
    outside = ~union(things, *image.shape[:2])
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


def union(areas: Sequence[Area], height: int, width: int) -> np.ndarray:
    """Pixels bool [H, W] of boxes and masks taken together.

    Raises:
        ValueError: A mask has another size.
    """
    covered = np.zeros((height, width), dtype=bool)
    for area in areas:
        covered |= _pixels(area, (height, width))
    return covered


def _overlaps(found: Sequence[Detection | None], targets: Sequence[Area]) -> list[tuple[float, float, float]]:
    """For each thing the sizes of what is common, of what was found and of its target."""
    if len(found) != len(targets) or not targets:
        raise ValueError(
            f"each thing that was asked for has a target; found {len(found)} detections and {len(targets)} targets."
        )
    return [
        (0.0, 0.0, 0.0) if one is None else _overlap(one.area, target)
        for one, target in zip(found, targets, strict=True)
    ]


def _overlap(area: Area, other: Area) -> tuple[float, float, float]:
    """Sizes of what two areas share and of each: in pixels if one is a mask, else in shares of the picture."""
    if not isinstance(area, np.ndarray) and not isinstance(other, np.ndarray):
        common = (max(area[0], other[0]), max(area[1], other[1]), min(area[2], other[2]), min(area[3], other[3]))
        return _size(common), _size(area), _size(other)
    shape = next(one.shape for one in (area, other) if isinstance(one, np.ndarray))
    first, second = _pixels(area, shape), _pixels(other, shape)
    return int((first & second).sum()), int(first.sum()), int(second.sum())


def _size(box: Box) -> float:
    return max(0.0, box[2] - box[0]) * max(0.0, box[3] - box[1])


def _pixels(area: Area, shape: tuple[int, ...]) -> np.ndarray:
    if not isinstance(area, np.ndarray):
        return pixel_box(area, *shape)
    if area.shape != shape:
        raise ValueError(f"masks of one size are compared; found {area.shape} and {shape}.")
    return area


def _ratio(part: float, whole: float) -> float:
    return part / whole if whole else 0.0


def _mean(values: Iterable[float]) -> float:
    return float(np.mean(list(values)))


def _grown(mask: np.ndarray, pixels: int) -> np.ndarray:
    """`mask` widened by so many pixels in the four directions and between."""
    for _ in range(pixels):
        padded = np.pad(mask, 1)
        rows = padded[:-2] | padded[1:-1] | padded[2:]
        mask = rows[:, :-2] | rows[:, 1:-1] | rows[:, 2:]
    return mask
