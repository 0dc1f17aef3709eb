"""One cast in several pictures on tiny pipelines: rehearsal, regions, the controlled run, and going on with it."""

from __future__ import annotations

import json

import numpy as np
import pytest
import tiny_pipes
import torch
from attnctrl.pipelines import Character, MultiSubjectPipeline, ScenePipeline, Shot
from attnctrl.pipelines.cast import resolve, told_by
from attnctrl.pipelines.masks import CELLS, MaskWarning

import attnctrl as ac
from attnctrl import maps
from attnctrl.errors import ControlError, SceneError, UnsupportedModelError
from attnctrl.presets_sets import chosen_options
from attnctrl.scene import Scene
from attnctrl.toybox.models.flux import tiny_pipeline

BALL, BOX = Character("ball", "a red circle"), Character("box", "a blue square")
CAST = [BALL, BOX]
LEFT, RIGHT = (0, 0, 0.5, 1), (0.5, 0, 1, 1)
SHOTS = [
    Shot("{ball} left, white background", boxes={"ball": LEFT}),
    Shot("{ball} right, {box} left", boxes={"ball": RIGHT, "box": LEFT}, seed=7),
    Shot("{box} right, gray background", boxes={"box": RIGHT}),
]
PIPES = {"unet": tiny_pipes.sd, "sd3": tiny_pipes.sd3, "flux": tiny_pipeline}
SIZES = {"width": 32, "height": 32, "num_inference_steps": 2}


def wrapped(kind="unet"):
    return MultiSubjectPipeline.from_pipe(PIPES[kind](), "tiny")


def pixels(picture):
    return np.asarray(picture.image).astype(int)


@pytest.mark.parametrize("kind", PIPES)
def test_a_story_is_a_rehearsal_and_a_run_with_the_presets_controls(kind):
    pipe = wrapped(kind)
    told = []
    story = pipe(CAST, SHOTS, seed=5, progress=lambda done, total: told.append((done, total)), **SIZES)
    assert told == [(1, 4), (2, 4), (3, 4), (4, 4)]
    rehearsal = story.rehearsal
    assert [shot.prompt for shot in rehearsal.shots][1] == "a red circle right, a blue square left"
    assert [shot.seed for shot in rehearsal.shots] == [5, 7, 7]
    names = [[(region.name, region.box) for region in own] for own in rehearsal.regions]
    assert names == [[("ball", LEFT)], [("ball", RIGHT), ("box", LEFT)], [("box", RIGHT)]]
    # the rehearsal is the plain pipeline
    for shot, picture in zip(rehearsal.shots, rehearsal.pictures, strict=True):
        plain = Scene.from_dict(
            {"version": 1, "prompt": shot.prompt, "width": 32, "height": 32, "steps": 2, "seed": shot.seed}
        )
        alone = ScenePipeline(pipe.pipe, pipe.identity, pipe.defaults)(plain)[0]
        assert np.abs(pixels(alone) - pixels(picture)).max() <= 1
        assert not picture.controlled
    # the run is the preset on these regions
    options = chosen_options("subjects", pipe.pipe, leading=False)
    stack = ac.preset("subjects", [list(own) for own in rehearsal.regions], **options)
    more = {"unet": ["harmonize"], "flux": ["reposition"]}.get(kind, [])
    assert [one.name for one in stack] == ["isolate", "share", *more]
    assert story.options == options
    again = pipe.draw(rehearsal.scenes, [[5], [7], [7]], stack, True, None)
    for one, two, plain in zip(story.pictures, again, rehearsal.pictures, strict=True):
        assert (pixels(one) == pixels(two)).all()
        assert (pixels(one) != pixels(plain)).any()
    assert story.pictures[1].record["story"]["shot"] == 1
    assert story.pictures[1].record["story"]["cast"][0] == {"name": "ball", "description": "a red circle"}
    assert story.sheet(64).size[0] > rehearsal.sheet(64).size[0]


@pytest.mark.parametrize("kind", PIPES)
def test_new_shots_leave_the_story_as_it_was_and_read_it(kind):
    pipe = wrapped(kind)
    story = pipe(CAST, SHOTS, **SIZES)
    assert story.anchors == 3
    drawn = []
    draw = pipe.draw
    pipe.draw = lambda *given: drawn.append(draw(*given)) or drawn[-1]
    new = [Shot("{ball} left, {box} right", boxes={"ball": LEFT, "box": RIGHT}, seed=11), Shot("white background")]
    more = pipe.more(story, new)
    rehearsed, batch = drawn
    assert [len(rehearsed), len(batch), len(more.pictures)] == [2, 5, 2]
    for one, two in zip(story.pictures, batch, strict=False):
        assert np.abs(pixels(one) - pixels(two)).max() <= 1
    # a new picture does not depend on the others that are new, but on the story
    alone = pipe.more(story, new[:1]).pictures[0]
    assert np.abs(pixels(alone) - pixels(more.pictures[0])).max() <= 1
    assert (pixels(alone) != pixels(more.rehearsal.pictures[0])).any()
    # and a story goes on more than once
    third = pipe.more(more, new[:1]).pictures[0]
    assert (pixels(third) == pixels(alone)).all()


