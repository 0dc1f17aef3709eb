"""Groups of tokens: what every control treats alike.

layout = Layout.of(text=12, image=(8, 8))                    # tokens in the model's own order
member = membership([Region("a cat", box=(0, 0, .5, 1))], (8, 8))
atom, groups = partition(layout, member, ...)                # sets of tokens that controls treat alike
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from types import MappingProxyType
from typing import Literal

import torch
from torch import Tensor

from .errors import LayoutError
from .layout import Layout, Span
from .region import Region

__all__ = ["OTHERS", "Group", "Words", "marked", "partition"]

Kind = Literal["global", "phrase", "filling", "region_text", "pad", "image", "reference", "register", "shared"]
OTHERS = -1
"""Stands for regions of another picture that have no namesake in this one."""


@dataclass(frozen=True)
class Group:
    """Tokens that every control treats alike.

    Attributes:
        kind: of text "global" (the prompt), "phrase" (words of it that tell of a region), "filling" (its padding),
            "region_text" (what is appended) or "pad" (unused); "image" (a cell of the picture), "reference",
            "register", or "shared" (a cell of another picture of the batch).
        index: number of the region (region_text, phrase), of the reference, or of the other picture; -1 otherwise.
        members: regions that hold these tokens; empty means uncovered, or a reference that is open to all. Of another
            picture's tokens, the regions of the same names, and `OTHERS` for those that have no namesake.
        name: for messages and reports.
    """

    kind: Kind
    index: int = -1
    members: frozenset[int] = field(default_factory=frozenset)
    name: str = ""


@dataclass(frozen=True)
class Words:
    """What the tokens of the prompt are: those that tell of a region, by its number, and all that are no padding.

    Where `all` is empty, every token of the prompt is one of its words.
    """

    phrases: Mapping[int, tuple[Span, ...]] = field(default_factory=dict)
    all: tuple[Span, ...] = ()

    def groups(self, tokens: int, regions: Sequence[Region]) -> list[tuple[Tensor, Group]]:
        """(bool [tokens], group) of each kind of words.

        Raises:
            LayoutError: when spans lie outside the prompt, or those of two regions overlap.
        """
        found: list[tuple[Tensor, Group]] = []
        left = torch.ones(tokens, dtype=torch.bool)
        for number, spans in self.phrases.items():
            mine = marked(spans, tokens, f"Region '{regions[number].label}'")
            if bool((mine & ~left).any()):
                raise LayoutError(
                    f"Region '{regions[number].label}': its words of the prompt, tokens {list(spans)}, are those of "
                    "another region as well. Give each region words of its own."
                )
            left &= ~mine
            found.append((mine, Group("phrase", number, frozenset([number]), f"words of {regions[number].label}")))
        words = marked(self.all, tokens, "The prompt") if self.all else torch.ones(tokens, dtype=torch.bool)
        rest = [(left & words, Group("global", name="prompt")), (left & ~words, Group("filling", name="filling"))]
        return [(mine, group) for mine, group in (*found, *rest) if bool(mine.any())]


def marked(spans: Sequence[Span], tokens: int, whose: str) -> Tensor:
    """bool [tokens]: those of the spans. Raises `LayoutError` when one lies outside."""
    marked = torch.zeros(tokens, dtype=torch.bool)
    for start, stop in spans:
        if not 0 <= start < stop <= tokens:
            raise LayoutError(
                f"{whose}: tokens [{start}, {stop}) are not in the encoded prompt, which has {tokens}. Take the spans "
                "from attnctrl.phrase_spans."
            )
        marked[start:stop] = True
    return marked


def _cells(member: Tensor) -> list[tuple[Tensor, frozenset[int]]]:
    """(bool [tokens], rows) of each combination of rows that holds tokens; `member` is bool [rows, tokens]."""
    # a further column, alike for all, keeps `unique` content where there are no rows
    marked = torch.cat([member.T, torch.zeros(member.shape[1], 1, dtype=torch.bool)], dim=1)
    cells, inverse = torch.unique(marked, dim=0, return_inverse=True)
    return [(inverse == n, frozenset(cell.nonzero().flatten().tolist())) for n, cell in enumerate(cells)]


def partition(
    layout: Layout,
    member: Tensor,
    regions: Sequence[Region],
    words: Words = Words(),
    shared: Mapping[int, Tensor] = MappingProxyType({}),
) -> tuple[Tensor, tuple[Group, ...]]:
    """Split the sequence into groups: one per text, reference and occurring combination of regions.

    Args:
        layout: the sequence; "text.region<r>" is the text of `regions[r]`.
        member: bool [R, image tokens], from `membership`.
        regions: R regions, for names and bound references.
        words: what the tokens of the prompt are.
        shared: bool [R + 1, image tokens] of each other picture whose tokens "shared.<n>" are: the members of its cells
            by this picture's regions, and in the last row those of others.

    Returns:
        (atom int64 [tokens], groups): `groups[atom[t]]` holds token t.
    """
    atom = torch.empty(layout.tokens, dtype=torch.int64)
    groups: list[Group] = []

    def add(group: Group) -> int:
        groups.append(group)
        return len(groups) - 1

    for item in layout.ranges:
        if len(item) == 0:
            continue
        span = slice(item.start, item.stop)
        if item.name == "image":
            for mine, members in _cells(member):
                names = " + ".join(regions[r].label for r in sorted(members))
                atom[span][mine] = add(Group("image", -1, members, f"image of {names}" if names else "background"))
        elif item.name.startswith("shared."):
            index = int(item.name.rpartition(".")[2])
            for mine, members in _cells(shared[index]):
                found = frozenset(OTHERS if r == len(regions) else r for r in members)
                names = " + ".join("others" if r == OTHERS else regions[r].label for r in sorted(found))
                atom[span][mine] = add(Group("shared", index, found, f"picture {index}: {names or 'background'}"))
        elif item.name.startswith("reference."):
            index = int(item.name.rpartition(".")[2])
            bound = frozenset(r for r, region in enumerate(regions) if region.reference == index)
            atom[span] = add(Group("reference", index, bound, f"reference {index}"))
        elif item.name.startswith("text.region"):
            index = int(item.name.removeprefix("text.region"))
            atom[span] = add(Group("region_text", index, frozenset([index]), f"text of {regions[index].label}"))
        elif item.name == "text.pad":
            atom[span] = add(Group("pad", name="padding"))
        elif item.name.endswith("registers") or item.name == "padding":
            atom[span] = add(Group("register", name=item.name))
        elif item.name == "text.global":
            for mine, group in words.groups(len(item), regions):
                atom[span][mine] = add(group)
        else:
            atom[span] = add(Group("global", name="prompt"))
    return atom, tuple(groups)
