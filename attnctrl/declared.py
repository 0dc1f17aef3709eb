"""The regions that the controls of a stack declare, scene by scene, and who acts on which."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from .controls.base import Control
from .errors import ControlError
from .region import Grid, Region, membership

__all__ = ["Declared", "nth"]


class Declared:
    """What the controls of a stack declare, those that are idle or out of their window included, so that isolation
    keeps its regions.

    Attributes:
        scenes: for how many samples there are regions; 1 where one set stands for all.

    Raises:
        ControlError: when controls hold regions for different numbers of samples.
    """

    def __init__(self, controls: Sequence[Control]) -> None:
        self._members: dict[tuple[int, Grid], Tensor] = {}
        self._declaring = [control for control in controls if control.scenes]
        told = [(control.scenes, control.prompt_spans) for control in controls]
        counts = {len(scenes) for pair in told for scenes in pair} - {0, 1}
        if len(counts) > 1:
            raise ControlError(
                f"Controls of one stack hold regions for different numbers of samples: {sorted(counts)}."
            )
        self.scenes = max(counts, default=1)

    def _text_declaring(self) -> list[Control]:
        return [control for control in self._declaring if control.appends_text]

    def _lending(self, borrower: Control) -> list[Control]:
        """Whose regions a control without any acts on: those of its own branch, or else of any."""
        lenders = self._text_declaring()
        near = [one for one in lenders if "all" in (one.branch, borrower.branch) or one.branch == borrower.branch]
        return near or lenders

    def regions(self, scene: int) -> tuple[Region, ...]:
        """All declared regions of a scene, numbered as in its layout."""
        return tuple(region for control in self._declaring for region in _scene(control, scene))

    def own(self, control: Control, scene: int) -> frozenset[int]:
        """The numbers of the regions that a control acts on: its own, or else those declared with texts."""
        wanted = [control] if control.scenes else self._lending(control) if control.needs_regions else []
        numbers: set[int] = set()
        start = 0
        for declaring in self._declaring:
            stop = start + len(_scene(declaring, scene))
            if any(declaring is one for one in wanted):
                numbers.update(range(start, stop))
            start = stop
        return frozenset(numbers)

    def member(self, scene: int, grid: Grid | None) -> Tensor:
        """bool [regions, image tokens]: who holds each token of a scene's picture at this grid; built once."""
        if grid is None:
            return torch.zeros(len(self.regions(scene)), 0, dtype=torch.bool)
        key = (scene, grid)
        if key not in self._members:
            parts = [membership(_scene(c, scene), grid, c.overlap_policy) for c in self._declaring]
            self._members[key] = torch.cat([membership((), grid), *parts])
        return self._members[key]

    def of_other(self, scene: int, other: int, grid: Grid | None) -> Tensor:
        """bool [regions + 1, image tokens] of another scene's picture: who of `scene`'s regions has a namesake there,
        and in the last row those that have none here."""
        own, theirs = self.regions(scene), self.regions(other)
        held = self.member(other, grid)
        names = [region.label for region in own]
        rows = torch.zeros(len(own) + 1, held.shape[1], dtype=torch.bool)
        for region, cells in zip(theirs, held, strict=True):
            rows[names.index(region.label) if region.label in names else len(own)] |= cells
        return rows


def _scene(control: Control, scene: int) -> tuple[Region, ...]:
    return nth(control.scenes, scene)


def nth(scenes: Sequence[tuple[Any, ...]], scene: int) -> tuple[Any, ...]:
    """What belongs to a scene, where one entry stands for all of them."""
    return scenes[scene if len(scenes) > 1 else 0] if scenes else ()
