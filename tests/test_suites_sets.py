"""Suites of sets of pictures: renders that do as told score full, and each thing that goes wrong lowers its own metric."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
from attnctrl.pipelines.runner import Runner

from attnctrl.toybox import suites_guidance as guidance
from attnctrl.toybox import suites_sets as sets
from attnctrl.toybox import world
from attnctrl.toybox.models.flux import tiny_pipeline
from attnctrl.toybox.suite import Options, measure
from attnctrl.toybox.suites import PAIRED
from attnctrl.toybox.suites_reposition import REPOSITION

CENTRES = {"left": 0.3, "right": 0.7, "top": 0.3, "bottom": 0.7}


def drawn(told: sets.Told, style: world.WorldStyle = world.WorldStyle(), **changes) -> np.ndarray:
    """What one picture's words ask for; `changes` of the subject."""
    words = told.prompt.split(", ")[0].split()
    x, y = (next((CENTRES[w] for w in words if w in pair), 0.5) for pair in (("left", "right"), ("top", "bottom")))
    radius = 0.13 if "small" in words else 0.2
    want = told.expected
    subject = world.WorldSubject(want.shape, want.color, want.pattern or "striped", x, y, radius)
    return world.render(world.WorldScene((replace(subject, **changes),), told.background, style)).image


def test_a_cast_that_stays_is_consistent():
    task, _ = sets.SUBJECTS.task("test", 0)
    assert len({told.background for told in task}) == len({told.prompt for told in task}) == sets.SET
    same = [drawn(told) for told in task]
    assert sets.subjects_values(task, same, same)["identity_similarity"] > 0.95
    assert sets.fidelity(task, same) == 1
    # the untold pattern drifts
    patterns = ("solid", "striped", "dotted", "checked")
    drift = [drawn(told, pattern=pattern) for told, pattern in zip(task, patterns, strict=True)]
    assert sets.subjects_values(task, drift, drift)["identity_similarity"] < 0.85
    assert sets.fidelity(task, drift) == 1
    # one that is missing is consistent with nothing: three of six pairs remain
    empty = [*same[:3], np.full_like(same[0], 128)]
    assert sets.subjects_values(task, empty, empty)["identity_similarity"] == pytest.approx(0.5, abs=0.03)
    assert sets.fidelity(task, empty) < 0.9


def test_the_margin_is_over_other_casts():
    tasks = [sets.SUBJECTS.task("test", index)[0] for index in range(3)]
    images = [[drawn(told) for told in task] for task in tasks]
    whole = sets.SUBJECTS.whole["identity_margin"]
    casts = whole.reads(tasks, images)
    margin = whole.of(casts)
    within = np.mean([sets.subjects_values(t, i, i)["identity_similarity"] for t, i in zip(tasks, images, strict=True)])
    assert 0.2 < margin < within
    # the same cast in every task has no margin
    assert abs(whole.of(whole.reads([tasks[0]] * 3, [images[0]] * 3))) < 0.1
    # a cast that is drawn twice is never its own neighbour
    assert whole.of([casts[0], casts[0], casts[1]]) > 0.2
    assert whole.of([casts[0]] * 2) == pytest.approx(
        sets.subjects_values(tasks[0], images[0], ())["identity_similarity"]
    )


def test_the_margin_is_the_mean_over_pairs_one_by_one():
    rng = np.random.default_rng(0)
    casts = [[rng.normal(size=5) for _ in range(4)] for _ in range(4)]
    casts[1][2] = casts[3][0] = None
    casts[2] = [None] * 4

    def cosine(a, b):
        return 0.0 if a is None or b is None else float(a @ b / np.linalg.norm(a) / np.linalg.norm(b))

    within = [cosine(one[i], one[j]) for one in casts for i in range(4) for j in range(i)]
    between = [
        cosine(a, b) for one, other in zip(casts, [*casts[1:], casts[0]], strict=True) for a in one for b in other
    ]
    assert sets.identity_margin(casts) == pytest.approx(np.mean(within) - np.mean(between), abs=1e-12)


