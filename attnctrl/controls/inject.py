"""Values (and keys) of a picture that was inverted take the place of those of the picture that is drawn.

RF-Edit (Wang et al., arXiv 2411.04746): in the last blocks and the first steps of generation the values are those that
the inversion met at the same noise level, so that the source's layout and untouched parts stay, while queries and keys
follow the new prompt. The paper's code replaces values of texts too; here texts keep their own.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import ClassVar, Literal

import torch
from torch import Tensor

from ..bank import Bank, Entry, Held, checked_branch
from ..call import Situation
from ..content import Places, States
from ..errors import ControlError, LayoutError
from ..region import by
from ..schedule import Moment
from ..select import Layer
from .base import CODE_ONLY, Branch, Control
from .keep import is_kept_layer

__all__ = ["Inject", "Injected", "Kind"]

Kind = Literal["key", "value"]
_KEPT: tuple[Kind, ...] = ("key", "value")


@dataclass(frozen=True, eq=False)
class Inject(Control):
    """Image tokens get the keys or values that a bank holds of them, by `strength` s:

        x'_i = (1 - s) x_i + s x^bank_i        for x in `states`

    at the kept noise level that is nearest, where image tokens read image tokens. Tokens of which the bank holds
    nothing keep theirs: `Keep(regions, tokens="background")` leaves subjects to the new prompt.

    Attributes:
        bank: filled by `Keep` in an inversion or any other run of the same model at the same size. One picture serves
            all of the batch; otherwise there is one for each. What is kept of a single guidance branch, as when a
            picture is inverted without guidance, serves all of them.
        states: "value", as in the paper, "key", or both.
    """

    name: ClassVar[str] = "inject"
    in_documents: ClassVar[bool] = False

    bank: Bank = field(kw_only=True, metadata={CODE_ONLY: True})
    states: Sequence[Kind] = field(default=("value",), kw_only=True)
    branch: Branch = field(default="all", kw_only=True)

    def __post_init__(self) -> None:
        super().__post_init__()
        if not isinstance(self.bank, Bank):
            raise ControlError(f"'{self.name}': bank must be a Bank; found {type(self.bank).__name__}.")
        states = (self.states,) if isinstance(self.states, str) else tuple(self.states)
        if not states or set(states) - set(_KEPT) or len(set(states)) < len(states):
            raise ControlError(
                f"'{self.name}': states is one or both of {', '.join(_KEPT)}, each once; found {states!r}."
            )
        object.__setattr__(self, "states", states)

    @property
    def recalls(self) -> Bank | None:
        return self.bank

    def check_bank(self, model: Mapping[str, str], moment: Moment, branch: str | None) -> None:
        self.bank.check_filled(model)
        self._branch(checked_branch(branch))
        self.bank.nearest_step(moment.sigma)

    def content(self, situation: Situation, layer: Layer, places: Callable[[], Places | None]) -> Sequence[Injected]:
        line, frame = situation.line, situation.frame
        if line.stored is None or not is_kept_layer(frame):
            return ()
        kept = self.bank.held(layer.frame)
        if len(kept) not in (1, line.images):
            raise ControlError(
                f"'{self.name}': the bank holds {len(kept)} pictures and the batch has {line.images}. Keep one for all "
                "of them, or one for each."
            )
        picture = line.image if len(kept) > 1 else 0
        held, grid = kept[picture], frame.keys.grid
        if held.grid != grid:
            raise LayoutError(
                f"'{self.name}': the bank's picture has a grid of {by(held.grid)} tokens and this one {by(grid)}. Draw "
                "at the size of the picture, or capture it at this one."
            )
        entry = Entry("", -1, self._branch(line.stored[0]), picture)
        return (Injected(tuple(self.states), self.bank, entry, held, frame.keys["image"].start, self.strength),)

    def _branch(self, branch: str) -> str:
        """The branch of the bank that serves this one. Raises `ControlError` when there is none."""
        kept = self.bank.branches
        if branch not in kept and len(kept) > 1:
            raise ControlError(
                f"'{self.name}': the bank keeps branches {' and '.join(kept)}, and a forward of branch '{branch}' "
                "reads it. Capture with the same guidance, or without any."
            )
        return branch if branch in kept else kept[0]


@dataclass(frozen=True)
class Injected:
    """The content of a layer's call under `Inject`.

    Attributes:
        states: which.
        bank: where they are.
        entry: what they are kept under; see `at`.
        held: which image tokens are kept.
        start: where these begin among keys and values.
        strength: the way there, 1 is all of it.
    """

    states: tuple[Kind, ...]
    bank: Bank
    entry: Entry
    held: Held
    start: int
    strength: float

    def at(self, layer: str, moment: Moment) -> Injected:
        """The same for a layer of a forward.

        Raises:
            ControlError, ScheduleError: when the bank holds nothing for it.
        """
        entry = self.entry._replace(layer=layer, step=self.bank.nearest_step(moment.sigma))
        self.bank.check_entries([entry])
        return replace(self, entry=entry)

    def __call__(self, own: States, batch: States, rows: Tensor) -> States:
        kept = self.bank.entries[self.entry].opened(own.value)
        tokens = (self.held.tokens + self.start).to(own.value.device)
        return own._replace(
            **{name: self._mixed(getattr(own, name), kept[_KEPT.index(name)], tokens) for name in self.states}
        )

    def explain(self) -> str:
        """Which states, and how far."""
        return f"{' and '.join(self.states)} of picture {self.entry.picture} of the bank by {self.strength:g}"

    def _mixed(self, states: Tensor, kept: Tensor, tokens: Tensor) -> Tensor:
        """States [n, H, T, D] with those of `tokens` taken to `kept` [H, tokens, D]."""
        whole = kept.expand(len(states), -1, -1, -1)
        if self.strength < 1:
            whole = torch.lerp(states.index_select(2, tokens), whole, self.strength)
        return states.index_copy(2, tokens, whole)
