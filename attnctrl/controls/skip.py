"""Guidance away from a model with layers left out.

Skip layer guidance of Stable Diffusion 3.5 (SLG) leaves out whole blocks; spatiotemporal skip guidance (STG, arXiv
2411.18664) also knows the form in which their attention alone is left out.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from inspect import signature
from typing import Any, ClassVar, Literal

import torch
from torch import Tensor, nn

from ..errors import ControlError, UnsupportedModelError
from ..schedule import Window
from ..wraps import Now, Site, Wrap
from .guided import Guided

__all__ = ["Skip", "What"]

What = Literal["block", "attention"]


@dataclass(frozen=True, eq=False)
class Skip(Guided):
    """Blocks or their attention are left out, and the picture is led away from what that gives.

    As with `Perturb` the prompt's rows run through the model once more, in a branch "perturbed", and guided =
    u + s (c - u) + scale (c - p). `Skip` and `Perturb` with an equal `Guide` share one branch.
    With branch="all" the layers are left out of the run itself, and there is no further forward; in "cond" or "uncond"
    that works where these branches have forwards of their own.

    Attributes:
        what: "block", the whole block of each chosen layer gives back what it gets: SLG. In UNets that is one
            transformer block (self-attention, cross attention and feed-forward), never a stage that changes sizes.
            "attention", what the chosen attention adds to its block is zero, behind its output projection; the rest of
            the block, and of a dual block its other attention, stays: STG.
        layers: attention layers by which the blocks are named; there is no default.
        strength: 0 or 1.
        scale, window: of the branch; defaults are those of SD3.5-Medium, whose layers are "joint:7-9".
        rescale, rescale_mode: in [0, 1], and what of; see `attnctrl.increments.Guide`.
        replay: the branch takes what comes before its first layer from the prompt's forward, where it can.
    """

    name: ClassVar[str] = "skip"
    wraps: ClassVar[bool] = True

    what: What = "block"
    scale: float = field(default=2.8, kw_only=True)
    window: Window = field(default=(0.01, 0.2), kw_only=True)

    def __post_init__(self) -> None:
        super().__post_init__()
        self._check_choice("what", What)
        if self.strength not in (0, 1):
            raise ControlError(
                f"'{self.name}': a layer is left out or it is not, so strength is 0 or 1; found {self.strength}. "
                "Weaken the guidance by scale, or take Perturb, which has strengths between."
            )
        if self.layers is None:
            raise ControlError(f"'{self.name}' needs layers: which ones are left out, such as layers='joint:7-9'.")

    def wrap(self, site: Site, now: Now) -> Wrap:
        if self.what == "block":
            return Wrap(site.block, _passed(site.block, site.returns), site.inside, "blocks left out")
        if site.fused:
            raise UnsupportedModelError(
                f"'{self.name}': the attention of {site.layer.name} is one module with the block's feed-forward, so it "
                "cannot be left out alone. Give the control layers of another stack, or what='block'."
            )
        return Wrap(site.layer.module, _zeroed, frozenset([site.layer.name]), "attention left out")


def _passed(block: nn.Module, names: tuple[str, ...]) -> Callable[..., Any]:
    """Gives back those of the arguments that a block would return anew."""
    form = signature(type(block).forward)

    def around(forward: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
        given = form.bind(block, *args, **kwargs).arguments
        found = tuple(given[name] for name in names)
        return found if len(found) > 1 else found[0]

    return around


def _zeroed(forward: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
    """Zeros in the form of what the module returns; it runs, as its form is known to nobody else."""
    output = forward(*args, **kwargs)
    if isinstance(output, Tensor):
        return torch.zeros_like(output)
    return tuple(torch.zeros_like(one) if isinstance(one, Tensor) else one for one in output)
