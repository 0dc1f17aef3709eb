from __future__ import annotations

import numpy as np
import pytest
from scipy import ndimage

from attnctrl.toybox import world
from attnctrl.toybox.scorer import Expected, Found, agrees, match, read_picture


def degraded(image: np.ndarray, rng: np.random.Generator) -> np.ndarray:
    soft = ndimage.gaussian_filter(image.astype(float), (0.7, 0.7, 0)) + rng.uniform(-8, 8, 3)
    return np.clip(np.rint(soft + rng.normal(0, 6, soft.shape)), 0, 255).astype(np.uint8)


def rates(subjects: int, count: int, size: tuple[int, int] = (64, 64), spoil: bool = False) -> dict[str, float]:
    """Shares of pictures whose subjects are right in each respect (all of them, and no more of them)."""
    rng = np.random.default_rng([515, subjects])
    right = dict.fromkeys(("both", "pattern", "background", "sure_and_wrong"), 0)
    for _ in range(count):
        scene = world.sample_scene(rng, subjects, *size)
        image = world.render(scene, *size).image
        reading = read_picture(degraded(image, rng) if spoil else image)
        expected = [Expected(s.shape, s.color) for s in scene.subjects]
        found = match(expected, reading.subjects)
        exact = len(reading.subjects) == subjects
        right["both"] += exact and all(map(agrees, expected, found))
        right["pattern"] += all(
            f is not None and f.pattern == s.pattern for f, s in zip(found, scene.subjects, strict=True)
        )
        right["background"] += reading.background == scene.background
        right["sure_and_wrong"] += any(
            f and f.shape not in (None, s.shape) for f, s in zip(found, scene.subjects, strict=True)
        )
    return {name: value / count for name, value in right.items()}


def test_single_subjects_are_read():
    found = rates(1, 60)
    assert found["both"] >= 0.98
    assert found["pattern"] >= 0.96
    assert found["background"] == 1
    assert found["sure_and_wrong"] == 0


@pytest.mark.parametrize(
    ("subjects", "size"), [(2, (64, 64)), (4, (64, 64)), (3, (96, 64)), (1, (48, 48)), (1, (128, 128))]
)
def test_several_subjects_and_other_sizes_are_read(subjects, size):
    assert rates(subjects, 15, size)["both"] >= 14 / 15


def test_blurred_noisy_and_tinted_pictures_are_read():
    assert rates(1, 30, spoil=True)["both"] >= 29 / 30
    assert rates(3, 15, spoil=True)["both"] >= 14 / 15


@pytest.mark.parametrize("style", world.STYLES)
@pytest.mark.parametrize("background", world.BACKGROUNDS)
def test_every_style_on_every_ground(style, background):
    subjects = (
        world.WorldSubject("heart", "orange", "checked", 0.27, 0.3, 0.2),
        world.WorldSubject("star", "blue", "striped", 0.72, 0.7, 0.22),
    )
    for outline in world.OUTLINES:
        scene = world.WorldScene(subjects, background, world.WorldStyle(style, outline, 45, 3))
        reading = read_picture(world.render(scene).image)
        assert reading.background == background
        assert {(f.shape, f.color, f.pattern) for f in reading.subjects} == {
            ("heart", "orange", "checked"),
            ("star", "blue", "striped"),
        }


def test_mask_and_box_are_where_the_subject_is():
    scene = world.WorldScene((world.WorldSubject("square", "green", "dotted", 0.6, 0.4, 0.25),), "beige")
    truth = world.render(scene)
    (found,) = read_picture(truth.image).subjects
    overlap = (found.mask & truth.masks[0]).sum() / (found.mask | truth.masks[0]).sum()
    assert overlap > 0.9
    assert np.abs(np.array(found.box) - truth.boxes[0]).max() <= 1.5 / 64
    assert found.confidence > 0.5


def test_touching_subjects_of_one_colour_are_parted():
    subjects = (
        world.WorldSubject("circle", "red", "solid", 0.3, 0.5, 0.2),
        world.WorldSubject("circle", "red", "solid", 0.675, 0.5, 0.2),
    )
    reading = read_picture(world.render(world.WorldScene(subjects, "white")).image)
    assert [(f.shape, f.color) for f in reading.subjects] == [("circle", "red"), ("circle", "red")]


def painted(inside: np.ndarray) -> np.ndarray:
    image = np.full((*inside.shape, 3), world.BACKGROUNDS["white"], dtype=np.uint8)
    image[inside] = world.COLORS["red"]
    return image


