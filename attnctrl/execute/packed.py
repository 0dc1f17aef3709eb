"""All classes in one kernel call of variable sequence lengths.

Queries are packed class after class, and behind each other the keys that each class sees; the kernel takes both packs
and where their segments start. A class whose row has several log-weights is one segment per log-weight, merged by their
log-sum-exps. Nothing outside a segment is read, so there is no mask; the price is a copy of sum |K_r| keys and values.
"""

from __future__ import annotations

import copy
from abc import abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass, replace
from itertools import accumulate
from typing import Any, Protocol

import torch
from torch import Tensor

from .base import ExecutionPlan, Kernel
from .grouped import GroupedPlan, sort_keys
from .lse import merge, records_gradients, split_levels
from .terms import Terms
from .tokens import find_runs, tensor_bytes

Runs = tuple[tuple[int, int], ...]


@dataclass(frozen=True)
class Block:
    """Where a class lies in the pack of queries: once per level, `count` queries each time, from `start` on."""

    start: int
    count: int
    levels: int


@dataclass(frozen=True, eq=False)
class Packing:
    """How one batch entry is packed. O(T + G^2): keys that several classes see stand here as runs, not as copies.

    Attributes:
        queries: int64 [n], the token of each query, class after class.
        query_runs: what to take of `queries`, segment after segment; None when each class is one segment.
        order: int64 [Tk], an order of the keys in which those of a class lie in few runs.
        key_runs: what to take of `order`, segment after segment.
        lengths: (queries, keys) of each segment.
        query_starts, key_starts: int32 [segments + 1], where segments start in the packs, and the ends.
        blocks: the classes in the pack of queries.
        log_weight: float32 [segments], what the scores of a segment gain; None when all classes are hard.
        weight: float32 [n], the share of each entry of `queries` in its token's output; None means 1.
    """

    queries: Tensor
    query_runs: Runs | None
    order: Tensor
    key_runs: Runs
    lengths: tuple[tuple[int, int], ...]
    query_starts: Tensor
    key_starts: Tensor
    blocks: tuple[Block, ...]
    log_weight: Tensor | None
    weight: Tensor | None

    @property
    def sizes(self) -> tuple[int, int]:
        """(queries, keys) of the packs of one batch entry."""
        return sum(queries for queries, _ in self.lengths), sum(keys for _, keys in self.lengths)

    @property
    def longest(self) -> tuple[int, int]:
        """The largest numbers of (queries, keys) in a segment."""
        return max(queries for queries, _ in self.lengths), max(keys for _, keys in self.lengths)

    @property
    def nbytes(self) -> int:
        """Bytes held: index tensors, and 16 per run."""
        parts = [self.queries, self.order, self.query_starts, self.key_starts, self.log_weight, self.weight]
        return tensor_bytes(parts) + 16 * (len(self.query_runs or ()) + len(self.key_runs))

    def to(self, device: torch.device | str) -> Packing:
        """The same packing on `device`."""
        names = ("queries", "order", "query_starts", "key_starts", "log_weight", "weight")
        moved: dict[str, Any] = {name: held.to(device) for name in names if (held := getattr(self, name)) is not None}
        return replace(self, **moved)

    def pack_queries(self, query: Tensor) -> Tensor:
        """Query [B, H, Tq, D] packed to [B, n, H, D]."""
        index = self.queries if self.query_runs is None else _join(self.queries, self.query_runs)
        return query.transpose(1, 2).index_select(1, index)

    def pack_keys(self, key: Tensor, value: Tensor) -> tuple[Tensor, Tensor]:
        """Key and value [B, Hk, Tk, D] packed to [B, m, Hk, D]."""
        index = _join(self.order, self.key_runs)
        return key.transpose(1, 2).index_select(1, index), value.transpose(1, 2).index_select(1, index)

    def starts(self, batch: int) -> tuple[Tensor, Tensor]:
        """int32 [batch * segments + 1] twice: `query_starts` and `key_starts` of a whole batch, entry after entry."""
        if batch == 1:
            return self.query_starts, self.key_starts
        queries, keys = self.sizes
        return _repeat(self.query_starts, batch, queries), _repeat(self.key_starts, batch, keys)

    def unpack(self, packed: Tensor, lse: Tensor | None, tokens: int) -> Tensor:
        """The output [B, H, Tq, D] from the packed one.

        Args:
            packed: [B, n, H, D].
            lse: [B, n, H], needed when there are log-weights.
            tokens: Tq.
        """
        batch, _, heads, width = packed.shape
        if self.log_weight is None and self.weight is None:
            out = packed.new_empty(batch, tokens, heads, width)
            return out.index_copy_(1, self.queries, packed).transpose(1, 2)
        # shares are added up in float32 or better and cast once
        dtype = torch.promote_types(packed.dtype, torch.float32)
        whole = packed
        if self.log_weight is not None and lse is not None:
            whole = self._merge(packed, lse, self.log_weight)
        if self.weight is not None:
            whole = whole.to(dtype) * self.weight[:, None, None]
        out = packed.new_zeros(batch, tokens, heads, width, dtype=dtype)
        return out.index_add_(1, self.queries, whole.to(dtype)).to(packed.dtype).transpose(1, 2)

    def _merge(self, packed: Tensor, lse: Tensor, log_weight: Tensor) -> Tensor:
        """One entry per class and query: the levels of a class are merged."""
        parts, segment = [], 0
        for block in self.blocks:
            size = (block.levels, block.count)
            outputs = packed.narrow(1, block.start, block.levels * block.count).unflatten(1, size).unbind(1)
            if block.levels == 1:
                parts.append(outputs[0].to(lse.dtype))
            else:
                lses = lse.narrow(1, block.start, block.levels * block.count).unflatten(1, size).unbind(1)
                parts.append(merge(outputs, lses, log_weight.narrow(0, segment, block.levels)))
            segment += block.levels
        return torch.cat(parts, 1)


