"""The suite of repositions: boxes as told, the slope, and its ways of drawing on tiny pipelines."""

from __future__ import annotations

import numpy as np
import pytest
import tiny_pipes
from attnctrl.pipelines.runner import Runner

from attnctrl.controls import Share
from attnctrl.toybox import suites_reposition as suite
from attnctrl.toybox import world
from attnctrl.toybox.models.flux import tiny_pipeline
from attnctrl.toybox.scorer import Expected
from attnctrl.toybox.suite import Options, measure
from attnctrl.toybox.suites_sets import Told


def test_boxes_are_those_of_the_words():
    def box(words):
        return suite.place_of(Told(f"a {words}, white background", Expected("star", "red"), "white"))

    assert box("large red star left") == pytest.approx((0.03, 0.23, 0.57, 0.77))
    assert box("large red star bottom") == pytest.approx((0.23, 0.43, 0.77, 0.97))
    assert box("large red star center") == pytest.approx((0.23, 0.23, 0.77, 0.77))
    assert box("small red star right") == pytest.approx((0.6, 0.35, 0.9, 0.65))


def test_boxes_hold_what_is_drawn_there():
    """A subject in the middle of what its words allow lies in its box."""
    for word, (x, y) in {"left": (0.3, 0.5), "center": (0.5, 0.5), "bottom": (0.5, 0.7)}.items():
        subject = world.WorldSubject("square", "red", "solid", x, y, 0.25)
        assert (subject.place_word, subject.size_word) == (word, "large")
        x0, y0, x1, y1 = suite.place_of(Told(f"a large red square {word}, gray background", Expected(), "gray"))
        rows, columns = np.nonzero(world.render(world.WorldScene((subject,), "gray")).masks[0])
        assert 64 * x0 - 1 <= columns.min() <= columns.max() <= 64 * x1
        assert 64 * y0 - 1 <= rows.min() <= rows.max() <= 64 * y1


def test_the_slope_is_the_change_for_each_place():
    assert suite.distance_slope({"same_place": 0.9, "near": 0.8, "far": 0.7}) == pytest.approx(-0.1)
    assert suite.distance_slope({"same_place": 0.9, "near": 0.2, "far": 0.9}) == pytest.approx(0)


def test_pictures_of_a_task_read_its_first_one():
    task, seed = suite.REPOSITION.task("tune", 0)
    wanted = suite.pictures(task, seed)
    (share,) = suite.anchored(Runner(None), wanted * 2)
    assert isinstance(share, Share)
    assert [share.reads(n, 10) for n in range(10)] == [(), *[(0,)] * 4, (), *[(5,)] * 4]
    assert len(share.scenes) == 10
    assert len({one.regions[0].label for one in wanted}) == 1


def test_a_cut_subject_stands_at_its_new_place():
    task, seed = suite.REPOSITION.task("tune", 0)
    first, *others = suite.pictures(task, seed)
    told = task[0].expected
    x0, y0, x1, y1 = first.regions[0].box
    subject = world.WorldSubject(told.shape, told.color, "solid", (x0 + x1) / 2, (y0 + y1) / 2, 0.25)
    shown = world.render(world.WorldScene((subject,), "black" if told.color != "black" else "white"))
    for other in others:
        moved = np.asarray(suite._cut(shown.image, first, other)).astype(int)
        ground = moved[0, 0]
        rows, columns = np.nonzero(np.abs(moved - ground).sum(-1) > 60)
        x0, y0, x1, y1 = (64 * edge for edge in other.regions[0].box)
        assert x0 - 1 <= columns.min() < columns.max() <= x1 + 1
        assert y0 - 1 <= rows.min() < rows.max() <= y1 + 1
        assert max(np.ptp(columns), np.ptp(rows)) > (x1 - x0) - 4


def test_the_suite_measures_every_way(monkeypatch):
    monkeypatch.setattr("attnctrl.toybox.suite.time_ratio", lambda *_: 1.0)
    runner, seen = Runner(tiny_pipeline(), size=(32, 32), steps=1, batch=5), []
    found = measure(suite.REPOSITION, runner, "tiny", 1, None, Options(variants=True, grid=seen.append))
    assert {"slope", "shared.slope", "resample.slope", "canvas.slope"} <= set(found["metrics"])
    assert all(entry["controlled"] is not None for entry in found["metrics"].values())
    assert len(seen) == 1


def test_other_ways_are_those_that_the_model_has():
    """A canvas is one of them where keys can be turned, and elsewhere what acts in the first place."""
    found = {make: set(suite.ways(Runner(make()))) for make in (tiny_pipeline, tiny_pipes.sd, tiny_pipes.sd3)}
    assert found[tiny_pipeline] == {"shared", "resample", "canvas"}
    assert found[tiny_pipes.sd] == {"shared", "resample"}
    assert found[tiny_pipes.sd3] == {"shared", "resample", "table"}


@pytest.mark.parametrize("make", [tiny_pipeline, tiny_pipes.sd, tiny_pipes.sd3])
def test_first_pictures_are_the_plain_ones_and_others_are_not(make):
    runner = Runner(make(), size=(32, 32), steps=3, batch=4)
    task, seed = suite.REPOSITION.task("test", 0)
    wanted = suite.pictures(task, seed)
    plain = runner.draw([one.prompt for one in wanted], [one.seed for one in wanted])
    ways = [suite.moved, suite.on_canvas, *[suite.on_table] * (make is tiny_pipes.sd3)]
    for draw in ways:
        told = []
        drawn = draw(runner, wanted, told.append)
        assert len(drawn) == sum(told) == 5
        first, *others = (np.abs(a.astype(int) - b) for a, b in zip(drawn, plain, strict=True))
        # another batch size rounds otherwise: a value or two may fall on the other side of a level
        assert first.max() <= 1
        assert (first > 0).sum() <= 3
        assert all((other > 0).sum() > 20 for other in others)
    # nothing is read: what is kept are the pictures that were asked for, not the canvases' rows
    unread = suite.on_canvas(runner, wanted, strength=0.0)
    assert max(np.abs(a.astype(int) - b).max() for a, b in zip(unread, plain, strict=True)) <= 1
