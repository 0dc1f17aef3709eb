"""Attention outputs that serve for several steps: T-GATE (arXiv 2404.02747) and pyramid attention broadcast (PAB, arXiv
2408.12588)."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any, ClassVar, Literal

from ..bank import checked_branch
from ..errors import ControlError, ScheduleError, UnsupportedModelError
from ..reuse import Action, Key, Output, broadcast, gated, joined, kept_bytes, parted
from ..wraps import Now, Site, Wrap
from .base import Branch, Control

__all__ = ["Policy", "Reuse"]

Policy = Literal["pab", "tgate"]


@dataclass(frozen=True, eq=False)
class Reuse(Control):
    """Whole attention modules give back what they gave at an earlier step, and neither project nor attend.

    What is kept is the output behind the module's projection; gates of the block and what it is added to are those of
    the step. It is told apart by guidance branch, also where branches are forwards of their own, and serves only rows
    of the same sequence under the same controls: where another control begins, ends or draws anew, the layer is
    computed. Layers that are recorded (`Keep`, maps) are computed. All is dropped at the end of a run, after an error
    and when controls come or go.

    policy="pab": at steps that are no multiple of `every` (`cross_every` in cross attention), while the timestep lies
    `between`, the output of the step before serves again. policy="tgate", for models with cross attention: step
    gate - 1 keeps the mean of the guided and the unguided output of cross attention, which serves from the gate on;
    self-attention is computed at multiples of `early` from `warmup` on, and of `late` from the gate on. It saves most
    where the pipeline drops guidance at the gate.

    Attributes:
        policy: which rule.
        every, cross_every: of "pab"; 1 is "not there".
        between: of "pab": timesteps of 1000, both left out.
        gate, warmup, early, late: of "tgate": m, omega, s, f of its tables; those of SDXL with 25 steps.
        strength: 0 or 1.
    """

    name: ClassVar[str] = "reuse"
    wraps: ClassVar[bool] = True
    keeps: ClassVar[bool] = True

    policy: Policy = "pab"
    every: int = field(default=2, kw_only=True)
    cross_every: int = field(default=2, kw_only=True)
    between: Sequence[float] = field(default=(100.0, 800.0), kw_only=True)
    gate: int = field(default=10, kw_only=True)
    warmup: int = field(default=2, kw_only=True)
    early: int = field(default=5, kw_only=True)
    late: int = field(default=1, kw_only=True)
    branch: Branch = field(default="all", kw_only=True)

    def __post_init__(self) -> None:
        super().__post_init__()
        self._check_choice("policy", Policy)
        for name, least in (("every", 1), ("cross_every", 1), ("gate", 1), ("warmup", 0), ("early", 1), ("late", 1)):
            value = getattr(self, name)
            if not isinstance(value, int) or value < least:
                raise ControlError(f"'{self.name}': {name} must be a whole number from {least} on; found {value!r}.")
        between = tuple(float(value) for value in self.between)
        if len(between) != 2 or not 0 <= between[0] <= between[1] <= 1000:
            raise ControlError(f"'{self.name}': between is two timesteps in [0, 1000]; found {between}.")
        object.__setattr__(self, "between", between)
        if self.strength not in (0, 1):
            raise ControlError(f"'{self.name}': an output serves or it does not; strength is 0 or 1.")

    @property
    def is_idle(self) -> bool:
        return super().is_idle or (self.policy == "pab" and self.every == self.cross_every == 1)

    @property
    def names_branches(self) -> bool:
        return True

    def action(self, step: int, timestep: float, crossed: bool) -> Action:
        """What the policy says of a layer at a step of the run, as far as something is kept."""
        if self.policy == "pab":
            low, high = self.between
            every = self.cross_every if crossed else self.every
            return broadcast(step, timestep, every=every, between=(low, high))
        return gated(step, crossed, gate=self.gate, warmup=self.warmup, early=self.early, late=self.late)

    def rows_kept(self, crossed: bool, branches: int) -> int:
        """The most rows that are kept at once of a layer for each picture, in a run of so many guidance branches."""
        if self.policy == "pab":
            return branches if (self.cross_every if crossed else self.every) > 1 else 0
        # the mean of two branches is kept once
        return max(1, branches - 1) if crossed else branches * (self.early > 1 or self.late > 1)

    def predict(self, pipe_or_model: Any, **run: Any) -> int:
        """The most bytes that are kept at once, told before it runs; arguments as of `attnctrl.reuse.kept_bytes`."""
        return kept_bytes(pipe_or_model, self, **run)

    def wrap(self, site: Site, now: Now) -> Wrap | None:
        layer, step = site.layer.name, now.moment.step
        if step is None:
            raise ScheduleError(
                f"'{self.name}' goes by steps, and the step of this forward cannot be told. Attach to the pipeline, or "
                "pass scheduler=... after its set_timesteps."
            )
        frame = now.frames[site.layer.frame]
        if self.policy == "tgate" and frame.is_joint and "text.global" in frame.queries and "image" in frame.queries:
            raise UnsupportedModelError(
                f"'{self.name}': T-GATE keeps cross attention, and {layer} lets picture and text read each other in "
                "one. Take policy='pab'."
            )
        if site.fused:
            raise UnsupportedModelError(
                f"'{self.name}': the attention of {layer} is one module with the block's feed-forward, which would be "
                "kept as well. Give the control layers of another stack."
            )
        keys = [Key(self, layer, checked_branch(part.branch), part.guides) for part in now.parts]
        action = self.action(step, now.timestep, not frame.is_joint)
        last = step == now.moment.steps - 1
        # of a step that does not read them, they are of no use to those that follow
        kept = now.kept.take(keys, now.parts, step, last) if action == "reuse" and layer not in now.watched else None
        if kept is not None:
            return Wrap(site.layer.module, _gives(joined(kept)), frozenset([layer]), f"outputs kept by {self.policy}")
        if last:
            now.kept.drop(keys)
        if last or action == "compute":
            return None
        return Wrap(site.layer.module, _keeps(now, layer, keys, step, action == "mean"), frozenset(), "")


def _gives(output: Output) -> Callable[..., Any]:
    """Gives this, and runs nothing."""

    def around(forward: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
        return output

    return around


def _keeps(now: Now, layer: str, keys: Sequence[Key], step: int, mean: bool) -> Callable[..., Any]:
    """Runs the module, and keeps what it returns."""

    def around(forward: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
        output = forward(*args, **kwargs)
        for key, part, own in zip(keys, now.parts, parted(output, now.parts, layer), strict=True):
            now.kept.store(key, part, own, now.run, step, mean)
        return output

    return around
