from __future__ import annotations

import numpy as np
import pytest

from attnctrl.metrics import (
    background_similarity,
    bootstrap_interval,
    fill_ratio,
    inclusion_ratio,
    metric,
    paired_interval,
    pixel_box,
    result,
    seam,
)

COLORS = np.array([[0, 0, -1, 1], [0, -1, 1, 1], [-1, -1, 0, 1], [-1, -1, -1, -1]])
LEFT, RIGHT = (0.0, 0.0, 0.5, 0.5), (0.5, 0.0, 1.0, 0.5)


def test_pixel_box_takes_pixels_by_their_centre():
    assert pixel_box((0.2, 0.0, 0.6, 0.5), 2, 4).tolist() == [[False, True, False, False], [False] * 4]


def test_inclusion_is_the_share_of_the_colour_that_is_inside():
    assert inclusion_ratio(COLORS, [LEFT], [0]) == 3 / 4
    assert inclusion_ratio(COLORS, [LEFT, RIGHT], [0, 1]) == (3 / 4 + 3 / 4) / 2
    assert inclusion_ratio(COLORS, [(0.0, 0.0, 1.0, 0.5)], [0]) == 3 / 4
    assert inclusion_ratio(COLORS, [RIGHT], [0]) == 0
    assert inclusion_ratio(COLORS, [LEFT], [5]) == 0


def test_fill_is_the_share_of_the_box_that_is_covered():
    assert fill_ratio(COLORS, [LEFT], [0]) == 3 / 4
    assert fill_ratio(COLORS, [(0, 0, 1, 1)], [0]) == 4 / 16


def test_boxes_and_colours_come_in_pairs():
    with pytest.raises(ValueError, match="2 boxes and 1 colours"):
        inclusion_ratio(COLORS, [LEFT, RIGHT], [0])


def test_background_similarity_looks_outside_of_the_boxes():
    image, other = np.zeros((2, 2, 2, 3), dtype=np.uint8)
    other[0, 0] = 255
    assert background_similarity(image, other, [LEFT]) == 1
    other[1, 1] = 51
    assert background_similarity(image, other, [LEFT]) == pytest.approx(1 - 0.2 / 3)
    assert background_similarity(image, other, [(0, 0, 1, 1)]) == 1
    with pytest.raises(ValueError, match="one size"):
        background_similarity(image, other[:1], [LEFT])


def test_seam_is_the_step_at_region_edges():
    image = np.full((8, 8, 3), 100, dtype=np.uint8)
    regions = np.zeros((1, 8, 8), dtype=bool)
    regions[0, :, 4:] = True
    assert seam(image, regions) == 0
    image[:, 4:] = 151
    assert seam(image, regions) == pytest.approx(0.2)
    assert seam(image.transpose(1, 0, 2), regions.transpose(0, 2, 1)) == pytest.approx(0.2)
    image[:, 2:] = 151
    image[:, :2] = 100
    # One of the seven columns of steps, away from the edge, among 48 + 56 others.
    assert seam(image, regions) == pytest.approx(-0.2 * 8 / (48 + 56))


def test_seam_leaves_subjects_out():
    image = np.full((8, 8, 3), 100, dtype=np.uint8)
    regions = np.zeros((1, 8, 8), dtype=bool)
    regions[0, :, 4:] = True
    image[0, 4] = 200
    subject = np.zeros((8, 8), dtype=bool)
    subject[0, 4] = True
    assert seam(image, regions) > 0
    assert seam(image, regions, subject) == 0
    assert seam(image, regions, np.ones((8, 8), dtype=bool)) == 0


def test_bootstrap_interval_covers_the_mean_about_as_often_as_it_says():
    rng = np.random.default_rng(0)
    intervals = [bootstrap_interval(rng.normal(3, 2, 40), draws=400, seed=i) for i in range(300)]
    covered = np.mean([low <= 3 <= high for low, high in intervals])
    assert 0.90 <= covered <= 0.98
    assert np.mean([high - low for low, high in intervals]) == pytest.approx(2 * 1.96 * 2 / 40**0.5, rel=0.08)


def test_intervals_are_repeatable_and_paired():
    rng = np.random.default_rng(1)
    base = rng.normal(0, 5, 30)
    assert bootstrap_interval(base) == bootstrap_interval(base)
    # A constant gain has no spread, however much the pictures differ from each other.
    low, high = paired_interval(base, base + 2)
    assert (low, high) == pytest.approx((2, 2))
    with pytest.raises(ValueError, match="2 values without and 1 with"):
        paired_interval([1, 2], [1])
    with pytest.raises(ValueError, match="one value or more"):
        bootstrap_interval([])


def test_metric_and_result_have_the_form_of_every_suite():
    assert metric([0, 0, 0], [1, 1, 1], "lower") == {
        "vanilla": 0.0,
        "controlled": 1.0,
        "delta": 1.0,
        "ci95": [1.0, 1.0],
        "better": "lower",
    }
    alone = metric([1, 1])
    assert alone == {"vanilla": 1.0, "controlled": None, "delta": None, "ci95": [1.0, 1.0], "better": "higher"}
    assert result("layout", "toy", 2, 1.23456, {"a": alone}) == {
        "suite": "layout",
        "model": "toy",
        "n": 2,
        "seconds": 1.235,
        "metrics": {"a": alone},
    }
