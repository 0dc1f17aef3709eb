from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest

from attnctrl.toybox import model_path, world
from attnctrl.toybox.degrade import ALL, degrade
from attnctrl.toybox.scorer import read_picture
from attnctrl.toybox.scorer_style import Evidence, Style, read_style
from attnctrl.toybox.suites_scorer import visible_style

HEART = world.WorldSubject("heart", "orange", "checked", 0.3, 0.3, 0.2)
SCENE = world.WorldScene((HEART, world.WorldSubject("cross", "blue", "solid", 0.7, 0.7, 0.2)), "gray")
NO_WAVES, PLAIN = (0.0, 0.0, 0.0, 0.0), (1.0, 0.0, 0.0, 0.0)


def drawn(style: world.WorldStyle, background: str = "gray") -> np.ndarray:
    return world.render(replace(SCENE, background=background, style=style)).image


def every_style() -> list[tuple[world.WorldStyle, Style]]:
    return [
        (world.WorldStyle("flat"), Style("flat")),
        (world.WorldStyle("grainy", grain_seed=5), Style("grainy")),
        *((world.WorldStyle("outlined", outline=o), Style("outlined", outline=o)) for o in world.OUTLINES),
        *((world.WorldStyle("hatched", hatch_angle=a), Style("hatched", hatch_angle=a)) for a in world.HATCH_ANGLES),
    ]


@pytest.mark.parametrize("background", world.BACKGROUNDS)
def test_every_style_is_read_on_every_ground(background):
    for style, want in every_style():
        assert read_picture(drawn(style, background)).style == want, style


@pytest.mark.parametrize("kind", ["blur", "shift", "noise"])
def test_every_style_is_read_when_spoilt(kind):
    styles = every_style()
    images = degrade(np.stack([drawn(s) for s, _ in styles]), kind, np.random.default_rng(3), None)
    assert [read_picture(image).style for image in images] == [want for _, want in styles]


@pytest.mark.parametrize(
    ("waves", "grain", "rims", "want"),
    [
        (NO_WAVES, 0.0, PLAIN, Style("flat")),
        (NO_WAVES, 0.0, (0.1, 0.0, 0.0, 0.9), Style("outlined", outline="brown")),
        ((0.0, 1.0, 20.0, 0.0), 0.0, PLAIN, Style("hatched", hatch_angle=90)),
        ((0.0, 1.0, 20.0, 0.0), 4.6, PLAIN, Style("hatched", hatch_angle=90)),
        ((0.0, 15.0, 20.0, 0.0), 0.0, PLAIN, Style("hatched")),
        (NO_WAVES, 12.0, PLAIN, Style("grainy")),
        # weak waves, weak grain, both at once, a rim of no known colour, no subject to have a rim
        ((7.0, 0.0, 0.0, 0.0), 0.0, PLAIN, Style(None)),
        (NO_WAVES, 4.0, PLAIN, Style(None)),
        ((20.0, 0.0, 0.0, 0.0), 12.0, PLAIN, Style(None)),
        (NO_WAVES, 0.0, (0.5, 0.4, 0.0, 0.0), Style(None)),
        (NO_WAVES, 0.0, (0.0, 0.0, 0.0, 0.0), Style(None)),
    ],
)
def test_a_style_has_a_name_only_when_its_evidence_is_clear(waves, grain, rims, want):
    assert read_style(Evidence(np.array(waves), grain, np.array(rims))) == want


def test_the_phase_of_hatching_does_not_matter():
    image = drawn(world.WorldStyle("hatched", hatch_angle=45))
    for step in (1, 2, 4):
        assert read_picture(np.roll(image, step, axis=1)).style == Style("hatched", hatch_angle=45)


def test_evidence_is_in_levels():
    hatched = read_picture(drawn(world.WorldStyle("hatched", hatch_angle=0))).evidence
    # the fundamental of 42 * clip(2 sin - 0.6, 0, 1), sampled at six points a wave
    assert hatched.waves[0] == pytest.approx(24.2, abs=1)
    assert hatched.waves[1:].max() < 1
    assert hatched.grain < 1
    assert read_picture(drawn(world.WorldStyle("grainy", grain_seed=5))).evidence.grain == pytest.approx(13, abs=2)


def test_without_subjects_flat_and_outlined_are_one():
    empty = world.WorldScene((), "beige")
    assert read_picture(world.render(empty).image).style == Style(None)
    hatched = replace(empty, style=world.WorldStyle("hatched", hatch_angle=135))
    assert read_picture(world.render(hatched).image).style == Style("hatched", hatch_angle=135)


def test_a_rim_of_another_colour_is_none_of_the_worlds():
    # 2 pixels of green around a blue disc on white
    y, x = np.mgrid[-32:32, -32:32] + 0.5
    image = np.full((64, 64, 3), world.BACKGROUNDS["white"], dtype=np.uint8)
    image[np.hypot(x, y) < 16] = (90, 255, 90)
    image[np.hypot(x, y) < 14] = world.COLORS["blue"]
    reading = read_picture(image)
    assert [(f.shape, f.color) for f in reading.subjects] == [("circle", "blue")]
    assert reading.style == Style(None)


@pytest.fixture(scope="module")
def vae():
    from diffusers import AutoencoderKL

    return AutoencoderKL.from_pretrained(model_path("toy-flux"), subfolder="vae").eval()


@pytest.mark.parametrize(
    ("outline", "ground"), [("white", "white"), ("black", "black"), ("brown", "black"), ("black", "beige")]
)
def test_outlines_are_read_when_everything_spoils_them(vae, outline, ground):
    """Those that are near to the ground as well: white on white is 8 levels high."""
    rng, right, plain = np.random.default_rng(5), [], []
    for index in range(16):
        scene = world.sample_scene(rng, 1 + index % 3)
        for name, told in (("outlined", right), ("flat", plain)):
            drawn = replace(scene, background=ground, style=replace(scene.style, name=name, outline=outline))
            image = world.render(drawn).image[None]
            image = degrade(image, ALL, rng, vae)
            told.append(read_picture(image[0]).style == visible_style(drawn.style))
    assert np.mean(right) >= (0.6 if (outline, ground) == ("white", "white") else 0.85)
    assert np.mean(plain) >= 0.9
