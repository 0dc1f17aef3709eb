"""Regions that do not see each other.

Isolation after LAMIC's group isolation and region-modulated attention (arXiv 2508.00477), M_reg of "Training-free
Regional Prompting" (arXiv 2411.02395) and the attribute isolation attention of "Seg2Any" (arXiv 2506.00596).
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar, Literal

from ..call import Situation
from ..layout import Group
from ..region import Overlap, Region
from ..visibility import Visibility
from .base import Control, Scenes, scenes_of

__all__ = ["Background", "Hub", "Isolate"]

Background = Literal["isolated", "reads_all", "shared"]
Hub = Literal["relay", "source"]


@dataclass(frozen=True, eq=False)
class Isolate(Control):
    """Image tokens of different regions do not see each other.

    I_S are image tokens whose set of regions is S, or a reference bound to the regions S; S empty is the background.
    What query rows see of key columns at strength 1:

        q \\ k          | I_S', S' not empty          | background
        I_S            | S meets S'                  | only "shared"
        background     | "reads_all" and "shared"    | 1

    Registers and filling tokens of the model see and are seen by all.

    "isolated" parts the background as well (LAMIC, M_reg); "reads_all" lets it read everything without being read by
    regions (Seg2Any's asymmetry); "shared" lets everyone see it. References that belong to no region stay open to all.

    With text=True the texts of regions are parted too, in both directions: T_r from T_r' and from the prompt, T_r from
    image tokens outside r. With hub="source" the prompt's tokens do not read image tokens of regions, so the prompt
    cannot carry anything from one region to another; "relay" leaves that path open (see the reachability notes of
    `explain`).

    Strength s < 1 is soft: cut edges keep the log-weight log(1 - s). Strength 0 is not there.

    Attributes:
        regions: a list of `Region`, or one list per sample; empty takes the regions that other controls of the stack
            declare.
        background: what uncovered tokens see and who sees them.
        text: part the texts of regions as well.
        hub: whether the prompt may carry information between regions.
        overlap: policy for its own `regions`; declared ones keep the policy of the control that declares them.
    """

    name: ClassVar[str] = "isolate"
    needs_regions: ClassVar[bool] = True

    regions: Sequence[Region] | Sequence[Sequence[Region]] = ()
    background: Background = "isolated"
    text: bool = True
    hub: Hub = "relay"
    overlap: Overlap = "union"

    def __post_init__(self) -> None:
        super().__post_init__()
        scenes = scenes_of(self.regions, self.name)
        object.__setattr__(self, "regions", scenes[0] if len(scenes) == 1 else scenes)
        self._check_choice("background", Background)
        self._check_choice("hub", Hub)
        self._check_choice("overlap", Overlap)

    @property
    def scenes(self) -> Scenes:
        return scenes_of(self.regions, self.name)

    @property
    def overlap_policy(self) -> Overlap:
        return self.overlap

    def visibility(self, situation: Situation, own: frozenset[int]) -> Visibility | None:
        cut = 1 - self.strength
        return situation.tabulate(lambda q, k: 1.0 if self._sees(q, k, own) else cut)

    def _sees(self, q: Group, k: Group, own: frozenset[int]) -> bool:
        if "register" in (q.kind, k.kind):
            return True
        rows, columns = q.members & own, k.members & own
        q_text, k_text = (g.kind == "region_text" and g.index in own for g in (q, k))
        if q_text or k_text:
            return not self.text or bool(rows & columns)
        if "global" in (q.kind, k.kind):
            return not (self.hub == "source" and q.kind == "global" and columns)
        if not (_is_pictured(q, rows) and _is_pictured(k, columns)):
            return True
        if rows and columns:
            return bool(rows & columns)
        if not rows and not columns:
            return True
        return self.background == "shared" or (self.background == "reads_all" and not rows)


def _is_pictured(group: Group, members: frozenset[int]) -> bool:
    """Image tokens, and references that belong to a region."""
    return group.kind == "image" or (group.kind == "reference" and bool(members))
