"""Regions of the picture with texts of their own.

Region-modulated attention after "Training-free Regional Prompting for Diffusion Transformers" (arXiv 2411.02395, mask
M_reg and base ratio) and the semantic alignment mask of "Seg2Any" (arXiv 2506.00596), with LAMIC's rule for references
(arXiv 2508.00477).
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import partial
from typing import ClassVar, Literal

from ..call import Blend, Situation
from ..groups import Group
from ..rules import Rules
from ..schedule import is_empty
from ..visibility import Visibility
from .grouped import Grouped, is_appended

__all__ = ["GlobalText", "OpenTexts", "Regions"]

GlobalText = Literal["open", "background", "none"]

_RULES = Rules.parse("""
       S C P R U F O
    S  m 0 0 m 0 m 0
    C  0 1 1 1 1 1 1
    P  0 1 1 1 1 1 1
    R  m 1 1 1 1 m 1
    U  0 1 1 1 1 0 1
    F  m 1 1 m 0 m 0
    O  0 1 1 1 1 0 1
""")
_COVERED = tuple(pair for x in "RF" for y in "CP" for pair in (x + y, y + x))
_UNCOVERED = tuple(pair for x in "UO" for y in "CP" for pair in (x + y, y + x))
_CLOSED: dict[GlobalText, tuple[str, ...]] = {"open": (), "background": _COVERED, "none": (*_COVERED, *_UNCOVERED)}


@dataclass(frozen=True, eq=False)
class Regions(Grouped):
    """Each region reads its own text; the text is encoded by itself and appended to the prompt while the control acts.

    The table, in the letters of `attnctrl.rules` (m: where both belong to a common region), at strength 1; g is 1 for
    global_text="open" and h is 1 for "open" and "background":

        q \\ k  | S  C  P | R  U  F  O
        S      | m  0  0 | m  0  m  0
        C, P   | 0  1  1 | g  h  g  h
        R      | m  g  g | 1  1  m  1
        U      | 0  h  h | 1  1  0  1
        F      | m  g  g | m  0  m  0
        O      | 0  h  h | 1  1  0  1

    The table is symmetric. Image rows see each other: add `Isolate` to part them. Registers and filling tokens of the
    model see and are seen by all. Softness by `strength` is that of `Grouped`. With global_text="open" this is the
    semantic alignment mask of Seg2Any; "none" together with `Isolate` is M_reg of arXiv 2411.02395.

    base_ratio b mixes in a second pass over [C, P, image, references] without any mask, arXiv 2411.02395:
    image rows = (1 - b) * table + b * open, rows of the prompt take the open pass, those of appended texts the table.
    Other controls do not touch it.

    One region on the whole canvas with the prompt's own tokens equals the plain model for "background" and "none" at
    any base_ratio. It does not for "open": there the image reads the same text twice.

    In cross attention, where keys are texts alone, tokens of no region read the prompt with "none" as well.

    Tokens of several regions read all their texts: with mixing="mask" in one softmax; with "passes" each text has a
    softmax of its own, and the outputs are averaged ("attention couple"), so that texts of different lengths count
    alike and none fights for the first token that CLIP's texts begin with. Where no regions overlap both are the same.

    Attributes:
        base_ratio: b in [0, 1); published examples use 0.1 to 0.3.
        global_text: which image tokens see the prompt, and are seen by it.
        mixing: "auto" takes passes in cross attention, masks in joint attention.
    """

    name: ClassVar[str] = "regions"
    brings_regions: ClassVar[bool] = True
    appends_text: ClassVar[bool] = True

    base_ratio: float = 0.0
    global_text: GlobalText = "background"
    mixing: Literal["auto", "mask", "passes"] = "auto"

    def __post_init__(self) -> None:
        super().__post_init__()
        self._check_choice("global_text", GlobalText)
        self._check_choice("mixing", Literal["auto", "mask", "passes"])
        self._check_range("base_ratio", 0, 1, open_end=True)

    def rules(self, situation: Situation) -> Rules:
        rules = _RULES.with_marks("0", *_CLOSED[self.global_text])
        # in cross attention uncovered tokens have nothing but the prompt to read
        crossed = "image" not in situation.frame.keys
        return rules.with_marks("1", "UC", "UP") if crossed else rules

    def visibility(self, situation: Situation, own: frozenset[int]) -> Visibility | None:
        depth = self._depth(situation, own)
        return self._turn(situation, own, 0) if depth > 1 else super().visibility(situation, own)

    def blends(self, situation: Situation, own: frozenset[int]) -> Sequence[Blend]:
        present = self.present(situation, own)
        open_pass = _open_pass(situation, present, self.base_ratio)

        def share(group: Group, turn: int) -> float:
            texts = len(group.members & present) if group.kind == "image" else 0
            return (1 - self.base_ratio) / texts if texts > turn else 0.0

        further = [
            Blend(self._turn(situation, own, turn), situation.share(partial(share, turn=turn)), alone=False)
            for turn in range(1, self._depth(situation, own))
        ]
        return (*open_pass, *further)

    def _depth(self, situation: Situation, own: frozenset[int]) -> int:
        """The most texts that a token reads in passes of their own; 0 where it reads them together."""
        crossed = "image" not in situation.frame.keys
        if self.mixing == "mask" or (self.mixing == "auto" and not crossed):
            return 0
        present = self.present(situation, own)
        return max((len(group.members & present) for group in situation.queries[1] if group.kind == "image"), default=0)

    def _turn(self, situation: Situation, own: frozenset[int], number: int) -> Visibility:
        """What the pass sees in which tokens of several regions belong to the `number`th of theirs."""
        weight, present = self.weight(situation, own), self.present(situation, own)

        def in_turn(group: Group) -> Group:
            mine = sorted(group.members & present)
            if group.kind != "image" or len(mine) <= number:
                return group
            return replace(group, members=group.members - present | {mine[number]})

        return situation.tabulate(lambda q, k: weight(in_turn(q), k))


@dataclass(frozen=True, eq=False)
class OpenTexts(Grouped):
    """Everyone reads the texts of all regions: what layers do in which `Regions` does not act, in two methods.

    Without it such layers see the prompt alone. "Training-free Regional Prompting" (arXiv 2411.02395) masks every n-th
    block, and the blocks between read all texts; so does InvokeAI, with every second block.

    Attributes:
        base_ratio: as of `Regions`.
        global_text: "none" leaves the prompt to its own tokens and to the open pass, as arXiv 2411.02395 does.
    """

    name: ClassVar[str] = "open_texts"
    appends_text: ClassVar[bool] = True

    base_ratio: float = 0.0
    global_text: Literal["open", "none"] = "open"

    def __post_init__(self) -> None:
        super().__post_init__()
        self._check_choice("global_text", Literal["open", "none"])
        self._check_range("base_ratio", 0, 1, open_end=True)

    @property
    def is_idle(self) -> bool:
        # without regions of its own it takes those that others declare
        return self.strength == 0 or is_empty(self.window)

    def rules(self, situation: Situation) -> Rules:
        rules = _RULES.with_marks("1", "**")
        return rules if self.global_text == "open" else rules.with_marks("0", *_CLOSED["none"], "SC", "SP", "CS", "PS")

    def blends(self, situation: Situation, own: frozenset[int]) -> Sequence[Blend]:
        return _open_pass(situation, self.present(situation, own), self.base_ratio)


def _open_pass(situation: Situation, own: frozenset[int], base_ratio: float) -> Sequence[Blend]:
    """The plain model's pass, on which appended texts have no part."""
    if base_ratio == 0:
        return ()
    visibility = situation.tabulate(lambda q, k: float(q == k or not (is_appended(q, own) or is_appended(k, own))))
    whole = dict.fromkeys(("global", "phrase", "filling"), 1.0)
    share = {**whole, "image": base_ratio, "reference": base_ratio}
    return (Blend(visibility, situation.share(lambda group: share.get(group.kind, 0.0))),)
