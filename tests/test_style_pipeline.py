"""Sets in one style on tiny pipelines: the anchor is plain, batches do not matter, records make pictures again."""

from __future__ import annotations

import numpy as np
import pytest
import tiny_pipes
from attnctrl.pipelines import StylePipeline

import attnctrl as ac
from attnctrl import provenance
from attnctrl.errors import AttnCtrlError, ControlError, SceneError, SelectionError
from attnctrl.presets import STYLES, style
from attnctrl.toybox.models.flux import tiny_pipeline

PIPES = {"flux": tiny_pipeline, "sd3": tiny_pipes.sd3, "sd": tiny_pipes.sd}
PROMPTS = ["a red circle", "a blue square", "a star", "two cats"]
FAST = {"width": 64, "height": 64, "num_inference_steps": 2}


def pixels(pictures):
    return [np.asarray(one.image).astype(int) for one in pictures]


@pytest.fixture(scope="module")
def pipe():
    return StylePipeline.from_pipe(tiny_pipeline())


@pytest.mark.parametrize("make", PIPES.values(), ids=PIPES)
def test_the_anchor_is_plain_and_the_others_are_not(make):
    pipe = StylePipeline.from_pipe(make())
    drawn = pipe(PROMPTS[:3], "gray background", preset="style-aligned", seeds=5, **FAST)
    plain = pipe(PROMPTS[:3], "gray background", seeds=5, controls=[], **FAST)
    distances = [np.abs(a - b).max() for a, b in zip(pixels(drawn), pixels(plain), strict=True)]
    assert distances[0] <= 1
    assert min(distances[1:]) > 1
    assert [one.seed for one in drawn] == [5, 6, 7]
    assert [one.record["scene"]["prompt"] for one in drawn] == [f"{text}, gray background" for text in PROMPTS[:3]]
    assert drawn[0].record["scene"]["controls"][0]["name"] == "share_style"
    assert (drawn[0].controlled, plain[0].controlled) == (True, False)
    assert "AdaIN" in drawn[0].report


def test_batches_of_two_are_the_whole_set(pipe):
    """Each batch draws the anchor again; rounding is all that differs."""
    ticks = []
    whole = pipe(PROMPTS, "{} drawn in ink", seeds=[4, 9, 2, 7], **FAST)
    parts = pipe(PROMPTS, "{} drawn in ink", seeds=[4, 9, 2, 7], batch=2, progress=lambda *x: ticks.append(x), **FAST)
    assert ticks == [(n, 6) for n in range(1, 7)]
    for one, two in zip(whole, parts, strict=True):
        assert np.abs(np.asarray(one.image).astype(int) - np.asarray(two.image).astype(int)).max() <= 1
        assert (one.seed, one.record["scene"], one.record["set"]) == (two.seed, two.record["scene"], two.record["set"])
    assert whole[1].record["scene"]["prompt"] == "a blue square drawn in ink"


def test_a_picture_is_made_again_from_its_file(pipe, tmp_path):
    drawn = pipe(
        PROMPTS, "in ink", ["", "fog", "", ""], seeds=3, layers="double", weight=2.0, window=(0.0, 0.6), **FAST
    )
    for number in (0, 1, 3):
        record = provenance.read(drawn[number].save(tmp_path / f"{number}.png"))
        again = pipe.again(record)
        assert np.abs(np.asarray(again.image).astype(int) - np.asarray(drawn[number].image).astype(int)).max() <= 1
        assert again.record["set"] == record["set"]
        assert again.seed == 3 + number
    assert record["set"]["prompts"] == ["a red circle, in ink", "two cats, in ink"]
    assert record["set"]["seeds"] == [3, 6]
    with pytest.raises(ControlError, match="not that of a picture of a set"):
        pipe.again({"scene": {}, "seed": 1})


def test_what_is_not_meant_has_no_influence(pipe):
    """The others of a set may be any: a picture depends on the anchor and on itself."""
    call = {**FAST, "preset": "style-aligned"}
    one = pipe([PROMPTS[0], PROMPTS[1]], seeds=[1, 2], **call)[1]
    two = pipe([PROMPTS[0], PROMPTS[3], PROMPTS[1]], seeds=[1, 8, 2], **call)[2]
    other = pipe([PROMPTS[0], PROMPTS[1]], seeds=[30, 2], **call)[1]
    first, second, third = pixels([one, two, other])
    assert np.abs(first - second).max() <= 1
    assert np.abs(first - third).max() > 1


@pytest.mark.parametrize(
    ("prompts", "options", "error", "message"),
    [
        ([], {}, ControlError, "two prompts or more.*found 0"),
        ("a red circle", {}, ControlError, "two prompts or more.*found 1"),
        (["a cat", " "], {}, ControlError, "Prompt 1 is empty"),
        (PROMPTS, {"batch": 1}, ControlError, "batch must be 2 or more"),
        (PROMPTS, {"seeds": [1, 2]}, ControlError, "4 prompts with 1 pictures each need 4 seeds"),
        (PROMPTS, {"negative_prompt": ["fog"]}, ControlError, "4 prompts need one text, or 4"),
        (PROMPTS, {"layers": "singel"}, SelectionError, "Did you mean 'single'"),
        (PROMPTS, {"preset": "alined"}, ControlError, "no preset named"),
        (PROMPTS, {"wait": 2.0}, ControlError, "wait"),
        (PROMPTS, {"controls": [], "weight": 2.0}, ControlError, "not both"),
        (["a cat", "a cat " * 600], {}, SceneError, "prompt 1: .*shorten it"),
    ],
)
def test_errors_say_what_to_do(pipe, prompts, options, error, message):
    assert issubclass(error, AttnCtrlError)
    with pytest.raises(error, match=message):
        pipe(prompts, **{**FAST, **options})


def test_where_nobody_says_it_is_what_was_measured():
    """On FLUX the anchor stands apart; without rotary positions it cannot; what is told comes first."""
    flux, unet = tiny_pipeline(), tiny_pipes.sd()
    (own,), (other,) = style(flux), style(unet)
    assert own.positions == "apart"
    assert other.positions == "keep"
    assert {name: getattr(own, name) for name in STYLES["flux"]} == dict(STYLES["flux"])
    (told,) = style(flux, weight=2.0, match=("key",))
    assert (told.weight, told.match, told.positions) == (2.0, ("key",), "apart")
    with pytest.raises(ControlError, match="wait"):
        style(flux, wait=1)


def test_presets_of_styles_are_what_the_papers_say():
    (paper,) = ac.preset("alignedgen")
    assert (paper.layers, paper.positions, paper.scale, paper.texts) == ("style", "apart", 1.1, True)
    assert (paper.readers, paper.anchors, paper.match, paper.weights) == ("anchors", 1, ("query", "key"), (1.0,))
    (other,) = ac.preset("style-aligned", weight=2.0, group=4)
    assert (other.layers, other.positions, other.weights, other.group) == (None, "keep", (2.0,), 4)
    with pytest.raises(ControlError, match="take no regions"):
        ac.preset("style-aligned", [ac.Region("a cat", box=(0, 0, 1, 1))])
    with pytest.raises(ControlError, match="wait"):
        ac.preset("alignedgen", wait=1)
