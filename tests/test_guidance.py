"""The arithmetic of perturbed branches: what is added, to what, and that no parametrisation changes it."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from attnctrl.guidance import Guide, added, copied, increment, rows_of_arguments


def normal(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


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
    c, p = normal(4, 6, 6), normal(4, 6, 6, seed=1)
    g = 3 * (c - p)
    expected = g * (phi * c.std() / (c + g).std() + 1 - phi)
    assert (increment(c, p, Guide(3.0, phi)) - expected).abs().max() < 1e-12
    assert increment(torch.zeros(3, 3), torch.zeros(3, 3), Guide(3.0, phi)).isfinite().all()


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
