"""From controls to the work on one kernel call.

Stages of a call, always in this order; a control may take part in any: positions (rotary argument) -> content (query,
key, value) -> sources (further keys and values) -> visibility (who sees whom) -> execute -> output. Controls compose by
list order inside a stage; visibilities add up to one plan and one execution.

A `Situation` is what a control knows when it is asked for its part: one sample's sequence in one phase of the run. An
`Act` is the ready plan that hangs on a layer while the model runs. A `Probe` watches a call and changes nothing.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property, partial
from typing import Any, Protocol

import torch
from torch import Tensor

from .bank import Held, Recalled
from .content import Content, RowContents, States, changed, followed, of_rows
from .errors import ControlError, PlanError
from .execute import ExecutionPlan, Host, Kernel, Pass, as_bias, plan
from .execute.tokens import TokenSet
from .groups import Group, Words, partition
from .layout import Frame, Layout
from .output import RowOutputs, Run, edited, mask_of, overwritten
from .region import Region
from .schedule import Moment
from .sources import Sources, compacted, shifted
from .variants import Line, RowSet
from .visibility import Visibility, compose

_Own = tuple[Tensor, Tensor, Tensor | None]

__all__ = ["Act", "Blend", "Probe", "Row", "Situation", "build_passes", "build_plan", "per_sample"]


@dataclass(frozen=True)
class Row:
    """One batch entry: which guidance branch, which sample (scene) of the batch, which of the branch's rows."""

    branch: str | None
    sample: int
    image: int = 0


@dataclass(frozen=True, eq=False)
class Situation:
    """One sample's sequence in one phase of the run, as the layers of one frame see it.

    Attributes:
        frame: token ranges of queries and keys, with the texts that controls append in this phase.
        regions: all regions declared by the stack, whether their control acts in this phase or not.
        member: bool [regions, image tokens].
        words: what the tokens of the prompt are.
        shared: of each other picture whose tokens are among the keys, who holds them, see `partition`.
        others: the regions of each of these pictures.
        stored: where these are pictures of a bank, what it holds of each: those of their tokens alone are there.
        line: which picture of how many this is.
    """

    frame: Frame
    regions: tuple[Region, ...]
    member: Tensor
    words: Words = field(default_factory=Words)
    shared: Mapping[int, Tensor] = field(default_factory=dict)
    others: Mapping[int, tuple[Region, ...]] = field(default_factory=dict)
    stored: tuple[Held, ...] = ()
    line: Line = field(default_factory=partial(Line, 0, ()))

    def _split(self, side: Layout) -> tuple[Tensor, tuple[Group, ...]]:
        return partition(side, self.member, self.regions, self.words, self.shared)

    @cached_property
    def queries(self) -> tuple[Tensor, tuple[Group, ...]]:
        """(atom int64 [query tokens], groups): the group of each query token, and the groups by number."""
        return self._split(self.frame.queries)

    @cached_property
    def keys(self) -> tuple[Tensor, tuple[Group, ...]]:
        """The same of the key tokens; the same object in joint attention."""
        return self.queries if self.frame.is_joint else self._split(self.frame.keys)

    def tabulate(self, weight: Callable[[Group, Group], float]) -> Visibility:
        """The visibility in which query group q sees key group k with `weight(q, k)` in [0, 1]."""
        (rows, row_groups), (columns, column_groups) = self.queries, self.keys
        table = torch.tensor([[weight(q, k) for k in column_groups] for q in row_groups], dtype=torch.float64)
        names = tuple(group.name for group in row_groups)
        if self.frame.is_joint:
            return Visibility.joint(rows, table.log(), names)
        return Visibility(rows, columns, table.log().float(), names, tuple(group.name for group in column_groups))

    def share(self, weight: Callable[[Group], float]) -> Tensor:
        """float32 [query tokens] from a number per group."""
        atom, groups = self.queries
        return torch.tensor([weight(group) for group in groups])[atom]


@dataclass(frozen=True, eq=False)
class Blend:
    """A further pass beside the controlled one: output = (1 - sum of shares) * controlled + share * this pass + ...

    Attributes:
        visibility: what this pass sees.
        share: float32 [tokens] in [0, 1], per query token.
        alone: other controls do not touch it; else what they hide is hidden in it too.
    """

    visibility: Visibility
    share: Tensor
    alone: bool = True


class VisibilityControl(Protocol):
    """The part of a control that the visibility stage asks for; `own` are the regions the control acts on."""

    def visibility(self, situation: Situation, own: frozenset[int]) -> Visibility | None: ...

    def blends(self, situation: Situation, own: frozenset[int]) -> Sequence[Blend]: ...


