"""A negative prompt for models without guidance of their own: normalized attention guidance (NAG, arXiv 2505.21179)."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field, replace
from functools import cached_property
from typing import ClassVar

import torch
from torch import Tensor

from ..call import Situation
from ..errors import ControlError
from ..execute import ExecutionPlan
from ..groups import Group
from ..output import Executed
from ..perturb import exact
from ..region import Region
from ..select import Layer
from ..visibility import Visibility
from .base import CODE_ONLY, Control, Scenes

__all__ = ["NAG", "Normalized", "normalized"]

_WORDS = ("global", "phrase", "filling", "region_text")
"""Groups that are texts of the prompt or of regions."""


@dataclass(frozen=True, eq=False)
class NAG(Control):
    """Attention outputs are led away from those that a negative prompt would give; there is no further forward.

    With z+ the output of an image token that reads the prompt, and z- that of the same query where the negative prompt
    stands in the place of all other texts,

        z~ = z+ + scale (z+ - z-),  r = |z~|_1 / |z+|_1,  z^ = z~ min(r, tau) / r
        output = strength z^ + (1 - strength) z+

    in front of the output projection. Norms are those of a token over all heads. Where z+ is zero it stays zero.

    The negative prompt is encoded by itself and appended to the text while the control acts. In joint attention it is a
    stream of its own from block to block: it reads itself and the picture, as it would in a model that is given it
    alone, and nobody but z- reads it. Other controls of visibility hold in both passes. Tokens of texts and of
    reference pictures keep their outputs.

    It differs from the authors' pipelines in that texts are encoded at their own length (T5 there reads padding as
    well), and that pooled embeddings and modulations are those of the prompt for both.

    Attributes:
        negative_prompt: what is not to be seen.
        negative_embeds: [tokens, channels], the encoded negative prompt, for a bare model.
        scale: away from z-; 0 is "not there". Published values are 2 to 5 and more.
        tau: at least 1; how much longer than z+ an output may become.
        strength: alpha of the paper, 0.25 for FLUX, 0.5 for Stable Diffusion; 0 is "not there".
    """

    name: ClassVar[str] = "nag"
    appends_text: ClassVar[bool] = True
    placeless: ClassVar[bool] = True

    negative_prompt: str = ""
    negative_embeds: Tensor | None = field(default=None, kw_only=True, metadata={CODE_ONLY: True})
    scale: float = field(default=3.0, kw_only=True)
    tau: float = field(default=2.5, kw_only=True)
    strength: float = field(default=0.25, kw_only=True)

    def __post_init__(self) -> None:
        super().__post_init__()
        self._check_range("scale", 0, float("inf"), open_end=True)
        self._check_range("tau", 1, float("inf"), open_end=True)
        if not self.negative_prompt and self.negative_embeds is None:
            raise ControlError(f"'{self.name}' needs a negative prompt: NAG('what is not to be seen').")

    @property
    def is_idle(self) -> bool:
        return super().is_idle or self.scale == 0

    @cached_property
    def scenes(self) -> Scenes:
        return ((Region(self.negative_prompt, name="negative prompt", prompt_embeds=self.negative_embeds),),)

    def visibility(self, situation: Situation, own: frozenset[int]) -> Visibility | None:
        """The negative prompt reads itself and the picture, and nobody else reads it."""

        def weight(q: Group, k: Group, against: Callable[[Group], bool]) -> float:
            if against(k):
                return float(against(q))
            return float(not against(q) or k.kind not in _WORDS)

        return _tabulated(situation, own, weight)

    def contrast(self, situation: Situation, own: frozenset[int]) -> Visibility | None:
        """Everyone reads the negative prompt, and nobody but themselves the other texts."""

        def weight(q: Group, k: Group, against: Callable[[Group], bool]) -> float:
            return float(q == k or against(k) or k.kind not in _WORDS)

        return _tabulated(situation, own, weight)

    def output(self, situation: Situation, own: frozenset[int], layer: Layer) -> Normalized | None:
        frame = situation.frame
        if "image" not in frame.queries or not any(_of(group, own) for group in situation.keys[1]):
            return None
        image = frame.queries["image"]
        return Normalized(self.scale, self.tau, self.strength, (image.start, image.stop))


def _of(group: Group, own: frozenset[int]) -> bool:
    return group.kind == "region_text" and group.index in own


def _tabulated(
    situation: Situation, own: frozenset[int], weight: Callable[[Group, Group, Callable[[Group], bool]], float]
) -> Visibility | None:
    def against(group: Group) -> bool:
        return _of(group, own)

    if not any(map(against, situation.keys[1])):
        return None
    return situation.tabulate(lambda q, k: weight(q, k, against))


@dataclass(frozen=True)
class Normalized:
    """The output of a layer's call under `NAG`.

    Attributes:
        scale, tau, strength: see `normalized`.
        span: the image's tokens [start, stop) of the queries.
        plan: by which z- is executed.
    """

    scale: float
    tau: float
    strength: float
    span: tuple[int, int]
    plan: ExecutionPlan | None = None

    def under(self, plan: ExecutionPlan | None) -> Normalized:
        """The same with the plan of its second pass."""
        return replace(self, plan=plan)

    def __call__(self, call: Executed) -> Tensor:
        start, stop = self.span
        mine = slice(start, stop)
        negative = call.attend(call.query, call.scale, self.plan)
        found = normalized(call.out[:, :, mine], negative[:, :, mine], self.scale, self.tau, self.strength)
        return torch.cat([call.out[:, :, :start], found, call.out[:, :, stop:]], 2)

    def explain(self) -> str:
        """The numbers."""
        return f"away from the negative prompt by {self.scale:g} (tau {self.tau:g}, alpha {self.strength:g})"


def normalized(positive: Tensor, negative: Tensor, scale: float, tau: float, strength: float) -> Tensor:
    """alpha z^ + (1 - alpha) z+ of outputs [B, H, N, D], see `NAG`; in float32 at least, in the dtype of `positive`."""
    plus, minus = exact(positive), exact(negative)
    led = plus + scale * (plus - minus)
    # min(r, tau) / r, which is 1 where nothing is led anywhere
    longer = _length(led)
    factor = torch.where(longer > 0, tau * _length(plus) / longer.clamp(min=torch.finfo(plus.dtype).tiny), 1.0)
    return torch.lerp(plus, led * factor.clamp(max=1), strength).to(positive.dtype)


def _length(x: Tensor) -> Tensor:
    """The L1 norm of each token over all heads, [B, 1, N, 1]."""
    return x.abs().sum((1, 3), keepdim=True)
