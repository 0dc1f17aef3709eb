"""A layout is measured by what a detector finds: matching by label, then by place where labels repeat."""

from __future__ import annotations

import sys

import numpy as np
import pytest

from attnctrl.metrics import Detection, Wanted, assign, measure_layout
from attnctrl.metrics.detections import MetricError, crop, identities
from attnctrl.toybox import world
from attnctrl.toybox.detect import color_detections, detect_subjects, embed_subject
from attnctrl.toybox.scorer import read_picture
from attnctrl.toybox.scorer_color import COLOR_NAMES

LEFT, RIGHT = (0.0, 0.0, 0.5, 1.0), (0.5, 0.0, 1.0, 1.0)


def at(label: str, x: float, score: float = 1.0) -> Detection:
    return Detection(label, (x, 0.4, x + 0.2, 0.6), None, score)


def test_the_surest_of_a_label_is_taken_wherever_it_is():
    sure, unsure, other = at("cat", 0.7, 0.9), at("cat", 0.1, 0.5), at("dog", 0.1, 0.99)
    assert assign([unsure, sure, other], ["cat", "bird"], [LEFT, RIGHT]) == [sure, None]


def test_repeated_labels_are_told_apart_by_place():
    a, b, unsure = at("cat", 0.7, 0.9), at("cat", 0.1, 0.8), at("cat", 0.0, 0.2)
    assert assign([a, b, unsure], ["cat", "cat"], [LEFT, RIGHT]) == [b, a]
    assert assign([a, b, unsure], ["cat", "cat"], [RIGHT, LEFT]) == [a, b]
    assert assign([a], ["cat", "dog", "cat"], [LEFT, LEFT, RIGHT]) == [None, None, a]
    assert assign([], ["cat", "cat"], [LEFT, RIGHT]) == [None, None]
    mask = np.zeros((4, 4), dtype=bool)
    mask[:, :2] = True
    assert assign([a, b], ["cat", "cat"], [mask, ~mask]) == [b, a]


def test_the_assignment_is_the_best_one_of_all_not_the_nearest_of_each():
    """Taken one after the other, the first target would take from the second what is nearest to both."""
    one, other = Detection("cat", (0.2, 0, 0.55, 1)), Detection("cat", (0.3, 0, 0.7, 1))
    assert assign([one, other], ["cat", "cat"], [(0.2, 0, 0.6, 1), (0.1, 0, 0.5, 1)]) == [other, one]


def test_repeated_labels_say_that_they_need_scipy(monkeypatch):
    monkeypatch.setitem(sys.modules, "scipy.optimize", None)
    assert assign([at("cat", 0.1)], ["cat"], [LEFT])[0] is not None
    with pytest.raises(MetricError, match=r"2 things of one label .* pip install 'attnctrl\[eval\]'"):
        assign([at("cat", 0.1)], ["cat", "cat"], [LEFT, RIGHT])


def test_each_label_has_a_target():
    with pytest.raises(ValueError, match="found 1 labels and 2 targets"):
        assign([], ["cat"], [LEFT, RIGHT])


def test_a_crop_is_what_the_box_touches():
    image = np.arange(4 * 8 * 3).reshape(4, 8, 3)
    assert np.array_equal(crop(image, (0.25, 0.5, 0.5, 1.0)), image[2:, 2:4])
    assert np.array_equal(crop(image, (0.3, 0.6, 0.45, 0.7)), image[2:3, 2:4])
    assert np.array_equal(crop(image, (1.0, 1.0, 1.0, 1.0)), image[3:, 7:])
    # 3 * (1 / 3) pixels, rounded up in floating point, are no fourth row
    assert crop(np.zeros((3, 3, 3)), (0, 0, 0.1 + 0.2 + 1 / 30, 1)).shape == (3, 1, 3)


def test_identity_is_zero_where_nothing_is_found():
    image, other = np.zeros((4, 4, 3)), np.ones((4, 4, 3))

    def embed(picture, found):
        return np.array([1.0, picture.mean() + found.score])

    shown = [(other, at("cat", 0, 0.0)), (other, at("dog", 0, 0.0))]
    # (1, 1) against (1, 0)
    assert identities(image, [at("cat", 0, 0.0), None], shown, embed) == [pytest.approx(2**-0.5), 0.0]


