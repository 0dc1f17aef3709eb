"""Subjects of other pictures, read as if they stood where they stand in the picture that reads them.

After Reposition Attention of IR-Diffusion (arXiv 2411.19261), as its abstract tells it: tokens read what is near to
them, so a subject that is shared is moved and scaled to its new place.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import ClassVar, Literal

import torch
from torch import Tensor

from ..call import Situation
from ..errors import ControlError, UnsupportedModelError
from ..fitting import Box, Fit, Fitting, around, fitted, repeats, token_box
from ..region import extent
from ..rotary import Rotary
from ..sources import Move
from ..visibility import Visibility
from .base import Branch, Control

__all__ = ["Mode", "Reposition", "UnmovedWarning"]

Mode = Literal["rope", "table", "resample"]


class UnmovedWarning(UserWarning):
    """What is read of a picture stays where it stands, since nothing here has its name."""


@dataclass(frozen=True, eq=False)
class Reposition(Control):
    """Moves what `Share` reads of a subject to its namesake's place in the reading picture:

        k_j' = R(g (p_j' - p_j)) k_j    with    p_j' = t + (p_j + 1/2 - r) s - 1/2,    log-weight g log(s_y s_x)

    where r and t are the middles of the subject's region there and here, s = size here / size there, in tokens, and g
    is `strength`. It needs a `Share` in the same layers, and regions, which any control of the stack declares; subjects
    are the same where their regions have the same name, and the first region of a name counts. Subjects without a
    namesake stay where they are, with a warning. Pictures of a bank are moved like others, but for "table".

    Attributes:
        mode: "rope" turns keys on, by fractions of a token as well, in models with rotary positions. "table", in models
            that add positions once at the input (SD3, PixArt, AuraFlow), exchanges there what was added to the
            subject's tokens, x_j - pos(p_j) + pos(p_j'), bilinear in the table: the picture that is read runs with it
            in all layers, so it should be a pinned row (`attnctrl.pinned`), whose own picture nobody looks at, and
            whoever reads it must have its subjects at the same places. "resample", for every model, moves nothing: it
            weighs each token by how often resizing the subject would take it, which is all that remains of moving keys
            without positions; with equal sizes it does nothing.
        fit: "stretch" fills the region's extent, "contain" and "cover" keep proportions.
        density: with "rope" and "table", a subject that is scaled counts as much as the area that it then covers.
        strength: g, of the way to go; 0 leaves everything where it stands.
    """

    name: ClassVar[str] = "reposition"
    follows: ClassVar[bool] = True

    mode: Mode = "rope"
    fit: Fit = "stretch"
    density: bool = True
    branch: Branch = field(default="all", kw_only=True)

    def __post_init__(self) -> None:
        super().__post_init__()
        self._check_choice("mode", Mode)
        self._check_choice("fit", Fit)

    def move(self, situation: Situation, other: int, rotary: Rotary | None) -> Move | None:
        if self.mode != "rope":
            return None
        if rotary is None or not {"y", "x"} <= set(rotary.axes):
            raise UnsupportedModelError(
                f"'{self.name}': mode='rope' turns keys on, and in this model image tokens have no rotary positions in "
                "steps of whole tokens. Use mode='resample', mode='table' in models that add positions to the picture, "
                "or a canvas (attnctrl.pipelines.canvas)."
            )
        by = self._shift(situation, other)
        shift = torch.zeros(len(by), len(rotary.axes), dtype=torch.float64)
        shift[:, [rotary.axes.index("y"), rotary.axes.index("x")]] = by
        return Move((rotary, shift))

    @property
    def exchanges(self) -> bool:
        return self.mode == "table"

    def exchange(self, situation: Situation, other: int) -> Tensor | None:
        by = self._shift(situation, other)
        namesakes = situation.shared[other][:-1]
        return by if bool(namesakes.any()) else None

    def _shift(self, situation: Situation, other: int) -> Tensor:
        """float64 [image tokens, 2]: how far, (y, x) in tokens, those of another picture go."""
        self._tell_unmoved(situation, other)
        places = _cells(situation, other)
        shift = torch.zeros(len(places), 2, dtype=torch.float64)
        for held, fitting in self._fittings(situation, other, _extents):
            shift[held] = self.strength * fitting.shift(places[held])
        return shift

    def visibility(self, situation: Situation, own: frozenset[int]) -> Visibility | None:
        if not situation.shared:
            return None
        if situation.stored and self.mode == "table":
            raise ControlError(
                f"'{self.name}': mode='table' draws the picture that is read with its subjects elsewhere, and those of "
                "a bank are drawn. Leave it out, or draw the pictures in one batch."
            )
        if any(held.names and not held.boxes for held in situation.stored):
            raise ControlError(
                f"'{self.name}': this bank does not tell where its subjects stood, as earlier versions kept none of "
                "it. Capture it anew, or leave this out."
            )
        known = situation.regions or any(situation.others.values()) or any(held.names for held in situation.stored)
        if not known:
            raise ControlError(
                f"'{self.name}' moves subjects, but no control of the stack declares regions, so nothing tells where "
                "they are. Give `Share` regions=[...], one list per picture."
            )
        keys = situation.frame.keys
        weight = torch.ones(keys.tokens, dtype=torch.float64)
        for other in situation.shared:
            span = keys[f"shared.{other}"]
            weight[span.start : span.stop] = _WEIGHTS[self.mode](self, situation, other) ** self.strength
        if bool((weight == 1).all()):
            return None
        values, atom = weight.unique(return_inverse=True)
        names = tuple(f"times {value:.3g}" for value in values.tolist())
        return Visibility(torch.zeros_like(situation.queries[0]), atom, values.log().float()[None], ("all",), names)

    def _density(self, situation: Situation, other: int) -> Tensor:
        """float64 [image tokens]: how much larger the subject of each becomes."""
        weight = torch.ones(situation.shared[other].shape[1], dtype=torch.float64)
        for held, fitting in self._fittings(situation, other, _extents) if self.density else ():
            weight[held] = fitting.area
        return weight

    def _multiplicity(self, situation: Situation, other: int) -> Tensor:
        """float64 [image tokens]: how often resizing a subject's box of tokens to its namesake's would take each."""
        cells = _cells(situation, other)
        weight = torch.ones(len(cells), dtype=torch.float64)
        for held, fitting in self._fittings(situation, other, _boxes):
            x0, y0, x1, y1 = map(int, _around_cells(cells[held]))
            rows, columns = (
                repeats(side, scale) for side, scale in zip((y1 - y0, x1 - x0), fitting.scale, strict=True)
            )
            taken = torch.outer(rows, columns).double()
            weight[held] = taken[cells[held, 0] - y0, cells[held, 1] - x0]
        return weight

    def _fittings(
        self, situation: Situation, other: int, boxes: Callable[[Situation, int, int], tuple[Box, Box]]
    ) -> Iterator[tuple[Tensor, Fitting]]:
        """(bool [image tokens], their map) of each subject of another picture that has a namesake here; of tokens in
        several, the last counts."""
        for number, held in enumerate(situation.shared[other][:-1]):
            if bool(held.any()):
                yield held, fitted(*boxes(situation, other, number), self.fit)

    def _tell_unmoved(self, situation: Situation, other: int) -> None:
        here = {region.label for region in situation.regions}
        if lacking := [name for name in _names(situation, other) if name not in here]:
            warnings.warn(
                f"'{self.name}': picture {other} has the regions {', '.join(lacking)}, which picture "
                f"{situation.line.image} has not: as far as it reads them, they stay where they are. Give regions of "
                "one subject the same name.",
                UnmovedWarning,
                stacklevel=2,
            )


_WEIGHTS: Mapping[Mode, Callable[[Reposition, Situation, int], Tensor]] = {
    "rope": Reposition._density,
    "table": Reposition._density,
    "resample": Reposition._multiplicity,
}


def _grid(situation: Situation, other: int | None = None) -> tuple[int, int]:
    """Rows and columns of tokens of the picture that reads, or of another one: of a bank it may have other ones."""
    grid = situation.frame.queries.grid
    if other is not None and situation.stored:
        grid = situation.stored[other].grid
    height, width = grid[-2:]
    return height, width


def _cells(situation: Situation, other: int) -> Tensor:
    """int64 [tokens of another picture that are there, 2]: their rows and columns; the same in all frames of a film."""
    height, width = _grid(situation, other)
    tokens = situation.stored[other].tokens if situation.stored else torch.arange(situation.shared[other].shape[1])
    inside = tokens % (height * width)
    return torch.stack([inside // width, inside % width], dim=1)


def _names(situation: Situation, other: int) -> list[str]:
    """Of the regions of another picture."""
    if situation.stored:
        return list(situation.stored[other].names)
    return [region.label for region in situation.others[other]]


def _extents(situation: Situation, other: int, number: int) -> tuple[Box, Box]:
    """The boxes around a subject in another picture and here, in tokens, as exactly as its regions tell."""

    def scaled(box: Sequence[float], grid: tuple[int, int]) -> Box:
        (x0, y0, x1, y1), (height, width) = box, grid
        return x0 * width, y0 * height, x1 * width, y1 * height

    own, theirs = _grid(situation), _grid(situation, other)
    here = situation.regions[number]
    if situation.stored:
        boxes: Sequence[Sequence[float]] = situation.stored[other].boxes
    else:
        boxes = [extent(region) for region in situation.others[other]]
    named = zip(_names(situation, other), boxes, strict=True)
    return around([scaled(box, theirs) for name, box in named if name == here.label]), scaled(extent(here), own)


def _boxes(situation: Situation, other: int, number: int) -> tuple[Box, Box]:
    """The same of the tokens that are a subject's."""
    held = situation.shared[other][number]
    return _around_cells(_cells(situation, other)[held]), token_box(situation.member[number], _grid(situation))


def _around_cells(cells: Tensor) -> Box:
    """The box around cells int64 [n, 2] (row, column), in tokens."""
    (y0, x0), (y1, x1) = cells.amin(0).tolist(), (cells.amax(0) + 1).tolist()
    return x0, y0, x1, y1
