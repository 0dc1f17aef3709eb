"""The work on one kernel call: an `Act` hangs on a layer while the model runs, a `Probe` only watches.

Its stages and their order are told in `attnctrl.call`.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Sequence
from functools import partial
from typing import Any, Protocol

from torch import Tensor

from .bank import Recalled
from .content import Content, RowContents, States, changed, followed, of_rows
from .errors import PlanError
from .execute import ExecutionPlan, Kernel, as_bias
from .output import RowOutputs, Run, edited, mask_of, overwritten
from .schedule import Moment
from .sources import Sources
from .variants import RowSet

_Own = tuple[Tensor, Tensor, Tensor | None]

__all__ = ["Act", "Probe", "per_sample"]


class Probe(Protocol):
    """What watches the kernel calls of a layer; it gets the very tensors that the kernel gets and must not write.

    One that has `executed(out)` is given what attention gave out [B, H, Tq, D] too, before any control's output.
    """

    def look(
        self, query: Tensor, key: Tensor, value: Tensor, mask: Tensor | None, kernel: Kernel, scale: float | None
    ) -> None:
        """Watch one call; arguments as in `Act.run`."""


class Act:
    """What a layer does during one forward: for each set of rows a plan, or the untouched kernel.

    Attributes:
        parts: (rows, plan or None for untouched); () leaves the layer's own call as it is.
        tokens: numbers of (queries, keys) that the plans are made for.
        call: which of the module's kernel calls is meant; the others, such as those that read an IP-Adapter's
            pictures, stay as they are.
        outputs: what becomes of the executed call, for each set of rows; () leaves it alone.
        sources: of each part, what its rows read of others; () nothing.
        contents: what becomes of queries, keys and values before, for each set of rows, those of `parts` where these
            tell rows apart; () leaves them alone.
        probes: what watches that call.
    """

    probes: tuple[Probe, ...] = ()

    def __init__(
        self,
        parts: Sequence[tuple[RowSet, ExecutionPlan | None]],
        tokens: tuple[int, int],
        call: int = 0,
        outputs: Sequence[RowOutputs] = (),
        sources: Sequence[Sources | None] = (),
        contents: Sequence[RowContents] = (),
    ) -> None:
        self.parts = tuple(parts)
        self.tokens = tokens
        self.call = call
        self.outputs = tuple(outputs)
        self.contents = tuple(contents)
        self.sources = tuple(sources) or (None,) * len(self.parts)
        rows = [rows for rows, _ in self.parts if rows is not None]
        self._split = bool(rows)
        told = rows or [rows for rows, *_ in self.outputs or self.contents if rows is not None]
        self._rows = sum(map(_count, told)) if told else None

    @property
    def attended(self) -> tuple[Recalled, ...]:
        """What of banks takes part in the kernel's calls: keys and values, and what makes queries."""
        held: list[Any] = [*self.sources, *(edit for _, edits in self.contents for edit in edits)]
        return tuple(one for one in held if isinstance(one, Recalled))

    @property
    def stored(self) -> tuple[Recalled, ...]:
        """All that is read of banks, by outputs too."""
        edits: list[Any] = [edit for *_, edits in self.outputs for edit in edits]
        return *self.attended, *(one for one in edits if isinstance(one, Recalled))

    def at(self, layer: str, moment: Moment) -> Act:
        """The same for a layer of a forward, with what it reads of banks.

        Raises:
            ControlError, ScheduleError: when a bank holds no keys for it.
        """
        placed = {id(one): one.at(layer, moment) for one in self.stored}
        made = copy.copy(self)
        made.sources = tuple(placed.get(id(one), one) for one in self.sources)
        made.contents = tuple((rows, tuple(placed.get(id(one), one) for one in edits)) for rows, edits in self.contents)
        made.outputs = tuple(
            (rows, part, placed.get(id(one), one), tuple(placed.get(id(edit), edit) for edit in edits))
            for rows, part, one, edits in self.outputs
        )
        return made

    def watched(self, probes: Sequence[Probe]) -> Act:
        """The same with `probes` besides its own."""
        made = copy.copy(self)
        made.probes = (*self.probes, *probes)
        return made

    @property
    def executors(self) -> tuple[str, ...]:
        """Names of the executors in use."""
        return tuple(sorted({part.executor for _, part in self.parts if part is not None}))

    @property
    def explained(self) -> frozenset[str]:
        """What is done, a line for each plan, content and output."""
        plans = {part.explain() for _, part in self.parts if part is not None}
        contents = {edit.explain() for _, edits in self.contents for edit in edits}
        outputs = {edit.explain() for *_, edits in self.outputs for edit in edits}
        return frozenset(plans | contents | outputs)

    @property
    def needs_mask(self) -> bool:
        """Some kernel call of a plan gets an additive bias."""
        return any(part.needs_mask for _, part in self.parts if part is not None)

    def run(
        self, query: Tensor, key: Tensor, value: Tensor, mask: Tensor | None, kernel: Kernel, scale: float | None
    ) -> Tensor:
        """The controlled attention of query, key, value [B, heads, tokens, head_dim].

        Args:
            mask: the model's own, bool (True sees) or additive, [B, Tk] or broadcastable to [B, heads, Tq, Tk]; it is
                merged with the plans.

        Raises:
            PlanError: when tokens, rows or mask do not fit the plans.
        """
        if (query.shape[2], key.shape[2]) != self.tokens:
            raise PlanError(
                f"The plan covers {self.tokens[0]} queries and {self.tokens[1]} keys, but the kernel got "
                f"{query.shape[2]} and {key.shape[2]}. Another hook shortens or extends the sequence inside the model."
            )
        if self._rows is not None and self._rows != query.shape[0]:
            raise PlanError(
                f"The plan tells {self._rows} rows of the batch apart, but the kernel got {query.shape[0]}: the "
                "layer's processor splits its batch, as those of perturbed-attention guidance do. Leave this layer out "
                "of the control's `layers`."
            )
        if mask is not None:
            mask = per_sample(mask, query.shape[0], self.tokens)
        run, batch = partial(_run_part, kernel), States(query, key, value)
        if self._split and self.contents and not self.outputs:
            # a set of rows after the other, so that no more than one of them is there twice
            out = self._in_parts(run, batch, batch, [edits for _, edits in self.contents], mask, scale)
            self.tell(out)
            return out
        own = changed(self.contents, batch)
        if overwritten(self.outputs) and not self._asked:
            out = query.new_empty(()).expand(*query.shape[:3], value.shape[-1])
        else:
            out = self._in_parts(run, own, batch, [()] * len(self.parts), mask, scale)
            self.tell(out)
        return edited(self.outputs, out, own, (key, value), mask, run, scale)

    @property
    def _asked(self) -> list[Callable[[Tensor], None]]:
        """Those of the probes that want what attention gives out."""
        # no names within the comprehension: compiled code cannot read them
        return [probe.executed for probe in self.probes if hasattr(probe, "executed")]

    def tell(self, out: Tensor) -> None:
        """Tell the probes that want it what attention gave out [B, H, Tq, D]."""
        for told in self._asked:
            told(out)

    def _in_parts(
        self,
        run: Run,
        own: States,
        batch: States,
        edits: Sequence[Sequence[Content]],
        mask: Tensor | None,
        scale: float | None,
    ) -> Tensor:
        """The attention of all rows: one part after the other, each with its contents before."""

        def attended(number: int) -> Tensor:
            rows, part = self.parts[number]
            mine = followed(edits[number], of_rows(own, rows), batch, rows)
            read = _read(self.sources[number], (mine.key, mine.value, mask_of(mask, rows)), batch.key, batch.value)
            return run(part, mine.query, *read, scale)

        if not self._split:
            return attended(0)
        count, heads, tokens, _ = own.query.shape
        # [B, T, H, D] memory, in which models read it
        out = own.query.new_empty(count, tokens, heads, own.value.shape[-1]).transpose(1, 2)
        for number, (rows, _) in enumerate(self.parts):
            if rows is not None:
                out[rows] = attended(number).to(out.dtype)
        return out


