"""Solvers of inversion against their identities: reference_sharing C (RF-Solver), D (RF-Inversion), B (c); style_aligned 12."""

from __future__ import annotations

import math
from itertools import pairwise

import pytest
import torch

from attnctrl.errors import ControlError, ScheduleError, UnsupportedModelError
from attnctrl.inversion import (
    FLOW_STEPS,
    Evaluation,
    Level,
    diffusion_shares,
    evaluations,
    fading,
    flow_shares,
    noised,
    odds_map,
    pulled,
    walk,
    walk_ddim,
)

EULER, MIDPOINT, FIREFLOW = (FLOW_STEPS[name] for name in ("euler", "midpoint", "fireflow"))


def normal(seed, *shape):
    return torch.randn(*shape, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))


def falling(steps, shift=1.5):
    """The toy scheduler's list: steps + 1 values from 1 to 0."""
    values = [1 - i / steps for i in range(steps + 1)]
    return [shift * s / (1 + (shift - 1) * s) for s in values]


MATRIX = normal(1, 6, 6) / 2


def smooth(z, sigma):
    return torch.tanh(z @ MATRIX) * math.cos(3 * sigma) + 0.5 * z * sigma


def last(*arguments):
    *_, z = walk(*arguments)
    return z


def round_trip(step, steps, z, velocity=smooth):
    sigmas = falling(steps)
    return (last(velocity, last(velocity, z, sigmas[::-1], step), sigmas, step) - z).norm().item()


def test_c_a_midpoint_is_the_second_order_taylor_step():
    z, a, b = normal(0, 3, 6), 0.7, 0.4
    h = b - a
    first = smooth(z, a)
    slope = (smooth(z + h / 2 * first, a + h / 2) - first) / (h / 2)
    taylor = z + h * first + h * h / 2 * slope
    torch.testing.assert_close(last(smooth, z, [a, b], MIDPOINT), taylor, rtol=0, atol=1e-14)


def test_c_b_what_each_step_solves_exactly():
    z, constant, slope = normal(0, 3, 6), normal(2, 3, 6), normal(3, 3, 6)
    sigmas = falling(5)
    exact = z - constant - slope / 2

    def linear(_z, sigma):
        return constant + slope * sigma

    torch.testing.assert_close(last(linear, z, sigmas, MIDPOINT), exact, rtol=0, atol=1e-13)
    assert (last(linear, z, sigmas, EULER) - exact).norm() > 0.1
    for step in FLOW_STEPS.values():
        torch.testing.assert_close(last(lambda *_: constant, z, sigmas, step), z - constant, rtol=0, atol=1e-13)


@pytest.mark.parametrize(("step", "order"), [(EULER, 2), (MIDPOINT, 8)], ids=["euler", "midpoint"])
def test_c_round_trip_error_falls_by_the_order_per_halving(step, order):
    z = normal(0, 3, 6)
    errors = [round_trip(step, steps, z) for steps in (32, 64, 128)]
    for coarse, fine in pairwise(errors):
        assert coarse / fine == pytest.approx(order, rel=0.1)


def test_c_midpoint_comes_back_where_euler_does_not():
    z = normal(0, 3, 6)
    assert round_trip(MIDPOINT, 16, z) < round_trip(EULER, 16, z) / 100
    assert round_trip(FIREFLOW, 16, z) < round_trip(EULER, 16, z) / 5


@pytest.mark.parametrize(
    ("step", "count"), [(EULER, lambda s: s), (MIDPOINT, lambda s: 2 * s), (FIREFLOW, lambda s: s + 1)]
)
@pytest.mark.parametrize("steps", [1, 7])
def test_c_f_evaluations_are_counted_and_placed(step, count, steps):
    sigmas, calls = falling(steps), []

    def noted(z, sigma):
        calls.append(sigma)
        return smooth(z, sigma)

    for along in (sigmas, sigmas[::-1]):
        calls.clear()
        assert len(list(walk(noted, normal(0, 2, 6), along, step))) == steps + 1
        assert len(calls) == count(steps)
        assert [one.sigma for one in evaluations(along, step)] == calls


def test_evaluations_tell_interval_and_stage():
    assert evaluations([1.0, 0.5, 0.0], MIDPOINT) == (
        Evaluation(0, 0, 1.0), Evaluation(0, 1, 0.75), Evaluation(1, 0, 0.5), Evaluation(1, 1, 0.25)
    )  # fmt: skip
    assert evaluations([0.0, 0.5, 1.0], FIREFLOW) == (
        Evaluation(0, 0, 0.0), Evaluation(0, 1, 0.25), Evaluation(1, 0, 0.75)
    )  # fmt: skip


