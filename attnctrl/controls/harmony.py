"""Looks of a subject carried from picture to picture: outputs of attention blended between tokens that match.

After the Regional Feature Harmonization of StorySync (arXiv 2508.03735), whose formulas are not published, and the
feature injection of ConsiStory (arXiv 2402.03286), which is the case of one match and full weight. Matches are found in
the layer itself, so no run before is needed.
"""

from __future__ import annotations

from dataclasses import dataclass, field, replace
from functools import cached_property
from typing import ClassVar, Literal

import torch
from torch import Tensor

from ..bank import Bank, Entry
from ..call import Situation
from ..errors import ControlError
from ..fitting import fitted, token_box
from ..output import Executed
from ..region import Grid, by
from ..schedule import Moment, Window
from ..select import Layer
from .base import CODE_ONLY, Branch
from .joined import Joined

__all__ = ["Features", "Harmonize"]

Features = Literal["query", "key", "value", "out", "place"]


@dataclass(frozen=True, eq=False)
class Harmonize(Joined):
    """Tokens of a subject take in the output of the tokens that they match in other pictures' subjects of that name:

        m_j(p) = argmax_s cos(f(p), f_j(s)), s in the subject of picture j; c_j(p) that cosine
        O(p) <- (1 - strength) O(p) + strength sum_j w_j O_j(m_j(p)),  w = softmax_j(c_j / temperature), c_j > floor

    All O are those before any control's output. O is blended before the layer's output projection: that is linear, so
    it is the same as behind it. Tokens of no subject and those without a match keep their output to the bit.

    With a bank the others are the pictures that `Keep(outputs=...)` captured in another run, of the same size: those of
    the batch take in theirs alone.

    Attributes:
        readers, anchors, group: who takes in whom, see `Joined`.
        features: f, all heads side by side: "query", "key" or "value" of the layer, or what it gives out ("out"). In
            models with rotary positions queries and keys hold their place as well, values never. With "place" tokens
            match that stand at the same place of the subject, its box there put onto its box here; c is 1 / (1 + d^2)
            of their distance d in tokens.
        radius: f is the mean over so many tokens to each side, as far as they are the subject's; 0 takes f itself.
        floor: in [-1, 1]; matches with a cosine up to it are none.
        temperature: of the weights; 0 takes the best picture alone, as ConsiStory does.
        window: by default the time in which ConsiStory injects.
        bank: whose pictures are taken in, in place of those of the batch.
    """

    name: ClassVar[str] = "harmonize"
    compares: ClassVar[bool] = True

    features: Features = field(default="value", kw_only=True)
    radius: int = field(default=0, kw_only=True)
    floor: float = field(default=0.6, kw_only=True)
    temperature: float = field(default=0.1, kw_only=True)
    window: Window = field(default=(0.1, 0.34), kw_only=True)
    branch: Branch = field(default="cond", kw_only=True)
    strength: float = field(default=0.8, kw_only=True)
    bank: Bank | None = field(default=None, kw_only=True, metadata={CODE_ONLY: True})

    def __post_init__(self) -> None:
        super().__post_init__()
        self._check_choice("features", Features)
        self._check_range("floor", -1, 1)
        self._check_range("temperature", 0, float("inf"), open_end=True)
        if self.features == "place" and self.radius:
            raise ControlError(f"'{self.name}': radius is of features, and places have none; leave it at 0.")
        if not isinstance(self.radius, int) or self.radius < 0:
            raise ControlError(f"'{self.name}': radius must be a whole number from 0 on; found {self.radius!r}.")
        self._check_alone(self.bank)

    @property
    def recalls(self) -> Bank | None:
        return self.bank

    def output(self, situation: Situation, own: frozenset[int], layer: Layer) -> Harmony | None:
        if not situation.shared:
            return None
        if not situation.regions and not any(bool(held.any()) for held in situation.shared.values()):
            raise ControlError(
                f"'{self.name}' matches subjects, but no control of the stack declares regions, so nothing tells where "
                "these are. Give it regions=[...], one list per picture."
            )
        if self.bank is None:
            harmony = Harmony(self, situation)
            return harmony if harmony.pairs else None
        grid = situation.frame.queries.grid
        if others := [held.grid for held in situation.stored if held.grid != grid]:
            raise ControlError(
                f"'{self.name}': pictures of the bank have a grid of {by(others[0])} tokens and this one {by(grid)}, "
                "so outputs of one are no match for the other. Capture this size."
            )
        if self.bank.tokens == "background":
            raise ControlError(
                f"'{self.name}' takes in outputs of subjects, but the bank keeps tokens='background' alone. Capture it "
                "with tokens='subject' or 'all'."
            )
        stored = StoredHarmony(self, situation, self.bank)
        return stored if stored.pairs else None