def _count(rows: Tensor | slice) -> int:
    return rows.stop - rows.start if isinstance(rows, slice) else len(rows)


def per_sample(mask: Tensor, batch: int, tokens: tuple[int, int]) -> Tensor:
    """A mask of the model as [B or 1, H or 1, Tq or 1, Tk or 1].

    Raises:
        PlanError: when it covers other tokens than the layer has.
    """
    queries, keys = tokens
    if tuple(mask.shape) == (batch, keys):
        # Diffusers' backends read such a mask as key padding
        mask = mask[:, None, None]
    mask = mask.reshape((1,) * (4 - mask.ndim) + tuple(mask.shape))
    if mask.shape[0] not in (1, batch) or mask.shape[2] not in (1, queries) or mask.shape[3] not in (1, keys):
        raise PlanError(
            f"The model passes an attention mask {tuple(mask.shape)} to a layer of {batch} rows, {queries} queries and "
            f"{keys} keys, so it cannot be merged with the plan. Leave the mask out, or give it all tokens, appended "
            "texts and references included."
        )
    return mask


def _read(sources: Sources | None, own: _Own, key: Tensor, value: Tensor) -> _Own:
    """Key, value and mask of some rows, with what they read of others."""
    return own if sources is None else sources.join(own, key, value)


def _run_part(
    kernel: Kernel,
    part: ExecutionPlan | None,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    mask: Tensor | None,
    scale: float | None,
) -> Tensor:
    if part is not None:
        return part.run(query, key, value, kernel=kernel, scale=scale, mask=mask)
    return kernel(query, key, value, mask=None if mask is None else as_bias(mask, query.dtype), scale=scale)
