"""Keys and values of other pictures of a batch, which rows read besides their own.

They come behind a row's own keys, compact: only tokens that somebody reads. Keys have been rotated where they stand in
their own picture; a move turns them on, as if they stood elsewhere.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from .execute import Pass
from .execute.tokens import TokenSet, token_set
from .rotary import Rotary
from .visibility import Visibility

__all__ = ["Move", "Sources", "compacted"]


@dataclass(frozen=True, eq=False)
class Move:
    """What becomes of the keys of others before they are read.

    Attributes:
        turn: where rotated keys are taken to: (rotary, shift float64 [axes]), see `Rotary.turn`.
        scale: what they are multiplied by, and so their scores: a temperature, no weight.
    """

    turn: tuple[Rotary, Tensor] | None = None
    scale: float = 1.0

    def __call__(self, keys: Tensor) -> Tensor:
        """Keys [B, H, T, D] moved."""
        if self.turn is not None:
            rotary, shift = self.turn
            keys = rotary.turn(keys, shift)
        return keys if self.scale == 1 else keys * self.scale


@dataclass(frozen=True, eq=False)
class Sources:
    """What a set of rows reads of others.

    Attributes:
        rows: int64 [rows, sources], the row of the batch that each source of each row is.
        tokens: of each source, those of the layer's key tokens that are read.
        moves: of each source, what becomes of its keys; None leaves them.
    """

    rows: Tensor
    tokens: tuple[TokenSet, ...]
    moves: tuple[Move | None, ...]

    @property
    def count(self) -> int:
        """Keys that come on top of a row's own."""
        return sum(one.count for one in self.tokens)

    def join(
        self, own: tuple[Tensor, Tensor, Tensor | None], key: Tensor, value: Tensor
    ) -> tuple[Tensor, Tensor, Tensor | None]:
        """Keys, values and mask of these rows with the sources' behind them; the model's mask hides none of those.

        Args:
            own: key, value [rows, H, Tk, D] and the model's 4D mask of the rows themselves.
            key, value: [B, H, Tk, D] of the whole batch.
        """
        mask = own[2]
        if mask is not None and mask.shape[3] > 1:
            mask = torch.nn.functional.pad(mask, (0, self.count), value=mask.dtype == torch.bool)
        return self._behind(own[0], key, moved=True), self._behind(own[1], value, moved=False), mask

    def _behind(self, own: Tensor, states: Tensor, *, moved: bool) -> Tensor:
        parts = [own]
        for number, (tokens, move) in enumerate(zip(self.tokens, self.moves, strict=True)):
            if not tokens.count:
                continue
            part = tokens.take(states)[self.rows[:, number]]
            parts.append(move(part) if moved and move is not None else part)
        return torch.cat(parts, dim=2)


def compacted(passes: Sequence[Pass], own: int, lengths: Sequence[int]) -> tuple[list[Pass], list[Tensor]]:
    """The passes without the keys of others that nobody sees.

    Args:
        passes: their keys are `own` tokens of the row itself, then those of each source.
        own, lengths: numbers of tokens.

    Returns:
        (passes, of each source the tokens int64 that are left).
    """
    seen = torch.zeros(own + sum(lengths), dtype=torch.bool)
    seen[:own] = True
    for one in passes:
        visibility = one.visibility
        computed = visibility.query_counts > 0
        if one.weight is not None:
            computed &= one.weight > 0
        seen |= visibility.log_weight[computed].isfinite().any(0)[visibility.key_atom]
    kept = seen.nonzero().flatten()
    starts = torch.tensor([0, *lengths]).cumsum(0) + own
    spans = zip(starts.tolist(), lengths, strict=False)
    left = [seen[start : start + length].nonzero().flatten() for start, length in spans]
    return [Pass(_of_keys(one.visibility, kept), one.weight) for one in passes], left


def _of_keys(visibility: Visibility, kept: Tensor) -> Visibility:
    return Visibility(
        visibility.query_atom,
        visibility.key_atom[kept],
        visibility.log_weight,
        visibility.query_names,
        visibility.key_names,
    )


def shifted(tokens: Tensor, by: int) -> TokenSet:
    """Tokens int64 of a range that begins at `by`, as tokens of the sequence."""
    return token_set(tokens + by)
