"""Regions that do not see each other.

Isolation after LAMIC's group isolation and region-modulated attention (arXiv 2508.00477), M_reg of "Training-free
Regional Prompting" (arXiv 2411.02395) and the attribute isolation attention of "Seg2Any" (arXiv 2506.00596).
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar, Literal

from ..call import Situation
from ..groups import Group
from ..rules import Rules
from .grouped import Grouped

__all__ = ["Background", "Hub", "Isolate"]

Background = Literal["isolated", "reads_all", "shared"]
Hub = Literal["relay", "source"]
Prompt = Literal["open", "background"]

_RULES = Rules.parse("""
       S C P R U F O
    S  m 0 0 m 0 m 0
    C  0 1 1 1 1 1 1
    P  0 1 1 1 1 1 1
    R  m 1 1 m 0 m 1
    U  0 1 1 0 1 0 1
    F  m 1 1 m 0 m 1
    O  0 1 1 1 1 1 1
""")
_OPENED: dict[Background, tuple[str, ...]] = {
    "isolated": (),
    "reads_all": ("UR", "UF"),
    "shared": ("UR", "UF", "RU", "FU"),
}


@dataclass(frozen=True, eq=False)
class Isolate(Grouped):
    """Image tokens of different regions do not see each other.

    The table, in the letters of `attnctrl.rules` (m: where both belong to a common region), at strength 1:

        q \\ k  | S  C  P | R  U  F  O
        S      | m  0  0 | m  0  m  0
        C, P   | 0  1  1 | 1  1  1  1
        R      | m  1  1 | m  0  m  1
        U      | 0  1  1 | 0  1  0  1
        F      | m  1  1 | m  0  m  1
        O      | 0  1  1 | 1  1  1  1

    Registers and filling tokens of the model see and are seen by all. "isolated" parts the background U as well (LAMIC,
    M_reg); "reads_all" lets it read everything without being read by regions (Seg2Any's asymmetry); "shared" lets
    everyone see it. Of the texts S nothing is cut with text=False. With hub="source" the prompt does not read R and F,
    so it cannot carry anything from one region to another; "relay" leaves that path open (see the reachability notes of
    `explain`). With prompt="background", regions do not read the prompt, which still reads them: together with
    background="reads_all" that is Seg2Any's attribute isolation.

    Of other pictures of the batch (`Share`), tokens of regions do not see subjects of other names.

    Attributes:
        background: what uncovered tokens see and who sees them.
        text: part the texts of regions as well.
        hub: whether the prompt may carry information between regions.
        prompt: who reads the prompt.
    """

    name: ClassVar[str] = "isolate"

    background: Background = "isolated"
    text: bool = True
    hub: Hub = "relay"
    prompt: Prompt = "open"

    def __post_init__(self) -> None:
        super().__post_init__()
        self._check_choice("background", Background)
        self._check_choice("hub", Hub)
        self._check_choice("prompt", Prompt)

    def of_shared(self, q: Group, k: Group) -> float:
        parted = q.members and k.members and not q.members & k.members
        return 1 - self.strength if parted else 1.0

    def rules(self, situation: Situation) -> Rules:
        rules = _RULES.with_marks("1", *_OPENED[self.background])
        if not self.text:
            rules = rules.with_marks("1", "S*", "*S")
        if self.hub == "source":
            rules = rules.with_marks("0", "CR", "CF", "PR", "PF")
        return rules.with_marks("0", "RC", "RP") if self.prompt == "background" else rules
