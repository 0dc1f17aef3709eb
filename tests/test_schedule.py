"""Windows on noise levels."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from attnctrl.errors import ScheduleError
from attnctrl.schedule import (
    Moment,
    Sigma,
    active_steps,
    checked_window,
    is_active,
    locate,
    run_levels,
    window_from_json,
    window_to_json,
)


def even(steps: int) -> list[float]:
    return [1 - i / steps for i in range(steps)]


@pytest.mark.parametrize(
    ("window", "steps", "expected"),
    [
        ((0.0, 1.0), 4, [0, 1, 2, 3]),
        ((0.0, 0.5), 4, [0, 1]),
        ((0.0, 0.5), 5, [0, 1]),  # the midpoint of step 2 is 0.5, which belongs to the other half
        ((0.5, 1.0), 5, [2, 3, 4]),
        ((0.0, 0.01), 50, [0]),
        ((0.0, 0.001), 4, [0]),
        ((0.99, 1.0), 4, [3]),
        ((0.3, 0.31), 10, [3]),
        ((0.3, 0.4), 10, [3]),
        ((1.0, 1.0), 4, []),
        ((0.2, 0.2), 4, []),
        ((0.0, 0.4), 28, list(range(11))),
        (Sigma(1.0, 0.5), 4, [0, 1]),
        (Sigma(0.5, 0.0), 4, [2, 3]),
        (Sigma(0.6, 0.55), 4, [1]),  # between 0.75 and 0.5: the step that runs down from 0.75
        (Sigma(2.0, 1.5), 4, [0]),
        (Sigma(0.5, 0.5), 4, []),
    ],
)
def test_active_steps(window: object, steps: int, expected: list[int]) -> None:
    assert list(active_steps(window, even(steps))) == expected


@given(st.integers(1, 60), st.floats(0, 1), st.floats(0, 1))
def test_adjacent_windows_share_the_steps(steps: int, a: float, b: float) -> None:
    """Windows that meet part the run between them, as long as each has a midpoint; and none is ever empty."""
    low, high = sorted((a, b))
    whole = active_steps((0.0, 1.0), even(steps))
    assert len(whole) == steps
    if low < high:
        assert active_steps((low, high), even(steps))
    halves = [[i for i in range(steps) if start <= (i + 0.5) / steps < stop] for start, stop in ((0, a), (a, 1))]
    if all(halves) and 0 < a < 1:
        assert active_steps((0.0, a), even(steps)) + active_steps((a, 1.0), even(steps)) == whole


def test_window_checks() -> None:
    assert checked_window([0, 1], "isolate") == (0.0, 1.0)
    for window in ((0.5, 0.2), (-0.1, 1), (0, 2), "half", 0.5, (0, 1, 2)):
        with pytest.raises(ScheduleError, match=r"isolate: a window"):
            checked_window(window, "isolate")
    with pytest.raises(ScheduleError, match="low <= high"):
        Sigma(0.1, 0.5)


def test_windows_survive_json() -> None:
    for window in ((0.0, 0.5), Sigma(0.9, 0.1)):
        assert window_from_json(window_to_json(window)) == window


@pytest.mark.parametrize("steps", [1, 4, 28, 50])
@pytest.mark.parametrize("shift", [1.0, 1.5, 3.16])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_each_step_is_found_from_its_rounded_noise_level(steps: int, shift: float, dtype: torch.dtype) -> None:
    """As FLUX pipelines pass it: timestep = sigma * 1000 in the latents' dtype, divided by 1000 there."""
    sigmas = [shift * s / (1 + (shift - 1) * s) for s in even(steps)]
    for step, sigma in enumerate(sigmas):
        timesteps = [1000 * s for s in sigmas]
        told = 1000 * float(torch.tensor(sigma * 1000).to(dtype) / 1000)
        assert locate(told, timesteps, step, torch.finfo(dtype).eps) == step
        if dtype == torch.float32:
            # the timestep alone tells, whatever the scheduler believes
            assert locate(told, timesteps, 0, torch.finfo(dtype).eps) == step


def test_positions() -> None:
    assert locate(500.0, [1000.0, 750.0, 500.0], None, 1e-7) == 2
    assert locate(500.0, (), None, 1e-7) is None
    assert locate(600.0, [1000.0, 750.0, 500.0], 1, 1e-7) is None  # none of this run's
    # repeated timesteps, as Heun has: the scheduler knows which
    assert locate(500.0, (1000.0, 500.0, 500.0, 200.0), 2, 1e-7) == 2
    # neighbours at the end of a long run are told apart
    assert locate(1.0, (2.0, 1.0, 0.0), 0, 1e-7) == 1


def test_is_active() -> None:
    assert is_active((0.0, 1.0), Moment())
    assert not is_active((0.5, 0.5), Moment())
    assert is_active(Sigma(0.6, 0.4), Moment(0.5))
    assert not is_active(Sigma(0.4, 0.2), Moment(0.5))
    assert is_active((0.0, 0.25), Moment(1.0, 0, (1.0, 0.5)))
    with pytest.raises(ScheduleError, match=r"isolate: .*there is no scheduler with timesteps.*scheduler="):
        is_active((0.0, 0.5), Moment(0.5), "isolate")
    with pytest.raises(ScheduleError, match=r"this forward's timestep is none of the scheduler's 2"):
        is_active((0.0, 0.5), Moment(0.6, None, (1.0, 0.5)))


def test_levels_of_real_schedulers() -> None:
    from diffusers import DDIMScheduler, EulerDiscreteScheduler, FlowMatchEulerDiscreteScheduler

    scheduler = FlowMatchEulerDiscreteScheduler(shift=1.0)
    assert run_levels(None) == ((), ())
    assert run_levels(scheduler) == ((), ())  # no run yet
    scheduler.set_timesteps(sigmas=[1.0, 0.75, 0.5])
    assert run_levels(scheduler) == ((1000.0, 750.0, 500.0), (1.0, 0.75, 0.5))
    betas = {"beta_start": 0.00085, "beta_end": 0.012, "beta_schedule": "scaled_linear"}
    euler = EulerDiscreteScheduler(**betas, timestep_spacing="leading", steps_offset=1)
    euler.set_timesteps(5)
    marks, sigmas = run_levels(euler)
    assert len(marks) == len(sigmas) == 5
    assert sigmas[0] == pytest.approx(6.0, abs=2)
    ddim = DDIMScheduler(**betas, timestep_spacing="leading", steps_offset=1)
    ddim.set_timesteps(5)
    # no sigmas of its own: those that Euler has at the same timesteps
    assert run_levels(ddim)[0] == marks
    assert run_levels(ddim)[1] == pytest.approx(sigmas, rel=1e-4)
