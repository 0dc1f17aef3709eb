"""Controls that may hold regions of their own."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field

from ..region import Overlap, Region
from .base import Control, Scenes, scenes_of

__all__ = ["Regional"]


@dataclass(frozen=True, eq=False)
class Regional(Control):
    """Base of controls with regions.

    Attributes:
        regions: a list of `Region`, or one list per sample of the batch; empty takes the regions that other controls of
            the stack declare.
        overlap: policy for its own `regions`; declared ones keep the policy of the control that declares them. "union",
            tokens in several regions are in all of them; "priority", later regions lie on top; "background", such
            tokens belong to none.
    """

    regions: Sequence[Region] | Sequence[Sequence[Region]] = ()
    overlap: Overlap = field(default="union", kw_only=True)

    def __post_init__(self) -> None:
        super().__post_init__()
        scenes = scenes_of(self.regions, self.name)
        object.__setattr__(self, "regions", scenes[0] if len(scenes) == 1 else scenes)
        self._check_choice("overlap", Overlap)

    @property
    def scenes(self) -> Scenes:
        return scenes_of(self.regions, self.name)

    @property
    def overlap_policy(self) -> Overlap:
        return self.overlap
