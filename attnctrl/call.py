"""From controls to the work on one kernel call.

Stages of a call, always in this order; a control may take part in any: positions (rotary argument) -> content (query,
key, value) -> sources (further keys and values) -> visibility (who sees whom) -> execute -> output. Controls compose by
list order inside a stage; visibilities add up to one plan and one execution.

A `Situation` is what a control knows when it is asked for its part: one sample's sequence in one phase of the run. What
comes of it, and hangs on a layer while the model runs, is an `attnctrl.act.Act`.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property, partial
from typing import Protocol

import torch
from torch import Tensor

from .bank import Held
from .errors import ControlError
from .execute import ExecutionPlan, Host, Pass, plan
from .execute.tokens import TokenSet
from .groups import Group, Words, partition
from .layout import Frame, Layout
from .region import Region
from .sources import compacted, shifted
from .variants import Line
from .visibility import Visibility, compose

__all__ = ["Blend", "Row", "Situation", "build_passes", "build_plan"]


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
