"""Solvers of flow models: dz/dsigma = v(z, sigma), from the picture (sigma 0) to noise (sigma 1) or back.

Midpoint is RF-Solver (Wang et al., arXiv 2411.04746), whose second-order Taylor step is exactly the explicit midpoint
rule; "fireflow" is its variant of one evaluation a step (Deng et al., arXiv 2412.07517); `pulled` makes the controlled
equations of RF-Inversion (Rout et al., arXiv 2410.10792) out of any velocity.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from itertools import pairwise
from types import MappingProxyType
from typing import NamedTuple

import torch
from torch import Tensor

from ..errors import ControlError, ScheduleError
from ..schedule import Window, active_steps

__all__ = ["FLOW_STEPS", "Evaluation", "Step", "Velocity", "evaluations", "fading", "pulled", "walk"]

Velocity = Callable[[Tensor, float], Tensor]
"""(latents of any shape, sigma) -> dz/dsigma of the same shape."""
Step = Callable[[Velocity, Tensor, float, float, Tensor | None], tuple[Tensor, Tensor | None]]
"""(velocity, z, sigma it is at, sigma to go to, what the step before kept) -> (z there, what to keep)."""


class Evaluation(NamedTuple):
    """One call of the velocity in a walk: in which interval, as which of its stages (0 first, 1 mid), and where."""

    interval: int
    stage: int
    sigma: float


def _euler(velocity: Velocity, z: Tensor, a: float, b: float, _kept: Tensor | None) -> tuple[Tensor, None]:
    return z + (b - a) * velocity(z, a), None


def _midpoint(velocity: Velocity, z: Tensor, a: float, b: float, _kept: Tensor | None) -> tuple[Tensor, None]:
    return z + (b - a) * _middle(velocity, z, velocity(z, a), a, b), None


def _fireflow(velocity: Velocity, z: Tensor, a: float, b: float, kept: Tensor | None) -> tuple[Tensor, Tensor]:
    middle = _middle(velocity, z, velocity(z, a) if kept is None else kept, a, b)
    return z + (b - a) * middle, middle


def _middle(velocity: Velocity, z: Tensor, first: Tensor, a: float, b: float) -> Tensor:
    half = (b - a) / 2
    return velocity(z + half * first, a + half)


FLOW_STEPS: Mapping[str, Step] = MappingProxyType({"euler": _euler, "midpoint": _midpoint, "fireflow": _fireflow})
"""Evaluations a step: euler 1, midpoint 2, fireflow 1 and one more in the first step."""


def walk(velocity: Velocity, z: Tensor, sigmas: Sequence[float], step: Step) -> Iterator[Tensor]:
    """The latents at each of `sigmas`, the given ones first; ascending sigmas invert, descending ones generate.

    Args:
        velocity: of the model, or one that `pulled` made.
        z: latents at sigmas[0], of any shape and dtype.
        sigmas: at least two, in [0, 1].
        step: one of `FLOW_STEPS`.

    Raises:
        ScheduleError: sigmas neither rise nor fall throughout, or leave [0, 1].
    """
    ordered = sorted(set(sigmas), reverse=sigmas[0] > sigmas[-1]) if sigmas else []
    if len(ordered) < 2 or ordered != list(sigmas) or min(ordered) < 0 or max(ordered) > 1:
        raise ScheduleError(
            f"A walk needs two or more sigmas in [0, 1] that rise or fall throughout; found {_listed(sigmas)}. Take "
            "those of a flow-matching Euler scheduler after set_timesteps, reversed to invert."
        )
    return _walk(velocity, z, sigmas, step)


def _walk(velocity: Velocity, z: Tensor, sigmas: Sequence[float], step: Step) -> Iterator[Tensor]:
    kept: Tensor | None = None
    yield z
    for a, b in pairwise(sigmas):
        z, kept = step(velocity, z, a, b, kept)
        yield z


def evaluations(sigmas: Sequence[float], step: Step) -> tuple[Evaluation, ...]:
    """Where a walk over `sigmas` will call the velocity, in order. Raises `ScheduleError` as `walk` does."""
    seen: list[Evaluation] = []
    calls: list[float] = []

    def note(z: Tensor, sigma: float) -> Tensor:
        calls.append(sigma)
        return z

    for interval, _ in enumerate(walk(note, torch.zeros(()), sigmas, step), -1):
        seen += [Evaluation(interval, stage, sigma) for stage, sigma in enumerate(calls)]
        calls.clear()
    return tuple(seen)


def pulled(velocity: Velocity, target: Tensor, end: float, strength: Callable[[float], float]) -> Velocity:
    """A velocity that is drawn towards the straight line that reaches `target` at `end`.

    v + w (line - v) with line = (target - z) / (end - sigma): inversion with target = noise, end = 1 and a constant w
    (gamma of the paper), generation with target = picture, end = 0 and a w that fades (eta). Both read the true sigma,
    as a label and as a time.

    Args:
        velocity: the model's.
        target: latents that broadcast to z.
        end: sigma of the target.
        strength: sigma -> w in [0, 1]; 0 is the plain velocity, bit for bit, 1 the line alone.

    Raises:
        ControlError: from the velocity, when w is out of [0, 1].
        ScheduleError: from the velocity, at `end` itself, where no line is left; walks evaluate at the other end of
            their last interval and never get there.
    """

    def towards(z: Tensor, sigma: float) -> Tensor:
        weight = strength(sigma)
        plain = velocity(z, sigma)
        if weight == 0:
            return plain
        if not 0 < weight <= 1:
            raise ControlError(f"The pull towards a picture or noise must be in [0, 1]; found {weight:g}.")
        if sigma == end:
            raise ScheduleError(f"Nothing can be pulled at sigma {sigma:g}, where the target lies; end the walk there.")
        return torch.lerp(plain, (target - z) / (end - sigma), weight)

    return towards


def fading(
    sigmas: Sequence[float], eta: float, window: Window = (0.0, 0.25), power: float = 0.0
) -> Callable[[float], float]:
    """The strength eta (1 - i/S)^power in step i of S inside `window`, and 0 outside, as a function of sigma.

    Args:
        sigmas: S + 1 descending ones, of generation.
        eta: 1 holds on to the picture, 0 leaves the model alone.
        window: part of the steps, see `attnctrl.schedule`.
        power: 0 for no decay.
    """
    active = frozenset(active_steps(window, sigmas[:-1]))
    steps = len(sigmas) - 1

    def strength(sigma: float) -> float:
        # a level that ends one step begins the next
        step = sum(level >= sigma for level in sigmas[1:-1])
        return eta * (1 - step / steps) ** power if step in active else 0.0

    return strength


def _listed(sigmas: Sequence[float]) -> str:
    shown = ", ".join(f"{sigma:.4g}" for sigma in sigmas[:6])
    return f"[{shown}{', ...' if len(sigmas) > 6 else ''}]"
