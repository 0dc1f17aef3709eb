"""Where what stands in one box stands when it is put into another: a scale and two middles, for rows and columns."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from math import prod
from typing import Literal

import torch
from torch import Tensor

from .region import Grid

__all__ = ["Box", "Fit", "Fitting", "around", "fitted", "repeats", "token_box"]

Box = tuple[float, float, float, float]
"""(x0, y0, x1, y1), half-open, in any unit: shares of a picture, tokens, pixels."""
Fit = Literal["stretch", "contain", "cover"]


@dataclass(frozen=True)
class Fitting:
    """place' = target + (place - source) * scale, each (y, x): the middles of both boxes, in one unit."""

    scale: tuple[float, float]
    source: tuple[float, float]
    target: tuple[float, float]

    @property
    def area(self) -> float:
        """How much larger it becomes."""
        return self.scale[0] * self.scale[1]

    def shift(self, places: Tensor) -> Tensor:
        """How far cells move: float64 [..., 2] (y, x) of cell numbers [..., 2], whose middles are half a cell on."""
        scale, source, target = (torch.tensor(pair, dtype=torch.float64) for pair in self.__dict__.values())
        middles = places.to(torch.float64) + 0.5
        return target + (middles - source) * scale - middles


def fitted(source: Box, target: Box, fit: Fit) -> Fitting:
    """The map of `source` onto `target`.

    Args:
        fit: "stretch" fills the target, each side by itself; "contain" and "cover" keep proportions, as large as fits
            into the target, or as small as fills it; middle upon middle.
    """
    (height, width), (tall, wide) = _size(source), _size(target)
    sides = tall / height, wide / width
    scale = {"stretch": sides, "contain": (min(sides),) * 2, "cover": (max(sides),) * 2}[fit]
    return Fitting((scale[0], scale[1]), _middle(source), _middle(target))


def around(boxes: Sequence[Box]) -> Box:
    """The smallest box around all of them."""
    x0, y0, x1, y1 = zip(*boxes, strict=True)
    return min(x0), min(y0), max(x1), max(y1)


def token_box(held: Tensor, grid: Grid) -> Box:
    """The box around tokens bool [image tokens], in tokens; the same in all frames of a film."""
    cells = held[: prod(grid[-2:])].view(grid[-2:])
    rows, columns = (cells.any(axis).nonzero().flatten().tolist() for axis in (1, 0))
    return columns[0], rows[0], columns[-1] + 1, rows[-1] + 1


def repeats(cells: int, scale: float) -> Tensor:
    """How often each of so many cells in a row is taken when the row is resized: int64 [cells].

    Cell Y of the resized row takes cell floor(Y * cells / resized), with resized = round(cells * scale), at least 1.
    """
    resized = max(1, round(cells * scale))
    return torch.bincount(torch.arange(resized) * cells // resized, minlength=cells)


def _size(box: Box) -> tuple[float, float]:
    return box[3] - box[1], box[2] - box[0]


def _middle(box: Box) -> tuple[float, float]:
    return (box[1] + box[3]) / 2, (box[0] + box[2]) / 2
