"""The exact lowering without a mask: one kernel call per class of queries with equal mask rows.

    out[Q_r] = kernel(q[Q_r], k[K_r], v[K_r])        K_r: every key that the row sees

Nothing is computed twice and nothing is thrown away: the cost is the density of the mask. Rows with different finite
weights add a bias per key, [1, 1, 1, |K_r|], or are merged from one call per weight. Tiny classes share one call with a
small bias [sum |Q_r|, |union of K_r|].
"""

from __future__ import annotations

import copy
from collections.abc import Sequence
from dataclasses import dataclass, replace
from itertools import groupby

import torch
from torch import Tensor

from .base import ExecutionPlan, Kernel
from .lse import merge, sdpa_lse, serves_lse, split_levels
from .terms import RowClass, Terms
from .tokens import MAX_RUNS, TokenSet, add_bias, find_runs, row_bias, take_bias, tensor_bytes, token_set

# Reading and packing the keys of a call costs as much as computing about 5 query rows with them (H 4, D 64, T 8192,
# one CPU thread: 1, 4, 8, 16, 32 queries take 0.9, 1.7, 2.3, 3.7, 6.4 ms), so merging pays for classes of a few
# tokens only.
ROWS_PER_CALL = 5
# On CUDA a kernel covers 128 queries per block and a short class leaves most of the device idle. An estimate, not
# measured.
ROWS_PER_CALL_CUDA = 128
# A bias per query and key costs a tenth more; one bias per key, shared by all queries, costs nothing (1.00 to 1.03).
MASKED_COST = 1.1
# A shared call makes a bias of at most this many rows, so its memory grows with the tokens and not with their square.
MAX_SHARED_ROWS = 512


@dataclass(frozen=True, eq=False)
class Levels:
    """The keys of a soft call by their log-weight.

    Attributes:
        keys: per level its keys, as runs of the key order that the call reads.
        log_weight: float32 [levels].
    """

    keys: tuple[TokenSet, ...]
    log_weight: Tensor

    @property
    def nbytes(self) -> int:
        """Bytes held."""
        return self.log_weight.nbytes + sum(one.nbytes for one in self.keys)

    def to(self, device: torch.device | str) -> Levels:
        """The same levels on `device`."""
        return replace(self, log_weight=self.log_weight.to(device))

    def attend(self, query: Tensor, key: Tensor, value: Tensor, scale: float | None) -> Tensor:
        """Attention of query [B, H, n, D] over all keys and values in the call's order, one call per level."""
        found = [sdpa_lse(query, keys.take(key), keys.take(value), scale) for keys in self.keys]
        return merge([out for out, _ in found], [lse for _, lse in found], self.log_weight)


@dataclass(frozen=True, eq=False)
class Call:
    """One kernel call.

    Attributes:
        queries: the tokens computed.
        keys: the tokens seen, as runs of the given or of the sorted key order.
        from_sorted: which of the two.
        rows: float32 [R, G] log-weights when a bias is needed, else None.
        row_of: int64 [count], the row of each query; None when they share one.
        weight: float32 [count] share of the output; None means 1.
        levels: how to do without the bias where the log-sum-exp can be had; None where the bias is preferred.
    """

    queries: TokenSet
    keys: TokenSet
    from_sorted: bool
    rows: Tensor | None
    row_of: Tensor | None
    weight: Tensor | None
    levels: Levels | None = None

    @property
    def nbytes(self) -> int:
        """Bytes held by the call."""
        indices = self.queries.nbytes + self.keys.nbytes + (0 if self.levels is None else self.levels.nbytes)
        return indices + tensor_bytes([self.rows, self.row_of, self.weight])

    @property
    def source(self) -> tuple[bool, tuple[tuple[int, int], ...]]:
        """What the call gathers: calls of equal source share it."""
        return self.from_sorted, self.keys.runs

    def to(self, device: torch.device | str) -> Call:
        """The same call on `device`."""
        rows, row_of, weight = (None if x is None else x.to(device) for x in (self.rows, self.row_of, self.weight))
        levels = None if self.levels is None else self.levels.to(device)
        return replace(self, queries=self.queries.to(device), rows=rows, row_of=row_of, weight=weight, levels=levels)