@pytest.mark.parametrize("sigmas", [[], [0.5], [0.5, 0.5], [1, 0.2, 0.4], [1.2, 0.5], [0.5, -0.1]])
def test_lists_that_cannot_be_walked_are_refused(sigmas):
    with pytest.raises(ScheduleError, match="sigmas in \\[0, 1\\] that rise or fall"):
        walk(smooth, normal(0, 6), sigmas, EULER)


# D: controlled equations


def test_d_a_the_full_pull_is_the_straight_line_for_any_model():
    picture, start, sigmas = normal(4, 2, 6), normal(5, 2, 6), falling(9)[2:]
    path = list(walk(pulled(smooth, picture, 0.0, lambda _: 1.0), start, sigmas, EULER))
    for sigma, z in zip(sigmas, path, strict=True):
        torch.testing.assert_close(z, picture + sigma / sigmas[0] * (start - picture), rtol=0, atol=1e-13)
    torch.testing.assert_close(path[-1], picture, rtol=0, atol=1e-14)


def test_d_a_from_noise_it_is_the_noised_trajectory():
    picture, noise, sigmas = normal(4, 2, 6), normal(5, 2, 6), falling(9)
    path = torch.stack(list(walk(pulled(smooth, picture, 0.0, lambda _: 1.0), noise, sigmas, EULER)))
    torch.testing.assert_close(path, noised(picture, noise, flow_shares(sigmas)), rtol=0, atol=1e-13)


def test_d_b_gamma_one_ends_on_the_noise():
    picture, noise = normal(4, 2, 6), normal(5, 2, 6)
    rising = falling(9)[::-1]
    end = last(pulled(smooth, noise, 1.0, lambda _: 1.0), picture, rising, EULER)
    torch.testing.assert_close(end, noise, rtol=0, atol=1e-13)


def test_d_b_half_a_pull_is_the_formula():
    z, noise, sigma = normal(4, 2, 6), normal(5, 2, 6), 0.3
    v = smooth(z, sigma)
    wanted = v + 0.5 * ((noise - z) / (1 - sigma) - v)
    torch.testing.assert_close(pulled(smooth, noise, 1.0, lambda _: 0.5)(z, sigma), wanted, rtol=0, atol=1e-14)


def test_d_c_without_pulls_it_is_the_euler_round_trip():
    z, sigmas = normal(0, 3, 6), falling(16)
    free = pulled(smooth, normal(5, 3, 6), 1.0, lambda _: 0.0)
    assert torch.equal(last(free, z, sigmas[::-1], EULER), last(smooth, z, sigmas[::-1], EULER))
    errors = [round_trip(EULER, steps, z, free) for steps in (64, 128)]
    assert errors[0] / errors[1] == pytest.approx(2, rel=0.1)


@pytest.mark.parametrize("step", [EULER, MIDPOINT])
def test_d_d_outside_its_window_the_pull_has_no_effect(step):
    sigmas, start = falling(8), normal(5, 2, 6)
    strength = fading(sigmas, 0.9, (0.0, 0.25))
    held = list(walk(pulled(smooth, normal(4, 2, 6), 0.0, strength), start, sigmas, step))
    free = list(walk(smooth, held[2], sigmas[2:], step))
    assert all(torch.equal(one, other) for one, other in zip(held[2:], free, strict=True))
    assert not torch.allclose(held[2], list(walk(smooth, start, sigmas, step))[2])


def test_d_strength_fades_by_steps():
    sigmas = [1.0, 0.75, 0.5, 0.25, 0.0]
    strength = fading(sigmas, 0.8, (0.0, 0.75), power=2)
    found = [strength(sigma) for sigma in (1.0, 0.9, 0.75, 0.6, 0.5, 0.25, 0.1, 0.0)]
    first, second, third = (0.8 * (1 - i / 4) ** 2 for i in range(3))
    assert found == pytest.approx([first, first, second, second, third, 0, 0, 0])


def test_pulls_that_cannot_be_are_refused():
    z = normal(0, 6)
    with pytest.raises(ScheduleError, match="where the target lies"):
        pulled(smooth, z, 1.0, lambda _: 0.5)(z, 1.0)
    with pytest.raises(ControlError, match=r"\[0, 1\]; found 1.5"):
        pulled(smooth, z, 1.0, lambda _: 1.5)(z, 0.5)


# noised trajectories


@pytest.mark.parametrize("mu", [0.3, 0.63, 1.15])
def test_b_c_the_odds_of_the_reference(mu):
    g = odds_map(mu)
    for sigma in (0.81, 0.65, 0.45, 0.1):
        odds = g(sigma) / (1 - g(sigma))
        assert odds == pytest.approx(math.exp(-2 * mu) * sigma / (1 - sigma))
        assert g(sigma) < sigma
        assert odds_map(0)(sigma) == pytest.approx(sigma)
    assert (g(1.0), g(0.0)) == (1.0, 0.0)


