"""Where characters are in a picture: boxes that are given, masks that somebody finds, or attention to their words."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Mapping, Sequence
from typing import TYPE_CHECKING, Any

import torch
from attnctrl.pipelines.cast import Character, Shot
from torch import Tensor

from attnctrl.maps import minmax, otsu
from attnctrl.region import Region

if TYPE_CHECKING:
    from PIL import Image

__all__ = ["MaskWarning", "attended", "places"]


class MaskWarning(UserWarning):
    """A character was found nowhere, or everywhere."""


def places(
    cast: Sequence[Character],
    shot: Shot,
    label: str,
    image: Image.Image,
    segment: Callable[[Image.Image, Character], Any] | None,
    heats: Mapping[str, Tensor],
) -> list[Region]:
    """The regions of a shot's characters, with their names and descriptions, in the order of the cast.

    Warns of those found nowhere or everywhere.

    Args:
        label: of the shot, for warnings.
        image: its plain picture.
        segment: finds who has no box; None takes attention.
        heats: [h, w] by name, what image tokens give to the words.
    """
    there = [one for one in cast if one.name in (shot.who or ())]
    lost = [one for one in there if one.name not in shot.boxes]
    if segment is not None:
        masks = {one.name: segment(image, one) for one in lost}
    else:
        found = attended(torch.stack([heats[one.name] for one in lost])) if lost else ()
        masks = {one.name: mask for one, mask in zip(lost, found, strict=True)}
    regions = []
    for one in there:
        if one.name in shot.boxes:
            left, top, right, bottom = (float(value) for value in shot.boxes[one.name])
            regions.append(Region(one.description, (left, top, right, bottom), name=one.name))
        elif (region := _found(one, masks[one.name], label)) is not None:
            regions.append(region)
    return regions


def attended(heats: Tensor) -> Tensor:
    """bool [n, h, w] of maps [n, h, w]: Otsu's masks; a token in several is that of the greatest stretched map."""
    strongest = minmax(heats).argmax(0) == torch.arange(len(heats), device=heats.device)[:, None, None]
    return otsu(heats).masks & strongest


def _found(one: Character, mask: Any, label: str) -> Region | None:
    region = None if mask is None else Region(one.description, mask=mask, name=one.name)
    inside = torch.zeros(1, dtype=torch.bool) if region is None else region.mask >= 0.5
    if not bool(inside.any()):
        warnings.warn(
            f"{label}: '{one.name}' was found nowhere, so it shares nothing there.", MaskWarning, stacklevel=2
        )
        return None
    if bool(inside.all()):
        warnings.warn(
            f"{label}: '{one.name}' was found everywhere; it has the whole picture.", MaskWarning, stacklevel=2
        )
        return Region(one.description, name=one.name)
    return region
