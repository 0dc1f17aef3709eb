"""Named token ranges of one forward, and who stands in the rows and columns of a layer."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from math import prod
from typing import Any

from .errors import LayoutError
from .region import Grid, by

__all__ = ["Frame", "Frames", "Layout", "Measures", "Slots", "Span", "TokenRange"]

Span = tuple[int, int]
"""Tokens [start, stop) of the prompt."""


@dataclass(frozen=True)
class Measures:
    """What one forward is given: tokens of the encoded prompt, the grid of the latents, those of reference pictures.

    `padding` are tokens that fill this row up to the longest of its batch, in models that pack each row by itself.
    `fixed`: the text must keep its length, so further texts take the place of its last tokens, which are zeros.
    `closed`: why the model can take no further texts at all; empty when it can. `corner`: where the first image token
    stands, in models that are given places with each forward; () in others.
    """

    text: int
    image: Grid
    references: Sequence[Grid] = ()
    padding: int = 0
    fixed: bool = False
    closed: str = ""
    corner: tuple[float, ...] = ()


@dataclass(frozen=True)
class Slots:
    """The room of appended texts: the n-th ones of all rows begin at one place and take `sizes[n]` tokens, of which the
    text of a row fills the first `lengths[row][n]`.
    """

    sizes: tuple[int, ...]
    lengths: tuple[tuple[int, ...], ...]

    @property
    def tokens(self) -> int:
        return sum(self.sizes)


@dataclass(frozen=True)
class TokenRange:
    """Tokens [start, stop) of a sequence under one name; `grid` when they are a picture or a film in raster order."""

    name: str
    start: int
    stop: int
    grid: Grid | None = None

    def __len__(self) -> int:
        return self.stop - self.start


@dataclass(frozen=True)
class Layout:
    """The token ranges of one forward, in sequence order without gaps.

    Names: "text.global" (the prompt), "text.glyphs" (its words to be drawn, where they stand by themselves),
    "text.region<r>" (texts appended by controls), "text.pad" (filling up a batch), "image" (the latents, with their
    grid), "reference.<k>" (reference pictures, with theirs), "registers" (learned tokens that stand for nothing;
    "text.registers" and "image.registers" where they fill up a text or a picture), "padding" (filling up a row of the
    batch, which the model masks by itself). `fixed`: further texts take the place of the prompt's last tokens, and a
    row with shorter texts keeps more of those. `closed`: why there can be no further texts.
    """

    ranges: tuple[TokenRange, ...]
    fixed: bool = False
    closed: str = ""

    def __post_init__(self) -> None:
        end = 0
        for item in self.ranges:
            if item.start != end or item.stop < item.start:
                raise LayoutError(f"Token ranges must follow each other without gaps; found {self.ranges}.")
            if item.grid is not None and prod(item.grid) != len(item):
                raise LayoutError(f"'{item.name}' has {len(item)} tokens but a grid of {by(item.grid)}.")
            end = item.stop

    @classmethod
    def of(cls, *, order: Sequence[str] = ("text", "image", "references"), registers: int = 0, **sizes: Any) -> Layout:
        """The given kinds of tokens in `order`: "text", "image", "references", "registers" (tokens that stand for
        nothing). `sizes` are the fields of `Measures`.
        """
        measures = Measures(**sizes)
        kinds: dict[str, list[tuple[str, int, Grid | None]]] = {
            "text": [("text.global", measures.text, None)],
            "image": [("image", prod(measures.image), measures.image)],
            "references": [(f"reference.{k}", prod(grid), grid) for k, grid in enumerate(measures.references)],
            "registers": [("registers", registers, None)],
        }
        return cls(_consecutive([item for kind in order for item in kinds[kind]]), measures.fixed, measures.closed)

    @classmethod
    def in_order(cls, *parts: tuple[str, int | Grid]) -> Layout:
        """Ranges by name and number of tokens, or grid; empty ones are left out."""
        sized = [(name, prod(size), size) if isinstance(size, tuple) else (name, size, None) for name, size in parts]
        return cls(_consecutive([item for item in sized if item[1]]))

    @property
    def tokens(self) -> int:
        """Length of the sequence."""
        return self.ranges[-1].stop

    @property
    def names(self) -> tuple[str, ...]:
        return tuple(item.name for item in self.ranges)

    def __contains__(self, name: str) -> bool:
        return name in self.names

    def __getitem__(self, name: str) -> TokenRange:
        for item in self.ranges:
            if item.name == name:
                return item
        raise LayoutError(f"There are no tokens named '{name}'; this forward has {', '.join(self.names)}.")

    @property
    def own_texts(self) -> tuple[Span, ...]:
        """Tokens of the model's own texts, and registers: neither pictures nor what controls append."""
        others = ("reference", "text.region", "text.pad", "padding")
        return tuple(
            (one.start, one.stop)
            for one in self.ranges
            if len(one) and one.name != "image" and not one.name.startswith(others)
        )

    @property
    def grid(self) -> Grid:
        """Grid of the image tokens."""
        grid = self["image"].grid
        if grid is None:
            raise LayoutError("The image tokens have no grid; regions need one.")
        return grid

    def with_texts(self, texts: Sequence[tuple[str, int]]) -> Layout:
        """The layout after `texts` (name, tokens) are appended to the global text; "text.pad" are unused tokens.

        Raises:
            LayoutError: when the model takes none, or they must take the place of the prompt's last tokens and are
                more than those.
        """
        if texts and self.closed:
            raise LayoutError(f"Regions with texts of their own need a longer text, but {self.closed}")
        sized: list[tuple[str, int, Grid | None]] = []
        last = "text.registers" if "text.registers" in self else "text.global"
        if self.fixed:
            # shorter texts leave more of the prompt's last tokens, and need no filling
            texts = [text for text in texts if text[0] != "text.pad"]
        more = sum(count for _, count in texts)
        for item in self.ranges:
            replaced = more if self.fixed and item.name == "text.global" else 0
            if replaced and replaced >= len(item):
                raise LayoutError(
                    f"The texts of the regions have {more} tokens, but this model reads {len(item)} tokens of text, "
                    "the prompt's included. Shorten them."
                )
            sized.append((item.name, len(item) - replaced, item.grid))
            if item.name == last:
                sized += [(name, count, None) for name, count in texts]
        return Layout(_consecutive(sized), self.fixed, self.closed)