class GroupedPlan(ExecutionPlan):
    """One unmasked kernel call per row class; peak memory is one extra copy of the keys and values of a class.

    Args:
        terms: the classes.
        reason: why this executor was chosen.
        device: whose costs decide which tiny classes share a call; None means the CPU.
        max_levels: soft classes of at most so many distinct log-weights run as one unmasked call per log-weight, by
            torch's own kernels, where no gradients are recorded and the model brings no mask; the others take a bias.
    """

    executor = "grouped"

    def __init__(
        self, terms: Terms, reason: str, *, device: torch.device | str | None = None, max_levels: int = 0
    ) -> None:
        super().__init__(density=terms.density, classes=len(terms.classes), tokens=terms.tokens, reason=reason)
        order = sort_keys(terms)
        calls = [_call(bundle, terms.key_atom, order, max_levels) for bundle in merge_tiny(terms, device)]
        calls.sort(key=lambda call: call.source)
        self._groups = tuple(tuple(group) for _, group in groupby(calls, key=lambda call: call.source))
        self._mixes = any(call.weight is not None for call in calls)
        self._order = order if any(call.from_sorted for call in calls) else None
        self._atom = terms.key_atom if any(call.rows is not None and not call.from_sorted for call in calls) else None
        has_sorted_bias = any(call.rows is not None and call.from_sorted for call in calls)
        self._sorted_atom = terms.key_atom[order] if has_sorted_bias else None

    @property
    def nbytes(self) -> int:
        """Bytes of all index tensors, rows and weights."""
        return tensor_bytes([self._order, self._atom, self._sorted_atom]) + sum(call.nbytes for call in self.calls)

    def explain(self) -> str:
        """See `ExecutionPlan.explain`; with the classes that need no bias because their levels are merged."""
        merged = sum(call.levels is not None for call in self.calls)
        return super().explain() + (f"; {merged} soft classes merged from unmasked calls" if merged else "")

    @property
    def calls(self) -> tuple[Call, ...]:
        """The kernel calls, in the order they are made; calls that read the same keys follow each other."""
        return tuple(call for group in self._groups for call in group)

    def to(self, device: torch.device | str) -> GroupedPlan:
        """The same plan on `device`."""
        moved = copy.copy(self)
        moved._groups = tuple(tuple(call.to(device) for call in group) for group in self._groups)
        for name in ("_order", "_atom", "_sorted_atom"):
            held = getattr(self, name)
            setattr(moved, name, None if held is None else held.to(device))
        return moved

    @property
    def needs_mask(self) -> bool:
        """See `ExecutionPlan.needs_mask`."""
        return any(call.rows is not None and call.levels is None for call in self.calls)

    def _attend(
        self, query: Tensor, key: Tensor, value: Tensor, kernel: Kernel, scale: float | None, bias: Tensor | None
    ) -> Tensor:
        batch, heads, tokens, _ = query.shape
        shape = (batch, tokens, heads, value.shape[-1])
        if self._mixes:
            # shares are added up in float32 or better and cast once
            out = query.new_zeros(shape, dtype=torch.promote_types(query.dtype, torch.float32)).transpose(1, 2)
        else:
            out = query.new_empty(shape).transpose(1, 2)
        in_order = {False: _Keys(key, value, self._atom, bias)}
        if self._order is not None:
            index = TokenSet(self._order.numel(), index=self._order)
            sorted_bias = None if bias is None else take_bias(bias, index, 3)
            in_order[True] = _Keys(index.take(key), index.take(value), self._sorted_atom, sorted_bias)
        for group in self._groups:
            source = in_order[group[0].from_sorted]
            keys, values = group[0].keys.take(source.key), group[0].keys.take(source.value)
            for call in group:
                queries = call.queries.take(query)
                if call.levels is not None and bias is None and serves_lse(queries, source.key, source.value):
                    part = call.levels.attend(queries, source.key, source.value, scale)
                else:
                    part = kernel(queries, keys, values, mask=_mask(call, source, query.dtype), scale=scale)
                if call.weight is None:
                    call.queries.put(out, part)
                else:
                    call.queries.put(out, part.to(out.dtype) * call.weight[:, None], add=True)
        return out.to(query.dtype)


@dataclass(frozen=True, eq=False)
class _Keys:
    """Keys and values in one of the two orders, with their atoms and the model's bias in the same order."""

    key: Tensor
    value: Tensor
    atom: Tensor | None
    bias: Tensor | None


