"""When a control acts: windows over denoising progress or over sigma, decided outside compiled code.

Step i of n stands for the progress (i + 0.5) / n. A window acts on the steps whose midpoint lies inside it, and on at
least one step: the one whose span holds the window's start. Positions are found from the noise level, never by counting
calls, so interrupted, restarted and repeated runs are all the same to it.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from .errors import ScheduleError

__all__ = [
    "Moment",
    "Sigma",
    "Window",
    "active_steps",
    "is_active",
    "is_full",
    "locate",
    "run_levels",
    "window_from_json",
    "window_to_json",
]


@dataclass(frozen=True)
class Sigma:
    """A window over noise levels: acts while low < sigma <= high.

    Sigma is 1 at pure noise in flow models, about 14.6 in Stable Diffusion 1.5 and XL (the scheduler's own sigmas).
    """

    high: float
    low: float = 0.0

    def __post_init__(self) -> None:
        if not 0 <= self.low <= self.high:
            raise ScheduleError(f"Sigma(high, low) needs 0 <= low <= high; found high={self.high}, low={self.low}.")


Window = tuple[float, float] | Sigma
"""(start, stop) in [0, 1] of the denoising progress, or `Sigma(high, low)`."""


@dataclass(frozen=True)
class Moment:
    """Where one forward stands in the run.

    Attributes:
        sigma: the noise level; None when nothing needed it or it is unknown.
        step: index of the step in the scheduler's run; None without a scheduler.
        sigmas: noise levels of all steps of the run, empty without a scheduler.
    """

    sigma: float | None = None
    step: int | None = None
    sigmas: tuple[float, ...] = ()

    @property
    def steps(self) -> int:
        return len(self.sigmas)


def checked_window(window: Any, label: str) -> Window:
    """The window as a pair of floats or a `Sigma`.

    Raises:
        ScheduleError: when it is neither, or out of [0, 1], or reversed.
    """
    if isinstance(window, Sigma):
        return window
    try:
        start, stop = (float(value) for value in window)
    except (TypeError, ValueError):
        raise ScheduleError(
            f"{label}: a window is (start, stop) of the denoising progress or Sigma(high, low); found {window!r}."
        ) from None
    if not 0 <= start <= stop <= 1:
        raise ScheduleError(f"{label}: a window needs 0 <= start <= stop <= 1; found {(start, stop)}.")
    return start, stop


def is_full(window: Window) -> bool:
    """The window holds every step, whatever the run."""
    return not isinstance(window, Sigma) and window[0] == 0 and window[1] == 1


def is_empty(window: Window) -> bool:
    """The window holds no step, whatever the run."""
    return window.high == window.low if isinstance(window, Sigma) else window[0] == window[1]


def active_steps(window: Window, sigmas: Sequence[float]) -> tuple[int, ...]:
    """The steps of a run on which a window acts.

    Args:
        window: progress or sigma window.
        sigmas: noise levels of the steps, first step first; for progress windows only their number matters.
    """
    count = len(sigmas)
    if count == 0 or is_empty(window):
        return ()
    if isinstance(window, Sigma):
        inside = tuple(i for i, sigma in enumerate(sigmas) if window.low < sigma <= window.high)
        # no step falls inside: the one whose span, from its sigma down to the next, holds the upper end
        return inside or (max((i for i, sigma in enumerate(sigmas) if sigma >= window.high), default=0),)
    start, stop = window
    inside = tuple(i for i in range(count) if start <= (i + 0.5) / count < stop)
    # the slack keeps a start such as 0.3 * 10 from falling into the step before
    return inside or (min(count - 1, int(start * count + 1e-9)),)


def is_active(window: Window, moment: Moment, label: str = "control") -> bool:
    """Whether a window holds this moment.

    Raises:
        ScheduleError: when the window needs the step or sigma and the moment does not have it.
    """
    if is_full(window) or is_empty(window):
        return is_full(window)
    if moment.step is not None:
        return moment.step in active_steps(window, moment.sigmas)
    if isinstance(window, Sigma) and moment.sigma is not None:
        return window.low < moment.sigma <= window.high
    raise ScheduleError(
        f"{label}: window {window} needs the position in the run, but {_why_unknown(moment)}. Attach to the pipeline, "
        "or pass scheduler=... (after its set_timesteps), or use a Sigma(high, low) window."
    )


def _why_unknown(moment: Moment) -> str:
    if not moment.sigmas:
        return "there is no scheduler with timesteps"
    return f"this forward's timestep is none of the scheduler's {moment.steps}"


def run_levels(scheduler: Any) -> tuple[tuple[float, ...], tuple[float, ...]]:
    """(timesteps, sigmas) of the steps of the scheduler's present run; empty without scheduler or `set_timesteps`.

    Schedulers without sigmas (DDIM, PNDM, DDPM) have those of their `alphas_cumprod`: sqrt((1 - a) / a), as the others
    have at the same timesteps. They range from about 14.6 down to 0 in Stable Diffusion, from 1 to 0 in flow models.
    """
    timesteps = getattr(scheduler, "timesteps", None)
    if timesteps is None or getattr(scheduler, "num_inference_steps", None) is None:
        return (), ()
    marks = tuple(float(value) for value in timesteps.tolist())
    sigmas = getattr(scheduler, "sigmas", None)
    if sigmas is not None:
        # the terminal sigma has no step of its own
        return marks, tuple(float(value) for value in sigmas[: len(marks)].tolist())
    kept = scheduler.alphas_cumprod.double()[timesteps.long().cpu()]
    return marks, tuple(float(value) for value in ((1 - kept) / kept).sqrt().tolist())


def locate(timestep: float, marks: Sequence[float], step_index: int | None, tolerance: float) -> int | None:
    """The step of a run that a timestep belongs to; None when it is none of them.

    Args:
        timestep: as given to the model, possibly rounded to half precision.
        marks: timesteps of the run.
        step_index: the scheduler's own opinion, preferred among timesteps within `tolerance` (repeated or very close
            ones).
        tolerance: relative rounding of the timestep's dtype.
    """
    slack = 2 * tolerance * max(abs(timestep), 1e-3) + 1e-3
    near = [i for i, mark in enumerate(marks) if abs(mark - timestep) <= slack]
    if step_index is not None and step_index in near:
        return step_index
    return min(near, key=lambda i: abs(marks[i] - timestep), default=None)


def window_to_json(window: Window) -> list[float] | dict[str, list[float]]:
    """[start, stop], or {"sigma": [high, low]}."""
    return {"sigma": [window.high, window.low]} if isinstance(window, Sigma) else list(window)


def window_from_json(data: Any) -> Any:
    """The window that `window_to_json` described; other values are returned for the check to refuse."""
    if isinstance(data, Mapping) and set(data) == {"sigma"}:
        return Sigma(*data["sigma"])
    return tuple(data) if isinstance(data, list) else data