def test_a_first_shot_with_everybody_is_the_one_that_others_read():
    """Pictures of a cast that comes in later read each other."""
    everybody = [SHOTS[1], SHOTS[0], SHOTS[2]]
    found = {kind: wrapped(kind)(CAST, everybody, **SIZES) for kind in PIPES}
    assert {kind: story.anchors for kind, story in found.items()} == {"unet": 1, "sd3": 1, "flux": 1}
    assert found["flux"].options == {"anchors": 1, "reposition": "rope", "weight": 1.5}
    assert found["sd3"].options == {"anchors": 1, "layers": "edit", "weight": 1.0}
    assert wrapped("flux")(CAST, everybody, options={"anchors": None}, **SIZES).anchors == 3


def test_layers_of_the_preset_are_those_of_all_that_reads():
    scenes = [[ac.Region(name="ball", box=(0, 0, 0.5, 1))]] * 2
    stack = ac.preset("subjects", scenes, layers="edit", reposition="rope", harmony=0.5)
    assert [(one.name, one.layers) for one in stack] == [
        ("share", "edit"), ("reposition", "edit"), ("harmonize", "edit"),
    ]  # fmt: skip


def test_who_has_no_box_is_where_attention_to_the_words_is():
    pipe = wrapped()
    shots = [Shot("{ball} left, {box} right"), Shot("{ball} right", seed=3)]
    prompts = ["a red circle left, a blue square right", "a red circle right"]
    rehearsal = pipe.rehearse(CAST, shots, **SIZES)
    # articles are no words of a character
    read = {"ball": ["red circle", "red circle"], "box": ["blue square", None], "cells": CELLS}
    scenes = [Scene.from_dict({"version": 1, "prompt": p, "width": 32, "height": 32, "steps": 2}) for p in prompts]
    with maps.record(pipe.pipe, read, prompt=prompts, window=(0.3, 1.0)) as found:
        pipe.draw(scenes, [[0], [3]], [], False, None)
    assert float(found["box"][1].abs().max()) == 0
    wanted = maps.attended(torch.stack([found["ball"][0], found["box"][0]]), found["cells"][0]).masks
    for region, mask in zip(rehearsal.regions[0], wanted, strict=True):
        assert torch.equal(region.mask >= 0.5, mask)
        assert 0 < float(region.mask.mean()) < 1
    alone = maps.attended(found["ball"][1:], found["cells"][1]).masks
    assert torch.equal(rehearsal.regions[1][0].mask >= 0.5, alone[0])
    assert not torch.equal(alone, maps.attended(found["ball"][1:]).masks)
    with pytest.raises(ac.LayoutError, match="3 phrases for 2 prompts"):
        maps.record(pipe.pipe, {"ball": ["a red circle", None, None]}, prompt=prompts)


def test_words_of_a_character_have_no_leading_article():
    descriptions = ["a red circle", " The old man", "an apple", "antlers", "Anna, a girl", "a"]
    cast = [Character(str(number), told) for number, told in enumerate(descriptions)]
    words = told_by(cast, [Shot("", who=tuple("012345"))])
    assert [told for (told,) in words.values()] == ["red circle", "old man", "apple", "antlers", "Anna, a girl", "a"]


def test_a_segmenter_may_find_them_and_says_when_it_cannot():
    pipe = wrapped()
    half = np.zeros((32, 32), dtype=bool)
    half[:, :16] = True

    def segment(image, character):
        assert image.size == (32, 32)
        return half if character is BALL else None

    shots = [Shot("{ball} left, {box} right"), Shot("{ball} right")]
    with pytest.warns(MaskWarning, match="shot 0: 'box' was found nowhere, so it shares nothing there"):
        rehearsal = pipe.rehearse(CAST, shots, segment=segment, **SIZES)
    assert [[region.name for region in own] for own in rehearsal.regions] == [["ball"], ["ball"]]
    assert float(rehearsal.regions[0][0].mask.mean()) == 0.5
    with pytest.warns(MaskWarning, match="'ball' was found everywhere; it has the whole picture"):
        found = pipe.rehearse([BALL], shots[1:], segment=lambda image, who: np.ones((4, 4)), **SIZES)
    assert (found.regions[0][0].mask, found.regions[0][0].box) == (None, None)


def test_one_shot_or_nobody_found_is_the_plain_picture():
    pipe = wrapped()
    story = pipe([BALL], SHOTS[:1], **SIZES)
    assert (story.anchors, story.pictures[0].controlled) == (0, False)
    assert (pixels(story.pictures[0]) == pixels(story.rehearsal.pictures[0])).all()
    with pytest.raises(ControlError, match="pictures read nobody"):
        pipe.more(story, SHOTS[:1])


