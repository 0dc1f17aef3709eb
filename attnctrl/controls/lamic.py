"""Entities that stay apart in one picture: group isolation and region modulation of LAMIC (arXiv 2508.00477).

An entity has a text, a region and a reference picture. `GroupIsolation` (GIA) acts at every step and parts entities;
`RegionModulation` (RMA) parts regions as well, for the first steps, and then lets the picture become one. Together they
are phase A of the paper, the first alone is phase B.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, ClassVar, Literal

from ..call import Situation
from ..errors import ControlError
from ..layout import Span
from ..rules import Rules
from ..schedule import Window
from .grouped import Grouped

__all__ = ["Ground", "GroupIsolation", "Hubs", "RegionModulation"]

Ground = Literal["parted", "open"]
Hubs = Literal["relay", "source", "private", "drop"]

GIA = Rules.parse("""
       S C P R U F O
    S  m 1 1 m 0 m 0
    C  1 1 1 1 1 1 1
    P  1 1 1 1 1 1 1
    R  m 1 1 1 1 m 1
    U  0 1 1 1 1 0 1
    F  m 1 1 m 0 m 0
    O  0 1 1 1 1 0 1
""")
RMA = Rules.parse("""
       S C P R U F O
    S  1 1 1 1 1 1 1
    C  1 1 1 0 0 1 1
    P  1 1 1 1 1 1 1
    R  1 0 1 m 0 1 1
    U  1 0 1 0 1 1 1
    F  1 1 1 1 1 1 1
    O  1 1 1 1 1 1 1
""")
_CUT: dict[Hubs, tuple[str, ...]] = {
    "relay": (),
    "source": tuple(q + k for q in "CP" for k in "RUFO"),
    "private": ("PS", "PR", "PF", "SP", "RP", "FP"),
    "drop": ("PS", "PC", "PR", "PU", "PF", "PO", "SP", "CP", "RP", "UP", "FP", "OP"),
}


@dataclass(frozen=True, eq=False)
class GroupIsolation(Grouped):
    """Texts, regions and reference pictures of different entities do not see each other; image tokens all do.

    The table, in the letters of `attnctrl.rules` (m: where both belong to a common region):

        q \\ k  | S  C  P | R  U  F  O
        S      | m  1  1 | m  0  m  0
        C, P   | 1  1  1 | 1  1  1  1
        R      | m  1  1 | 1  1  m  1
        U      | 0  1  1 | 1  1  0  1
        F      | m  1  1 | m  0  m  0
        O      | 0  1  1 | 1  1  0  1

    A region with `spans` has its text in the prompt, encoded together with all others, as in the paper; the texts of
    the others are encoded each by itself and appended. C is the rest of the prompt, P its padding, as far as
    `words` tells.

    C and P are read by all and read all, so they carry what entities must not tell each other from one block to the
    next. hubs="relay" is the paper; with "source" C and P read texts alone; with "drop" nobody sees P; with "private"
    each entity has a copy of P of its own, appended as a part of its text, and only C, U and O see the original.

    Attributes:
        words: tokens [start, stop) of the prompt that are no padding, or a list of them for each sample; () takes all
            tokens for words. "private" needs them.
        hubs: what prompt and padding may carry.
        ground: "parted" is the paper; with "open", texts of regions and image tokens of no region see each other in
            joint attention (S and U): what spills over a region's edge knows what it belongs to. In cross
            attention it would be drawn there, so there they stay parted.
        table: another table, in the form that `attnctrl.rules.Rules.parse` reads.
    """

    name: ClassVar[str] = "group_isolation"
    brings_regions: ClassVar[bool] = True
    appends_text: ClassVar[bool] = True

    words: Sequence[Span] | Sequence[Sequence[Span]] = ()
    hubs: Hubs = "relay"
    ground: Ground = "parted"
    table: str = ""

    def __post_init__(self) -> None:
        super().__post_init__()
        self._check_choice("hubs", Hubs)
        self._check_choice("ground", Ground)
        object.__setattr__(self, "words", _spans(self.words, self.name))
        if self.table:
            Rules.parse(self.table)
        if self.hubs == "private" and not self.words:
            raise ControlError(
                f"'{self.name}': hubs='private' copies the prompt's padding for each region, and without words nothing "
                "tells which tokens that is. Give words=attnctrl.phrase_spans(pipe, prompt, prompt)."
            )

    @property
    def copies_filling(self) -> bool:
        return self.hubs == "private"

    @property
    def prompt_spans(self) -> tuple[tuple[Span, ...], ...]:
        if self.words and isinstance(self.words[0][0], int):
            return (self.words,)  # type: ignore[return-value]
        return self.words  # type: ignore[return-value]

    def rules(self, situation: Situation) -> Rules:
        rules = (Rules.parse(self.table) if self.table else GIA).with_marks("0", *_CUT[self.hubs])
        opened = self.ground == "open" and "image" in situation.frame.keys
        return rules.with_marks("1", "SU", "US") if opened else rules


@dataclass(frozen=True, eq=False)
class RegionModulation(Grouped):
    """Regions, the uncovered part and the prompt do not see each other, for the first steps of a run.

    What the table cuts, in the letters of `attnctrl.rules`: R from R' of no common region, R from U, C from R and U,
    all in both directions; texts, padding and reference pictures are left to `GroupIsolation`.

    The paper's window is one step of twenty; the default ends at a tenth of the denoising progress, and at least one
    step is in every window that is not empty.

    Attributes:
        table: another table, in the form that `attnctrl.rules.Rules.parse` reads.
    """

    name: ClassVar[str] = "region_modulation"

    window: Window = (0.0, 0.1)
    table: str = ""

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.table:
            Rules.parse(self.table)

    def rules(self, situation: Situation) -> Rules:
        if self.table:
            return Rules.parse(self.table)
        # in cross attention uncovered tokens have nothing but the prompt to read
        return RMA if "image" in situation.frame.keys else RMA.with_marks("1", "UC")


def _spans(given: Any, name: str) -> Any:
    """Tuples of [start, stop), or a tuple of them for each sample.

    Raises:
        ControlError: when they are neither.
    """
    try:
        flat = all(isinstance(one[0], int) for one in given)
        scenes = [given] if flat else given
        made = tuple(tuple((int(start), int(stop)) for start, stop in scene) for scene in scenes)
    except (TypeError, ValueError, IndexError) as error:
        raise ControlError(
            f"'{name}': words are tokens [start, stop) of the prompt, or a list of them per sample; found {given!r}."
        ) from error
    return made[0] if flat else made
