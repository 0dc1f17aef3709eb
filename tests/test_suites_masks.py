"""The suite of masks: perfect masks score 1, each fault lowers its own score, and what is measured is what was read."""

from __future__ import annotations

import pytest
import torch
from attnctrl.pipelines.runner import Runner

from attnctrl import maps
from attnctrl.toybox import suites_masks as masks
from attnctrl.toybox import world
from attnctrl.toybox.models.flux import tiny_pipeline
from attnctrl.toybox.scorer import Expected
from attnctrl.toybox.suite import Options
from attnctrl.toybox.suites_layout import LAYOUT
from attnctrl.toybox.suites_sets import SUBJECTS

CIRCLE, STAR = (
    world.WorldSubject(shape, color, "solid", x, 0.5, 0.2)
    for shape, color, x in (("circle", "red", 0.25), ("star", "blue", 0.75))
)
SCENE = masks.Scene(
    "a red circle left, a blue star right",
    ("red circle", "blue star"),
    (Expected("circle", "red"), Expected("star", "blue")),
    0,
)


def truth(subject: world.WorldSubject, side: int = 16) -> torch.Tensor:
    """Tokens half covered by a subject that is rendered alone."""
    from attnctrl.region import Region, labels
    from attnctrl.toybox.scorer import read_picture

    (found,) = read_picture(world.render(world.WorldScene((subject,), "white"), 64, 64).image).subjects
    return labels(Region(mask=torch.from_numpy(found.mask).float()), (side, side))


def test_masks_where_the_subjects_are_score_1_and_others_what_they_share():
    image = world.render(world.WorldScene((CIRCLE, STAR), "white"), 64, 64).image
    exact = torch.stack([truth(CIRCLE), truth(STAR)])
    everywhere = torch.ones_like(exact)
    before, after = masks._scored(SCENE, image, (everywhere, exact))
    assert after == {"iou": 1.0, "precision": 1.0, "recall": 1.0}
    share = float(exact.float().mean())
    assert before == pytest.approx({"iou": share, "precision": share, "recall": 1.0})
    # exchanged, they cover nothing of their own
    swapped, _ = masks._scored(SCENE, image, (exact.flip(0), exact))
    assert swapped == {"iou": 0.0, "precision": 0.0, "recall": 0.0}
    empty, _ = masks._scored(SCENE, image, (torch.zeros_like(exact), exact))
    assert empty == {"iou": 0.0, "precision": 0.0, "recall": 0.0}


def test_subjects_that_are_not_there_do_not_count():
    image = world.render(world.WorldScene((CIRCLE,), "white"), 64, 64).image
    exact = torch.stack([truth(CIRCLE), torch.zeros(16, 16, dtype=torch.bool)])
    assert masks._scored(SCENE, image, (exact, exact))[1]["iou"] == 1.0
    nothing = world.render(world.WorldScene((), "white"), 64, 64).image
    assert masks._scored(SCENE, nothing, (exact, exact)) is None


def test_what_is_compared_is_otsus_threshold_and_attended_on_the_same_maps():
    runner, seen, done = Runner(tiny_pipeline(), size=(64, 64), steps=2, batch=8), [], []
    (one, seed), (two, other) = SUBJECTS.task("tune", 0), LAYOUT.task("tune", 0)
    prompts = [one[0].prompt, two.prompt]
    with maps.record(
        runner.pipe,
        {
            **{n: [f"{one.color} {one.shape}"] for n, one in zip("ab", two.expected, strict=True)},
            "cells": maps.Cells(8, 8),
        },
        prompt=[two.prompt],
        window=(0.3, 1.0),
        max_sequence_length=40,
    ) as found:
        runner.draw([two.prompt], [other])
    scene = masks._scene(2, Options(split="tune"), 0)
    assert (scene.prompt, scene.seed) == (two.prompt, other)
    _, [(plain, ours)] = masks._drawn(runner, [scene], done.append)
    heats = found.stacked("a", "b")[:, 0]
    assert torch.equal(plain, maps.otsu(heats).masks)
    assert torch.equal(ours, maps.attended(heats, found["cells"][0]).masks)
    assert not torch.equal(ours, plain)
    assert done == [1]
    assert masks._scene(1, Options(split="tune"), 0).seed == 10 * seed
    result = masks.measure_masks(runner, "tiny", 2, None, Options(split="tune", rows=True, grid=seen.append))
    assert (result["suite"], result["n"], result["split"]) == ("masks", 2, "tune")
    assert {row["prompts"][0] for row in result["rows"]} <= {*prompts, *(_prompts(1))}
    # noise shows no subjects, so nothing is measured of it
    assert bool(result["metrics"]) == bool(result["rows"])
    assert seen[0].size[0] > 2 * 192


def _prompts(index: int) -> list[str]:
    return [masks._scene(number, Options(split="tune"), index).prompt for number in masks.NAMES]
