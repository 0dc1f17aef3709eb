"""The arithmetic of perturbed branches: what is added, to what, and that no parametrisation changes it."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from torch import Tensor

from attnctrl.errors import ControlError
from attnctrl.families import all_families
from attnctrl.guidance import added, copied, rows_of_arguments
from attnctrl.increments import Guide, RescaleMode, increments, saliency
from attnctrl.place import guidance_of


def normal(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def increment(c: Tensor, p: Tensor, guide: Guide, **more: Any) -> Tensor:
    return increments(c, {guide: p}, **more)[0]


def test_the_increment_on_both_rows_adds_itself_whatever_the_guidance() -> None:
    """(u + g) + s ((c + g) - (u + g)) = u + s (c - u) + g."""
    u, c, p = (normal(4, 6, 6, seed=seed) for seed in range(3))
    g = increment(c, p, Guide(3.0))
    assert (g - 3 * (c - p)).abs().max() < 1e-12
    for s in (0.0, 1.0, 7.5):
        pipeline = added(u, g, u) + s * (added(c, g, c) - added(u, g, u))
        assert (pipeline - (u + s * (c - u) + 3 * (c - p))).abs().max() < 1e-12


def test_the_combination_is_the_same_in_noise_picture_and_velocity() -> None:
    """x = a x0 + b eps: each is an affine function of the others with one offset for all branches."""
    a, b, x = 0.6, 0.8, normal(4, 6, 6, seed=9)
    u, c, p = (normal(4, 6, 6, seed=seed) for seed in range(3))

    def guided(u: Tensor, c: Tensor, p: Tensor) -> Tensor:
        return u + 4.0 * (c - u) + increment(c, p, Guide(3.0))

    def picture(noise: Tensor) -> Tensor:
        return (x - b * noise) / a

    def velocity(noise: Tensor) -> Tensor:
        return noise - picture(noise)

    for change in (picture, velocity):
        assert (guided(*map(change, (u, c, p))) - change(guided(u, c, p))).abs().max() < 1e-11


@pytest.mark.parametrize("phi", [0.25, 1.0])
def test_rescaled_increments(phi: float) -> None:
    """Either mode brings the deviation of one sum to that of c; where that does not vary, nothing changes."""
    u, c, p = (normal(4, 6, 6, seed=seed) for seed in range(3))
    g, cfg = 3 * (c - p), u + 5 * (c - u)
    for mode, other in (("partial", c), ("full", cfg)):
        expected = g * (phi * c.std() / (other + g).std() + 1 - phi)
        assert (increment(c, p, Guide(3.0, phi, rescale_mode=mode), u=u, s=5.0) - expected).abs().max() < 1e-12
    still = torch.zeros(3, 3)
    assert increment(still, still, Guide(3.0, phi)).isfinite().all()
    # without guidance of the pipeline cfg is c
    full, partial = Guide(3.0, phi, rescale_mode="full"), Guide(3.0, phi)
    assert torch.equal(increment(c, p, full), increment(c, p, partial))


def test_saliency_is_a_softmax_over_blurred_magnitudes() -> None:
    """Dense: 3 x 3 weights exp(-d^2 / 2) of a grid with mirrored edges, then exp over the sum of each grid."""
    x = normal(2, 3, 5, 4)
    taps = torch.tensor([math.exp(-0.5), 1.0, math.exp(-0.5)], dtype=torch.float64)
    window = torch.outer(taps, taps) / taps.sum() ** 2
    around = torch.empty_like(x)
    for i in range(5):
        for j in range(4):
            rows = [abs(i + d) if i + d < 5 else 8 - (i + d) for d in (-1, 0, 1)]
            columns = [abs(j + d) if j + d < 4 else 6 - (j + d) for d in (-1, 0, 1)]
            around[..., i, j] = (x.abs()[..., rows, :][..., columns] * window).sum((-2, -1))
    expected = around.exp() / around.exp().sum((-2, -1), keepdim=True)
    assert (saliency(x) - expected).abs().max() < 1e-12


@pytest.mark.parametrize("phi", [0.25, 1.0])
def test_saliency_chooses_between_the_guidances(phi: float) -> None:
    """What is added to cfg leads to u + (s (c - u) or one of the g), element by element; phi of the way."""
    u, c, p, q = (normal(4, 6, 6, seed=seed) for seed in range(4))
    apart, g, h = 2 * (c - u), 3 * (c - p), 1.5 * (c - q)
    one, two = (Guide(w, phi, rescale_mode="snf") for w in (3.0, 1.5))
    where = saliency(g) > saliency(apart)
    assert 0.2 < where.double().mean() < 0.8
    found = increment(c, p, one, u=u, s=2.0)
    expected = phi * torch.where(where, g, apart) + (1 - phi) * (apart + g)
    assert (apart + found - expected).abs().max() < 1e-12
    # several of them compete with each other
    both = increments(c, {one: p, two: q}, u, 2.0)
    best = torch.stack([saliency(x) for x in (apart, g, h)]).max(0).indices
    chosen = torch.where(best == 0, apart, torch.where(best == 1, g, h))
    expected = phi * chosen + (1 - phi) * (apart + g + h)
    assert (apart + sum(both) - expected).abs().max() < 1e-12
    assert torch.equal(increment(c, p, one), increment(c, p, Guide(3.0)))
    with pytest.raises(ControlError, match="without rows and columns"):
        increment(c[0], p[0], one, u=u[0], s=2.0)


@pytest.mark.parametrize("mode", RescaleMode.__args__)
def test_modes_without_a_share_keep_the_bits(mode: RescaleMode) -> None:
    u, c, p = (normal(4, 6, 6, seed=seed).float() for seed in range(3))
    assert torch.equal(increment(c, p, Guide(3.0, 0.0, rescale_mode=mode), u=u, s=2.0), 3.0 * (c - p))
    assert not increment(c, p, Guide(0.0, 0.0, rescale_mode=mode), u=u, s=2.0).any()
    half = [x.bfloat16() for x in (c, p, u)]
    found = increment(half[0], half[1], Guide(3.0, 1.0, rescale_mode=mode), u=half[2], s=2.0)
    exact = increment(*(x.double() for x in half[:2]), Guide(3.0, 1.0, rescale_mode=mode), u=half[2].double(), s=2.0)
    assert found.dtype == torch.float32
    assert (found - exact).abs().max() < 1e-5


def test_what_a_pipelines_guidance_is_told_by() -> None:
    class Pipe:
        guidance_scale, do_classifier_free_guidance = 4.0, True

    free = type("Free", (), {"guidance_scale": 1.0, "do_classifier_free_guidance": False})()
    sd3, zimage = (one for name in ("sd3", "zimage") for one in all_families() if one.name == name)
    both = ("uncond", "cond")
    assert guidance_of(sd3, [None, Pipe()], both) == 4.0
    assert guidance_of(zimage, [Pipe()], both[::-1]) == 5.0
    assert guidance_of(sd3, [free], ("cond",)) == 1.0
    for pipes, branches in (([], both), ([None], both), ([Pipe()], ("cond",)), ([], ("cond",))):
        assert guidance_of(sd3, pipes, branches) is None


def test_small_differences_are_multiplied_in_float32() -> None:
    c, p = torch.tensor([1.0], dtype=torch.bfloat16), torch.tensor([1.0078125], dtype=torch.bfloat16)
    found = increment(c, p, Guide(3.1))
    assert found.dtype == torch.float32
    assert added(c, found, c).dtype == torch.bfloat16
    assert (found + 3.1 * 0.0078125).abs().max() < 1e-7


def test_a_learned_variance_is_left_alone() -> None:
    row, latents, g = normal(8, 6, 6), normal(4, 6, 6, seed=1), normal(4, 6, 6, seed=2)
    out = added(row, g, latents)
    assert torch.equal(out[4:], row[4:])
    assert torch.equal(out[:4], row[:4] + g)


def test_rows_of_arguments() -> None:
    pair = torch.arange(4.0)
    given = {
        "hidden_states": normal(4, 3),
        "timestep": torch.tensor(5.0),
        "image_rotary_emb": (normal(4, 2), normal(4, 2)),
        "added": {"text": pair, "deep": [pair, torch.arange(3)]},
        "texts": [normal(2, 2), normal(1, 2), normal(3, 2), normal(4, 2)],
        "return_dict": False,
    }
    taken = rows_of_arguments(given, [2, 3], 4, ("hidden_states", "texts"))
    assert torch.equal(taken["hidden_states"], given["hidden_states"][2:])
    assert taken["added"]["text"].tolist() == taken["added"]["deep"][0].tolist() == [2.0, 3.0]
    assert taken["added"]["deep"][1].tolist() == [0, 1, 2]
    assert [len(text) for text in taken["texts"]] == [3, 4]
    assert taken["image_rotary_emb"] is given["image_rotary_emb"]
    assert taken["timestep"] is given["timestep"]
    assert rows_of_arguments(given, [0, 1, 2, 3], 4, ()) is given


def test_copies_survive_what_a_model_takes_out() -> None:
    given = {"residuals": [torch.ones(1), torch.zeros(1)]}
    held = copied(given)
    given["residuals"].pop(0)
    assert [one.item() for one in held["residuals"]] == [1.0, 0.0]