def _mask(call: Call, source: _Keys, dtype: torch.dtype) -> Tensor | None:
    """The bias of a call: its rows looked up for its keys, plus its part of the model's bias."""
    own = theirs = None
    if call.rows is not None and source.atom is not None:
        own = row_bias(call.rows, call.row_of, call.keys.take(source.atom, 0), dtype)
    if source.bias is not None:
        theirs = take_bias(take_bias(source.bias, call.queries, 2), call.keys, 3)
    return add_bias(own, theirs)


def sort_keys(terms: Terms) -> Tensor:
    """An order of the keys, int64 [Tk], in which the keys of each class lie in few runs; tokens of an atom keep their
    order.

    Atoms are sorted by who sees them, the class that sees most first, so its keys are one run, the next one's at most
    two, ...
    """
    classes = sorted(terms.classes, key=lambda c: -c.pairs)
    atoms = range(int(terms.key_atom.max()) + 1)
    sees = [c.row.isfinite().tolist() for c in classes]
    ranked = sorted(atoms, key=lambda atom: tuple(not row[atom] for row in sees))
    rank = torch.empty(len(ranked), dtype=torch.int64)
    rank[ranked] = torch.arange(len(ranked))
    return torch.argsort(rank[terms.key_atom], stable=True)


def merge_tiny(terms: Terms, device: torch.device | str | None = None) -> list[list[RowClass]]:
    """Bundles of classes, one call each: small classes join a common call as long as that is cheaper."""
    return [bundle for bundle, _ in _bundles(terms, device)]


def cost(terms: Terms, device: torch.device | str | None = None) -> tuple[float, int]:
    """Estimated cost of all calls in unmasked score pairs, and the number of calls."""
    costs = [cost for _, cost in _bundles(terms, device)]
    return sum(costs), len(costs)


def _bundles(terms: Terms, device: torch.device | str | None) -> list[tuple[list[RowClass], float]]:
    """Bundles with their costs; classes join in the order of their size."""
    counts = torch.bincount(terms.key_atom)
    overhead = ROWS_PER_CALL if torch.device(device or "cpu").type == "cpu" else ROWS_PER_CALL_CUDA
    bundles: list[tuple[list[RowClass], float]] = []
    union, rows = torch.zeros(len(counts), dtype=torch.bool), 0
    for one in sorted(terms.classes, key=lambda c: c.queries.numel()):
        size, sees = one.queries.numel(), one.row.isfinite()
        alone = float((size + overhead) * one.keys)
        joined = (rows + size + overhead) * int(counts[union | sees].sum()) * MASKED_COST
        if bundles and rows + size <= MAX_SHARED_ROWS and joined < bundles[-1][1] + alone:
            bundles[-1] = ([*bundles[-1][0], one], joined)
            union, rows = union | sees, rows + size
        else:
            bundles.append(([one], alone))
            union, rows = sees, size
    return bundles


def _call(bundle: Sequence[RowClass], key_atom: Tensor, order: Tensor, max_levels: int) -> Call:
    """The call of a bundle of classes."""
    rows = torch.stack([one.row for one in bundle])
    seen = rows.isfinite().any(0)
    levels = split_levels(rows[0]) if len(bundle) == 1 and bundle[0].is_soft else []
    if len(levels) > max_levels:
        levels = []
    # what one kernel call reads has to lie in few runs
    read = [seen, *(atoms for _, atoms in levels)]
    from_sorted = any(len(find_runs(atoms[key_atom].nonzero().flatten())) > MAX_RUNS for atoms in read)
    in_order = key_atom[order] if from_sorted else key_atom
    keys, *parts = (_run_set(atoms[in_order]) for atoms in read)
    queries = torch.cat([one.queries for one in bundle])
    weight = None
    if any(one.weight is not None for one in bundle):
        weight = torch.cat([torch.ones(len(one.queries)) if one.weight is None else one.weight for one in bundle])
    if len(bundle) == 1:
        bias = rows if bundle[0].is_soft else None
        split = Levels(tuple(parts), torch.tensor([level for level, _ in levels])) if levels else None
        return Call(token_set(queries), keys, from_sorted, bias, None, weight, split)
    row_of = torch.cat([torch.full_like(one.queries, row) for row, one in enumerate(bundle)])
    # a query that is in two classes of the bundle (two passes) stands here twice; its shares are added
    return Call(token_set(queries), keys, from_sorted, rows, row_of, weight)


def _run_set(chosen: Tensor) -> TokenSet:
    """The tokens where bool [T] holds, as runs."""
    return TokenSet(int(chosen.sum()), find_runs(chosen.nonzero().flatten()))
