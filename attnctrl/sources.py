"""Keys and values of other pictures, which rows read besides their own: pictures of the batch, or those of a bank.

They come behind a row's own keys, compact: only tokens that somebody reads. Keys have been rotated where they stand in
their own picture; a move turns them on, as if they stood elsewhere.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field, replace

import torch
from torch import Tensor

from .bank import Bank, Entry
from .execute import Pass
from .execute.tokens import TokenSet, token_set
from .layout import TokenRange
from .rotary import Rotary, Trig
from .schedule import Moment
from .visibility import Visibility

__all__ = ["Move", "Rows", "Sources", "Stored", "compacted"]


@dataclass(frozen=True, eq=False)
class Move:
    """What becomes of the keys of others before they are read.

    Attributes:
        turn: where rotated keys are taken to: (rotary, shift float64 [axes], or [image tokens, axes] where each goes
            its own way), see `Rotary.turn`.
        scale: what they are multiplied by, and so their scores: a temperature, no weight.
    """

    turn: tuple[Rotary, Tensor] | None = None
    scale: float = 1.0
    _trig: Trig | None = field(init=False, repr=False)

    def __post_init__(self) -> None:
        object.__setattr__(self, "_trig", None if self.turn is None else self.turn[0].trig(self.turn[1]))

    def __call__(self, keys: Tensor) -> Tensor:
        """Keys [B, H, T, D] moved."""
        if self.turn is not None and self._trig is not None:
            keys = self.turn[0].turned(keys, self._trig)
        return keys if self.scale == 1 else keys * self.scale

    def of(self, tokens: TokenSet, image: TokenRange) -> Move:
        """The move of some of a layer's key tokens, of which those of `image` are the picture's."""
        if self.turn is None or self.turn[1].ndim == 1 or not tokens.count:
            return self
        rotary, shift = self.turn
        mine = tokens.take(torch.nn.functional.pad(shift, (0, 0, image.start, 0)), 0)
        return replace(self, turn=(rotary, mine))

    def to(self, device: torch.device) -> Move:
        """The same with its shifts on `device`."""
        return self if self.turn is None else replace(self, turn=(self.turn[0], self.turn[1].to(device)))


@dataclass(frozen=True, eq=False)
class Sources:
    """What a set of rows reads of others.

    Attributes:
        tokens: of each source, those that are read.
        moves: of each source, what becomes of its keys; None leaves them.
    """

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
        keys, values = [own[0]], [own[1]]
        for number, (tokens, move) in enumerate(zip(self.tokens, self.moves, strict=True)):
            if not tokens.count:
                continue
            more, theirs = self._states(number, key, value, len(own[0]))
            keys.append(more if move is None else move(more))
            values.append(theirs)
        return torch.cat(keys, dim=2), torch.cat(values, dim=2), mask

    def _states(self, number: int, key: Tensor, value: Tensor, rows: int) -> tuple[Tensor, Tensor]:
        """Keys and values [rows, H, tokens, D] of a source."""
        raise NotImplementedError


@dataclass(frozen=True, eq=False)
class Rows(Sources):
    """Other rows of the batch; `tokens` are those of the layer's key tokens.

    Attributes:
        rows: int64 [rows, sources], the row of the batch that each source of each row is.
    """

    rows: Tensor

    def _states(self, number: int, key: Tensor, value: Tensor, rows: int) -> tuple[Tensor, Tensor]:
        tokens, at = self.tokens[number], self.rows[:, number]
        return tokens.take(key)[at], tokens.take(value)[at]


@dataclass(frozen=True, eq=False)
class Stored(Sources):
    """Pictures of a bank, the same for all rows; `tokens` are those of the tokens that it holds of each.

    Attributes:
        bank: where they are.
        branch: of the rows.
        layer, step: where a forward stands; see `at`.
    """

    bank: Bank
    branch: str
    layer: str = ""
    step: int = -1

    def at(self, layer: str, moment: Moment) -> Stored:
        """The same for a layer of a forward.

        Raises:
            ControlError, ScheduleError: when the bank holds no keys for it.
        """
        made = replace(self, layer=layer, step=self.bank.kept_step(moment.step))
        self.bank.check_entries(made._entry(number) for number, tokens in enumerate(self.tokens) if tokens.count)
        return made

    def _entry(self, number: int) -> Entry:
        return Entry(self.layer, self.step, self.branch, number)

    def _states(self, number: int, key: Tensor, value: Tensor, rows: int) -> tuple[Tensor, Tensor]:
        states = self.tokens[number].take(self.bank.entries[self._entry(number)].opened(key))
        return states[:1].expand(rows, -1, -1, -1), states[1:].expand(rows, -1, -1, -1)


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
