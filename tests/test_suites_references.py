"""The suite of references: renders that do as told score full, and each thing that goes wrong lowers its own metric."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

import numpy as np
import pytest
from attnctrl.pipelines.runner import Runner
from scipy import ndimage

from attnctrl.errors import UnsupportedModelError
from attnctrl.toybox import suite, world
from attnctrl.toybox.models.flux import tiny_pipeline
from attnctrl.toybox.suite import COMMON, Picture, measure
from attnctrl.toybox.suites import PAIRED
from attnctrl.toybox.suites_references import COUNTS, REFERENCES, Cast, cast_values, fidelity, values

NAMES = ("identity_similarity", "color", "shape", "inclusion_ratio", "fill_ratio", "leak", "background_similarity")


def ideal(cast: Cast, places: Sequence[int] | None = None, background: str | None = None) -> np.ndarray:
    """What a cast asks for; `places`: the index of the box each thing is put into."""
    boxes = [cast.boxes[index] for index in places or range(len(cast.boxes))]
    subjects = tuple(
        replace(one, x=(b[0] + b[2]) / 2, y=(b[1] + b[3]) / 2, radius=0.2)
        for one, b in zip(cast.subjects, boxes, strict=True)
    )
    return world.render(world.WorldScene(subjects, background or cast.background)).image


def pair(cast: Cast, **changes) -> list[np.ndarray]:
    return [ideal(cast, **changes), ideal(cast.swapped, **changes)]


@pytest.fixture(scope="module")
def task() -> tuple[Cast, ...]:
    return REFERENCES.task("test", 2)[0]


def test_a_task_has_one_to_four_things_with_a_reference_and_a_place_each():
    replaced = set()
    for index in range(20):
        for count, cast in zip(COUNTS, REFERENCES.task("test", index)[0], strict=True):
            shown = [*cast.subjects, cast.other]
            assert len({one.shape for one in shown}) == len({one.color for one in shown}) == count + 1
            assert len(cast.places) == len(cast.boxes) == len(cast.references) == count
            assert cast.prompt == ", ".join(
                [*(f"this thing {at}" for at in cast.places), f"{cast.background} background"]
            )
            assert [one.shape for one in cast.references] == [(48, 48, 3)] * count
            if count > 1:
                # the places share the canvas
                assert sum((b[2] - b[0]) * (b[3] - b[1]) for b in cast.boxes) == 1
            replaced.add((count, cast.replaced))
    assert replaced == {(count, index) for count in COUNTS for index in range(count)}


def test_one_thing_is_as_it_was_before_there_were_several():
    """Stored results of one reference stay comparable: its tasks are drawn first."""
    ones = [REFERENCES.task("test", index)[0][0] for index in range(3)]
    told = [(one.prompt, one.subjects[0].color, one.other.shape) for one in ones]
    assert told == [
        ("this thing right, beige background", "green", "heart"),
        ("this thing left, gray background", "blue", "star"),
        ("this thing right, white background", "purple", "triangle"),
    ]


def test_pictures_bind_each_place_to_its_reference(task):
    pictures = REFERENCES.pictures(task, 5)
    assert [len(one.references) for one in pictures] == [count for count in COUNTS for _ in range(2)]
    assert {one.seed for one in pictures} == {5}
    for cast, first, second in zip(task, pictures[::2], pictures[1::2], strict=True):
        assert first.prompt == second.prompt == cast.prompt
        assert [one.reference for one in first.regions] == list(range(len(cast.places)))
        assert [one.box for one in first.regions] == cast.boxes
        assert [one.prompt for one in first.regions] == [
            f"this thing {place}, {cast.background} background" for place in cast.places
        ]
        changed = [bool((a != b).any()) for a, b in zip(first.references, second.references, strict=True)]
        assert changed == [index == cast.replaced for index in range(len(cast.places))]


def test_things_that_come_in_where_told_score_full(task):
    images = [image for cast in task for image in pair(cast)]
    found = values(task, images, images)
    assert set(found) == {name + end for name in NAMES for end in ("", "_2", "_3", "_4")} == set(REFERENCES.better)
    for end in ("", "_2", "_3", "_4"):
        assert found["identity_similarity" + end] > 0.85
        assert [found[name + end] for name in ("color", "shape", "background_similarity")] == [1, 1, 1]
        assert found["inclusion_ratio" + end] > 0.99
        assert 0.1 < found["fill_ratio" + end] < 0.7
        assert found["leak" + end] == pytest.approx(0, abs=1e-3)
    assert fidelity(task, images) == 1


@pytest.mark.parametrize("count", COUNTS)
def test_rims_are_of_the_things_and_no_ground(task, count):
    cast = task[COUNTS.index(count)]
    flat = pair(cast)
    rim = world.OUTLINES["white" if cast.background == "black" else "black"]
    outlined = [np.where(_rims(image, cast), np.array(rim, dtype=np.uint8), image) for image in flat]
    assert (outlined[0] != flat[0]).any()
    assert cast_values(cast, outlined, flat)["background_similarity"] == 1
    # a stripe across the ground is ground
    striped = [image.copy() for image in flat]
    for image in striped:
        image[:2] = rim
    assert cast_values(cast, striped, flat)["background_similarity"] < 0.98


def _rims(image: np.ndarray, cast: Cast) -> np.ndarray:
    """bool [H, W, 1]: pixels beside a thing, up to the width in which the world draws rims."""
    things = np.abs(image.astype(int) - world.BACKGROUNDS[cast.background]).sum(-1) > 60
    return (~things & (ndimage.distance_transform_edt(~things) < 2.5))[..., None]


@pytest.mark.parametrize("count", COUNTS[1:])
def test_each_thing_that_goes_wrong_lowers_its_own_metric(task, count):
    cast = task[COUNTS.index(count)]
    right = pair(cast)
    full = cast_values(cast, right, right)
    moved = cast_values(cast, pair(cast, places=[*range(1, count), 0]), right)
    assert moved["inclusion_ratio"] < 0.01
    assert moved["fill_ratio"] < 0.01
    # what either picture shows of the things is no ground
    assert moved["background_similarity"] > 0.99
    assert moved["identity_similarity"] == pytest.approx(full["identity_similarity"], abs=0.03)
    # one of the things is left out of both pictures
    few = replace(cast, subjects=cast.subjects[:-1], places=cast.places[:-1], replaced=0)
    lacking = cast_values(cast, [ideal(few), ideal(few)], right)
    assert lacking["inclusion_ratio"] <= (count - 1) / count + 1e-9
    assert lacking["color"] <= (count - 1) / count
    # what a replaced reference changes elsewhere
    grounds = [name for name in world.BACKGROUNDS if name != cast.background]
    leaking = cast_values(cast, [right[0], ideal(cast.swapped, background=grounds[0])], right)
    assert leaking["leak"] > 0.05
    assert full["background_similarity"] == 1
    other = cast_values(cast, pair(cast, background=grounds[0]), right)
    assert other["background_similarity"] < 0.95
    assert other["leak"] == pytest.approx(0, abs=1e-3)


def test_a_replacement_that_is_ignored_is_seen(task):
    for cast in task:
        image = ideal(cast)
        assert cast_values(cast, [image, image], [image])["color"] == 1 - 0.5 / len(cast.places)


@pytest.fixture(scope="module")
def runner() -> Runner:
    return Runner(tiny_pipeline(), size=(64, 64), steps=1, batch=5)


def test_pictures_with_equally_many_references_are_drawn_together(runner, monkeypatch):
    shown = []
    show = Runner.showing

    def showing(self, references, positions="corner", regions=()):
        shown.append(([len(one) for one in references], positions, [len(one) for one in regions]))
        return show(self, references, positions, regions)

    monkeypatch.setattr(Runner, "showing", showing)
    gray = np.full((48, 48, 3), 128, np.uint8)
    regions = REFERENCES.task("test", 0)[0][1].regions
    plain = Picture("a red circle", 1)
    two = Picture("a red circle", 1, regions, (gray, gray), "apart")
    images = suite._draw(runner, [[two, plain, two], [two, plain, two]], {}, lambda more: None)
    # four with two references: two a task, so two tasks in a batch of at most five
    assert shown == [([2, 2, 2, 2], "corner", [2, 2, 2, 2])]
    alone = runner.draw([plain.prompt], [plain.seed])[0]
    for first, second, third in images:
        assert np.abs(second.astype(int) - alone).max() <= 1
        assert np.abs(first.astype(int) - third).max() <= 1
        assert np.abs(first.astype(int) - second).max() > 1
    shown.clear()
    suite._draw(runner, [[two, plain, two]], {"regions": {}}, lambda more: None)
    assert shown == [([2, 2], "apart", [2, 2])]


def test_the_suite_compares_with_references_that_are_merely_shown(runner):
    found = measure(REFERENCES, runner, "tiny", 1)["metrics"]
    assert set(found) == {*REFERENCES.better, *COMMON, "time_ratio", "memory_ratio"}
    for end in ("", "_2", "_3", "_4"):
        assert found["background_similarity" + end]["vanilla"] == 1
        assert found["background_similarity" + end]["controlled"] < 1
    assert all(np.isfinite(entry["controlled"]) for entry in found.values())


def test_references_need_a_model_that_follows_them():
    import tiny_pipes

    runner = Runner(tiny_pipes.sd(), size=(16, 16), steps=1)
    with pytest.raises(UnsupportedModelError, match="StableDiffusionPipeline follows no reference picture"):
        measure(PAIRED["references"], runner, "tiny", 1)
