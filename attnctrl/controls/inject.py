"""Queries, keys or values of a picture that was inverted take the place of those of the picture that is drawn.

Values, as in RF-Edit (Wang et al., arXiv 2411.04746): in the last blocks and the first steps of generation they are
those that the inversion met at the same noise level, so that the source's layout and untouched parts stay, while
queries and keys follow the new prompt. Queries and keys, as in Plug-and-Play (arXiv 2211.12572) and, for image tokens
of joint attention, in the editing of arXiv 2508.07519: who looks where is the source's, what is seen is the new
picture's. Keys and values, as in MasaCtrl (arXiv 2304.08465): the new picture looks at the source in place of itself.
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
from ..layout import Frame
from ..region import by
from ..schedule import Moment
from ..select import Layer
from .base import CODE_ONLY, Branch, Control
from .keep import is_kept_layer, kept_of

__all__ = ["Inject", "Injected", "Kind", "Whose"]

Kind = Literal["query", "key", "value"]
Whose = Literal["image", "all"]


@dataclass(frozen=True, eq=False)
class Inject(Control):
    """Tokens get the queries, keys or values that a bank holds of them, by `strength` s:

        x'_i = (1 - s) x_i + s x^bank_i        for x in `states`

    at the kept noise level that is nearest, where image tokens read image tokens. Tokens of which the bank holds
    nothing keep theirs: `Keep(regions, tokens="background")` leaves subjects to the new prompt. Queries and keys are
    put in as the kernel gets them, turned to where their tokens stand.

    Attributes:
        bank: filled by `Keep` in an inversion or any other run of the same model at the same size. One picture serves
            all of the batch; otherwise there is one for each. What is kept of a single guidance branch, as when a
            picture is inverted without guidance, serves all of them.
        states: some of "query", "key" and "value". Queries want a bank of `Keep(queries=True)`.
        tokens: "image", or "all" for the model's own texts as well where they share a sequence with the image, as
            RF-Edit's code does; a bank of `Keep(texts=True)`, and texts of one length. In layers of images alone "all"
            are those of the image.
    """

    name: ClassVar[str] = "inject"
    in_documents: ClassVar[bool] = False

    bank: Bank = field(kw_only=True, metadata={CODE_ONLY: True})
    states: Sequence[Kind] = field(default=("value",), kw_only=True)
    tokens: Whose = field(default="image", kw_only=True)
    branch: Branch = field(default="all", kw_only=True)

    def __post_init__(self) -> None:
        super().__post_init__()
        if not isinstance(self.bank, Bank):
            raise ControlError(f"'{self.name}': bank must be a Bank; found {type(self.bank).__name__}.")
        states = (self.states,) if isinstance(self.states, str) else tuple(self.states)
        if not states or set(states) - set(States._fields) or len(set(states)) < len(states):
            raise ControlError(
                f"'{self.name}': states is some of {', '.join(States._fields)}, each once; found {states!r}."
            )
        object.__setattr__(self, "states", states)
        self._check_choice("tokens", Whose)

    @property
    def recalls(self) -> Bank | None:
        return self.bank

    def check_bank(self, model: Mapping[str, str], moment: Moment, branch: str | None) -> None:
        self.bank.check_filled(model)
        if "query" in self.states and not self.bank.queries:
            raise ControlError(
                f"'{self.name}' puts in queries, and the bank keeps keys and values alone. Capture it with "
                "Keep(queries=True), or leave 'query' out of the states."
            )
        if self.tokens == "all" and not self.bank.texts:
            raise ControlError(
                f"'{self.name}' has tokens='all', and the bank keeps nothing of texts. Capture it with "
                "Keep(texts=True), on a model whose texts share a sequence with the image, or take tokens='image'."
            )
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
        return (Injected(tuple(self.states), self.bank, entry, held, frame, self.tokens == "all", self.strength),)

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
        frame: where these are among queries, and among keys and values.
        texts: those of texts are meant as well.
        strength: the way there, 1 is all of it.
    """

    states: tuple[Kind, ...]
    bank: Bank
    entry: Entry
    held: Held
    frame: Frame
    texts: bool
    strength: float

    def at(self, layer: str, moment: Moment) -> Injected:
        """The same for a layer of a forward.

        Raises:
            ControlError, ScheduleError: when the bank holds nothing for it.
            LayoutError: when its texts are of another length.
        """
        entry = self.entry._replace(layer=layer, step=self.bank.nearest_step(moment.sigma))
        self.bank.check_entries([entry])
        texts = self.bank.entries[entry].states.shape[2] - len(self.held.tokens)
        here = sum(stop - start for start, stop in self.frame.keys.own_texts)
        if self.texts and texts != here:
            raise LayoutError(
                f"'inject': the bank holds {texts} tokens of texts in layer {layer}, and here are {here}. Encode both "
                "prompts to one length (of pipelines: max_sequence_length), or take tokens='image'."
            )
        return replace(self, entry=entry)

    def __call__(self, own: States, batch: States, rows: Tensor) -> States:
        packed, kept = self.bank.entries[self.entry], dict[str, Tensor]()
        if "query" in self.states:
            kept["query"] = packed.opened_query(own.query)
        if {"key", "value"} & set(self.states):
            kept["key"], kept["value"] = packed.opened(own.value)
        return own._replace(**{name: self._mixed(name, getattr(own, name), kept[name]) for name in self.states})

    def explain(self) -> str:
        """Which states, and how far."""
        whose = ", texts included," if self.texts else ""
        return f"{' and '.join(self.states)} of picture {self.entry.picture} of the bank{whose} by {self.strength:g}"

    def _mixed(self, name: Kind, states: Tensor, kept: Tensor) -> Tensor:
        """States [n, H, T, D] with those of the tokens in question taken to `kept` [H, tokens or more, D]."""
        side = self.frame.queries if name == "query" else self.frame.keys
        tokens = kept_of(side, self.held, self.texts).to(states.device)
        whole = kept[:, : len(tokens)].expand(len(states), -1, -1, -1)
        if self.strength < 1:
            whole = torch.lerp(states.index_select(2, tokens), whole, self.strength)
        return states.index_copy(2, tokens, whole)
