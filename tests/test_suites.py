from __future__ import annotations

import json

import numpy as np
import pytest

from attnctrl.toybox import suites_model, world
from attnctrl.toybox.models.flux import tiny_pipeline
from attnctrl.toybox.scorer import read_picture
from attnctrl.toybox.suites import SUITES
from attnctrl.toybox.suites_layout import (
    BETTER,
    BOX,
    CONTROL,
    VARIANTS,
    build_controls,
    measure_layout,
    sample_task,
    subject_values,
    task_values,
)
from attnctrl.toybox.suites_model import measure_model
from attnctrl.toybox.suites_run import Runner


@pytest.fixture(scope="module")
def runner() -> Runner:
    return Runner(tiny_pipeline(), size=(64, 64), steps=2, batch=2)


def ideal(task, places=None) -> np.ndarray:
    """What the task asks for, drawn by the world."""
    boxes = places or task.boxes
    subjects = tuple(
        world.WorldSubject(shape, color, "solid", (b[0] + b[2]) / 2, (b[1] + b[3]) / 2, 0.18)
        for (shape, color), b in zip(task.subjects, boxes, strict=True)
    )
    return world.render(world.WorldScene(subjects, task.background)).image


def test_suites_are_registered():
    assert set(SUITES) == {"layout", "model", "scorer"}


def test_tasks_differ_in_shape_and_colour_and_stay_on_the_canvas():
    assert sample_task(3) == sample_task(3)
    arrangements = set()
    for index in range(60):
        task = sample_task(index)
        (shape, color), (other_shape, other_color) = task.subjects
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
    values = task_values(task, image, image, (8, 8))
    assert set(values) == set(BETTER)
    assert [values[n] for n in ("presence", "binding", "placement", "background_similarity")] == [1, 1, 1, 1]
    assert values["inclusion_ratio"] > 0.99
    assert 0.2 < values["fill_ratio"] < 0.8
    assert abs(values["seam"]) < 0.01


def test_swapped_places_bind_but_are_not_placed():
    task = sample_task(0)
    image = ideal(task, places=task.boxes[::-1])
    values = task_values(task, image, ideal(task), (8, 8))
    assert (values["binding"], values["presence"], values["placement"]) == (1, 1, 0)
    assert values["inclusion_ratio"] < 0.05


def test_a_colour_on_the_wrong_shape_is_present_but_not_bound():
    task = sample_task(0)
    (a, red), (b, blue) = task.subjects
    crossed = type(task)(((b, red), (a, blue)), task.boxes, task.background, task.seed)
    assert subject_values(task, read_picture(ideal(crossed))) == {"presence": 1, "binding": 0, "placement": 0}


def test_controls_of_a_batch_have_the_regions_of_each_sample():
    tasks = [sample_task(0), sample_task(1)]
    isolate, regions = build_controls(CONTROL, tasks)
    assert (isolate.name, isolate.window, isolate.background) == ("isolate", (0.0, 0.5), "shared")
    assert isolate.regions == ()
    assert [[r.prompt for r in scene] for scene in regions.regions] == [
        [f"{phrase}, {task.background} background" for phrase in task.phrases] for task in tasks
    ]
    assert [[r.box for r in scene] for scene in regions.regions] == [list(task.boxes) for task in tasks]


def test_layout_suite_gives_the_form_and_counts_pictures(runner):
    steps = []
    found = measure_layout(runner, "tiny", 3, lambda done, total: steps.append((done, total)))
    assert list(found) == ["suite", "model", "n", "seconds", "metrics"]
    assert (found["suite"], found["model"], found["n"]) == ("layout", "tiny", 3)
    assert set(found["metrics"]) == set(BETTER)
    for name, entry in found["metrics"].items():
        assert list(entry) == ["vanilla", "controlled", "delta", "ci95", "better"]
        assert entry["delta"] == pytest.approx(entry["controlled"] - entry["vanilla"])
        assert entry["ci95"][0] <= entry["delta"] + 1e-9
        assert entry["delta"] - 1e-9 <= entry["ci95"][1]
        assert entry["better"] == BETTER[name]
    # Control changes the pictures, and the plain ones are compared with themselves.
    assert found["metrics"]["background_similarity"]["vanilla"] == 1
    assert found["metrics"]["background_similarity"]["controlled"] < 1
    assert steps == [(2, 6), (3, 6), (5, 6), (6, 6)]
    assert json.loads(json.dumps(found)) == found


def test_variants_come_beside(runner):
    found = measure_layout(runner, "tiny", 1, variants=True)["metrics"]
    assert set(found) == {prefix + name for name in BETTER for prefix in ("", *(f"{v}." for v in VARIANTS))}
    assert found["regions_only.background_similarity"] != found["parted_always.background_similarity"]


def test_model_suite_gives_the_form(runner):
    found = measure_model(runner, "tiny", 2)
    assert (found["suite"], found["n"]) == ("model", 2)
    assert set(found["metrics"]) == {
        "scorer_accuracy", "single_subject", "single_shape", "single_color", "two_subjects", "three_subjects",
    }  # fmt: skip
    assert found["metrics"]["scorer_accuracy"]["vanilla"] == 1
    for entry in found["metrics"].values():
        assert (entry["controlled"], entry["delta"], entry["better"]) == (None, None, "higher")


def test_model_suite_draws_enough_captions_whatever_is_asked(monkeypatch):
    asked = []
    monkeypatch.setattr(Runner, "load", classmethod(lambda cls, model: model))
    monkeypatch.setattr(suites_model, "measure_model", lambda runner, model, count, progress: asked.append(count))
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
