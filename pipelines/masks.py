"""Where characters are in a picture: boxes that are given, masks that somebody finds, or attention to their words."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from attnctrl.pipelines.cast import Character, Shot
from torch import Tensor

from attnctrl.maps import Cells, Key, Recording, attended
from attnctrl.region import Region
from attnctrl.schedule import Window

__all__ = ["CELLS", "READING", "Attention", "MaskWarning", "attention_keys", "places"]

READING: Window = (0.3, 1.0)
"""When attention is read: the first steps know of no places yet."""
CELLS = Cells(8, 8)
"""Along whose attention maps of words are spread."""
_CELLS = ""
"""No character has this name."""
Find = Callable[[Sequence[Character]], Mapping[str, Any]]


class MaskWarning(UserWarning):
    """A character was found nowhere, or everywhere."""


@dataclass(frozen=True, eq=False)
class Attention:
    """What was read in the plain pictures of all shots.

    Attributes:
        heats: [shots, h, w] by name, what image tokens give to the words of a character.
        cells: [shots, m, h, w], what they give to `CELLS`; None where no layer has as many tokens.
    """

    heats: Mapping[str, Tensor]
    cells: Tensor | None

    @classmethod
    def of(cls, found: Recording) -> Attention:
        """Of a record of `attention_keys`."""
        heats = {name: found[name] for name in found.names if name != _CELLS}
        return cls(heats, found.get(_CELLS))

    def find(self, number: int, lost: Sequence[Character]) -> dict[str, Tensor]:
        """bool [h, w] by name: the masks of these characters in a shot."""
        heats = torch.stack([self.heats[one.name][number] for one in lost])
        cells = None if self.cells is None else self.cells[number]
        masks = attended(heats, cells, (CELLS.rows, CELLS.columns)).masks
        return {one.name: mask for one, mask in zip(lost, masks, strict=True)}


def attention_keys(words: Mapping[str, Key]) -> dict[str, Key]:
    """What `attnctrl.maps.record` reads for `Attention`; `words` of characters by name."""
    return {**words, _CELLS: CELLS}


def places(cast: Sequence[Character], shot: Shot, label: str, find: Find) -> list[Region]:
    """The regions of a shot's characters, with their names and descriptions, in the order of the cast.

    Warns of those found nowhere or everywhere.

    Args:
        label: of the shot, for warnings.
        find: the masks of those who have no box, by name.
    """
    there = [one for one in cast if one.name in (shot.who or ())]
    lost = [one for one in there if one.name not in shot.boxes]
    masks = find(lost) if lost else {}
    regions = []
    for one in there:
        if one.name in shot.boxes:
            left, top, right, bottom = (float(value) for value in shot.boxes[one.name])
            regions.append(Region(one.description, (left, top, right, bottom), name=one.name))
        elif (region := _found(one, masks[one.name], label)) is not None:
            regions.append(region)
    return regions


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