def pack(terms: Terms) -> Packing:
    """The packing of some classes, on the CPU."""
    order = sort_keys(terms)
    atom = terms.key_atom[order]
    query_runs: list[tuple[int, int]] = []
    key_runs: list[tuple[int, int]] = []
    lengths: list[tuple[int, int]] = []
    blocks: list[Block] = []
    log_weights: list[float] = []
    first = start = 0
    for one in terms.classes:
        count, levels = one.queries.numel(), split_levels(one.row)
        blocks.append(Block(start, count, len(levels)))
        for log_weight, atoms in levels:
            runs = find_runs(atoms[atom].nonzero().flatten())
            query_runs.append((first, count))
            key_runs += runs
            lengths.append((count, sum(length for _, length in runs)))
            log_weights.append(log_weight)
        first += count
        start += count * len(levels)
    soft = len(lengths) > len(blocks)
    weight = None
    if any(one.weight is not None for one in terms.classes):
        shares = [torch.ones(one.queries.numel()) if one.weight is None else one.weight for one in terms.classes]
        weight = torch.cat(shares)
    return Packing(
        queries=torch.cat([one.queries for one in terms.classes]),
        query_runs=tuple(query_runs) if soft else None,
        order=order,
        key_runs=tuple(key_runs),
        lengths=tuple(lengths),
        query_starts=_starts([queries for queries, _ in lengths]),
        key_starts=_starts([keys for _, keys in lengths]),
        blocks=tuple(blocks),
        log_weight=torch.tensor(log_weights) if soft else None,
        weight=weight,
    )


def copied(terms: Terms) -> int:
    """Tokens that packing copies: the keys of each class, and its queries once more for each further log-weight."""
    return sum(one.keys + (len(split_levels(one.row)) - 1) * one.queries.numel() for one in terms.classes)


def _starts(lengths: Sequence[int]) -> Tensor:
    """Cumulative sequence lengths int32 [len + 1], as kernels of variable length take them."""
    return torch.tensor([0, *accumulate(lengths)], dtype=torch.int32)


def _repeat(starts: Tensor, batch: int, size: int) -> Tensor:
    entry = torch.arange(batch, dtype=starts.dtype, device=starts.device)
    return torch.cat([starts[:1], (starts[1:] + size * entry[:, None]).flatten()])


def _join(index: Tensor, runs: Runs) -> Tensor:
    return torch.cat([index.narrow(0, start, length) for start, length in runs])


class PackedKernel(Protocol):
    """A kernel of variable sequence lengths.

    Attributes:
        name: in words, for reports.
    """

    name: str

    def serves(self, query: Tensor, key: Tensor, value: Tensor) -> bool:
        """Whether it takes inputs of such dtypes and head sizes, [B, H, T, D]."""

    def __call__(
        self, query: Tensor, key: Tensor, value: Tensor, packing: Packing, scale: float | None
    ) -> tuple[Tensor, Tensor | None]:
        """Each segment's queries over its keys.

        Args:
            query, key, value: packs [B, n, H, D], [B, m, Hk, D], [B, m, Hk, Dv].
            packing: whose segments they hold; a log-sum-exp is wanted when it has log-weights.
            scale: of the scores; None means 1 / sqrt(D).

        Returns:
            (output [B, n, H, Dv], log-sum-exp [B, n, H] when wanted, else None).
        """


class PackedPlan(ExecutionPlan):
    """Gathers, calls one kernel, scatters.

    What the kernel cannot take goes through grouped calls instead: a mask of the model, dtypes and head sizes it does
    not serve, and gradients of soft rows, whose log-sum-exps are not differentiable.
    """

    def __init__(self, terms: Terms, reason: str, *, device: torch.device | str | None = None) -> None:
        super().__init__(density=terms.density, classes=len(terms.classes), tokens=terms.tokens, reason=reason)
        self._packing = pack(terms)
        self._grouped = GroupedPlan(terms, "in place of a packed call", device=device)
        self._packed_kernel = self._find_kernel(torch.device(device or "cpu"), self._packing.log_weight is not None)

    @abstractmethod
    def _find_kernel(self, device: torch.device, soft: bool) -> PackedKernel:
        """The kernel for plans on `device`; one with log-sum-exps when `soft`."""

    @property
    def nbytes(self) -> int:
        """Bytes of the packing and of the grouped calls behind it."""
        return self._packing.nbytes + self._grouped.nbytes

    def to(self, device: torch.device | str) -> PackedPlan:
        """The same plan on `device`, with a kernel for that device."""
        moved = copy.copy(self)
        moved._packing = self._packing.to(device)
        moved._grouped = self._grouped.to(device)
        moved._packed_kernel = self._find_kernel(torch.device(device), self._packing.log_weight is not None)
        return moved

    def explain(self) -> str:
        """See `ExecutionPlan.explain`; with the kernel."""
        return f"{super().explain()}; {self._packed_kernel.name}"

    def _attend(
        self, query: Tensor, key: Tensor, value: Tensor, kernel: Kernel, scale: float | None, bias: Tensor | None
    ) -> Tensor:
        packing = self._packing
        blind = packing.log_weight is not None and records_gradients(query, key, value)
        if bias is not None or blind or not self._packed_kernel.serves(query, key, value):
            return self._grouped._attend(query, key, value, kernel, scale, bias)
        keys, values = packing.pack_keys(key, value)
        out, lse = self._packed_kernel(packing.pack_queries(query), keys, values, packing, scale)
        return packing.unpack(out, lse, query.shape[2])
