"""Pictures that read each other, or those of a bank: one operator for consistent subjects, scenes and styles.

After the shared attention of ConsiStory (arXiv 2402.03286), StoryDiffusion (arXiv 2405.01434), IR-Diffusion (arXiv
2411.19261) and SceneDecorator (arXiv 2510.22994), which differ in whose tokens are read, by whom, and when.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from functools import partial
from typing import ClassVar, Literal

import numpy as np
import torch

from ..bank import Bank
from ..call import Situation
from ..errors import ControlError, UnsupportedModelError
from ..groups import Group
from ..rotary import Rotary
from ..select import Layer
from ..sources import Move
from ..visibility import Visibility, compose
from .base import CODE_ONLY, Branch
from .joined import Joined, Readers

__all__ = ["Positions", "Queries", "Readers", "Share", "Tokens"]

Tokens = Literal["all", "subject", "background"]
Queries = Literal["all", "subject", "background", "same"]
Positions = Literal["keep", "apart"]


@dataclass(frozen=True, eq=False)
class Share(Joined):
    """Image tokens of each picture also read image tokens of others of the batch, in one softmax with their own:

        out_i = softmax([q_i k_i^T / sqrt(d), {q_i k_j[T_j]^T / sqrt(d) + log w}_j]) [v_i; {v_j[T_j]}]

    Keys are shared within a guidance branch and a group of pictures alone. Texts read nothing of others, and nobody
    reads their texts; pictures that read nobody are the plain model's.

    Which tokens T_j are those of subjects is told by regions: its own, or those that other controls of the stack
    declare; subjects of different pictures are the same where their regions have the same name (prompt, if none).

    With a bank the others are the pictures that `Keep` captured in another run, as if they were the anchors of the
    batch: the pictures of the batch read them alone.

    Attributes:
        readers, anchors, group: who reads whom, see `Joined`.
        tokens: whose tokens are read: "all", those of subjects, or those of no subject.
        queries: who reads: "all" image tokens, those of subjects, those of none, or with "same" those of a subject the
            tokens of the same subject alone.
        ratio: share of these tokens in (0, 1] that is read, drawn anew at every step for each picture and resolution,
            the same in all layers and for all readers.
        query_ratio: share in (0, 1] of the tokens of a picture that read others at all, drawn in the same way (1 less
            the query dropout of IR-Diffusion).
        gate: in (0, 1], how likely pictures are shared at a step in a layer; elsewhere and else the layer is the plain
            model's. One coin for each layer and step, the same for all pictures and branches (StoryDiffusion).
        weight: w > 0: how often each of them counts (log-weight log w); `strength` s makes it s * w. With
            readers="anchors" also one for each anchor, with a bank one for each of its pictures.
        own: >= 0: how often the own image tokens of those who read others count; 0 leaves them the others' alone, as if
            their keys and values took the place of the own ones. `strength` s makes it 1 - s + s * own.
        positions: in models with rotary positions, where the others seem to stand: "keep", on the same places; with
            "apart" side by side, the n-th to the right of n - 1 others, so that positions do not collide (AlignedGen,
            arXiv 2509.17088).
        seed: of the draws.
        bank: whose pictures are read in place of those of the batch. For the same model and noise levels, with the
            layers, steps and branches that it holds.
    """

    name: ClassVar[str] = "share"
    shares: ClassVar[bool] = True

    tokens: Tokens = "all"
    queries: Queries = "all"
    ratio: float = 1.0
    weight: float | Sequence[float] = 1.0
    positions: Positions = "keep"
    seed: int = 0
    query_ratio: float = field(default=1.0, kw_only=True)
    gate: float = field(default=1.0, kw_only=True)
    own: float = field(default=1.0, kw_only=True)
    branch: Branch = field(default="all", kw_only=True)
    bank: Bank | None = field(default=None, kw_only=True, metadata={CODE_ONLY: True})

    def __post_init__(self) -> None:
        super().__post_init__()
        for name, choices in (("tokens", Tokens), ("queries", Queries), ("positions", Positions)):
            self._check_choice(name, choices)
        if not isinstance(self.weight, (int, float)):
            object.__setattr__(self, "weight", tuple(self.weight))
            if self.bank is None and (self.readers != "anchors" or len(self.weights) != self.anchors):
                raise ControlError(
                    f"'{self.name}': a weight for each anchor wants readers='anchors' and as many weights as anchors; "
                    f"found readers={self.readers!r}, anchors={self.anchors} and {len(self.weights)} weights."
                )
        if not all(0 <= one <= 1000 for one in self.weights):
            raise ControlError(f"'{self.name}': weight must be in [0, 1000]; found {self.weight}.")
        for name in ("ratio", "query_ratio", "gate"):
            if not 0 < getattr(self, name) <= 1:
                raise ControlError(f"'{self.name}': {name} must be in (0, 1]; found {getattr(self, name)}.")
        self._check_range("own", 0, 1000)
        if self.own != 1 and self.query_ratio < 1:
            raise ControlError(
                f"'{self.name}': own={self.own:g} is of tokens that read others; leave query_ratio at 1."
            )
        self._check_alone(self.bank)

    @property
    def is_idle(self) -> bool:
        return super().is_idle or not any(self.weights)

    @property
    def weights(self) -> tuple[float, ...]:
        """One for all pictures that are read, or one for each of them."""
        return (self.weight,) if isinstance(self.weight, (int, float)) else tuple(self.weight)

    @property
    def draws(self) -> bool:
        return min(self.ratio, self.query_ratio, self.gate) < 1

    @property
    def draws_readers(self) -> bool:
        return self.query_ratio < 1

    @property
    def recalls(self) -> Bank | None:
        return self.bank

    def opens(self, layer: Layer, draw: int) -> bool:
        if self.gate == 1:
            return True
        # the name and not the number in its stack: two stacks have coins of their own
        told = [self.seed, draw, *layer.name.encode()]
        return bool(np.random.default_rng(told).random() < self.gate)

    def move(self, situation: Situation, other: int, rotary: Rotary | None) -> Move | None:
        if self.positions == "keep":
            return None
        if rotary is None or "x" not in rotary.axes:
            raise UnsupportedModelError(
                f"'{self.name}': positions='apart' turns keys on, and in this model image tokens have no rotary "
                "positions in steps of whole tokens. Leave positions='keep'."
            )
        number = 1 + list(situation.shared).index(other)
        return Move((rotary, rotary.shift(x=float(number * situation.frame.keys.grid[-1]))))

    def visibility(self, situation: Situation, own: frozenset[int]) -> Visibility | None:
        if not situation.shared:
            return None
        if self._is_untold(situation):
            raise ControlError(
                f"'{self.name}' shares tokens of subjects, but no control of the stack declares regions, so nothing "
                "tells which these are. Give it (or Keep, for a bank) regions=[...], one list per picture, or "
                "tokens='all', queries='all'."
            )
        if situation.stored and self.bank is not None and self.bank.tokens not in ("all", self.tokens):
            raise ControlError(
                f"'{self.name}' reads tokens='{self.tokens}', but the bank keeps tokens='{self.bank.tokens}' alone. "
                "Give Share the tokens that Keep had, or keep 'all'."
            )
        if self.bank is not None and len(self.weights) not in (1, self.bank.pictures):
            raise ControlError(
                f"'{self.name}' has {len(self.weights)} weights, and the bank keeps {self.bank.pictures} pictures. "
                "Give one for all, or one for each."
            )
        there = tuple(group for group in situation.keys[1] if group.kind == "shared")
        parts = [situation.tabulate(partial(self._sees, there))]
        if self.ratio < 1:
            parts.append(self._drawn(situation))
        if self.query_ratio < 1:
            parts.append(self._reading(situation))
        return compose(*parts)

    def _is_untold(self, situation: Situation) -> bool:
        """Subjects are asked for, and nothing tells which tokens are theirs."""
        if self.bank is not None:
            # the tokens of a bank bring the names of their subjects
            told = situation.regions or self.scenes
            return (self.tokens != "all" and not self.bank.names) or (self.queries != "all" and not told)
        known = situation.regions or any(bool(held.any()) for held in situation.shared.values())
        return (self.tokens, self.queries) != ("all", "all") and not known

    def _sees(self, there: Sequence[Group], q: Group, k: Group) -> float:
        """With which weight q sees k, where `there` is what there is of others."""
        if k.kind == "shared":
            return self._reads(q, k)
        if self.own == 1 or k.kind != "image" or not any(self._reads(q, other) for other in there):
            return 1.0
        return 1 - self.strength + self.strength * self.own

    def _reads(self, q: Group, k: Group) -> float:
        held = {"all": True, "subject": bool(k.members), "background": not k.members}[self.tokens]
        reads = {
            "all": True,
            "subject": bool(q.members),
            "background": not q.members,
            "same": bool(q.members & k.members),
        }[self.queries]
        number = k.index - self.first(k.index) if len(self.weights) > 1 else 0
        return self.strength * self.weights[number] * float(self.reading(q) and held and reads)

    def reading(self, q: Group) -> bool:
        """Whether these tokens are of a kind that reads other pictures."""
        return q.kind == "image"

    def _drawn(self, situation: Situation) -> Visibility:
        """Hides the tokens of others that were not drawn at this step; of each picture and kind as many are left."""
        atom, groups = situation.keys
        keep = torch.ones(len(atom), dtype=torch.bool)
        for number, group in enumerate(groups):
            if group.kind == "shared":
                mine = (atom == number).nonzero().flatten()
                keep[mine] = self._lot(len(mine), self.ratio, situation, group.index, group.members)
        rows = torch.zeros_like(situation.queries[0])
        table = torch.tensor([[float("-inf"), 0.0]])
        return Visibility(rows, keep.long(), table, ("all",), ("not drawn", "drawn"))

    def _reading(self, situation: Situation) -> Visibility:
        """Hides all tokens of others from those that do not read at this step."""
        atom, groups = situation.queries
        reading = torch.ones(len(atom), dtype=torch.bool)
        for number, group in enumerate(groups):
            if group.kind == "image":
                mine = (atom == number).nonzero().flatten()
                reading[mine] = self._lot(len(mine), self.query_ratio, situation, situation.line.image, group.members)
        keys, theirs = situation.keys
        shared = torch.tensor([group.kind == "shared" for group in theirs])[keys]
        table = torch.tensor([[0.0, float("-inf")], [0.0, 0.0]])
        return Visibility(reading.long(), shared.long(), table, ("not reading", "reading"), ("own", "shared"))

    def _lot(
        self, count: int, ratio: float, situation: Situation, picture: int, members: frozenset[int]
    ) -> torch.Tensor:
        """bool [count]: which of the tokens of a picture and kind are drawn at this step, one of them at least."""
        told = [self.seed, situation.line.draw, count, picture, *(1 + n for n in sorted(members))]
        order = torch.from_numpy(np.random.default_rng(told).permutation(count))
        drawn = torch.zeros(count, dtype=torch.bool)
        drawn[order[: max(1, round(ratio * count))]] = True
        return drawn