@dataclass(frozen=True)
class Harmony:
    """The output of a layer's call under `Harmonize`, for one picture of the batch."""

    control: Harmonize
    situation: Situation

    @cached_property
    def pairs(self) -> dict[int, Tensor]:
        """By picture: bool [tokens, tokens], whether its token (column) is of a subject of this one's (row); those
        pictures alone that have any."""
        mine = self.situation.member.T.float()
        found = {n: mine @ self.held(n).float() > 0 for n in self.situation.shared}
        return {n: pair for n, pair in found.items() if bool(pair.any())}

    def held(self, other: int) -> Tensor:
        """bool [regions, tokens]: which of the tokens of another picture namesakes of these regions hold."""
        return self.situation.shared[other][:-1]

    def states(self, call: Executed, other: int, name: Features) -> Tensor:
        """[b, heads, image tokens, head_dim]: what another picture has of these rows' layer."""
        place = self.situation.frame.queries["image"]
        found: Tensor = getattr(call.batch, name)
        return found[call.rows - self.situation.line.image + other, :, place.start : place.stop]

    def __call__(self, call: Executed) -> Tensor:
        control, rows, device = self.control, call.rows, call.out.device
        place = self.situation.frame.queries["image"]
        span, grid = slice(place.start, place.stop), self.situation.frame.queries.grid

        def described(states: Tensor, held: Tensor) -> Tensor:
            """Unit features [b, tokens of the subject, channels] of [b, heads, image tokens, head_dim]."""
            found = states.float().transpose(1, 2).flatten(2)
            found = found if control.radius == 0 else _smoothed(found, held, grid, control.radius)
            return torch.nn.functional.normalize(found[:, held], dim=-1)

        own = torch.stack([pair.any(1) for pair in self.pairs.values()]).any(0).to(device)
        cosines, taken = [], []
        for other, pair in self.pairs.items():
            held = pair.any(0).to(device)
            if control.features == "place":
                likeness = self._nearness(other).to(device)[own][:, held].expand(len(rows), -1, -1)
            else:
                mine: Tensor = getattr(call.batch, control.features)
                theirs = self.states(call, other, control.features)
                likeness = described(mine[rows, :, span], own) @ described(theirs, held).mT
            likeness = likeness.masked_fill(~pair.to(device)[own][:, held], float("-inf"))
            best, where = likeness.max(-1)
            outputs = self.states(call, other, "out")[:, :, held].float()
            cosines.append(best)
            taken.append(outputs.gather(2, where[:, None, :, None].expand(-1, outputs.shape[1], -1, outputs.shape[3])))
        weights = _weights(torch.stack(cosines), control.floor, control.temperature)
        mixed = (weights[:, :, None, :, None] * torch.stack(taken)).sum(0)
        before = call.out[:, :, span][:, :, own]
        kept = (weights.sum(0) > 0)[:, None, :, None]
        after = (1 - control.strength) * before.float() + control.strength * mixed
        where = own.nonzero().flatten() + place.start
        return call.out.index_copy(2, where, torch.where(kept, after.to(call.out.dtype), before))

    def _nearness(self, other: int) -> Tensor:
        """float32 [tokens, tokens]: 1 / (1 + d^2) of each token from those of another picture's subject of its name,
        once the boxes of tokens lie upon each other; 0 for those of no subject."""
        grid = self.situation.frame.queries.grid
        cells = torch.cartesian_prod(*(torch.arange(float(side), dtype=torch.float64) for side in grid))
        found = torch.zeros(len(cells), len(cells))
        for mine, theirs in zip(self.situation.member, self.held(other), strict=True):
            if not bool(mine.any()) or not bool(theirs.any()):
                continue
            fitting = fitted(token_box(mine, grid), token_box(theirs, grid), "stretch")
            there = cells.clone()
            there[:, -2:] += fitting.shift(cells[:, -2:])
            near = 1 / (1 + torch.cdist(there, cells).square())
            found = torch.where(mine[:, None] & theirs, near.float().maximum(found), found)
        return found

    def explain(self) -> str:
        """Share, features and pictures."""
        pictures = ", ".join(map(str, self.pairs))
        return f"harmonized by {self.control.strength:g} with pictures {pictures}, matched by {self.control.features}"


