"""The output stage of a call: what controls make of the attention after it was executed.

Controls give an `Output` for the rows of a layer that they act in. It is called once the kernel has run and sees what
the kernel was given; several follow each other in list order. Layers without one never come here.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Any, NamedTuple, Protocol, runtime_checkable

from torch import Tensor

from .content import States
from .execute import ExecutionPlan
from .sources import Sources
from .variants import RowSet, put_rows, row_numbers

__all__ = ["Batch", "Contrasting", "Executed", "Output", "RowOutputs", "Run", "edited", "mask_of", "overwritten"]

Run = Callable[..., Tensor]
"""(plan or None, query, key, value, mask, scale) -> the attention of some rows."""


class Attend(Protocol):
    """See `Executed.attend`."""

    def __call__(self, query: Tensor, scale: float | None, plan: ExecutionPlan | None = ...) -> Tensor: ...


class Batch(NamedTuple):
    """A kernel call of all rows, [B, heads, tokens, D] each: what it was given, and what it gave before any output."""

    query: Tensor
    key: Tensor
    value: Tensor
    out: Tensor


@dataclass(frozen=True, eq=False)
class Executed:
    """A kernel call that has run, as one variant of rows sees it.

    Attributes:
        query: [B, H, Tq, D].
        key, value: [B, Hk, Tk, D], without those of other pictures; in joint attention query i belongs to value i.
        out: [B, H, Tq, D], what was executed, and earlier outputs have made of it; where all of it is `overwritten`,
            nothing was, and it has the shape alone.
        mask: the model's own, bool (True sees) or additive, 4D, broadcastable to [B, H, Tq, Tk]; or None.
        scale: of the scores; None means 1 / sqrt(D).
        planned: controls of visibility act on this call as well.
        attend: (query [B, H, Tq, D], scale, plan) -> the attention of another query over the same keys, under the same
            mask and visibility, or under another plan. Where `alike`, a query [B, H, 1, D] will do.
        rows: int64 [B], which rows of the batch these are.
        batch: all rows, for outputs that compare pictures.
    """

    query: Tensor
    key: Tensor
    value: Tensor
    out: Tensor
    mask: Tensor | None
    scale: float | None
    planned: bool
    attend: Attend
    rows: Tensor
    batch: Batch

    @property
    def alike(self) -> bool:
        """All queries see the same keys."""
        return not self.planned and (self.mask is None or self.mask.shape[2] == 1)


class Output(Protocol):
    """What becomes of an executed call. Equal ones do the same, so that layers share them.

    One that has an attribute `overwrites` which is True reads neither `Executed.out` nor `Executed.batch.out`.
    """

    def __call__(self, call: Executed) -> Tensor:
        """The new output [B, H, Tq, D]."""

    def explain(self) -> str:
        """One line for reports."""


@runtime_checkable
class Contrasting(Output, Protocol):
    """An output that wants a second execution of the call, under a plan of its own; see `Control.contrast`."""

    def under(self, plan: ExecutionPlan | None) -> Output:
        """The same with that plan."""


RowOutputs = tuple[RowSet, ExecutionPlan | None, Sources | None, tuple[Output, ...]]
"""(rows, the plan and the sources they were executed by, their outputs in list order)."""


def overwritten(outputs: Sequence[RowOutputs]) -> bool:
    """Nobody reads what a call would give: one output makes all of it anew."""
    if len(outputs) != 1:
        return False
    rows, _, _, edits = outputs[0]
    return rows is None and len(edits) == 1 and getattr(edits[0], "overwrites", False)


def edited(
    outputs: Sequence[RowOutputs],
    out: Tensor,
    own: States,
    others: tuple[Tensor, Tensor],
    mask: Tensor | None,
    run: Run,
    scale: float | None,
) -> Tensor:
    """The executed `out` after the outputs of its rows; rows without one keep theirs to the bit.

    Args:
        own: of all rows, after the content stage.
        others: key, value of all rows as the model made them, for sources.
        mask: the model's own, 4D.
        run: executes some rows again, for `Executed.attend`.
    """
    batch = Batch(*own, out)
    for rows, plan, sources, edits in outputs:
        if not edits:
            continue
        query, key, value = (_taken(states, rows) for states in own)
        own_mask = mask_of(mask, rows)
        read = (key, value, own_mask) if sources is None else sources.join((key, value, own_mask), *others)

        def attend(query: Tensor, scale: float | None, plan: Any = plan, read: Any = read) -> Tensor:
            return run(plan, query, *read, scale)

        mine = query, key, value, _taken(batch.out, rows)
        call = Executed(*mine, own_mask, scale, plan is not None, attend, row_numbers(rows, out), batch)
        for edit in edits:
            call = replace(call, out=edit(call))
        out = put_rows(out, batch.out, rows, call.out)
    return out


def _taken(x: Tensor, rows: RowSet) -> Tensor:
    return x if rows is None else x[rows]


def mask_of(mask: Tensor | None, rows: RowSet) -> Tensor | None:
    """The part of a 4D mask that belongs to some rows; all of it where it is the same for all rows."""
    return mask if mask is None or rows is None or mask.shape[0] == 1 else mask[rows]
