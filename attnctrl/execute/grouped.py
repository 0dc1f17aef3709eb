"""The exact lowering without a mask: one kernel call per class of queries with equal mask rows.

    out[Q_r] = kernel(q[Q_r], k[K_r], v[K_r])        K_r: every key that the row sees

Nothing is computed twice and nothing is thrown away: the cost is the density of the mask. Rows with different finite
weights add a bias per key, [1, 1, 1, |K_r|]. Tiny classes share one call with a small bias [sum |Q_r|, |union of K_r|].
"""

from __future__ import annotations

import copy
from collections.abc import Sequence
from dataclasses import dataclass, replace
from itertools import groupby

import torch
from torch import Tensor

from .base import ExecutionPlan, Kernel
from .terms import RowClass, Terms
from .tokens import MAX_RUNS, TokenSet, find_runs, row_bias, tensor_bytes, token_set

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
class Call:
    """One kernel call.

    Attributes:
        queries: the tokens computed.
        keys: the tokens seen, as runs of the given or of the sorted key order.
        from_sorted: which of the two.
        rows: float32 [R, G] log-weights when a bias is needed, else None.
        row_of: int64 [count], the row of each query; None when they share one.
        weight: float32 [count] share of the output; None means 1.
    """

    queries: TokenSet
    keys: TokenSet
    from_sorted: bool
    rows: Tensor | None
    row_of: Tensor | None
    weight: Tensor | None

    @property
    def nbytes(self) -> int:
        """Bytes held by the call."""
        return self.queries.nbytes + self.keys.nbytes + tensor_bytes([self.rows, self.row_of, self.weight])

    @property
    def source(self) -> tuple[bool, tuple[tuple[int, int], ...]]:
        """What the call gathers: calls of equal source share it."""
        return self.from_sorted, self.keys.runs

    def to(self, device: torch.device | str) -> Call:
        """The same call on `device`."""
        rows, row_of, weight = (None if x is None else x.to(device) for x in (self.rows, self.row_of, self.weight))
        return replace(self, queries=self.queries.to(device), rows=rows, row_of=row_of, weight=weight)


class GroupedPlan(ExecutionPlan):
    """One unmasked kernel call per row class; peak memory is one extra copy of the keys and values of a class."""

    executor = "grouped"

    def __init__(self, terms: Terms, reason: str, *, device: torch.device | str | None = None) -> None:
        super().__init__(density=terms.density, classes=len(terms.classes), tokens=terms.tokens, reason=reason)
        order = sort_keys(terms)
        calls = [_call(bundle, terms.key_atom, order) for bundle in merge_tiny(terms, device)]
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

    def run(self, query: Tensor, key: Tensor, value: Tensor, *, kernel: Kernel, scale: float | None = None) -> Tensor:
        """See `ExecutionPlan.run`."""
        batch, heads, tokens, _ = query.shape
        shape = (batch, tokens, heads, value.shape[-1])
        if self._mixes:
            # shares are added up in float32 or better and cast once
            out = query.new_zeros(shape, dtype=torch.promote_types(query.dtype, torch.float32)).transpose(1, 2)
        else:
            out = query.new_empty(shape).transpose(1, 2)
        in_order = {False: (key, value, self._atom)}
        if self._order is not None:
            index = TokenSet(self._order.numel(), index=self._order)
            in_order[True] = (index.take(key), index.take(value), self._sorted_atom)
        for group in self._groups:
            all_keys, all_values, atom = in_order[group[0].from_sorted]
            keys, values = group[0].keys.take(all_keys), group[0].keys.take(all_values)
            for call in group:
                mask = None
                if call.rows is not None and atom is not None:
                    mask = row_bias(call.rows, call.row_of, call.keys.take(atom, 0), query.dtype)
                part = kernel(call.queries.take(query), keys, values, mask=mask, scale=scale)
                if call.weight is None:
                    call.queries.put(out, part)
                else:
                    call.queries.put(out, part.to(out.dtype) * call.weight[:, None], add=True)
        return out.to(query.dtype)


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


def _call(bundle: Sequence[RowClass], key_atom: Tensor, order: Tensor) -> Call:
    """The call of a bundle of classes."""
    rows = torch.stack([one.row for one in bundle])
    seen = rows.isfinite().any(0)[key_atom]
    given = find_runs(seen.nonzero().flatten())
    from_sorted = len(given) > MAX_RUNS
    runs = find_runs(seen[order].nonzero().flatten()) if from_sorted else given
    keys = TokenSet(int(seen.sum()), runs)
    queries = torch.cat([one.queries for one in bundle])
    weight = None
    if any(one.weight is not None for one in bundle):
        weight = torch.cat([torch.ones(len(one.queries)) if one.weight is None else one.weight for one in bundle])
    if len(bundle) == 1:
        bias = rows if bundle[0].is_soft else None
        return Call(token_set(queries), keys, from_sorted, bias, None, weight)
    row_of = torch.cat([torch.full_like(one.queries, row) for row, one in enumerate(bundle)])
    # a query that is in two classes of the bundle (two passes) stands here twice; its shares are added
    return Call(token_set(queries), keys, from_sorted, rows, row_of, weight)