def build_passes(
    situation: Situation, acting: Sequence[tuple[VisibilityControl, frozenset[int]]], hidden: frozenset[int]
) -> list[Pass]:
    """Compose the visibility stage of one layer.

    Args:
        situation: the sample's sequence.
        acting: controls of this layer in list order, each with the regions it acts on.
        hidden: regions whose text is in the sequence but belongs to no control acting in this layer; it is seen by
            nobody.

    Returns:
        the passes; none when everyone sees everyone, as no control has anything to say about it.

    Raises:
        ControlError: when two controls mix passes.
    """
    tucked = _hide(situation, hidden)
    always = [] if tucked is None else [tucked]
    seen = [(control, part) for control, own in acting if (part := control.visibility(situation, own)) is not None]
    mixing = [(control, found) for control, own in acting if (found := control.blends(situation, own))]
    if len(mixing) > 1:
        raise ControlError(
            f"{len(mixing)} controls of one layer mix passes (base_ratio, or overlapping texts in cross attention); "
            "leave that to one of them: base_ratio=0, mixing='mask'."
        )
    parts = [*always, *(part for _, part in seen)]
    if not mixing:
        return [Pass(compose(*parts))] if parts else []
    main = compose(*parts) if parts else situation.tabulate(lambda q, k: 1.0)
    mixer, blends = mixing[0]
    others = [part for control, part in seen if control is not mixer]
    left = 1 - torch.stack([blend.share for blend in blends]).sum(0)
    further = [
        _weighted(compose(*always, blend.visibility, *([] if blend.alone else others)), blend.share) for blend in blends
    ]
    return [_weighted(main, left), *further]


def build_plan(
    situation: Situation,
    acting: Sequence[tuple[VisibilityControl, frozenset[int]]],
    hidden: frozenset[int],
    device: torch.device | str,
    host: Host = Host(),
) -> tuple[ExecutionPlan | None, tuple[TokenSet, ...]]:
    """The execution plan of one layer, with its index tensors on `device`, None when everyone sees everyone; and of
    each other picture that is read, the tokens that come behind the own keys.
    """
    passes = build_passes(situation, acting, hidden)
    if not situation.shared:
        return (plan(passes, device=device, host=host) if passes else None), ()
    keys = situation.frame.keys
    passes = passes or [Pass(situation.tabulate(lambda q, k: 1.0))]
    lengths = [held.shape[1] for held in situation.shared.values()]
    passes, left = compacted(passes, keys.tokens - sum(lengths), lengths)
    begin = 0 if situation.stored else keys["image"].start
    return plan(passes, device=device, host=host), tuple(shifted(one, begin).to(device) for one in left)


def _hide(situation: Situation, hidden: frozenset[int]) -> Visibility | None:
    """Padding and texts of controls that do not act here see themselves only, and nobody else sees them."""

    def is_hidden(group: Group) -> bool:
        return group.kind == "pad" or (group.kind == "region_text" and group.index in hidden)

    if not any(is_hidden(group) for _, groups in (situation.queries, situation.keys) for group in groups):
        return None
    return situation.tabulate(lambda q, k: float(q == k or not (is_hidden(q) or is_hidden(k))))


def _weighted(visibility: Visibility, share: Tensor) -> Pass:
    """The pass with its share per atom; atoms are split where tokens of one atom have different shares."""
    values, which = torch.unique(share, return_inverse=True)
    if len(values) > 1:
        keys = which if visibility.is_joint else torch.zeros_like(visibility.key_atom)
        blank = ("",) * (len(values) if visibility.is_joint else 1)
        labels = Visibility(which, keys, torch.zeros(len(values), len(blank)), ("",) * len(values), blank)
        visibility = compose(visibility, labels)
    first = torch.full((len(visibility.query_names),), -1)
    first[visibility.query_atom.flip(0)] = torch.arange(len(share)).flip(0)
    return Pass(visibility, torch.where(first >= 0, share[first], 0.0))


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
    def stored(self) -> tuple[Recalled, ...]:
        """What is read of banks."""
        contents = (edit for _, edits in self.contents for edit in edits)
        held: list[Any] = [*self.sources, *contents, *(edit for *_, edits in self.outputs for edit in edits)]
        return tuple(one for one in held if isinstance(one, Recalled))

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
        return [told for probe in self.probes if (told := getattr(probe, "executed", None)) is not None]

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
