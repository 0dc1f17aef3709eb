from __future__ import annotations

import json

import numpy as np
import pytest
from attnctrl.pipelines.runner import Runner

from attnctrl.toybox import suites_model, world
from attnctrl.toybox.models.flux import tiny_pipeline
from attnctrl.toybox.scorer import read_picture
from attnctrl.toybox.suite import Options
from attnctrl.toybox.suites import SUITES
from attnctrl.toybox.suites_layout import (
    BOX,
    ISOLATION,
    LAYOUT,
    Task,
    isolation_values,
    layout_values,
    leakage,
    subject_values,
)
from attnctrl.toybox.suites_model import measure_model


@pytest.fixture(scope="module")
def runner() -> Runner:
    return Runner(tiny_pipeline(), size=(64, 64), steps=2, batch=2)


def ideal(task, places=None) -> np.ndarray:
    """What the task asks for, drawn by the world."""
    boxes = places or task.boxes
    subjects = tuple(
        world.WorldSubject(shape, color, pattern or "solid", (b[0] + b[2]) / 2, (b[1] + b[3]) / 2, 0.18)
        for (shape, color, pattern), b in zip(task.subjects, boxes, strict=True)
    )
    return world.render(world.WorldScene(subjects, task.background)).image


def sample_task(index: int) -> Task:
    return LAYOUT.task("test", index)[0]


def test_suites_are_registered():
    assert set(SUITES) == {
        "model", "scorer", "masks", "layout", "isolation", "references", "subjects", "reposition", "style", "guidance",
    }  # fmt: skip


def test_tasks_differ_in_shape_and_colour_and_stay_on_the_canvas():
    arrangements = set()
    for index in range(60):
        task = sample_task(index)
        (shape, color, _), (other_shape, other_color, _) = task.subjects
        assert shape != other_shape
        assert color != other_color
        first, second = task.phrases
        assert task.prompt == f"{first}, {second}, {task.background} background"
        for phrase, told, (x0, y0, x1, y1) in (
            (first, f"a {color} {shape} ", task.boxes[0]),
            (second, f"a {other_color} {other_shape} ", task.boxes[1]),
        ):
            assert phrase.startswith(told)
            place = phrase.removeprefix(told)
            assert place in world.PLACES
            assert ("left" in place, "right" in place) == ((x0 + x1) / 2 < 0.4, (x0 + x1) / 2 > 0.6)
            assert ("top" in place, "bottom" in place) == ((y0 + y1) / 2 < 0.4, (y0 + y1) / 2 > 0.6)
        for x0, y0, x1, y1 in task.boxes:
            assert 0 <= x0 < x1 <= 1
            assert 0 <= y0 < y1 <= 1
            assert (x1 - x0, y1 - y0) == pytest.approx((BOX, BOX))
        (ax0, ay0, ax1, ay1), (bx0, by0, bx1, by1) = task.boxes
        assert ax1 <= bx0 or bx1 <= ax0 or ay1 <= by0 or by1 <= ay0
        arrangements.add((abs(ax0 - bx0) > 0.3, abs(ay0 - by0) > 0.3))
    assert arrangements == {(True, False), (False, True), (True, True)}


@pytest.mark.parametrize("index", range(4))
def test_a_picture_that_does_as_told_scores_full(index):
    task = sample_task(index)
    image = ideal(task)
    values = layout_values(task, [image], [image])
    assert set(values) == set(LAYOUT.better)
    assert [values[n] for n in ("presence", "binding", "placement", "background_similarity")] == [1, 1, 1, 1]
    assert values["inclusion_ratio"] > 0.99
    assert 0.2 < values["fill_ratio"] < 0.8
    assert abs(values["seam"]) < 0.01


def test_swapped_places_bind_but_are_not_placed():
    task = sample_task(0)
    image = ideal(task, places=task.boxes[::-1])
    values = layout_values(task, [image], [ideal(task)])
    assert (values["binding"], values["presence"], values["placement"]) == (1, 1, 0)
    assert values["inclusion_ratio"] < 0.05


def test_a_colour_on_the_wrong_shape_is_present_but_not_bound():
    task = sample_task(0)
    (a, red, _), (b, blue, _) = task.subjects
    crossed = Task(((b, red, None), (a, blue, None)), task.boxes, task.background)
    assert subject_values(task, read_picture(ideal(crossed))) == {"presence": 1, "binding": 0, "placement": 0}


def test_tasks_of_isolation_share_their_shape_and_nearly_touch():
    for index in range(30):
        task, _ = ISOLATION.task("test", index)
        (shape, color, pattern), (other_shape, other_color, other_pattern) = task.subjects
        assert shape == other_shape
        assert color != other_color
        assert pattern != other_pattern
        (ax0, ay0, ax1, ay1), (bx0, by0, bx1, by1) = task.boxes
        gap = max(bx0 - ax1, ax0 - bx1, by0 - ay1, ay0 - by1)
        assert 0 <= gap < 0.05
        assert f" {pattern} {color} {shape} " in task.phrases[0]


