"""Controls that act in a guidance branch of their own: what they have in common."""

from __future__ import annotations

from dataclasses import dataclass, field

from ..increments import Guide, RescaleMode
from .base import Branch, Control

__all__ = ["Guided"]


@dataclass(frozen=True, eq=False)
class Guided(Control):
    """Base of controls from whose branch "perturbed" the picture is led away: guided = u + s (c - u) + scale (c - p).

    Those with an equal `Guide` share one branch. With branch="cond", "uncond" or "all" they act in that branch itself,
    and there is no further forward.
    """

    scale: float = field(kw_only=True)
    rescale: float = field(default=0.0, kw_only=True)
    rescale_mode: RescaleMode = field(default="partial", kw_only=True)
    replay: bool = field(default=True, kw_only=True)
    branch: Branch = field(default="perturbed", kw_only=True)

    def __post_init__(self) -> None:
        super().__post_init__()
        self._check_choice("rescale_mode", RescaleMode)
        self._check_range("rescale", 0, 1)
        self._check_range("scale", 0, float("inf"), open_end=True)

    @property
    def guide(self) -> Guide | None:
        if self.branch != "perturbed":
            return None
        return Guide(self.scale, self.rescale, self.window, self.replay, self.rescale_mode)

    @property
    def is_idle(self) -> bool:
        return super().is_idle or (self.branch == "perturbed" and self.scale == 0)