@pytest.mark.parametrize("name", ["consistory", "storydiffusion", "storysync", "scene", "ir-diffusion"])
def test_every_preset_draws_a_story_and_goes_on(name):
    pipe = wrapped()
    told = {**SIZES, "num_inference_steps": 8}
    story = pipe(CAST, SHOTS, preset=name, options={"anchors": 1}, **told)
    assert story.anchors == 1
    assert (pixels(story.pictures[1]) != pixels(story.rehearsal.pictures[1])).any()
    if name != "ir-diffusion":  # its isolation acts in the first picture as well
        assert np.abs(pixels(story.pictures[0]) - pixels(story.rehearsal.pictures[0])).max() <= 1
    more = pipe.more(story, [Shot("{ball} right", boxes={"ball": RIGHT}, seed=4)])
    assert (pixels(more.pictures[0]) != pixels(more.rehearsal.pictures[0])).any()


def test_subjects_read_their_own_descriptions_in_ir_diffusion():
    """Masked mutual cross attention: nine parts of the description, one of the prompt, none of it on joint models."""
    pipe = wrapped()
    rehearsal = pipe.rehearse(CAST, SHOTS, **SIZES)
    assert [region.prompt for region in rehearsal.regions[1]] == [one.description for one in CAST]
    story = pipe.perform(rehearsal, preset="ir-diffusion", options={"anchors": 1})
    assert story.options["portraits"] == 0.9
    acting = story.pictures[0].record["report"]
    assert any(line["name"] == "regions" and line["forwards"] > 0 for line in acting["controls"]), acting
    alone = pipe.perform(rehearsal, preset="ir-diffusion", options={"anchors": 1, "portraits": 0.0})
    assert (pixels(alone.pictures[1]) != pixels(story.pictures[1])).any()
    texts = ac.preset("ir-diffusion", [list(own) for own in rehearsal.regions], portraits=0.9)[0]
    assert (texts.name, texts.base_ratio, texts.branch) == ("regions", pytest.approx(0.1), "cond")
    assert [one.name for one in ac.preset("ir-diffusion", [list(own) for own in rehearsal.regions])] == [
        "isolate",
        "share",
        "reposition",
    ]


@pytest.mark.parametrize(
    ("cast", "shots", "message"),
    [
        ([], [Shot("a")], "found 0 characters, 1 shots"),
        (CAST, [Shot("{ball}")], "no shot shows 'box'; write {box}"),
        ([BALL, Character("ball", "x")], [Shot("{ball}")], "found 'ball'; rename it"),
        ([Character("ball", " ")], [Shot("{ball}")], "'ball' has no description"),
        ([BALL], [Shot("{bell} left")], "shot 0: 'bell' is not in the cast, which is ball"),
        ([BALL], [Shot("{ball}", who=["fox"])], "shot 0: 'fox' is not in the cast"),
        ([BALL], [Shot("a circle", who=["ball"])], "does not hold the words 'a red circle' of 'ball'; write {ball}"),
        (CAST, [Shot("{ball} {box}", who=["ball"], boxes={"box": LEFT}), Shot("{box}")], "a box for 'box', who is not"),
        ([BALL], [Shot("{ball}", seed=-1)], "shot 0: seed must be in"),
    ],
)
def test_what_does_not_fit_together_is_refused(cast, shots, message):
    with pytest.raises(SceneError, match=message):
        resolve(cast, shots)


def test_words_are_sought_where_nobody_gave_a_box():
    shots = resolve(CAST, [*SHOTS, Shot("A red circle and a blue square", who=["ball"])])
    assert [shot.who for shot in shots] == [("ball",), ("ball", "box"), ("box",), ("ball",)]
    assert told_by(CAST, shots) == {"ball": [None, None, None, "red circle"]}


def test_other_pipelines_and_presets_are_refused():
    with pytest.raises(UnsupportedModelError, match="MultiSubjectPipeline runs on"):
        MultiSubjectPipeline.from_pipe(object())
    with pytest.raises(ControlError, match="no preset named 'nobody'"):
        wrapped().perform(wrapped().rehearse(CAST, SHOTS, **SIZES), preset="nobody")


@pytest.mark.parametrize("kind", PIPES)
def test_a_record_makes_its_picture_again(kind):
    """Characters are found by attention once more; new shots of a story as well."""
    pipe = wrapped(kind)
    story = pipe(CAST, [Shot("{ball} left"), Shot("{ball} right, {box} left")], seed=5, window=(0.5, 1.0), **SIZES)
    later = pipe.more(story, [Shot("{ball} and {box}")], seed=8)
    for drawn in (story.pictures[1], later.pictures[0]):
        written = json.dumps(drawn.record)
        found = pipe.again(json.loads(written))
        assert (pixels(found) == pixels(drawn)).all()
        assert json.dumps(found.record) == written


def test_records_of_others_and_of_segmenters_are_refused():
    pipe = wrapped()
    with pytest.raises(ControlError, match="not that of a picture of a story"):
        pipe.again({"scene": {}})
    whole = np.ones((32, 32), bool)
    story = pipe(CAST, [Shot("{ball} and {box}"), Shot("{ball}")], segment=lambda _image, _one: whole, **SIZES)
    with pytest.raises(ControlError, match="A segmenter found the characters"):
        pipe.again(story.pictures[0].record)
