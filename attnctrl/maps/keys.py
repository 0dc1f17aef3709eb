"""Groups of keys whose attention is read: words of the prompt, ranges of tokens, parts of the picture."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from math import prod
from typing import Any

import torch
from torch import Tensor

from ..errors import LayoutError
from ..groups import marked
from ..layout import Layout, Span
from ..phrases import phrase_spans
from ..region import Region, membership

__all__ = ["Cells", "Key", "Keys", "keys_of"]

_RANGE = re.compile(r"(text|image|reference)\.\w+")
_WHOLE = {
    "text": re.compile(r"text\.(global|glyphs|region\d+)"),
    "image": re.compile("image"),
    "references": re.compile(r"reference\.\d+"),
}
"""What stands for several ranges of tokens, by their names: all words, without what fills up a text or a picture."""


@dataclass(frozen=True)
class Cells:
    """The image's keys, pooled to rows x columns cells: a map for each cell, as features of the image's tokens.

    Layers with fewer tokens along a side, such as the deep ones of a UNet, are not read.
    """

    rows: int
    columns: int

    def __post_init__(self) -> None:
        if min(self.rows, self.columns) < 1:
            raise LayoutError(f"Cells needs one row and one column at least; found {self.rows} x {self.columns}.")


Key = str | Region | Cells | Sequence[str | None] | Sequence[Span]
"""A phrase of the prompt; "text", "image", "references" or the name of one range, such as "reference.0"; the image's
tokens in a region; the image in cells; a phrase for each prompt of a batch, None where it has none (its maps are 0);
tokens [start, stop) of the prompt.
"""


@dataclass(frozen=True, eq=False)
class Keys:
    """One named group of keys, or the cells of a picture; `spans` are words of each prompt where `key` is None."""

    name: str
    key: str | Region | Cells | None
    spans: tuple[tuple[Span, ...], ...] = ()

    def columns(self, layout: Layout, prompt: int) -> Tensor | None:
        """float32 [keys, c], 1 where a key belongs to the group, or [keys, cells]; None where there are no such keys,
        or fewer than cells.

        Args:
            layout: of the keys.
            prompt: number of the row's prompt.

        Raises:
            LayoutError: when spans lie outside the prompt.
        """
        if isinstance(self.key, str):
            wanted = _WHOLE.get(self.key, re.compile(re.escape(self.key)))
            inside = [(item.start, item.stop) for item in layout.ranges if wanted.fullmatch(item.name) and len(item)]
            return _placed(layout, inside, torch.ones(sum(b - a for a, b in inside), 1)) if inside else None
        name = "text.global" if self.key is None else "image"
        if name not in layout:
            return None
        place = layout[name]
        if self.key is None:
            spans = self.spans[prompt if len(self.spans) > 1 else 0]
            values = marked(spans, len(place), f"'{self.name}'")[:, None].float()
        elif isinstance(self.key, Region):
            values = membership([self.key], layout.grid).T.float()
        elif self.key.rows > layout.grid[-2] or self.key.columns > layout.grid[-1]:
            return None
        else:
            values = _cells(self.key, layout.grid)
        return _placed(layout, [(place.start, place.stop)], values)


def keys_of(
    pipe: Any, wanted: Mapping[str, Key] | Sequence[str], prompts: Sequence[str], max_sequence_length: int | None = None
) -> tuple[Keys, ...]:
    """The groups by name; a sequence names phrases by themselves.

    Args:
        pipe: the pipeline, for its tokenizers.
        wanted: names and what they stand for.
        prompts: as the pipeline is given them; () where no group is a phrase.
        max_sequence_length: as the pipeline is given it.

    Raises:
        LayoutError: when a phrase is in no prompt, or there is nothing to read.
        UnsupportedModelError: when the places of words are not known.
    """
    named = wanted if isinstance(wanted, Mapping) else {phrase: phrase for phrase in wanted}
    if not named:
        raise LayoutError("There is no group of keys to read; give names, such as {'cat': 'a cat', 'text': 'text'}.")

    def keys(name: str, key: Any) -> Keys:
        if isinstance(key, (Region, Cells)) or (isinstance(key, str) and (key in _WHOLE or _RANGE.fullmatch(key))):
            return Keys(name, key)
        if not isinstance(key, str) and not any(isinstance(item, str) for item in key):
            return Keys(name, None, (tuple((int(start), int(stop)) for start, stop in key),))
        phrases = [key] * len(prompts) if isinstance(key, str) else list(key)
        if not prompts:
            raise LayoutError(f"'{name}': to find the words '{key}', give record(..., prompt=...) as the pipeline.")
        if len(phrases) != len(prompts):
            raise LayoutError(f"'{name}': {len(phrases)} phrases for {len(prompts)} prompts; give one each, or None.")
        found = (
            () if phrase is None else phrase_spans(pipe, prompt, phrase, max_sequence_length=max_sequence_length)
            for prompt, phrase in zip(prompts, phrases, strict=True)
        )
        return Keys(name, None, tuple(found))

    return tuple(keys(name, key) for name, key in named.items())


def _placed(layout: Layout, ranges: Sequence[Span], values: Tensor) -> Tensor:
    """float32 [keys, c]: `values` at the tokens of the ranges, 0 elsewhere."""
    columns = torch.zeros(layout.tokens, values.shape[-1])
    columns[torch.cat([torch.arange(start, stop) for start, stop in ranges])] = values
    return columns


def _cells(cells: Cells, grid: tuple[int, ...]) -> Tensor:
    """float32 [tokens of the grid, cells]: 1 where a token lies in a cell; a film's frames have the same cells."""
    height, width = grid[-2:]
    rows = torch.arange(height) * cells.rows // height
    columns = torch.arange(width) * cells.columns // width
    number = (rows[:, None] * cells.columns + columns).flatten().repeat(prod(grid[:-2]))
    return torch.nn.functional.one_hot(number, cells.rows * cells.columns).float()
