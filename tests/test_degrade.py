from __future__ import annotations

import numpy as np
import pytest

from attnctrl.toybox.degrade import ALL, KINDS, blur, degrade
from attnctrl.toybox.models.flux import tiny_pipeline

STEP = np.zeros((2, 32, 32, 3), dtype=np.uint8)
STEP[:, :, 16:] = 200


@pytest.fixture(scope="module")
def vae():
    return tiny_pipeline().vae


def spoilt(kind: str, seed: int = 1, vae=None, images: np.ndarray = STEP) -> np.ndarray:
    return degrade(images, kind, np.random.default_rng(seed), vae)


def test_blur_is_the_normal_curve_within_each_picture():
    # Phi(0.5 / 0.7) = 0.76 of the step is reached half a pixel past it, up to the sampling of the kernel
    row = blur(STEP)[0, 5, :, 0].astype(int)
    assert row[15] == 200 - row[16]
    assert row[16] == pytest.approx(200 * 0.76, abs=8)
    assert (row[:12].max(), row[20:].min()) == (0, 200)
    other = np.stack([STEP[0], 255 - STEP[0]])
    assert np.array_equal(blur(other)[0], blur(STEP)[0])


def test_a_shift_moves_each_channel_of_each_picture_by_its_own_step():
    moved = spoilt("shift", images=np.full((50, 4, 4, 3), 100, dtype=np.uint8)).astype(int) - 100
    assert (np.ptp(moved, axis=(1, 2)) == 0).all()
    steps = moved[:, 0, 0]
    assert (steps.min(), steps.max()) == (-8, 8)
    assert np.unique(steps[:, 0] - steps[:, 1]).size > 5


def test_noise_has_its_deviation_and_stays_in_range():
    grey = np.full((4, 32, 32, 3), 128, dtype=np.uint8)
    assert (spoilt("noise", images=grey).astype(float) - 128).std() == pytest.approx(6, abs=0.2)
    assert spoilt("noise").max() < 240


def test_all_is_every_kind_in_order(vae):
    rng = np.random.default_rng(4)
    one_by_one = STEP
    for kind in KINDS:
        one_by_one = degrade(one_by_one, kind, rng, vae)
    assert np.array_equal(spoilt(ALL, 4, vae), one_by_one)


@pytest.mark.parametrize("kind", [*KINDS, ALL])
def test_equal_generators_give_equal_pictures(kind, vae):
    first = spoilt(kind, 7, vae)
    assert np.array_equal(first, spoilt(kind, 7, vae))
    assert (first.dtype, first.shape) == (np.uint8, STEP.shape)
    assert not np.array_equal(first, STEP)


def test_an_unknown_kind_is_refused():
    with pytest.raises(ValueError, match="spoilt by one of blur, vae, shift, noise, degraded; asked for 'melt'"):
        spoilt("melt")
