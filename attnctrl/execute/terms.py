"""Passes brought to one normal form: classes of queries that share a row of the mask and a share of the output.

    out[q] = sum_p weight_p[atom(q)] * softmax(q k^T * scale + W_p[atom(q), atom(k)]) v

A row is what one query sees in one pass. Equal rows are one class whatever pass they come from, and their weights
add, so two passes that agree on a query cost one attention for it (regional.md: with one region that is the whole
canvas both passes are vanilla).
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from ..errors import PlanError
from ..visibility import combine_atoms
from .base import Pass

WEIGHT_TOLERANCE = 1e-5


@dataclass(frozen=True, eq=False)
class RowClass:
    """Queries that share a row of log-weights.

    Attributes:
        row: float32 [G] over the occurring key atoms; a row that is constant where finite is zero there.
        queries: int64 [n], ascending token numbers.
        weight: float32 [n], the share of this class in each query's output; None means 1.
        keys: number of visible key tokens.
    """

    row: Tensor
    queries: Tensor
    weight: Tensor | None
    keys: int

    @property
    def pairs(self) -> int:
        """Score pairs of the class."""
        return self.queries.numel() * self.keys

    @property
    def is_soft(self) -> bool:
        """Visible keys have different log-weights, so the kernel needs a bias."""
        return bool((self.row[self.row.isfinite()] != 0).any())


@dataclass(frozen=True, eq=False)
class Terms:
    """The classes of a call. `key_atom` int64 [Tk] numbers the G occurring key atoms; `tokens` is (Tq, Tk)."""

    classes: tuple[RowClass, ...]
    key_atom: Tensor
    tokens: tuple[int, int]

    @property
    def density(self) -> float:
        """Score pairs of all classes over Tq x Tk."""
        return sum(c.pairs for c in self.classes) / max(1, self.tokens[0] * self.tokens[1])

    @property
    def is_open(self) -> bool:
        """One class sees every key alike and is the whole output: unmasked attention."""
        first = self.classes[0]
        return len(self.classes) == 1 and first.weight is None and bool((first.row == 0).all())


def build_terms(passes: Sequence[Pass]) -> Terms:
    """Normal form of the passes.

    Raises:
        PlanError: when token counts differ, weights are out of range or do not sum to 1, or a computed query sees no
            key.
    """
    if not passes:
        raise PlanError("A plan needs at least one pass; use Visibility.open(tokens) for unmasked attention.")
    shares = [_checked_weight(number, one) for number, one in enumerate(passes)]
    query_atom, query_columns = _refine([one.visibility.query_atom for one in passes], "query")
    if not query_atom.numel():
        raise PlanError("There are no query tokens to plan for; the visibility covers an empty sequence.")
    key_atom, key_columns = _refine([one.visibility.key_atom for one in passes], "key")
    share = torch.stack([w[column] for w, column in zip(shares, query_columns, strict=True)])
    _check_sum(share.sum(0), passes, query_columns)
    rows = torch.stack(
        [
            one.visibility.log_weight.cpu()[queries][:, keys]
            for one, queries, keys in zip(passes, query_columns, key_columns, strict=True)
        ]
    )
    tokens = (query_atom.numel(), key_atom.numel())
    return Terms(_classes(rows.flatten(0, 1), share.flatten(), query_atom, key_atom), key_atom, tokens)


def _classes(rows: Tensor, share: Tensor, query_atom: Tensor, key_atom: Tensor) -> tuple[RowClass, ...]:
    """Classes of equal rows [P * Gq, Gk] with positive share float64 [P * Gq], pass-major."""
    groups = int(query_atom.max()) + 1
    live = (share > 0).nonzero().flatten()
    distinct, class_of = torch.unique(_flatten_constant(rows[live]), dim=0, return_inverse=True)
    total = torch.zeros(len(distinct), groups, dtype=torch.float64)
    total.index_put_((class_of, live % groups), share[live], accumulate=True)
    key_counts = torch.bincount(key_atom, minlength=rows.shape[1])
    classes = []
    for row, weight in zip(distinct, total, strict=True):
        queries = (weight[query_atom] > 0).nonzero().flatten()
        per_token = weight[query_atom[queries]]
        whole = bool((per_token > 1 - WEIGHT_TOLERANCE).all())
        keys = int(key_counts[row.isfinite()].sum())
        classes.append(RowClass(row, queries, None if whole else per_token.to(torch.float32), keys))
    return tuple(sorted(classes, key=lambda c: int(c.queries[0])))


def _flatten_constant(rows: Tensor) -> Tensor:
    """Rows that are constant where finite become zero there: softmax does not see a constant."""
    finite = rows.isfinite()
    low = rows.masked_fill(~finite, float("inf")).amin(1, keepdim=True)
    high = rows.amax(1, keepdim=True)
    return torch.where(finite & (low == high), 0.0, rows)


def _refine(labels: Sequence[Tensor], side: str) -> tuple[Tensor, list[Tensor]]:
    """Common refinement of labellings [T]: (atom int64 [T], per labelling its atom int64 [G] of each refined atom)."""
    if len({label.numel() for label in labels}) > 1:
        found = ", ".join(str(label.numel()) for label in labels)
        raise PlanError(f"All passes of a call must cover the same tokens; {side} tokens per pass: {found}.")
    present, atom = torch.unique(labels[0].cpu(), return_inverse=True)
    columns = [present]
    for label in labels[1:]:
        atom, pairs = combine_atoms(atom, label.cpu())
        columns = [column[pairs[:, 0]] for column in columns] + [pairs[:, 1]]
    return atom, columns


def _checked_weight(number: int, one: Pass) -> Tensor:
    """float64 [Gq] on the CPU, after checking shape, range and that computed queries see a key."""
    names = one.visibility.query_names
    if one.weight is None:
        weight = torch.ones(len(names), dtype=torch.float64)
    else:
        weight = one.weight.detach().to(device="cpu", dtype=torch.float64)
    if tuple(weight.shape) != (len(names),):
        raise PlanError(
            f"The weight of pass {number} must have shape [{len(names)}], one entry per query atom "
            f"({', '.join(names)}); found {tuple(weight.shape)}."
        )
    bad = ~((weight >= 0) & (weight <= 1))
    if bool(bad.any()):
        found = ", ".join(f"'{names[g]}' {float(weight[g]):g}" for g in bad.nonzero().flatten().tolist())
        raise PlanError(f"Weights of a pass must lie in [0, 1]; pass {number} has {found}.")
    one.visibility.validate(weight > 0)
    return weight


def _check_sum(total: Tensor, passes: Sequence[Pass], columns: Sequence[Tensor]) -> None:
    wrong = ((total - 1).abs() > WEIGHT_TOLERANCE).nonzero().flatten().tolist()
    if not wrong:
        return
    found = []
    for g in wrong:
        names = [one.visibility.query_names[int(column[g])] for one, column in zip(passes, columns, strict=True)]
        found.append(f"'{' & '.join(dict.fromkeys(names))}' {float(total[g]):g}")
    raise PlanError(
        f"The weights of all passes must sum to 1 for every query atom; found {', '.join(found)}. "
        "Give the missing share to one of the passes (weight None means 1)."
    )
