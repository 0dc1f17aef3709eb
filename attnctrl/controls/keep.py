"""Capture of keys and values: a run whose pictures later runs read, with `Share(bank=...)`.

The anchors of ConsiStory (arXiv 2402.03286, "anchor cache") and the id images of StoryDiffusion (arXiv 2405.01434,
"id bank"), which keep the inputs of their layers; here keys and values are kept, of the tokens alone that will be read.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, ClassVar

import torch
from torch import Tensor

from ..act import Probe
from ..bank import Bank, Entry, Held, checked_branch
from ..bank.packing import joined
from ..content import Places, States, moments_before
from ..errors import ControlError, LayoutError, PlanError, ScheduleError, UnsupportedModelError
from ..execute import Kernel
from ..layout import Frame, Layout
from ..region import Grid
from ..schedule import Window, active_steps, checked_window, is_empty
from ..select import Layer
from ..watch import View
from .base import CODE_ONLY, Branch
from .regional import Regional
from .sharing import Tokens

if TYPE_CHECKING:
    from ..bank.size import Need

__all__ = ["Keep", "held_of", "is_kept_layer", "kept_of"]


@dataclass(frozen=True, eq=False)
class Keep(Regional):
    """Keeps keys and values of image tokens in a bank; the model's output stays what it is, bit for bit.

    They are kept where image tokens read image tokens, as the kernel gets them. Which tokens are those of subjects is
    told by regions: its own, or those that other controls of the stack declare; their names are kept.

    Attributes:
        bank: where they are kept; filled by one run.
        tokens: which image tokens: "all", those of subjects, or those of no subject.
        pictures: the first so many of each branch; None keeps all.
        every: every so many steps of the run, from the first on; they stand for the steps that follow them.
        moments: mean and standard deviation of queries, keys and values of all image tokens, as they were before their
            positions, are kept as well: a style that `ShareStyle(bank=...)` matches. Little: of each layer as much as
            three tokens of float32.
        queries: queries of the same tokens are kept as well, for `Inject`.
        outputs: the part of the run in which what attention gives out at these tokens is kept as well, for `Harmonize`;
            None keeps none. Before any control's output, and without that of texts.
        texts: states of the model's own texts (and registers) are kept as well, where image tokens share a sequence
            with them; for `Inject(tokens="all")`.
    """

    name: ClassVar[str] = "keep"
    observes: ClassVar[bool] = True

    bank: Bank = field(kw_only=True, metadata={CODE_ONLY: True})
    tokens: Tokens = field(default="all", kw_only=True)
    pictures: int | None = field(default=None, kw_only=True)
    every: int = field(default=1, kw_only=True)
    moments: bool = field(default=False, kw_only=True)
    queries: bool = field(default=False, kw_only=True)
    texts: bool = field(default=False, kw_only=True)
    outputs: Window | None = field(default=None, kw_only=True)
    branch: Branch = field(default="all", kw_only=True)

    def __post_init__(self) -> None:
        super().__post_init__()
        self._check_choice("tokens", Tokens)
        if self.outputs is not None:
            object.__setattr__(self, "outputs", checked_window(self.outputs, self.name))
            both = [one for one in (self.outputs, self.window) if isinstance(one, tuple)]
            apart = len(both) == 2 and max(start for start, _ in both) >= min(stop for _, stop in both)
            if is_empty(self.outputs) or apart:
                raise ControlError(
                    f"'{self.name}': outputs are kept where its window {self.window} and outputs={self.outputs} meet, "
                    "and they do not. Give both the part of the run in which the bank is read."
                )
        if not isinstance(self.bank, Bank):
            raise ControlError(f"'{self.name}': bank must be a Bank; found {type(self.bank).__name__}.")
        for name in ("pictures", "every"):
            value = getattr(self, name)
            if value is not None and (not isinstance(value, int) or value < 1):
                raise ControlError(f"'{self.name}': {name} must be a whole number from 1 on; found {value!r}.")

    @property
    def names_branches(self) -> bool:
        return True

    def is_kept(self, step: int) -> bool:
        """Whether keys of this step are kept, in the window."""
        return step % self.every == 0

    def keeps_outputs(self, step: int, sigmas: Sequence[float]) -> bool:
        """Whether outputs of this step of a run are kept: their window holds it, or a step that it stands for."""
        if self.outputs is None:
            return False
        return not set(range(step, step + self.every)).isdisjoint(active_steps(self.outputs, sigmas))

    def predict(self, pipe_or_model: Any, **run: Any) -> Need:
        """What a run will take in the bank, told before it runs; arguments as of `attnctrl.bank.size.predict`."""
        from ..bank.size import predict

        return predict(pipe_or_model, self, **run)

    def probes(self, view: View) -> dict[str, Probe]:
        """A probe for each layer in which image tokens read image tokens.

        Raises:
            ScheduleError: when the step of the forward is unknown.
            ControlError: when the bank holds something else, or a branch is unknown.
            UnsupportedModelError: when moments are kept, and the model's positions are not known; when texts are, and
                in no layer they are among the tokens of images.
        """
        step = view.moment.step
        if step is None:
            raise ScheduleError(
                f"'{self.name}' keeps keys by step, and the step of this forward cannot be told. Attach to the "
                "pipeline, or pass scheduler=... after its set_timesteps."
            )
        if not self.is_kept(step):
            return {}
        rows = [
            (number, checked_branch(row.branch), row.image)
            for number, row in enumerate(view.told)
            if self.pictures is None or row.image < self.pictures
        ]
        self.bank.begin(view.identity(), view.moment.sigmas, self.every, self.tokens, self.queries, self.texts)
        self.check_texts([view.frames[0][layer.frame] for layer in view.layers])
        held: dict[tuple[str, int], Held] = {}
        found: dict[str, Probe] = {}
        kind = OutputCapture if self.keeps_outputs(step, view.moment.sigmas) else LayerCapture
        for layer in view.layers:
            if not is_kept_layer(view.frames[0][layer.frame]):
                continue
            captures = []
            for number, branch, image in rows:
                frame, key = view.frames[number][layer.frame], (layer.frame, number)
                if key not in held:
                    held[key] = held_of(self.tokens, frame.keys.grid, *view.holders(number, layer.frame))
                entry = Entry(layer.name, step, branch, image)
                places = view.places(number, layer.frame) if self.moments else None
                captures.append(
                    Capture(view.rows.start + number, frame, entry, held[key], self.texts, self.moments, places)
                )
            found[layer.name] = kind(self.bank, layer, view.batch, tuple(captures))
        return found

    def check_texts(self, frames: Sequence[Frame]) -> None:
        """Whether texts, if asked for, are among the tokens of images somewhere.

        Raises:
            UnsupportedModelError: when they are not.
        """
        if self.texts and not any(is_kept_layer(one) and one.keys.own_texts for one in frames):
            raise UnsupportedModelError(
                f"'{self.name}' has texts=True, but in none of these layers texts share a sequence with the image: "
                "image tokens read each other alone there, as in UNets, where texts are read by cross-attention. Leave "
                "texts out (of Inject and editing: tokens='image')."
            )


def is_kept_layer(frame: Frame) -> bool:
    """Image tokens read image tokens there."""
    return "image" in frame.queries and "image" in frame.keys


def held_of(
    tokens: Tokens, grid: Grid, names: tuple[str, ...], member: Tensor, boxes: tuple[tuple[float, ...], ...] = ()
) -> Held:
    """Which tokens of a picture are kept; `member` bool [regions, image tokens] tells who holds them, and `boxes` (x0,
    y0, x1, y1) where these regions are, as shares of the picture.

    Raises:
        LayoutError: when subjects are asked for and there are none.
    """
    if tokens != "all" and not names:
        raise LayoutError(
            f"'keep' has tokens='{tokens}', but no control of the stack declares regions, so nothing tells which these "
            "are. Give it regions=[...], one list per picture, or tokens='all'."
        )
    subject = member.any(0)
    wanted = {"all": torch.ones_like(subject), "subject": subject, "background": ~subject}[tokens]
    index = wanted.nonzero().flatten()
    return Held(grid, index, names, member[:, index], boxes)


@dataclass(frozen=True, eq=False)
class Capture:
    """One row of the batch, and what is kept of it.

    Attributes:
        row: its number.
        frame: its tokens.
        entry, held: under what, and which tokens of the image.
        texts: those of texts are kept too.
        moments: these are kept too.
        places: where its image tokens stand, for the moments; None where they do not turn.
    """

    row: int
    frame: Frame
    entry: Entry
    held: Held
    texts: bool = False
    moments: bool = False
    places: Places | None = None

    def look(self, query: Tensor, key: Tensor, value: Tensor) -> tuple[States, Tensor | None]:
        """The states [heads, tokens, head_dim] that are kept of its row of a call, and its moments, if asked for."""
        sides = (self.frame.queries, self.frame.keys, self.frame.keys)
        own = [one[self.row] for one in (query, key, value)]
        index = [kept_of(side, self.held, self.texts).to(key.device) for side in sides]
        found = States(*(one.index_select(1, tokens) for one, tokens in zip(own, index, strict=True)))
        if not self.moments:
            return found, None
        image = [one[:, side["image"].start : side["image"].stop] for one, side in zip(own, sides, strict=True)]
        standing = (self.places, self.places, None)  # values do not turn
        return found, joined([*map(moments_before, image, standing)])


def kept_of(side: Layout, held: Held, texts: bool) -> Tensor:
    """int64: of queries or keys, the tokens that are kept: those `held` of the image, and then those of texts."""
    spans = side.own_texts if texts else ()
    return torch.cat([held.tokens + side["image"].start, *(torch.arange(*span) for span in spans)])


@dataclass(frozen=True, eq=False)
class LayerCapture:
    """Keeps keys and values of one layer in one forward.

    Attributes:
        bank: where they go.
        layer: whose they are.
        batch: number of rows.
        captures: the rows that are kept.
    """

    bank: Bank
    layer: Layer
    batch: int
    captures: tuple[Capture, ...]

    @torch.no_grad()
    def look(
        self, query: Tensor, key: Tensor, value: Tensor, mask: Tensor | None, kernel: Kernel, scale: float | None
    ) -> None:
        """Keep one call. Raises `PlanError` when its rows or tokens are others than the layout says."""
        for one in self.captures:
            end = one.frame.keys.tokens if one.texts else one.frame.keys["image"].stop
            if key.shape[0] != self.batch or key.shape[2] < end:
                raise PlanError(
                    f"'keep' expects {self.batch} rows of {end} keys and more in layer {self.layer.name}, but the "
                    f"kernel got {key.shape[0]} of {key.shape[2]}: another hook or processor splits the batch or "
                    "changes the sequence. Leave this layer out of its `layers`."
                )
            self.bank.put(one.entry, self.layer.frame, one.held, *one.look(query, key, value))


class OutputCapture(LayerCapture):
    """The same, and what the layer gives out."""

    @torch.no_grad()
    def executed(self, out: Tensor) -> None:
        """Keep what a call [B, heads, tokens, head_dim] gave out, beside what was kept of it."""
        for one in self.captures:
            tokens = kept_of(one.frame.queries, one.held, texts=False).to(out.device)
            self.bank.put_output(one.entry, out[one.row].index_select(1, tokens))
