"""Pictures of a batch in one style: they read the first one, and their queries and keys are spread as those of it.

StyleAligned (arXiv 2312.02133) on UNets; AlignedGen (arXiv 2509.17088) on transformers with rotary positions, where
keys of another picture that stand on the same places would be taken for the picture's own.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from typing import ClassVar, Literal

from torch import Tensor

from ..bank import Bank, Entry
from ..call import Situation
from ..content import Content, Moments, Places, States, matched, moments_before
from ..errors import ControlError
from ..groups import Group
from ..rotary import Rotary
from ..schedule import Moment, is_empty
from ..select import Layer
from ..sources import Move
from .sharing import Readers, Share

__all__ = ["AdaIN", "Matched", "OfBank", "OfRow", "ScaledKeys", "ShareStyle"]

Matched = Literal["query", "key", "value"]
_WORDS = ("text.global", "text.glyphs", "text.region")
_TEXTS = ("global", "phrase", "filling", "region_text")


@dataclass(frozen=True, eq=False)
class ShareStyle(Share):
    """`Share` by which the first picture of each group, the anchor, gives its style to the others:

        out_i = softmax([q'_i k'_i^T / sqrt(d), scale q'_i k_0^T / sqrt(d) + log w]) [v'_i; v_0]
        x'_i = AdaIN(x_i, x_0) = (x_i - mean x_i) / std x_i * std x_0 + mean x_0        for x in `match`

    Means and standard deviations are those of image tokens per head and channel, before rotary positions; x_0 is of the
    same guidance branch. The anchor itself is the plain model's picture.

    Attributes:
        match: which of "query", "key" and "value" are matched; `strength` s goes the way there by s.
        scale: of the anchors' keys, in (0, 10]: a temperature. AlignedGen's lambda; `weight` w is the odds e^b.
        text_scale: of the keys of a reader's own texts where they share a softmax with its image, in (0, 10]: more than
            1 makes up for the anchors' keys, among which the prompt counts for less (FreeCus, arXiv 2507.15249).
        texts: texts read the anchors too, as in AlignedGen's code.
        readers: "anchors" in the papers, with `anchors` 1.
        norms: every GroupNorm of a UNet normalises a picture with the statistics that it has together with the anchor,
            whatever `layers` say; `strength` s goes the way there by s (StyleAligned's share_group_norm). Off in its
            own settings for sets, on in those for real pictures. Its share_layer_norm does nothing.
        bank: whose first picture is the anchor, in place of one of the batch: of `Keep(moments=True)`.
    """

    name: ClassVar[str] = "share_style"

    match: Sequence[Matched] = field(default=("query", "key"), kw_only=True)
    scale: float = field(default=1.0, kw_only=True)
    text_scale: float = field(default=1.0, kw_only=True)
    texts: bool = field(default=False, kw_only=True)
    norms: bool = field(default=False, kw_only=True)
    readers: Readers = field(default="anchors", kw_only=True)
    anchors: int = field(default=1, kw_only=True)

    def __post_init__(self) -> None:
        super().__post_init__()
        match = (self.match,) if isinstance(self.match, str) else tuple(self.match)
        strange = [one for one in match if one not in States._fields]
        if strange or len(set(match)) < len(match):
            raise ControlError(
                f"'{self.name}': match is some of {', '.join(States._fields)}, each once; found {match!r}."
            )
        object.__setattr__(self, "match", match)
        if self.norms and self.bank is not None:
            raise ControlError(
                f"'{self.name}': a bank keeps nothing of GroupNorms; leave out norms=True, or draw the anchor in the "
                "batch."
            )
        for name in ("scale", "text_scale"):
            if not 0 < getattr(self, name) <= 10:
                raise ControlError(
                    f"'{self.name}': {name} must be in (0, 10]; found {getattr(self, name)}. weight=0 reads nothing."
                )

    @property
    def is_idle(self) -> bool:
        return (
            self.strength == 0
            or is_empty(self.window)
            or not (self.match or any(self.weights) or self.norms or self.text_scale != 1)
        )

    def content(self, situation: Situation, layer: Layer, places: Callable[[], Places | None]) -> Sequence[Content]:
        line, frame = situation.line, situation.frame
        anchor, stored = self.first(line.image), line.stored
        unread = anchor == line.image if self.bank is None else stored is None
        if unread or any("image" not in side for side in (frame.queries, frame.keys)):
            return ()
        texts = tuple((one.start, one.stop) for one in frame.keys.ranges if one.name.startswith(_WORDS) and len(one))
        scaled = (ScaledKeys(texts, self.text_scale),) if texts and self.text_scale != 1 else ()
        if not self.match:
            return scaled
        # values do not turn
        standing = places() if {"query", "key"} & set(self.match) else None
        query, key = ((side["image"].start, side["image"].stop) for side in (frame.queries, frame.keys))
        told = (tuple(self.match), (query, key), self.strength, standing)
        if self.bank is None or stored is None:
            return (OfRow(*told, anchor - line.image), *scaled)
        return (OfBank(*told, self.bank, Entry("", -1, stored[0], 0)), *scaled)

    def pools_with(self, image: int) -> int | None:
        return self.first(image) if self.norms else None

    def move(self, situation: Situation, other: int, rotary: Rotary | None) -> Move | None:
        moved = super().move(situation, other, rotary)
        return moved if self.scale == 1 else Move(None if moved is None else moved.turn, self.scale)

    def reading(self, q: Group) -> bool:
        return super().reading(q) or (self.texts and q.kind in _TEXTS)


@dataclass(frozen=True)
class ScaledKeys:
    """Keys of some tokens [start, stop) times a number, and so their scores: a temperature, which turns as they do."""

    spans: tuple[tuple[int, int], ...]
    scale: float

    def __call__(self, own: States, batch: States, rows: Tensor) -> States:
        key = own.key.clone()
        for start, stop in self.spans:
            key[:, :, start:stop] *= self.scale
        return own._replace(key=key)

    def explain(self) -> str:
        """How much."""
        return f"keys of texts times {self.scale:g}"


@dataclass(frozen=True)
class AdaIN:
    """The content of a layer's call under `ShareStyle`.

    Attributes:
        match: which states.
        spans: image tokens [start, stop) of queries, and of keys and values.
        strength: the way there, 1 is all of it.
        places: where image tokens stand; None where they do not turn.
    """

    match: tuple[Matched, ...]
    spans: tuple[tuple[int, int], tuple[int, int]]
    strength: float
    places: Places | None

    def __call__(self, own: States, batch: States, rows: Tensor) -> States:
        made = {name: self._matched(getattr(own, name), self._aim(name, batch, rows), name) for name in self.match}
        return own._replace(**made)

    def explain(self) -> str:
        """Which states, how far, and to what."""
        return f"AdaIN of {', '.join(self.match)} by {self.strength:g} to the picture {self._model()}"

    def _aim(self, name: Matched, batch: States, rows: Tensor) -> Moments:
        """The anchors' moments [n or 1, H, 1, D] of a state, before positions."""
        raise NotImplementedError

    def _model(self) -> str:
        """Which picture is the anchor."""
        raise NotImplementedError

    def _span(self, name: Matched) -> tuple[int, int]:
        return self.spans[0] if name == "query" else self.spans[1]

    def _places(self, name: Matched) -> Places | None:
        return None if name == "value" else self.places

    def _matched(self, states: Tensor, aim: Moments, name: Matched) -> Tensor:
        """States [n, H, T, D] whose image tokens have these moments."""
        (start, stop), places = self._span(name), self._places(name)
        image = states[:, :, start:stop]
        if places is None:
            found = matched(image, aim, self.strength)
        else:
            # in float32 from one turn to the other, rounded once
            found = places.done(matched(places.undone(image), aim, self.strength)).to(states.dtype)
        if stop - start == states.shape[2]:
            return found
        made = states.clone()  # slice_scatter copies all rows of which these are a view
        made[:, :, start:stop] = found
        return made


@dataclass(frozen=True)
class OfRow(AdaIN):
    """The anchor is a row of the batch; `offset` leads from a row to it."""

    offset: int

    def _aim(self, name: Matched, batch: States, rows: Tensor) -> Moments:
        start, stop = self._span(name)
        anchor = getattr(batch, name)[:, :, start:stop][rows + self.offset]
        return moments_before(anchor, self._places(name))

    def _model(self) -> str:
        return f"{-self.offset} before"


@dataclass(frozen=True)
class OfBank(AdaIN):
    """The anchor is a picture of a bank.

    Attributes:
        bank: where it is.
        entry: what it is kept under; see `at`.
    """

    bank: Bank
    entry: Entry

    def at(self, layer: str, moment: Moment) -> OfBank:
        """The same for a layer of a forward.

        Raises:
            ControlError, ScheduleError: when the bank holds nothing for it.
        """
        entry = self.entry._replace(layer=layer, step=self.bank.kept_step(moment.step))
        self.bank.check_entries([entry])
        return replace(self, entry=entry)

    def _aim(self, name: Matched, batch: States, rows: Tensor) -> Moments:
        return self.bank.entries[self.entry].moments_of(name, batch.value.device)

    def _model(self) -> str:
        return f"{self.entry.picture} of the bank"
