from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest

from attnctrl.metrics import auc, identity_similarity, set_consistency
from attnctrl.toybox import world
from attnctrl.toybox.embed import identity_embedding, style_embedding
from attnctrl.toybox.scorer import read_picture
from attnctrl.toybox.suites_scorer_same import (
    STYLES,
    TRIALS,
    embed_identity,
    embed_style,
    identity_trio,
    similarities,
    style_trio,
)

STAR = world.WorldSubject("star", "purple", "striped", 0.3, 0.35, 0.22)


def identity(subject: world.WorldSubject, background: str = "white", style: str = "flat") -> np.ndarray:
    vector = embed_identity(world.render(world.WorldScene((subject,), background, world.WorldStyle(style))).image)
    assert vector is not None
    return vector


def style(name: str, background: str = "gray", count: int = 1, **untold) -> np.ndarray:
    rng = np.random.default_rng([11, count])
    scene = replace(world.sample_scene(rng, count), background=background, style=world.WorldStyle(name, **untold))
    vector = embed_style(world.render(scene).image)
    assert vector is not None
    return vector


def test_embeddings_have_unit_length():
    assert identity(STAR).shape == (6 + 256 + 6 + 4,)
    assert np.linalg.norm(identity(STAR)) == pytest.approx(1)
    assert style("hatched").shape == (4 + 1 + 4,)
    assert np.linalg.norm(style("hatched")) == pytest.approx(1)


def test_identity_is_kept_across_place_size_ground_and_style():
    kept = identity(STAR)
    assert identity_similarity(kept, identity(replace(STAR, x=0.65, y=0.6))) > 0.97
    assert identity_similarity(kept, identity(replace(STAR, x=0.5, y=0.5, radius=0.33))) > 0.9
    assert identity_similarity(kept, identity(STAR, "black")) > 0.95
    for name in world.STYLES:
        assert identity_similarity(kept, identity(STAR, "beige", name)) > 0.9, name


@pytest.mark.parametrize("change", [{"shape": "cross"}, {"color": "blue"}, {"pattern": "dotted"}])
def test_identity_is_lost_with_any_attribute(change):
    assert identity_similarity(identity(STAR), identity(replace(STAR, **change))) < 0.85


def test_neighbouring_colours_are_nearer_than_others():
    orange, yellow, blue = (identity(replace(STAR, color=color)) for color in ("orange", "yellow", "blue"))
    assert identity_similarity(orange, yellow) > identity_similarity(orange, blue) + 0.005


def test_style_is_kept_across_scenes_grounds_and_grain():
    for name in world.STYLES:
        vectors = [style(name, b, n, grain_seed=n) for n, b in enumerate(world.BACKGROUNDS, 1) if b != "black"]
        assert set_consistency(vectors) > 0.9, name


def test_styles_and_their_untold_parameters_differ():
    vectors = [style(s.name, outline=s.outline, hatch_angle=s.hatch_angle) for s in STYLES]
    for i, one in enumerate(vectors):
        assert max(identity_similarity(one, other) for other in vectors[:i] + vectors[i + 1 :]) < 0.6, STYLES[i]


def test_what_is_not_known_of_rims_is_any_of_them():
    empty = style_embedding(read_picture(world.render(world.WorldScene((), "white")).image))
    assert empty.tolist() == pytest.approx([0] * 5 + [0.5] * 4)


def test_no_subject_has_no_identity():
    assert embed_identity(world.render(world.WorldScene((), "white")).image) is None


def test_missing_embeddings_count_against():
    east, north = np.array([1.0, 0.0]), np.array([0.0, 1.0])
    assert similarities([east, east, north, None, east, north, east, None, None]) == ([1, -1, -1], [0, 1, 1])


def test_identity_trios_differ_in_one_attribute_in_turn():
    rng = np.random.default_rng(5)
    for index in range(6):
        (kept,), (same,), (other,) = (scene.subjects for scene in identity_trio(index, rng, (64, 64)))
        names = ("shape", "color", "pattern")
        assert [n for n in names if getattr(kept, n) != getattr(same, n)] == []
        assert [n for n in names if getattr(kept, n) != getattr(other, n)] == [names[index % 3]]
        assert len({kept.x, same.x, other.x}) == 3
        assert len({kept.radius, same.radius, other.radius}) == 3


def test_style_trios_have_two_styles():
    rng = np.random.default_rng(5)
    for index in range(18):
        kept, same, other = (replace(s.style, grain_seed=0) for s in style_trio(index, rng, (64, 64)))
        assert kept == same == STYLES[index % 9]
        assert other in STYLES
        assert other != kept


@pytest.mark.parametrize("name", TRIALS)
def test_same_and_different_are_told_apart(name):
    draw, embed = TRIALS[name]
    rng = np.random.default_rng(2025)
    scenes = [scene for index in range(12) for scene in draw(index, rng, (64, 64))]
    assert auc(*similarities([embed(world.render(scene).image) for scene in scenes])) >= 0.97


def test_identity_is_of_the_subject_that_was_asked_for():
    pair = (replace(STAR, x=0.27), world.WorldSubject("circle", "green", "solid", 0.75, 0.7, 0.17))
    image = world.render(world.WorldScene(pair, "gray")).image
    by_color = {one.color: identity_embedding(image, one) for one in read_picture(image).subjects}
    assert identity_similarity(by_color["purple"], identity(STAR)) > 0.95
    assert identity_similarity(by_color["green"], identity(STAR)) < 0.5
