from __future__ import annotations

import json
from dataclasses import replace

import numpy as np
import pytest
from attnctrl.pipelines.runner import Runner

from attnctrl.toybox import suites_scorer, world
from attnctrl.toybox.models.flux import tiny_pipeline
from attnctrl.toybox.scorer import Found, Reading, read_picture
from attnctrl.toybox.scorer_style import Style
from attnctrl.toybox.suites import SUITES
from attnctrl.toybox.suites_scorer import (
    SPOILT,
    by_place,
    held_out_scenes,
    measure_scorer,
    picture_values,
    visible_style,
)
from attnctrl.toybox.suites_scorer_same import PICTURES

RED = world.WorldSubject("circle", "red", "solid", 0.3, 0.5, 0.15)
BLUE = world.WorldSubject("star", "blue", "striped", 0.7, 0.5, 0.18)
SCENE = world.WorldScene((RED, BLUE), "gray", world.WorldStyle("outlined", outline="black"))
RATES = ("shape", "color", "pattern", "background", "style", "outline", "hatch_angle")


def mask(*columns: int) -> np.ndarray:
    out = np.zeros((4, 8), dtype=bool)
    out[:, list(columns)] = True
    return out


def found(*columns: int, **names) -> Found:
    words = {"shape": "circle", "color": "red", "pattern": "solid", **names}
    return Found(**words, box=(0, 0, 1, 1), mask=mask(*columns), confidence=1.0)


def reading(*subjects: Found, background: str = "gray", style: Style = Style("outlined", "black")) -> Reading:
    empty = read_picture(world.render(world.WorldScene((), "gray")).image)
    return replace(empty, subjects=subjects, background=background, style=style)


def test_what_is_read_is_compared_by_place_not_by_name():
    drawn = np.stack([mask(0, 1, 2), mask(5, 6)])
    left, right = found(0, 1, 2, 3), found(6)
    assert by_place(drawn, [right, left]) == [(left, 3 / 4), (right, 1 / 2)]
    assert by_place(drawn, [right]) == [(None, 0.0), (right, 1 / 2)]
    # too little of it is there
    assert by_place(drawn, [found(2, 3, 4)]) == [(None, 0.0), (None, 0.0)]
    assert by_place(drawn, []) == [(None, 0.0), (None, 0.0)]


def test_values_of_one_picture():
    drawn = np.stack([mask(0, 1), mask(5, 6)])
    star = found(5, 6, shape=None, color="purple", pattern="striped")
    values = picture_values(SCENE, drawn, reading(found(0, 1), star, style=Style("outlined", "brown")))
    rates = {name: (value.right, value.wrong) for name, value in values.items()}
    assert rates == {
        # one of two; the other is unknown, or has a wrong name
        "shape": (0.5, 0.0),
        "color": (0.5, 0.5),
        "pattern": (1.0, 0.0),
        "background": (1.0, 0.0),
        "style": (1.0, 0.0),
        "outline": (0.0, 1.0),
        "count": (1.0, None),
        "mask": (1.0, None),
    }


def test_what_is_missing_is_not_right_and_not_wrong():
    drawn = np.stack([mask(0, 1), mask(5, 6)])
    values = picture_values(SCENE, drawn, reading(style=Style(None), background="white"))
    for name in ("shape", "color", "pattern", "style", "outline"):
        assert (values[name].right, values[name].wrong) == (0.0, 0.0), name
    assert (values["background"].right, values["background"].wrong) == (0.0, 1.0)
    assert (values["count"].right, values["mask"].right) == (0.0, 0.0)


def test_only_what_shows_of_a_style_is_asked_for():
    told = {"outline": "brown", "hatch_angle": 90}
    assert visible_style(world.WorldStyle("flat", **told)) == Style("flat")
    assert visible_style(world.WorldStyle("grainy", **told)) == Style("grainy")
    assert visible_style(world.WorldStyle("outlined", **told)) == Style("outlined", outline="brown")
    assert visible_style(world.WorldStyle("hatched", **told)) == Style("hatched", hatch_angle=90)


def test_scenes_are_balanced():
    scenes = held_out_scenes(24, (64, 64))
    assert scenes == held_out_scenes(24, (64, 64))
    kinds = [(scene.style.name, len(scene.subjects)) for scene in scenes]
    assert {kinds.count((style, n)) for style in world.STYLES for n in (1, 2, 3)} == {2}


@pytest.fixture(scope="module")
def result():
    steps: list[tuple[int, int]] = []
    runner = Runner(tiny_pipeline(), size=(64, 64), steps=2, batch=2)
    return measure_scorer(runner, "tiny", 8, lambda done, total: steps.append((done, total))), steps


def test_the_suite_gives_the_form(result):
    (printed, steps) = result
    assert list(printed) == ["suite", "model", "n", "seconds", "metrics"]
    assert (printed["suite"], printed["model"], printed["n"]) == ("scorer", "tiny", 8)
    suffixes = ["" if kind is None else f"_{kind}" for kind in SPOILT]
    assert set(printed["metrics"]) == {
        *(prefix + name + suffix for prefix in ("", "sure_and_wrong_") for name in RATES for suffix in suffixes),
        *(name + suffix for name in ("count", "mask") for suffix in suffixes),
        *(name + suffix for name in ("identity_auc", "style_auc") for suffix in ("", "_degraded")),
    }
    for name, entry in printed["metrics"].items():
        assert list(entry) == ["vanilla", "controlled", "delta", "ci95", "better"]
        assert entry["better"] == ("lower" if name.startswith("sure_and_wrong") else "higher")
        assert 0 <= entry["ci95"][0] <= entry["vanilla"] <= entry["ci95"][1] <= 1
    assert len(steps) == steps[-1][0] == steps[-1][1] == 8 * (len(SPOILT) + PICTURES)
    assert json.loads(json.dumps(printed)) == printed


def test_clean_renders_are_read_as_drawn(result):
    metrics = result[0]["metrics"]
    assert {metrics[name]["vanilla"] for name in (*RATES, "count", "identity_auc", "style_auc")} == {1.0}
    assert metrics["mask"]["vanilla"] > 0.93
    for kind in ("blur", "shift", "noise"):
        assert metrics[f"shape_{kind}"]["vanilla"] >= 0.93


def test_a_vae_that_melts_everything_is_seen(result):
    # the tiny pipeline's VAE is untrained
    metrics = result[0]["metrics"]
    assert metrics["shape_vae"]["vanilla"] < 0.2
    assert metrics["identity_auc_degraded"]["vanilla"] < 0.8


def test_the_suite_reads_enough_renders_whatever_is_asked(monkeypatch):
    asked = []
    monkeypatch.setattr(Runner, "load", classmethod(lambda cls, model: model))
    monkeypatch.setattr(suites_scorer, "measure_scorer", lambda runner, model, count, progress: asked.append(count))
    SUITES["scorer"]("toy-flux", 4, None)
    SUITES["scorer"]("toy-flux", 300, None)
    assert asked == [suites_scorer.LEAST, 300]