def test_one_style_is_consistent_and_four_are_not():
    task, _ = sets.STYLE.task("test", 1)
    assert len({told.expected.shape for told in task}) == len({told.expected.color for told in task}) == sets.SET
    hatched = [drawn(told, world.WorldStyle("hatched", hatch_angle=45)) for told in task]
    one = sets.style_values(task, hatched, hatched)
    assert one["set_consistency"] > 0.9
    assert one["same_style"] == 1
    mixed = [drawn(told, world.WorldStyle(name)) for told, name in zip(task, world.STYLES, strict=True)]
    several = sets.style_values(task, mixed, mixed)
    assert several["set_consistency"] < one["set_consistency"] - 0.3
    assert several["same_style"] == 0


def test_what_is_copied_from_the_first_picture_is_seen():
    task, _ = sets.STYLE.task("test", 1)
    own = [drawn(told) for told in task]
    assert sets.style_values(task, own, own)["copied"] == 0
    first = task[0].expected
    painted = [own[0], *(drawn(told, color=first.color) for told in task[1:])]
    assert sets.style_values(task, painted, own)["copied"] == pytest.approx(0.5)
    twice = [own[0], own[0], *own[2:]]
    assert sets.style_values(task, twice, own)["copied"] == pytest.approx(1 / 3)
    assert sets.fidelity(task, twice) < sets.fidelity(task, own)


def test_reposition_tells_distances_and_scale_apart():
    for index in range(8):
        task, _ = REPOSITION.task("test", index)
        first, same, near, far, small = (told.prompt for told in task)
        assert first == same
        assert len({first, near, far, small}) == 4
        assert small == far.replace("a large ", "a small ")
        assert " center" in near
    images = [drawn(told) for told in task]
    values = sets.reposition_values(task, images, images)
    assert {*values, "slope"} == set(REPOSITION.better)
    assert min(values.values()) > 0.8
    images[3] = drawn(task[3], color="red" if task[3].expected.color != "red" else "blue")
    worse = sets.reposition_values(task, images, images)
    assert worse["far"] < 0.8 * values["far"]
    assert [worse[n] for n in ("same_place", "near", "far_and_small")] == [
        values[n] for n in ("same_place", "near", "far_and_small")
    ]


def test_guidance_is_measured_against_renders():
    tasks = [guidance.GUIDANCE.task("test", index)[0] for index in range(12)]
    assert {len(task.expected) for task in tasks} == {1, 2}
    renders = [[world.render(task.scene).image] * guidance.PER_TASK for task in tasks]
    values = [guidance.values(task, images, images) for task, images in zip(tasks, renders, strict=True)]
    assert np.mean([one["binding"] for one in values]) == 1
    assert max(one["saturation"] for one in values) == 0
    assert min(one["style"] for one in values) == 1
    rimmed = world.WorldScene(tasks[0].scene.subjects, tasks[0].scene.background, world.WorldStyle("outlined", "black"))
    assert guidance.values(tasks[0], [world.render(rimmed).image, renders[0][0]], renders[0])["style"] == 0.5
    # each render twice has its mean and, but for N - 1, its covariance
    frechet = guidance.GUIDANCE.whole["frechet"]
    assert frechet.of(frechet.reads(tasks, renders)) < 1e-3
    # pale pictures are not as colourful, and further away
    pale = [[(0.4 * image + 0.6 * 128).astype(np.uint8) for image in images] for images in renders]
    assert guidance.values(tasks[0], pale[0], renders[0])["saturation"] > 0.01
    assert frechet.of(frechet.reads(tasks, pale)) > 0.1
    # a subject too many is not bound
    doubled = [world.render(tasks[0].scene).image.copy() for _ in range(2)]
    for image in doubled:
        image[:20, :20] = world.COLORS["red"] if tasks[0].expected[0].color != "red" else world.COLORS["blue"]
    assert guidance.values(tasks[0], doubled, doubled)["binding"] < 1