@pytest.mark.parametrize("name", ["ellipse", "bar", "half circle", "squircle", "ring", "blob"])
def test_what_is_no_shape_gets_no_name(name):
    y, x = np.mgrid[-32:32, -32:32] + 0.5
    inside = {
        "ellipse": (x / 22) ** 2 + (y / 9) ** 2 < 1,
        "bar": (abs(x) < 20) & (abs(y) < 5),
        "half circle": (np.hypot(x, y) < 20) & (y < -2),
        "squircle": (abs(x) / 16) ** 3.4 + (abs(y) / 16) ** 3.4 < 1,
        "blob": np.hypot(x, y) < 15 * (1 + 0.1 * np.sin(3 * np.arctan2(y, x)) + 0.1 * np.cos(2 * np.arctan2(y, x) + 1)),
        "ring": (np.hypot(x, y) < 20) & (np.hypot(x, y) > 11),
    }[name]
    (found,) = read_picture(painted(inside)).subjects
    assert (found.shape, found.color) == (None, "red")


@pytest.mark.parametrize("shape", world.SHAPES)
def test_a_shape_that_the_edge_cuts_keeps_its_name(shape):
    subject = world.WorldSubject(shape, "red", "solid", 0.12, 0.5, 0.22)
    (found,) = read_picture(world.render(world.WorldScene((subject,), "white")).image).subjects
    assert found.shape == shape
    assert found.confidence > 0.82


def test_a_small_blurred_star_is_a_star():
    subject = world.WorldSubject("star", "green", "dotted", 0.5, 0.5, 0.15)
    image = world.render(world.WorldScene((subject,), "gray")).image.astype(float)
    soft = ndimage.gaussian_filter(image, (1.0, 1.0, 0)).astype(np.uint8)
    assert [(f.shape, f.color) for f in read_picture(soft).subjects] == [("star", "green")]


def test_lines_and_specks_are_no_subjects():
    lines = np.zeros((64, 64), dtype=bool)
    lines[30:32, 5:60] = True
    assert read_picture(painted(lines)).subjects == ()
    specks = np.zeros((64, 64), dtype=bool)
    specks[::5, ::5] = True
    assert (read_picture(painted(specks)).colors == -1).all()


@pytest.mark.parametrize("outline", world.OUTLINES)
@pytest.mark.parametrize("background", ["white", "gray", "black"])
def test_outlines_show_no_colour(background, outline):
    subject = world.WorldSubject("star", "blue", "striped", 0.5, 0.5, 0.25)
    scene = world.WorldScene((subject,), background, world.WorldStyle("outlined", outline))
    colors = read_picture(world.render(scene).image).colors
    assert set(np.unique(colors)) == {-1, list(world.COLORS).index("blue")}


@pytest.mark.parametrize("shift", [(12, 0, -16), (14, -14, 0)])
def test_a_tinted_ground_is_still_the_ground(shift):
    scene = world.WorldScene((world.WorldSubject("circle", "orange", "checked", 0.5, 0.5, 0.25),), "beige")
    image = np.clip(world.render(scene).image.astype(int) + shift, 0, 255).astype(np.uint8)
    assert [(f.shape, f.color) for f in read_picture(image).subjects] == [("circle", "orange")]


def test_an_empty_picture_has_no_subjects():
    reading = read_picture(painted(np.zeros((64, 64), dtype=bool)))
    assert reading.subjects == ()
    assert reading.background == "white"
    assert (reading.colors == -1).all()


@pytest.mark.parametrize("image", [np.zeros((64, 64, 3)), np.zeros((64, 64), np.uint8), np.zeros((8, 64, 3), np.uint8)])
def test_what_is_no_picture_is_refused(image):
    with pytest.raises(ValueError, match=r"a picture is uint8 \[H, W, 3\]"):
        read_picture(image)


def seen(shape: str | None, color: str | None, pattern: str | None = "solid") -> Found:
    return Found(shape, color, pattern, (0, 0, 1, 1), np.ones((1, 1), dtype=bool), 1.0)


def test_match_prefers_whole_agreement():
    a, b = seen("circle", "red"), seen("circle", "blue")
    assert match([Expected("circle", "blue"), Expected("circle", "red")], [a, b]) == [b, a]
    # One whole agreement is worth more than two halves.
    expected = [Expected("circle", "red"), Expected("circle", "blue", "striped")]
    whole, half = seen("circle", "red", "striped"), seen("star", "red")
    assert match(expected, [half, whole]) == [whole, half]


def test_match_leaves_out_what_is_missing():
    only = seen("circle", "red")
    assert match([Expected("star", "blue"), Expected("circle", "red")], [only]) == [None, only]
    assert match([Expected("star")], []) == [None]


def test_untold_attributes_fit_anything():
    assert agrees(Expected(color="red"), seen("circle", "red", None))
    assert not agrees(Expected(shape="circle"), seen(None, "red"))
    assert not agrees(Expected(), None)
    assert not agrees(Expected(pattern="striped"), seen("circle", "red"))