def _consecutive(sized: Sequence[tuple[str, int, Grid | None]]) -> tuple[TokenRange, ...]:
    ranges, start = [], 0
    for name, count, grid in sized:
        ranges.append(TokenRange(name, start, start + count, grid))
        start += count
    return tuple(ranges)


@dataclass(frozen=True)
class Frame:
    """Who stands in the rows and who in the columns of a layer's attention; one object for joint attention."""

    queries: Layout
    keys: Layout

    @classmethod
    def joint(cls, layout: Layout) -> Frame:
        """Self-attention of one sequence."""
        return cls(layout, layout)

    @property
    def is_joint(self) -> bool:
        return self.queries is self.keys

    @property
    def tokens(self) -> tuple[int, int]:
        """(queries, keys)."""
        return self.queries.tokens, self.keys.tokens

    @property
    def grid(self) -> Grid | None:
        """Grid of the image tokens on either side; None where there are none."""
        return next((side.grid for side in (self.queries, self.keys) if "image" in side), None)

    def __contains__(self, name: str) -> bool:
        return name in self.queries or name in self.keys

    def with_shared(self, tokens: Mapping[int, int]) -> Frame:
        """The frame in which so many keys of other pictures come behind the own ones, as "shared.<n>"."""
        more = [(f"shared.{n}", count, None) for n, count in tokens.items()]
        sized = [(item.name, len(item), item.grid) for item in self.keys.ranges]
        return Frame(self.queries, Layout(_consecutive([*sized, *more])))

    def with_texts(self, texts: Sequence[tuple[str, int]]) -> Frame:
        """As `Layout.with_texts`, on the sides that hold the prompt."""
        queries = self.queries.with_texts(texts)
        return Frame(queries, queries if self.is_joint else self.keys.with_texts(texts))


@dataclass(frozen=True)
class Frames:
    """The frames of one forward by name; layers name theirs. The first is the one that reports speak of. `corner` is
    that of `Measures`."""

    items: tuple[tuple[str, Frame], ...]
    corner: tuple[float, ...] = ()

    @classmethod
    def of(cls, **frames: Frame) -> Frames:
        return cls(tuple(frames.items()))

    def __getitem__(self, name: str) -> Frame:
        return dict(self.items)[name]

    @property
    def main(self) -> Frame:
        return self.items[0][1]

    @property
    def fixed(self) -> bool:
        """Whether the text keeps its length, as in `Measures`."""
        return any(frame.queries.fixed or frame.keys.fixed for _, frame in self.items)

    @property
    def ranges(self) -> dict[str, TokenRange]:
        """All ranges by name, at the sizes of the first frame that holds them."""
        found: dict[str, TokenRange] = {}
        for _, frame in self.items:
            for item in (*frame.queries.ranges, *frame.keys.ranges):
                found.setdefault(item.name, item)
        return found

    def with_texts(self, texts: Sequence[tuple[str, int]]) -> Frames:
        """All frames after texts were appended to the prompt."""
        return replace(self, items=tuple((name, frame.with_texts(texts)) for name, frame in self.items))
