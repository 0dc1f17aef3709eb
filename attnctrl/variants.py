"""What the rows of a batch have in common: rows of one kind share a sequence, its plans and its acts."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import zip_longest

import torch
from torch import Tensor

from .layout import Frames, Slots

__all__ = ["Line", "RowSet", "Variant", "make_variants", "put_rows", "row_numbers", "row_set"]

RowSet = Tensor | slice | None
"""Rows of a batch: int64 [n], a slice, of which tensors are views, or None for all of them."""


def row_set(rows: Sequence[int], device: torch.device) -> Tensor | slice:
    """Rows in rising order; a slice where they follow each other."""
    if rows[-1] - rows[0] == len(rows) - 1:
        return slice(rows[0], rows[-1] + 1)
    return torch.tensor(rows, device=device)


def row_numbers(rows: RowSet, like: Tensor) -> Tensor:
    """int64 [n]: which rows of `like` [B, ...] these are, where it is."""
    if isinstance(rows, Tensor):
        return rows
    start, stop, _ = (rows or slice(None)).indices(len(like))
    return torch.arange(start, stop, device=like.device)


def put_rows(found: Tensor, given: Tensor, rows: RowSet, new: Tensor) -> Tensor:
    """`found` with these rows `new`; written to, unless it is still what was `given`."""
    if rows is None:
        return new
    made = found.clone() if found is given else found
    made[rows] = new
    return made


@dataclass(frozen=True)
class Line:
    """What is told of a row.

    Attributes:
        scene: whose regions are its own.
        active: numbers of the seats that act.
        image: its place among the rows of its branch, and `images`, how many these are; 0 of 1 where nobody reads other
            pictures, so that rows stay alike.
        draw: number of the draw of random tokens; 0 where there is none.
        stored: (branch, versions of the banks) of rows that read banks; None where they read none.
    """

    scene: int
    active: tuple[int, ...]
    image: int = 0
    images: int = 1
    draw: int = 0
    stored: tuple[str, tuple[int, ...]] | None = None


@dataclass(frozen=True)
class Variant:
    """What rows of one scene and one branch have in common in one phase: their line and their sequence."""

    line: Line
    frames: Frames

    @property
    def scene(self) -> int:
        return self.line.scene

    @property
    def active(self) -> tuple[int, ...]:
        return self.line.active


def make_variants(
    frames: Sequence[Frames],
    lines: Sequence[Line],
    texts: Mapping[Line, Sequence[tuple[str, int]]],
    aligned: bool = False,
) -> tuple[list[Variant], Slots]:
    """The variant of each row, all of one length.

    Args:
        frames: of the model's own sequence, per row or one for all.
        lines: of each row.
        texts: of each line, the appended texts, (name, tokens).
        aligned: the n-th texts of all rows begin at the same slot.

    Returns:
        (one variant per row, the slots for appended texts: one for all, or one for each n-th text when they are
        aligned).
    """
    counts = {line: [count for _, count in found] for line, found in texts.items()}
    if not aligned:
        counts = {line: [sum(count)] if count else [] for line, count in counts.items()}
    sizes = tuple(max(nth) for nth in zip_longest(*counts.values(), fillvalue=0))
    lengths = tuple((*counts[line], *[0] * (len(sizes) - len(counts[line]))) for line in lines)
    filled = {line: _filled(found, sizes, aligned) for line, found in texts.items()}
    each = frames if len(frames) == len(lines) else [frames[0]] * len(lines)
    pairs = list(zip(lines, each, strict=True))
    made = {(line, own): Variant(line, own.with_texts(filled[line])) for line, own in dict.fromkeys(pairs)}
    return [made[pair] for pair in pairs], Slots(sizes, lengths)


def _filled(texts: Sequence[tuple[str, int]], slots: Sequence[int], aligned: bool) -> list[tuple[str, int]]:
    """Texts, each followed by unused tokens that fill up its slot; all of them share one when not aligned."""
    groups = [[text] for text in texts] if aligned else [list(texts)]
    groups += [[] for _ in slots[len(groups) :]]
    whole: list[tuple[str, int]] = []
    for group, slot in zip(groups, slots, strict=False):
        left = slot - sum(count for _, count in group)
        whole += [*group, *([("text.pad", left)] if left else [])]
    return whole