def test_b_c_the_published_values():
    assert [round(odds_map(0.63)(sigma), 2) for sigma in (0.81, 0.65, 0.45)] == [0.55, 0.35, 0.19]


def test_noised_mixes_one_noise():
    clean, noise = normal(0, 2, 6), normal(1, 2, 6)
    path = noised(clean, noise, flow_shares([1.0, 0.4, 0.0], odds_map(0.5)))
    g = odds_map(0.5)(0.4)
    torch.testing.assert_close(path, torch.stack([noise, (1 - g) * clean + g * noise, clean]))
    (mixed,) = noised(clean, noise, diffusion_shares([0.36]))
    torch.testing.assert_close(mixed, 0.6 * clean + 0.8 * noise)


# DDIM


KEPT = torch.cumprod(1 - torch.linspace(0.00085**0.5, 0.012**0.5, 1000, dtype=torch.float64) ** 2, 0)


def levels(steps, *, no_signal=False):
    marks = [999 - i * (1000 // steps) for i in range(steps)]
    found = [Level(mark, KEPT[mark].item()) for mark in marks]
    return [Level(999, 0.0) if no_signal else found[0], *found[1:], Level(-1, 1.0)]


def end_of(*arguments):
    *_, z = walk_ddim(*arguments)
    return z


@pytest.mark.parametrize(("kind", "no_signal"), [("epsilon", False), ("v_prediction", False), ("v_prediction", True)])
def test_style_aligned_12_a_constant_prediction_comes_back(kind, no_signal):
    picture, answer, steps = normal(0, 2, 6), normal(1, 2, 6), levels(10, no_signal=no_signal)
    noise = end_of(lambda *_: answer, picture, steps[::-1], kind)
    assert (noise - picture).norm() > 1
    torch.testing.assert_close(end_of(lambda *_: answer, noise, steps, kind), picture, rtol=0, atol=1e-12)


def test_style_aligned_6_one_step_is_its_formula():
    z, noise, steps = normal(0, 2, 6), normal(1, 2, 6), levels(10)
    clean, noisy = steps[4], steps[3]
    heard = []

    def predict(_z, timestep):
        heard.append(timestep)
        return noise

    wanted = math.sqrt(noisy.kept) * (z - math.sqrt(1 - clean.kept) * noise) / math.sqrt(clean.kept)
    wanted = wanted + math.sqrt(1 - noisy.kept) * noise
    torch.testing.assert_close(end_of(predict, z, [clean, noisy], "epsilon"), wanted)
    end_of(predict, z, [noisy, clean], "epsilon")
    assert heard == [noisy.timestep] * 2


def test_v_and_noise_predictions_of_one_model_agree():
    """A network that knows the picture answers in either form; both walk the same way."""
    picture, noise, steps = normal(0, 2, 6), normal(1, 2, 6), levels(8)
    kept = {level.timestep: level.kept for level in steps}

    def v(_z, timestep):
        return math.sqrt(kept[timestep]) * noise - math.sqrt(1 - kept[timestep]) * picture

    start = math.sqrt(steps[0].kept) * picture + math.sqrt(1 - steps[0].kept) * noise
    by_v = list(walk_ddim(v, start, steps, "v_prediction"))
    by_noise = list(walk_ddim(lambda *_: noise, start, steps, "epsilon"))
    wanted = noised(picture, noise, diffusion_shares(level.kept for level in steps))
    torch.testing.assert_close(torch.stack(by_v), wanted)
    torch.testing.assert_close(torch.stack(by_noise), wanted)


def test_ddim_refuses_what_it_cannot_tell_apart():
    z, no_signal = normal(0, 6), [Level(999, 0.0), Level(-1, 1.0)]
    with pytest.raises(ScheduleError, match="cannot tell picture and noise apart"):
        end_of(lambda z, _: z, z, no_signal, "epsilon")
    with pytest.raises(ScheduleError, match="take more steps"):
        end_of(lambda z, _: z, z, no_signal[::-1], "v_prediction")
    assert torch.equal(end_of(lambda z, _: -z, z, no_signal, "v_prediction"), z)
    with pytest.raises(UnsupportedModelError, match="epsilon or v_prediction; the scheduler's prediction_type is 'sam"):
        end_of(lambda z, _: z, z, levels(3), "sample")
    with pytest.raises(ScheduleError, match="rise or fall"):
        walk_ddim(lambda z, _: z, z, [Level(9, 0.5), Level(9, 0.5)], "epsilon")


def test_levels_have_the_sigmas_of_schedulers():
    assert Level(0, 0.2).sigma == pytest.approx(2)
    assert (Level(999, 0.0).sigma, Level(-1, 1.0).sigma) == (math.inf, 0)