def test_leakage_is_a_matrix_of_boxes_and_subjects():
    task, _ = ISOLATION.task("test", 0)
    image = ideal(task)
    np.testing.assert_allclose(leakage(read_picture(image), task), np.eye(2), atol=0.02)
    values = isolation_values(task, [image], [image])
    assert set(values) == set(ISOLATION.better)
    assert [values[name] for name in ("leak", "pattern_leak", "binding")] == pytest.approx([0, 0, 1], abs=0.02)
    # colours in each other's place: all of each box leaks; patterns swapped: seen as taken over
    swapped = ideal(task, places=task.boxes[::-1])
    np.testing.assert_allclose(leakage(read_picture(swapped), task), 1 - np.eye(2), atol=0.02)
    assert isolation_values(task, [swapped], [image])["leak"] > 0.98
    (shape, red, striped), (_, blue, dotted) = task.subjects
    crossed = Task(((shape, red, dotted), (shape, blue, striped)), task.boxes, task.background)
    assert isolation_values(task, [ideal(crossed)], [image])["pattern_leak"] == 1


def test_model_suite_gives_the_form(runner):
    found = measure_model(runner, "tiny", 2)
    assert (found["suite"], found["n"]) == ("model", 2)
    assert set(found["metrics"]) == {
        "scorer_accuracy", "single_subject", "single_shape", "single_color", "two_subjects", "three_subjects",
    }  # fmt: skip
    assert found["metrics"]["scorer_accuracy"]["vanilla"] == 1
    for entry in found["metrics"].values():
        assert (entry["controlled"], entry["delta"], entry["better"]) == (None, None, "higher")
    seen: list = []
    more = measure_model(runner, "tiny", 2, None, Options(rows=True, grid=seen.append))
    assert more["metrics"] == found["metrics"]
    assert [list(row["vanilla"]) for row in more["rows"]] == [
        [name] for name in ("single_subject", "two_subjects", "three_subjects") for _ in range(2)
    ]
    assert seen[0].size[0] > 2 * 192


def test_model_suite_draws_enough_captions_whatever_is_asked(monkeypatch):
    asked = []
    monkeypatch.setattr(Runner, "load", classmethod(lambda cls, model: model))
    monkeypatch.setattr(suites_model, "measure_model", lambda runner, model, count, *_: asked.append(count))
    SUITES["model"]("toy-flux", 4, None)
    SUITES["model"]("toy-flux", 300, None)
    assert asked == [200, 300]


def test_captions_tell_shape_and_colour():
    scenes, captions = suites_model.held_out_captions(20, 1, (64, 64))
    assert all(f"{s.subjects[0].color} {s.subjects[0].shape}" in text for s, text in zip(scenes, captions, strict=True))
    assert suites_model.held_out_captions(20, 1, (64, 64))[1] == captions


def test_a_subject_too_many_is_not_right():
    circle = world.WorldSubject("circle", "red", "solid", 0.3, 0.3, 0.2)
    scene = world.WorldScene((circle,), "white")
    more = world.WorldScene((circle, world.WorldSubject("star", "blue", "solid", 0.7, 0.7, 0.2)), "white")
    assert suites_model._Read.of(scene, world.render(scene).image).right
    assert not suites_model._Read.of(scene, world.render(more).image).right


def test_pictures_do_not_depend_on_their_batch(runner):
    prompts, seeds = ["a red circle", "a blue star", "a green heart"], [5, 6, 7]
    together = runner.draw(prompts, seeds)
    alone = runner.draw(prompts[2:], seeds[2:]) + runner.draw(prompts[1:2], seeds[1:2])
    assert together[0].shape == (64, 64, 3)
    assert np.abs(together[2].astype(int) - alone[0]).max() <= 1
    assert np.abs(together[1].astype(int) - alone[1]).max() <= 1
    assert np.abs(together[1].astype(int) - alone[0]).max() > 1


def test_runner_reads_the_settings_of_the_model_folder(monkeypatch, tmp_path):
    tiny = tiny_pipeline()
    tiny.save_pretrained(tmp_path)
    (tmp_path / "attnctrl.json").write_text(
        json.dumps({"size": [96, 64], "steps": 7, "true_cfg_scale": 2.0, "other": 1})
    )
    loaded = Runner.load(str(tmp_path))
    assert (loaded.size, loaded.steps, loaded.true_cfg_scale, loaded.max_sequence_length) == ((96, 64), 7, 2.0, 40)
    assert loaded.grid == (8, 12)
