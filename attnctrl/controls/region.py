"""Regions of the picture with texts of their own.

Region-modulated attention after "Training-free Regional Prompting for Diffusion Transformers" (arXiv 2411.02395, mask
M_reg and base ratio) and the semantic alignment mask of "Seg2Any" (arXiv 2506.00596), with LAMIC's rule for references
(arXiv 2508.00477).
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar, Literal

from ..call import Blend, Situation
from ..layout import Group
from ..region import Overlap, Region
from ..visibility import Visibility
from .base import Control, Scenes, scenes_of

__all__ = ["GlobalText", "Regions"]

GlobalText = Literal["open", "background", "none"]


@dataclass(frozen=True, eq=False)
class Regions(Control):
    """Each region reads its own text; the text is encoded by itself and appended to the prompt while the control acts.

    T_g is the prompt, T_r the text of region r, I_S image tokens whose set of regions is S, F_k reference picture k,
    bound to the regions B that name it (B empty: open to all). What query rows see of key columns at strength 1 ("g(S)"
    is 1 for global_text="open", S empty for "background", 0 for "none"):

        q \\ k  | T_g   | T_r'           | I_S'                    | F_k', bound to B'
        T_g    | 1     | 0              | g(S')                   | g(B')
        T_r    | 0     | r = r'         | r in S'                 | r in B'
        I_S    | g(S)  | r' in S        | 1                       | B' empty, or S meets B'
        F_k    | g(B)  | r' in B        | B empty, or B meets S'  | B, B' both empty, or B meets B'

    The table is symmetric. Image rows see each other: add `Isolate` to part them. Registers and filling tokens of the
    model see and are seen by all.

    Strength s < 1 is soft (s = strength times the region's own, the largest one where regions overlap): edges of the
    plain model that the table cuts keep the weight 1 - s (log-weight log(1 - s)), edges from image or bound reference
    to T_r get the weight s; edges that neither the plain model nor the table has stay cut. So s -> 0 is the plain
    model, and strength 0 is not there.

    base_ratio b mixes in a second pass over [T_g, image, references] without any mask, arXiv 2411.02395:
    image rows = (1 - b) * table + b * open, T_g rows take the open pass, T_r rows the table. Other controls do not
    touch it.

    One region on the whole canvas with the prompt's own tokens equals the plain model for "background" and "none" at
    any base_ratio. It does not for "open": there the image reads the same text twice.

    In cross attention, where keys are texts alone, tokens of no region read the prompt with "none" as well.

    Attributes:
        regions: a list of `Region`, or one list per sample of the batch.
        overlap: "union", tokens in several regions read all their texts; "priority", later regions lie on top;
            "background", such tokens belong to none and read the prompt.
        base_ratio: b in [0, 1); published examples use 0.1 to 0.3.
        global_text: which image tokens see the prompt, and are seen by it.
    """

    name: ClassVar[str] = "regions"
    needs_regions: ClassVar[bool] = True
    appends_text: ClassVar[bool] = True

    regions: Sequence[Region] | Sequence[Sequence[Region]] = ()
    overlap: Overlap = "union"
    base_ratio: float = 0.0
    global_text: GlobalText = "background"

    def __post_init__(self) -> None:
        super().__post_init__()
        scenes = scenes_of(self.regions, self.name)
        object.__setattr__(self, "regions", scenes[0] if len(scenes) == 1 else scenes)
        self._check_choice("overlap", Overlap)
        self._check_choice("global_text", GlobalText)
        self._check_range("base_ratio", 0, 1, open_end=True)

    @property
    def is_idle(self) -> bool:
        return super().is_idle or not any(region.strength for scene in self.scenes for region in scene)

    @property
    def scenes(self) -> Scenes:
        return scenes_of(self.regions, self.name)

    @property
    def overlap_policy(self) -> Overlap:
        return self.overlap

    def visibility(self, situation: Situation, own: frozenset[int]) -> Visibility | None:
        own = _present(situation, own)
        # in cross attention uncovered tokens have nothing but the prompt to read
        crossed = "image" not in situation.frame.keys

        def strength(members: frozenset[int]) -> float:
            return self.strength * max((situation.regions[r].strength for r in members), default=1.0)

        def weight(q: Group, k: Group) -> float:
            if "register" in (q.kind, k.kind) or (q is k and k.kind == "region_text"):
                return 1.0
            if _is_text(k, own):
                return strength(k.members) if k.index in q.members and q.kind != "region_text" else 0.0
            if _is_text(q, own):
                return float(q.index in k.members and k.kind != "region_text")
            if "region_text" in (q.kind, k.kind):
                return 1.0  # another control's text
            rows, columns = q.members & own, k.members & own
            if crossed and not rows and k.kind == "global":
                return 1.0
            return 1.0 if self._vanilla_edge_stays(q, k, rows, columns) else 1 - strength(rows | columns)

        return situation.tabulate(weight)

    def _vanilla_edge_stays(self, q: Group, k: Group, rows: frozenset[int], columns: frozenset[int]) -> bool:
        if q.kind == k.kind == "global":
            return True
        if "global" in (q.kind, k.kind):
            return self.global_text == "open" or (self.global_text == "background" and not rows | columns)
        bound = (q.kind == "reference" and rows) or (k.kind == "reference" and columns)
        return not bound or bool(rows & columns)

    def blend(self, situation: Situation, own: frozenset[int]) -> Blend | None:
        if self.base_ratio == 0:
            return None
        own = _present(situation, own)
        visibility = situation.tabulate(lambda q, k: float(q is k or not (_is_text(q, own) or _is_text(k, own))))
        share = {"global": 1.0, "image": self.base_ratio, "reference": self.base_ratio}
        return Blend(visibility, situation.share(lambda group: share.get(group.kind, 0.0)))


def _present(situation: Situation, own: frozenset[int]) -> frozenset[int]:
    """Regions of strength 0 are not there: their tokens are background."""
    return frozenset(r for r in own if situation.regions[r].strength > 0)


def _is_text(group: Group, own: frozenset[int]) -> bool:
    return group.kind == "region_text" and group.index in own