def test_a_layout_is_measured_with_the_means_that_are_given():
    image = np.zeros((10, 10, 3), dtype=np.uint8)
    reference, scene = image + 7, image.copy()
    scene[:, 5:] = 51
    asked = []

    def detect(picture, labels):
        asked.append(list(labels))
        if picture is reference:
            return [Detection("cat", (0, 0, 0.2, 0.2), None, 0.3), Detection("cat", (0.5, 0.5, 1, 1), None, 0.8)]
        # "cat" by half in its box, twice as far in the scene
        return [Detection("cat", (0.0, 0.0, 0.4 if picture is image else 0.6, 1.0))]

    seen = []

    def embed(picture, found):
        seen.append((picture is reference, found.box))
        return np.array([3.0, 4.0]) if picture is reference else np.array([1.0, 0.0])

    wanted = [Wanted("cat", (0.2, 0.0, 1.0, 1.0), reference), Wanted("dog", RIGHT)]
    assert measure_layout(image, wanted, detect) == {"inclusion_ratio": 0.25, "fill_ratio": pytest.approx(0.125)}
    assert asked == [["cat", "dog"]]
    values = measure_layout(image, wanted, detect, embed, scene)
    assert list(values) == ["inclusion_ratio", "fill_ratio", "identity_similarity", "background_similarity"]
    assert values["identity_similarity"] == pytest.approx(0.6)
    assert seen == [(True, (0.5, 0.5, 1, 1)), (False, (0.0, 0.0, 0.4, 1.0))]
    # the columns that neither detection covers all differ by 51
    assert values["background_similarity"] == pytest.approx(0.8)
    with pytest.raises(MetricError, match="none was given"):
        measure_layout(image, [Wanted("dog", RIGHT)], detect, embed)


def test_a_reference_in_which_nothing_is_found_is_taken_whole():
    boxes = []

    def embed(picture, found):
        boxes.append(found.box)
        return np.ones(2)

    def detect(picture, labels):
        return [Detection("cat", LEFT)] if picture.shape[0] == 8 else []

    wanted = [Wanted("cat", LEFT, np.zeros((4, 4, 3), np.uint8))]
    values = measure_layout(np.zeros((8, 8, 3), np.uint8), wanted, detect, embed)
    assert values == pytest.approx({"inclusion_ratio": 1, "fill_ratio": 1, "identity_similarity": 1})
    assert boxes == [(0, 0, 1, 1), LEFT]


CIRCLE = world.WorldSubject("circle", "red", "solid", 0.25, 0.5, 0.2)
STAR = world.WorldSubject("star", "blue", "dotted", 0.75, 0.5, 0.2)


def picture(*subjects: world.WorldSubject) -> np.ndarray:
    return world.render(world.WorldScene(subjects, "white"), 64, 64).image


def test_the_scorer_is_a_detector():
    found = detect_subjects(picture(CIRCLE, STAR), ["a red circle", "star", "a green thing", "a blue circle", "star"])
    assert [one.label for one in found] == ["a red circle", "star"]
    rendered = world.render(world.WorldScene((CIRCLE, STAR), "white"), 64, 64)
    for one, mask, box in zip(found, rendered.masks, rendered.boxes, strict=True):
        assert one.mask is not None
        assert (one.mask & mask).sum() / (one.mask | mask).sum() > 0.9
        assert one.box == pytest.approx(tuple(box), abs=2 / 64)
        assert 0 < one.score <= 1


def test_a_layout_of_the_world_is_measured():
    image, reference = picture(CIRCLE, STAR), picture(world.WorldSubject("circle", "red", "solid", 0.5, 0.5, 0.4))
    wanted = [Wanted("red circle", LEFT, reference), Wanted("blue star", RIGHT)]
    values = measure_layout(image, wanted, detect_subjects, embed_subject, picture(CIRCLE))
    assert values["inclusion_ratio"] == 1
    assert 0.1 < values["fill_ratio"] < 0.25
    assert values["identity_similarity"] > 0.95
    assert values["background_similarity"] > 0.99
    swapped = [Wanted("red circle", RIGHT, picture(STAR)), Wanted("blue star", LEFT)]
    # nothing red in that reference: taken whole, which has no mask
    with pytest.raises(MetricError, match="'red circle' has none"):
        measure_layout(image, swapped, detect_subjects, embed_subject)
    assert measure_layout(image, swapped, detect_subjects) == {"inclusion_ratio": 0, "fill_ratio": 0}


def test_colours_are_detections_of_their_pixels():
    colors = read_picture(picture(CIRCLE)).colors
    (one, none) = color_detections(colors, ["red", "blue"])
    assert none is None
    assert one is not None
    assert np.array_equal(one.mask, colors == COLOR_NAMES.index("red"))
