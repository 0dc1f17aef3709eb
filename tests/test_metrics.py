from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra.numpy import arrays

from attnctrl.metrics import (
    Detection,
    background_similarity,
    bootstrap_interval,
    fill_ratio,
    inclusion_ratio,
    metric,
    paired_interval,
    pixel_box,
    result,
    seam,
    set_metric,
)
from attnctrl.metrics.layout import generalised_iou, iou

COLORS = np.array([[0, 0, -1, 1], [0, -1, 1, 1], [-1, -1, 0, 1], [-1, -1, -1, -1]])
LEFT, RIGHT = (0.0, 0.0, 0.5, 0.5), (0.5, 0.0, 1.0, 0.5)


def test_pixel_box_takes_pixels_by_their_centre():
    assert pixel_box((0.2, 0.0, 0.6, 0.5), 2, 4).tolist() == [[False, True, False, False], [False] * 4]


def red(count: int = 1) -> list[Detection | None]:
    """The first colours of COLORS as detections."""
    return [Detection("colour", (0, 0, 1, 1), np.equal(COLORS, index)) for index in range(count)]


def test_inclusion_is_the_share_of_the_thing_that_is_inside():
    assert inclusion_ratio(red(), [LEFT]) == 3 / 4
    assert inclusion_ratio(red(2), [LEFT, RIGHT]) == (3 / 4 + 3 / 4) / 2
    assert inclusion_ratio(red(), [(0.0, 0.0, 1.0, 0.5)]) == 3 / 4
    assert inclusion_ratio(red(), [RIGHT]) == 0
    assert inclusion_ratio([None, *red()], [LEFT, LEFT]) == (0 + 3 / 4) / 2


def test_fill_is_the_share_of_the_target_that_is_covered():
    assert fill_ratio(red(), [LEFT]) == 3 / 4
    assert fill_ratio(red(), [(0, 0, 1, 1)]) == 4 / 16
    assert fill_ratio([None, *red()], [LEFT, LEFT]) == (0 + 3 / 4) / 2
    target = np.zeros((4, 4), dtype=bool)
    target[0] = True
    assert (inclusion_ratio(red(), [target]), fill_ratio(red(), [target])) == (2 / 4, 2 / 4)


def test_boxes_are_compared_exactly():
    found = [Detection("a", (0.1, 0.2, 0.5, 0.6))]
    # common 0.1 x 0.4 of 0.4 x 0.4, in a target of 0.3 x 0.8
    assert inclusion_ratio(found, [(0.4, 0.0, 0.7, 0.8)]) == pytest.approx(1 / 4)
    assert fill_ratio(found, [(0.4, 0.0, 0.7, 0.8)]) == pytest.approx(0.04 / 0.24)
    assert inclusion_ratio([Detection("a", (0.5, 0.5, 0.5, 0.5))], [(0, 0, 1, 1)]) == 0


SIDES = st.tuples(st.integers(0, 12), st.integers(1, 12)).map(lambda at: (at[0] / 24, (at[0] + at[1]) / 24))
BOXES = st.tuples(SIDES, SIDES).map(lambda sides: (sides[0][0], sides[1][0], sides[0][1], sides[1][1]))
MASKS = arrays(bool, (5, 6)).filter(np.any)
AREAS = st.one_of(BOXES, MASKS)


def thing(area) -> Detection:
    return Detection("a", (0, 0, 1, 1), area) if isinstance(area, np.ndarray) else Detection("a", area)


@given(AREAS)
def test_what_fills_its_target_is_wholly_inside(area):
    assert (inclusion_ratio([thing(area)], [area]), fill_ratio([thing(area)], [area])) == (1, 1)


@given(AREAS, AREAS)
def test_the_ratios_swap_when_thing_and_target_do(area, other):
    assert inclusion_ratio([thing(area)], [other]) == fill_ratio([thing(other)], [area])
    assert 0 <= inclusion_ratio([thing(area)], [other]) <= 1 + 1e-12


@given(MASKS, BOXES)
def test_what_is_apart_is_not_included(mask, box):
    assert inclusion_ratio([thing(mask)], [~mask]) == fill_ratio([thing(mask)], [~mask]) == 0
    below = (box[0] / 2, 0.5 + box[1] / 2, box[2] / 2, 0.5 + box[3] / 2)
    above = (box[0] / 2, box[1] / 2, box[2] / 2, box[3] / 2)
    assert inclusion_ratio([thing(above)], [below]) == fill_ratio([thing(above)], [below]) == 0


def test_things_and_targets_come_in_pairs_on_one_picture():
    with pytest.raises(ValueError, match="found 1 detections and 2 targets"):
        inclusion_ratio(red(), [LEFT, RIGHT])
    with pytest.raises(ValueError, match="found 0 detections and 0 targets"):
        fill_ratio([], [])
    with pytest.raises(ValueError, match=r"one size are compared; found \(2, 2\) and \(4, 4\)"):
        inclusion_ratio(red(), [np.ones((2, 2), dtype=bool)])


def test_a_detection_lies_on_the_picture():
    with pytest.raises(ValueError, match="Divide pixels by the width and height"):
        Detection("cat", (10, 20, 30, 40))
    with pytest.raises(ValueError, match=r"mask of 'cat' is int64 \(2,\); give bool"):
        Detection("cat", (0, 0, 1, 1), np.array([0, 1]))


def test_likeness_of_boxes():
    assert iou((0, 0, 0.5, 0.5), (0.25, 0, 0.75, 0.5)) == pytest.approx(1 / 3)
    assert generalised_iou((0, 0, 0.5, 0.5), (0, 0, 0.5, 0.5)) == 1
    # apart: hull 1 x 0.5, half of it empty
    assert generalised_iou((0, 0, 0.25, 0.5), (0.75, 0, 1, 0.5)) == pytest.approx(-1 / 2)


def test_background_similarity_looks_outside_of_the_boxes():
    image, other = np.zeros((2, 2, 2, 3), dtype=np.uint8)
    other[0, 0] = 255
    assert background_similarity(image, other, [LEFT]) == 1
    other[1, 1] = 51
    assert background_similarity(image, other, [LEFT]) == pytest.approx(1 - 0.2 / 3)
    assert background_similarity(image, other, [(0, 0, 1, 1)]) == 1
    corner = np.array([[True, False], [False, False]])
    assert background_similarity(image, other, [corner]) == pytest.approx(1 - 0.2 / 3)
    assert background_similarity(image, other, [corner, RIGHT, (0.5, 0.5, 1, 1)]) == 1
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


def test_numbers_of_sets_have_paired_intervals():
    """A statistic that is a mean has the interval of a mean; equal differences leave nothing to chance."""
    rng = np.random.default_rng(0)
    plain = rng.normal(size=40)
    shifted = set_metric(lambda some: float(np.mean(some)), plain, plain + 0.25)
    assert (shifted["delta"], shifted["ci95"]) == (pytest.approx(0.25), [pytest.approx(0.25)] * 2)
    steered = plain + rng.normal(0.2, 0.5, size=40)
    found = set_metric(lambda some: float(np.mean(some)), plain, steered, "lower")
    expected = metric(plain.tolist(), steered.tolist(), "lower")
    assert {k: found[k] for k in ("vanilla", "controlled", "delta", "better")} == pytest.approx(
        {k: expected[k] for k in ("vanilla", "controlled", "delta", "better")}
    )
    assert found["ci95"] == pytest.approx(expected["ci95"], abs=0.03)
    alone = set_metric(lambda some: float(np.max(some)), plain)
    assert alone["vanilla"] == alone["ci95"][1] == plain.max()
    assert alone["controlled"] is alone["delta"] is None
