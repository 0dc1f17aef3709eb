"""Sets of tokens, gathered from and scattered to [B, H, T, D] tensors, and additive biases made from tables of rows."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor

# Up to this many stretches are copied by slices, which is as fast as an index (64 stretches and more are slower) and
# needs none.
MAX_RUNS = 8


@dataclass(frozen=True, eq=False)
class TokenSet:
    """Some tokens of a sequence: a few contiguous runs (start, length), or, when given, an int64 index [count]."""

    count: int
    runs: tuple[tuple[int, int], ...] = ()
    index: Tensor | None = None

    @property
    def is_leading(self) -> bool:
        """The tokens are 0, 1, ... count - 1, in this order."""
        return self.index is None and self.runs == ((0, self.count),)

    @property
    def nbytes(self) -> int:
        """Bytes held: 16 per run, or 8 per token."""
        return 16 * len(self.runs) + (0 if self.index is None else self.index.nbytes)

    def to(self, device: torch.device | str) -> TokenSet:
        """The same set with its index on `device`."""
        return self if self.index is None else replace(self, index=self.index.to(device))

    def take(self, x: Tensor, dim: int = 2) -> Tensor:
        """The tokens of x along `dim`, in the order of this set; a view when they are contiguous."""
        if self.index is None and len(self.runs) == 1:
            return x.narrow(dim, *self.runs[0])
        if dim == 2 and x.stride(1) < x.stride(2):
            # [B, T, H, D] memory: whole tokens are contiguous there, which copies two to three times faster
            return self.take(x.transpose(1, 2), 1).transpose(1, 2)
        if self.index is None:
            return torch.cat([x.narrow(dim, start, length) for start, length in self.runs], dim)
        return x.index_select(dim, self.index)

    def put(self, out: Tensor, values: Tensor, *, add: bool = False) -> None:
        """Write (or add) values [B, H, count, D] to these tokens of out [B, H, T, D], in place, cast to out's dtype."""
        values = values.to(out.dtype)
        if self.index is not None:
            # through a view of its own: autograd refuses to write to `out` itself after writes through its views
            target = out.narrow(2, 0, out.shape[2])
            target.index_add_(2, self.index, values) if add else target.index_copy_(2, self.index, values)
            return
        offset = 0
        for start, length in self.runs:
            target, part = out.narrow(2, start, length), values.narrow(2, offset, length)
            target.add_(part) if add else target.copy_(part)
            offset += length


def find_runs(tokens: Tensor) -> tuple[tuple[int, int], ...]:
    """The runs (start, length) of int64 [n] token numbers in the given order."""
    if not tokens.numel():
        return ()
    heads = torch.cat([tokens.new_zeros(1), (tokens.diff() != 1).nonzero().flatten() + 1])
    lengths = torch.cat([heads, heads.new_tensor([tokens.numel()])]).diff()
    return tuple(zip(tokens[heads].tolist(), lengths.tolist(), strict=True))


def token_set(tokens: Tensor) -> TokenSet:
    """The set of int64 [n] token numbers, as runs when they are few."""
    runs = find_runs(tokens)
    if len(runs) <= MAX_RUNS:
        return TokenSet(tokens.numel(), runs)
    return TokenSet(tokens.numel(), index=tokens)


def row_bias(rows: Tensor, row_of: Tensor | None, key_atom: Tensor, dtype: torch.dtype) -> Tensor:
    """The additive bias of some queries: `rows` [R, G] of log-weights looked up for keys of `key_atom` int64 [Tk].

    Args:
        row_of: int64 [Tq], the row of each query; None when all share one row (R = 1).

    Returns:
        [1, 1, Tq or 1, Tk] in `dtype`. Memory behind the keys is padded to a multiple of 8, the alignment that masked
        CUDA kernels want; else they copy the whole mask at every call.
    """
    keys = key_atom.numel()
    padded = torch.nn.functional.pad(key_atom, (0, -keys % 8))
    table = rows.to(dtype).index_select(1, padded)
    bias = table if row_of is None else table.index_select(0, row_of)
    return bias[None, None, :, :keys]


def as_bias(mask: Tensor, dtype: torch.dtype) -> Tensor:
    """A mask that broadcasts to [B, H, Tq, Tk], bool (True sees) or additive, as a 4D additive bias in `dtype`."""
    mask = mask.reshape((1,) * (4 - mask.ndim) + tuple(mask.shape))
    if mask.dtype != torch.bool:
        return mask.to(dtype)
    return torch.zeros_like(mask, dtype=dtype).masked_fill_(~mask, float("-inf"))


def take_bias(bias: Tensor, tokens: TokenSet, dim: int) -> Tensor:
    """The part of a 4D bias that belongs to some tokens along `dim`; all of it where it is the same for all tokens."""
    return bias if bias.shape[dim] == 1 else tokens.take(bias, dim)


def add_bias(first: Tensor | None, second: Tensor | None) -> Tensor | None:
    """The sum of two additive biases; None adds nothing."""
    if first is None or second is None:
        return second if first is None else first
    return first + second


def tensor_bytes(tensors: Sequence[Tensor | None]) -> int:
    """Bytes of the tensors that are there."""
    return sum(tensor.nbytes for tensor in tensors if tensor is not None)
