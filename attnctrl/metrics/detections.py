"""Measuring a layout on any picture: what a detector finds there, against where it was told to be.

A detector and an embedding are functions that are given: the toybox has exact ones for its world
(`attnctrl.toybox.detect`), `attnctrl.metrics.open_vocabulary` those of transformers for photographs.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np

from ..errors import AttnCtrlError
from .consistency import identity_similarity
from .layout import Area, Box, Detection, background_similarity, fill_ratio, generalised_iou, inclusion_ratio, mask_box

Detector = Callable[[np.ndarray, Sequence[str]], Sequence[Detection]]
"""(picture uint8 [H, W, 3], what to look for) -> what was found, in any order; `label` is one of what was asked."""
Embed = Callable[[np.ndarray, Detection], np.ndarray]
"""(picture, what was found in it) -> float [D]: which thing it is, whatever stands around it."""

WHOLE: Box = (0.0, 0.0, 1.0, 1.0)
_EXACT = 1e-6
"""Pixels: a box that ends on a pixel's edge does not touch the next one for a rounding."""


class MetricError(AttnCtrlError, ValueError):
    """A metric is asked for without what it is measured on."""


@dataclass(frozen=True, eq=False)
class Wanted:
    """A thing that should be in a picture.

    Attributes:
        label: what a detector looks for.
        target: its box in shares, or its mask.
        reference: the picture that shows it, uint8 [h, w, 3]; None where none does.
    """

    label: str
    target: Area
    reference: np.ndarray | None = None


def crop(image: np.ndarray, box: Box) -> np.ndarray:
    """The pixels of `image` [H, W, 3] that a box touches, at least one each way."""
    height, width = image.shape[:2]
    return image[_span(box[1], box[3], height), _span(box[0], box[2], width)]


def assign(detections: Sequence[Detection], labels: Sequence[str], targets: Sequence[Area]) -> list[Detection | None]:
    """For each thing the detection that is taken for it, each used once; None where there are too few of its label.

    The n things of one label are its n surest detections, wherever they are: places decide only which of the n is
    which, by the assignment with the largest sum of generalised intersection over union of boxes (arXiv 1902.09630).

    Raises:
        ValueError: Labels and targets differ in number.
        MetricError: Labels repeat and scipy is not installed.
    """
    if len(labels) != len(targets):
        raise ValueError(f"each label has a target; found {len(labels)} labels and {len(targets)} targets.")
    taken: list[Detection | None] = [None] * len(labels)
    for label in dict.fromkeys(labels):
        wanted = [index for index, one in enumerate(labels) if one == label]
        found = sorted((one for one in detections if one.label == label), key=lambda one: -one.score)[: len(wanted)]
        for row, column in _pairs(found, [targets[index] for index in wanted]):
            taken[wanted[column]] = found[row]
    return taken


def identities(
    image: np.ndarray,
    found: Sequence[Detection | None],
    references: Sequence[tuple[np.ndarray, Detection]],
    embed: Embed,
) -> list[float]:
    """ID-S of each thing: cosine of the embeddings of its reference and of what was found; 0 for what was not found.

    Args:
        image: uint8 [H, W, 3].
        found: the thing in `image`, None for what was not found.
        references: for each thing a picture and where it is in it.
        embed: which thing it is.

    Raises:
        ValueError: There are not as many references as things.
    """
    return [
        0.0 if one is None else identity_similarity(embed(picture, shown), embed(image, one))
        for one, (picture, shown) in zip(found, references, strict=True)
    ]


def measure_layout(
    image: np.ndarray,
    wanted: Sequence[Wanted],
    detect: Detector,
    embed: Embed | None = None,
    background: np.ndarray | None = None,
) -> dict[str, float]:
    """`inclusion_ratio` and `fill_ratio` of a picture, and what else is given the means.

    Args:
        image: uint8 [H, W, 3].
        wanted: what should be where.
        detect: finds it.
        embed: adds `identity_similarity`, the mean over the things that have a reference. The thing in a reference is
            what `detect` finds there surest under its label, the whole reference where it finds nothing.
        background: a picture of the scene of the same size: adds `background_similarity` to it, with what is detected
            in either masked out of both.

    Raises:
        MetricError: `embed` is given but nothing has a reference.
    """
    labels, targets = [one.label for one in wanted], [one.target for one in wanted]
    detections = detect(image, labels)
    found = assign(detections, labels, targets)
    values = {"inclusion_ratio": inclusion_ratio(found, targets), "fill_ratio": fill_ratio(found, targets)}
    if embed is not None:
        pictured = [index for index, one in enumerate(wanted) if one.reference is not None]
        if not pictured:
            raise MetricError("identity is compared with references; none was given. Give a reference or no embedding.")
        shown = [
            (one.reference, _shown(one.reference, one.label, detect)) for one in wanted if one.reference is not None
        ]
        values["identity_similarity"] = float(np.mean(identities(image, [found[i] for i in pictured], shown, embed)))
    if background is not None:
        things = [one.area for one in (*detections, *detect(background, labels))]
        values["background_similarity"] = background_similarity(image, background, things)
    return values


def _span(start: float, stop: float, pixels: int) -> slice:
    first = min(int(np.floor(start * pixels + _EXACT)), pixels - 1)
    return slice(first, max(first + 1, int(np.ceil(stop * pixels - _EXACT))))


def _shown(picture: np.ndarray, label: str, detect: Detector) -> Detection:
    """What a reference shows."""
    found = [one for one in detect(picture, [label]) if one.label == label]
    return max(found, key=lambda one: one.score, default=Detection(label, WHOLE))


def _pairs(found: Sequence[Detection], targets: Sequence[Area]) -> list[tuple[int, int]]:
    """(detection, target), as many as there are detections."""
    if len(targets) == 1:
        return [(row, 0) for row in range(len(found))]
    try:
        from scipy.optimize import linear_sum_assignment
    except ImportError as missing:
        raise MetricError(
            f"{len(targets)} things of one label are told apart by scipy's assignment; install it: "
            "pip install 'attnctrl[eval]'."
        ) from missing
    boxes = [mask_box(target) if isinstance(target, np.ndarray) else target for target in targets]
    likeness = np.array([[generalised_iou(one.box, box) for box in boxes] for one in found])
    rows, columns = linear_sum_assignment(likeness.reshape(len(found), len(targets)), maximize=True)
    return list(zip(rows.tolist(), columns.tolist(), strict=True))
