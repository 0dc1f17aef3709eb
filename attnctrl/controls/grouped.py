"""Controls that are a table of rules on regions: what they have in common."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import ClassVar

from ..call import Situation
from ..groups import Group
from ..rules import Rules
from ..visibility import Visibility
from .regional import Regional

__all__ = ["Grouped", "is_appended"]


@dataclass(frozen=True, eq=False)
class Grouped(Regional):
    """Base of controls that say by `Rules` who sees whom.

    Strength s < 1 is soft: edges of the plain model that the table cuts keep the weight 1 - s (log-weight log(1 - s)).
    Where the texts of regions are appended, edges to them get the weight s, with s multiplied by the region's own
    strength (the largest one where regions overlap), and edges that neither the plain model nor the table has stay cut.
    So s -> 0 is the plain model, and strength 0 is not there.

    Attributes:
        reference_weight: w >= 0: the reference of a region counts w times to its image tokens (log-weight log w), as if
            it were there w times; 1 is as the model has it. What region tokens read of a picture shrinks with each
            picture, text and region that share their attention; more than 1 makes up for it.
        text_weight: w >= 0: the text of a region counts w times to its image tokens, in the same way.
    """

    needs_regions: ClassVar[bool] = True

    reference_weight: float = field(default=1.0, kw_only=True)
    text_weight: float = field(default=1.0, kw_only=True)

    def __post_init__(self) -> None:
        super().__post_init__()
        self._check_range("reference_weight", 0, 1000)
        self._check_range("text_weight", 0, 1000)

    @property
    def is_idle(self) -> bool:
        silent = self.appends_text and not any(region.strength for scene in self.scenes for region in scene)
        return super().is_idle or silent

    def rules(self, situation: Situation) -> Rules:
        """Who sees whom at strength 1."""
        raise NotImplementedError

    def visibility(self, situation: Situation, own: frozenset[int]) -> Visibility | None:
        # a sample may have no regions
        return situation.tabulate(self.weight(situation, own)) if own else None

    def weight(self, situation: Situation, own: frozenset[int]) -> Callable[[Group, Group], float]:
        """(query group, key group) -> with which weight the one sees the other."""
        rules, own = self.rules(situation), self.present(situation, own)

        def weight(q: Group, k: Group) -> float:
            if "register" in (q.kind, k.kind):
                return 1.0
            if k.kind == "shared":
                return self.of_shared(q, k)
            sees = rules.sees(q, k, own)
            if is_appended(q, own) or is_appended(k, own):
                to_text = self.appends_text and not is_appended(q, own)
                cut = 0.0 if self.appends_text else 1 - self.strength
                counts = self._counts(situation, q, k, own)
                return counts * (self._strength(situation, k.members) if to_text else 1.0) if sees else cut
            if sees:
                return self._counts(situation, q, k, own)
            return 1 - self._strength(situation, (q.members | k.members) & own)

        return weight

    def of_shared(self, q: Group, k: Group) -> float:
        """With which weight a token sees one of another picture, as far as this control has a say."""
        return 1.0

    def present(self, situation: Situation, own: frozenset[int]) -> frozenset[int]:
        """Regions of strength 0 are not there for controls that bring their texts: their tokens are background."""
        return frozenset(r for r in own if situation.regions[r].strength > 0) if self.appends_text else own

    def _counts(self, situation: Situation, q: Group, k: Group, own: frozenset[int]) -> float:
        """How often a reference or a text of a region counts to its image tokens, softened as everything else."""
        told = {"reference": self.reference_weight, "phrase": self.text_weight, "region_text": self.text_weight}
        members = q.members & k.members & own
        if q.kind != "image" or k.kind not in told or not members:
            return 1.0
        strength = self._strength(situation, members)
        return 1 - strength + strength * told[k.kind]

    def _strength(self, situation: Situation, members: frozenset[int]) -> float:
        if not self.appends_text:
            return self.strength
        return self.strength * max((situation.regions[r].strength for r in members), default=1.0)


def is_appended(group: Group, own: frozenset[int]) -> bool:
    """The group is a text that was appended for one of the regions `own`."""
    return group.kind == "region_text" and group.index in own