@dataclass(frozen=True)
class StoredHarmony(Harmony):
    """The same with the pictures of a bank, whose tokens are put where they stood.

    Attributes:
        bank: whose they are.
        layer, step: where a forward stands; see `at`.
    """

    bank: Bank
    layer: str = ""
    step: int = -1

    def at(self, layer: str, moment: Moment) -> StoredHarmony:
        """The same for a layer of a forward.

        Raises:
            ControlError, ScheduleError: when the bank holds nothing for it.
        """
        made = replace(self, layer=layer, step=self.bank.kept_step(moment.step))
        made.__dict__["pairs"] = self.pairs
        self.bank.check_entries(made._entry(other) for other in self.pairs)
        for other in self.pairs:
            self.bank.entries[made._entry(other)].check_outputs()
        return made

    def _entry(self, other: int) -> Entry:
        stored = self.situation.line.stored
        return Entry(self.layer, self.step, stored[0] if stored else "", other)

    def held(self, other: int) -> Tensor:
        return self._spread(self.situation.shared[other][:-1], other, 1)

    def states(self, call: Executed, other: int, name: Features) -> Tensor:
        packed = self.bank.entries[self._entry(other)]
        if name == "out":
            found = packed.opened_output(call.out)
        elif name == "query":
            found = packed.opened_query(call.query)
        else:
            found = packed.opened(call.key)[("key", "value").index(name)]
        return self._spread(found, other, 1).expand(len(call.rows), -1, -1, -1)

    def _spread(self, kept: Tensor, other: int, axis: int) -> Tensor:
        """What is kept of some tokens, along an axis, as of all image tokens; 0 at the others."""
        place, tokens = self.situation.frame.queries["image"], self.situation.stored[other].tokens.to(kept.device)
        shape = (*kept.shape[:axis], place.stop - place.start, *kept.shape[axis + 1 :])
        return kept.new_zeros(shape).index_copy_(axis, tokens, kept[(slice(None),) * axis + (slice(len(tokens)),)])


def _weights(cosines: Tensor, floor: float, temperature: float) -> Tensor:
    """Weights [pictures, ...] of matches; 0 for those up to the floor, all 0 where there is no other."""
    found = cosines.masked_fill(cosines <= floor, float("-inf"))
    there = found.isfinite().any(0)
    if temperature == 0:
        best = torch.nn.functional.one_hot(found.argmax(0), len(found)).movedim(-1, 0)
        return best.float() * there
    return torch.where(there, (found / temperature).softmax(0), 0.0)


def _smoothed(features: Tensor, held: Tensor, grid: Grid, radius: int) -> Tensor:
    """Means of features [b, tokens, channels] over neighbours that are `held`; frames of a film stay apart."""
    height, width = grid[-2:]
    maps = torch.cat([features * held[:, None], held[None, :, None].expand(len(features), -1, 1).float()], dim=-1)
    planes = maps.reshape(-1, height, width, maps.shape[-1]).permute(0, 3, 1, 2)
    sums = torch.nn.functional.avg_pool2d(planes, 2 * radius + 1, stride=1, padding=radius)
    flat = sums.permute(0, 2, 3, 1).reshape(maps.shape)
    return flat[..., :-1] / flat[..., -1:].clamp(min=1e-12)
