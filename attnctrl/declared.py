"""The regions that the controls of a stack declare, scene by scene, and who acts on which."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from math import prod
from typing import Any

import torch
from torch import Tensor

from .controls.base import Control
from .errors import ControlError
from .region import Grid, Region, membership

__all__ = ["Declared", "nth"]

_Key = tuple[int, str, int]
"""Of a region: its identity, the overlap policy, and which of its occurrences in a list."""


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
        return [one for one in self._declaring if one.appends_text and not one.placeless]

    def _lending(self, borrower: Control) -> list[Control]:
        """Whose regions a control without any acts on: those of its own branch, or else of any."""
        lenders = self._text_declaring()
        near = [one for one in lenders if "all" in (one.branch, borrower.branch) or one.branch == borrower.branch]
        return near or lenders

    def _numbered(self, scene: int) -> dict[_Key, tuple[int, Region]]:
        """The number and region of each: one that several controls declare alike is one region."""
        found: dict[_Key, tuple[int, Region]] = {}
        for control in self._declaring:
            for key, region in _keyed(control, scene):
                found.setdefault(key, (len(found), region))
        return found

    def regions(self, scene: int) -> tuple[Region, ...]:
        """All declared regions of a scene, numbered as in its layout."""
        return tuple(region for _, region in self._numbered(scene).values())

    def placed(self, scene: int) -> list[int]:
        """The numbers of those regions of a scene that have a place in the picture."""
        numbers = self._numbered(scene)
        owners = [control for control in self._declaring if not control.placeless]
        return sorted({numbers[key][0] for control in owners for key, _ in _keyed(control, scene)})

    def own(self, control: Control, scene: int) -> frozenset[int]:
        """The numbers of the regions that a control acts on: its own, or else those declared with texts."""
        wanted = [control] if control.scenes else self._lending(control) if control.needs_regions else []
        numbers = self._numbered(scene)
        return frozenset(numbers[key][0] for one in wanted for key, _ in _keyed(one, scene))

    def member(self, scene: int, grid: Grid | None) -> Tensor:
        """bool [regions, image tokens]: who holds each token of a scene's picture at this grid; built once."""
        numbers = self._numbered(scene)
        if grid is None:
            return torch.zeros(len(numbers), 0, dtype=torch.bool)
        if (scene, grid) not in self._members:
            nowhere = torch.zeros(1, prod(grid), dtype=torch.bool)
            rows = dict.fromkeys(range(len(numbers)), torch.zeros(1, 0, dtype=torch.bool))
            for control in self._declaring:
                mine = _keyed(control, scene)
                placed = [] if control.placeless else [region for _, region in mine]
                held = membership(placed, grid, control.overlap_policy) if placed else nowhere.expand(len(mine), -1)
                rows |= {numbers[key][0]: row[None] for (key, _), row in zip(mine, held, strict=True)}
            self._members[scene, grid] = torch.cat([membership((), grid), *rows.values()])
        return self._members[scene, grid]

    def of_other(self, scene: int, other: int, grid: Grid | None) -> Tensor:
        """bool [regions + 1, image tokens] of another scene's picture: who of `scene`'s regions has a namesake there,
        and in the last row those that have none here."""
        names = [region.label for region in self.regions(other)]
        return self.of_names(scene, names, self.member(other, grid))

    def of_names(self, scene: int, names: Sequence[str], held: Tensor) -> Tensor:
        """bool [regions + 1, tokens] as `of_other`, of tokens `held` bool [names, tokens] by regions of these names."""
        own = [region.label for region in self.regions(scene)]
        rows = torch.zeros(len(own) + 1, held.shape[1], dtype=torch.bool)
        for name, cells in zip(names, held, strict=True):
            rows[own.index(name) if name in own else len(own)] |= cells
        return rows


def _keyed(control: Control, scene: int) -> list[tuple[_Key, Region]]:
    """The regions that a control declares for a scene; one that it names twice is two."""
    met: Counter[int] = Counter()
    keyed: list[tuple[_Key, Region]] = []
    for region in nth(control.scenes, scene):
        keyed.append(((id(region), control.overlap_policy, met[id(region)]), region))
        met[id(region)] += 1
    return keyed


def nth(scenes: Sequence[tuple[Any, ...]], scene: int) -> tuple[Any, ...]:
    """What belongs to a scene, where one entry stands for all of them."""
    return scenes[scene if len(scenes) > 1 else 0] if scenes else ()
