"""What perturbed branches add to a step: arithmetic on one sample, in float32 at least.

c is the prediction for the prompt, u that without it, p that of a branch; cfg = u + s (c - u) is what the pipeline
makes of the first two, and c where it uses no guidance. Each is one sample without a batch axis, such as [channels,
rows, columns] or [tokens, channels]. A standard deviation is over all axes of the sample.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from .errors import ControlError
from .perturb import blurred, exact
from .schedule import Window

__all__ = ["Guide", "RescaleMode", "increments", "saliency"]

RescaleMode = Literal["partial", "full", "snf"]


@dataclass(frozen=True)
class Guide:
    """A perturbed branch: controls that ask for equal ones act in it together.

    Attributes:
        scale: w, how far to go away from it; 0 is "not there".
        rescale: phi in [0, 1], the share of the rescaled increment: phi g' + (1 - phi) g with g = w (c - p).
        window: when it runs.
        replay: what comes before its first perturbed layer is taken from the prompt's forward where it can be.
        rescale_mode: g' is, with "partial", g std(c) / std(c + g); with "full", g std(c) / std(cfg + g); with "snf",
            what leads to either s (c - u) or g at each element, whichever is more salient there (`saliency`), in the
            place of their sum. Without guidance of the pipeline "full" is "partial", and "snf" is g.
    """

    scale: float
    rescale: float = 0.0
    window: Window = (0.0, 1.0)
    replay: bool = True
    rescale_mode: RescaleMode = "partial"

    @property
    def reads_guidance(self) -> bool:
        """Its increment hangs on what the pipeline's own guidance gives."""
        return self.rescale > 0 and self.rescale_mode != "partial"


def increments(c: Tensor, perturbed: Mapping[Guide, Tensor], u: Tensor | None = None, s: float = 1.0) -> list[Tensor]:
    """What each branch adds to cfg.

    Args:
        perturbed: p of each branch.
        u, s: of the pipeline's guidance; u None where it uses none.

    Raises:
        ControlError: "snf" of a sample without rows and columns.
    """
    c = exact(c)
    plain = {guide: guide.scale * (c - exact(p)) for guide, p in perturbed.items()}
    apart = None if u is None else s * (c - exact(u))
    cfg = c if u is None or apart is None else exact(u) + apart
    fused = [guide for guide in plain if guide.rescale and guide.rescale_mode == "snf"]
    chosen = dict(zip(fused, _chosen(apart, [plain[guide] for guide in fused]), strict=True))

    def rescaled(guide: Guide, g: Tensor) -> Tensor:
        if guide.rescale_mode == "snf":
            return chosen[guide]
        return g * _ratio(c.std(), ((c if guide.rescale_mode == "partial" else cfg) + g).std())

    return [
        guide.rescale * rescaled(guide, g) + (1 - guide.rescale) * g if guide.rescale else g
        for guide, g in plain.items()
    ]


def saliency(x: Tensor) -> Tensor:
    """Where a change [..., rows, columns] weighs most: the softmax over each grid of its magnitude, which is blurred by
    3 x 3 taps of a Gaussian of one element, edges reflected."""
    spread = blurred(x.abs(), 1.0, 1)
    return spread.flatten(-2).softmax(-1).view_as(x)


def _chosen(apart: Tensor | None, found: Sequence[Tensor]) -> Sequence[Tensor]:
    """Of each increment, what leads from `apart` to it where it is the most salient of all, and 0 elsewhere."""
    if apart is None or not found:
        return found
    if apart.ndim < 3:
        raise ControlError(
            f"rescale_mode='snf' compares places of a picture, and this model predicts tokens {tuple(apart.shape)} "
            "without rows and columns. Take rescale_mode='full' or 'partial'."
        )
    # equal ones leave the pipeline's own
    first = torch.stack([saliency(one) for one in (apart, *found)]).argmax(0)
    return [torch.where(first == number, g - apart, 0.0) for number, g in enumerate(found, 1)]


def _ratio(before: Tensor, after: Tensor) -> Tensor:
    """before / after; 1 where nothing varies."""
    return torch.where(after > 0, before / after, torch.ones_like(after))