def test_guidance_is_compared_with_none_and_with_the_models_own(monkeypatch):
    seen = []

    def draw(self, prompts, seeds, around=None, progress=None, showing=None):
        seen.append((self.guidance_scale, self.true_cfg_scale, around is not None))
        return [np.full((64, 64, 3), 200, np.uint8) for _ in prompts]

    monkeypatch.setattr(Runner, "draw", draw)
    for cost in ("time_ratio", "_memory"):
        monkeypatch.setattr(f"attnctrl.toybox.suite.{cost}", lambda *_: 1.0)
    monkeypatch.setattr("attnctrl.pipelines.models.read_defaults", lambda folder: {"true_cfg_scale": 5.0, "steps": 3})
    runner = Runner(tiny_pipeline(), steps=1, guidance_scale=7.0, true_cfg_scale=7.0)
    suite = replace(PAIRED["guidance"], whole={})  # the bootstrap of distances takes a minute
    found = measure(suite, runner, "tiny", 2, None, Options(variants=True))
    ways = list(dict.fromkeys(seen))
    assert ways == [(1.0, 1.0, False), (1.0, 1.0, True), (1.0, 5.0, False), (1.0, 5.0, True)]
    assert {"binding", "early.style", "scale_0_5.binding", "cfg.binding", "cfg_and_perturbed.binding"} <= set(
        found["metrics"]
    )
    (one,) = guidance.perturbed(scale=4.0)(runner, [])
    (early,) = guidance.perturbed(window=guidance.EARLY)(runner, [])
    (own,) = guidance.perturbed()(runner, [])
    assert (one.scale, one.kind, own.guide.scale) == (4.0, own.kind, own.scale)
    assert (early.scale, early.window, own.window) == (own.scale, (0.0, 0.3), (0.0, 1.0))


def test_subjects_are_steered_where_a_plain_run_finds_them():
    """The preset's control on masks of attention to the told words, for each cast by itself."""
    from attnctrl import maps

    runner = Runner(tiny_pipeline(), size=(64, 64), steps=2, batch=8)
    pictures = [one for n in range(2) for one in sets.SUBJECTS.pictures(*sets.SUBJECTS.task("tune", n))]
    share = sets.SUBJECTS.controls(runner, pictures)[0]
    assert (share.name, share.group, share.layers) == ("share", 4, "shared")
    words = [one.worded[0].prompt for one in pictures]
    assert all(word in one.prompt for word, one in zip(words, pictures, strict=True))
    prompts = [one.prompt for one in pictures]
    keys = {"it": words, "cells": maps.Cells(8, 8)}
    with maps.record(runner.pipe, keys, prompt=prompts, window=(0.3, 1.0), max_sequence_length=40) as found:
        runner.draw(prompts, [one.seed for one in pictures])
    for scene, heat, cells, word in zip(share.scenes, found["it"], found["cells"], words, strict=True):
        assert [(region.label, region.mask.bool().tolist()) for region in scene] == [
            (word, maps.attended(heat[None], cells).masks[0].tolist())
        ]


@pytest.mark.parametrize("name", ["subjects", "style", "guidance"])
def test_each_suite_runs_on_a_pipeline(name):
    runner = Runner(tiny_pipeline(), size=(64, 64), steps=1, batch=5)
    found = measure(PAIRED[name], runner, "tiny", 2, None, Options(rows=True))
    assert set(found["metrics"]) >= set(PAIRED[name].better)
    assert all((entry["controlled"] is None) != bool(PAIRED[name].controls) for entry in found["metrics"].values())
    assert len(found["rows"]) == 2
    assert all(np.isfinite(entry["vanilla"]) for entry in found["metrics"].values())
