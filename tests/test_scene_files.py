"""Files that a scene names or comes from: masks, references, paths, and the limits of strangers' files."""

from __future__ import annotations

import io
import json
import os

import numpy as np
import pytest
from PIL import Image
from scene_tools import BASE, LEFT, RIGHT, refusal, refused_file, save_mask, write

from attnctrl.scene import load_scene
from attnctrl.scenefile import MAX_SCENE_BYTES, as_rgb, decode_picture

# masks and references


def test_masks_are_white_inside(tmp_path):
    save_mask(tmp_path / "m.png", [[0, 127, 128, 255]] * 2)
    Image.fromarray(np.array([[0, 127 * 256, 128 * 256, 65535]] * 2, dtype=np.uint16)).save(tmp_path / "m16.png")
    clear = np.full((2, 4, 4), 255, dtype=np.uint8)
    clear[:, :2, 3] = 0  # white but transparent on the left
    Image.fromarray(clear).save(tmp_path / "clear.png")
    for name in ("m.png", "m16.png", "clear.png"):
        scene = load_scene(write(tmp_path, {**BASE, "subjects": [{"prompt": "x", "mask": name}]}))
        assert scene.regions()[0].mask.tolist() == [[0, 0, 1, 1]] * 2, name


def test_pictures_are_what_viewers_show():
    """Upright, over white, 16 bits as 8, the first frame; a picture in memory like its file."""
    turned = np.zeros((2, 3, 3), np.uint8)
    turned[0, 0] = (255, 0, 0)
    exif = Image.Exif()
    exif[0x0112] = 6  # the camera was turned: shown a quarter further clockwise
    upright = np.rot90(turned, -1)
    clear = np.full((1, 3, 4), 200, np.uint8)
    clear[0, :, 3] = (0, 255, 51)
    deep = np.array([[0, 255, 256, 40000, 65535]], np.uint16)
    frames = [Image.new("RGB", (2, 1), color) for color in ("red", "blue")]
    cases = [
        (Image.fromarray(turned), {"exif": exif}, upright),
        (Image.fromarray(clear), {}, [[[255] * 3, [200] * 3, [244] * 3]]),
        (Image.fromarray(deep), {}, [[[value] * 3 for value in (0, 0, 1, 156, 255)]]),
        (frames[0], {"save_all": True, "append_images": frames[1:]}, [[[255, 0, 0]] * 2]),
    ]
    for image, how, expected in cases:
        file = io.BytesIO()
        image.save(file, "PNG", **how)
        assert np.array_equal(np.asarray(decode_picture(file.getvalue())), expected)
        assert np.array_equal(np.asarray(as_rgb(Image.open(file))), expected)


def test_the_reference_is_read_and_bound_to_its_subject(tmp_path):
    Image.new("RGBA", (5, 4), (9, 8, 7, 255)).save(tmp_path / "r.png")
    scene = load_scene(write(tmp_path, {**BASE, "subjects": [RIGHT, {**LEFT, "reference": "r.png"}]}))
    (picture,) = scene.references()
    assert (picture.mode, picture.size, picture.getpixel((4, 3))) == ("RGB", (5, 4), (9, 8, 7))
    assert [region.reference for region in scene.regions()] == [None, 0]
    assert load_scene(write(tmp_path, BASE)).references() == []


def test_several_references_are_counted_in_the_order_of_their_subjects(tmp_path):
    for name, color in (("a.png", (255, 0, 0)), ("b.png", (0, 0, 255))):
        Image.new("RGB", (4, 4), color).save(tmp_path / name)
    subjects = [
        {**LEFT, "reference": "b.png"},
        RIGHT,
        {"prompt": "x", "reference": "a.png"},
        {"prompt": "y", "box": [0, 0, 1, 1], "reference": "a.png"},
    ]
    scene = load_scene(write(tmp_path, {**BASE, "subjects": subjects}))
    assert [picture.getpixel((0, 0)) for picture in scene.references()] == [(0, 0, 255), (255, 0, 0), (255, 0, 0)]
    # the one without a place belongs to no region
    assert [region.reference for region in scene.regions()] == [0, None, 2]


def test_more_references_than_eight_are_refused():
    subjects = [{"prompt": "a", "reference": f"{i}.png"} for i in range(9)]
    text = refusal({**BASE, "subjects": subjects})
    assert "a scene takes 8 reference pictures at most; found 9 (subjects[0].reference, subjects[1].reference" in text


@pytest.mark.parametrize(
    ("name", "reason"),
    [
        ("/etc/hostname", "must be relative"),
        ("../secret.png", "leaves the scene's folder ('..')"),
        ("sub/../../secret.png", "leaves the scene's folder ('..')"),
        ("link.png", "leaves the scene's folder through a link"),
        ("folder/secret.png", "leaves the scene's folder through a link"),
        ("C:/secret.png", "must be relative"),
        ("..\\secret.png", "must be relative"),
        ("a\0.png", "must be relative"),
        ("", "must be relative"),
        ("none.png", "there is no such file"),
        (".", "not a regular file"),
        ("pipe", "not a regular file"),
    ],
)
@pytest.mark.parametrize("key", ["mask", "reference"])
def test_paths_stay_in_the_folder_of_the_scene(tmp_path, name, reason, key):
    folder = tmp_path / "scenes"
    folder.mkdir()
    save_mask(tmp_path / "secret.png", [[255]])
    (folder / "link.png").symlink_to(tmp_path / "secret.png")
    (folder / "folder").symlink_to(tmp_path)
    os.mkfifo(folder / "pipe")
    text = refused_file(write(folder, json.dumps({**BASE, "subjects": [{"prompt": "x", key: name}]})))
    assert f"subjects[0].{key}: " in text
    assert reason in text


def test_a_link_inside_the_folder_is_followed(tmp_path):
    (tmp_path / "masks").mkdir()
    save_mask(tmp_path / "masks" / "m.png", [[255, 0]])
    (tmp_path / "m.png").symlink_to(tmp_path / "masks" / "m.png")
    scene = load_scene(write(tmp_path, {**BASE, "subjects": [{"prompt": "x", "mask": "m.png"}]}))
    assert scene.regions()[0].mask.tolist() == [[1, 0]]


def test_bad_pictures_are_refused(tmp_path, monkeypatch):
    def message(name):
        return refused_file(
            write(tmp_path, {**BASE, "width": 80, "height": 40, "subjects": [{"prompt": "x", "mask": name}]})
        )

    (tmp_path / "text.png").write_text("not a picture")
    assert "cannot be decoded" in message("text.png")
    save_mask(tmp_path / "black.png", np.zeros((4, 8)))
    assert "the mask is empty" in message("black.png")
    save_mask(tmp_path / "tall.png", np.full((8, 4), 255))
    assert "other proportions than the picture; found 4 x 8; give it the picture's proportions (80 x 40)" in message(
        "tall.png"
    )
    save_mask(tmp_path / "big.png", np.full((100, 200), 255))
    whole = (tmp_path / "big.png").read_bytes()
    (tmp_path / "cut.png").write_bytes(whole[: len(whole) // 2])
    assert "cannot be decoded" in message("cut.png")
    Image.new("L", (8, 4), 255).save(tmp_path / "m.tiff")
    assert "use a PNG, JPEG or WEBP picture" in message("m.tiff")
    monkeypatch.setattr("attnctrl.scenefile.MAX_PICTURE_PIXELS", 19_999)
    assert "200 x 100 pixels, more than 19999" in message("big.png")
    monkeypatch.setattr("attnctrl.scenefile.MAX_PICTURE_BYTES", len(whole) - 1)
    assert "is larger than" in message("big.png")


def test_a_scene_without_a_folder_has_no_files():
    assert "the scene has no folder" in refusal({**BASE, "subjects": [{"prompt": "x", "mask": "m.png"}]})


# files of strangers


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("a: &x [1]\nb: *x\n", "anchors and aliases are not allowed"),
        ("version: 1\nversion: 1\n", "the key 'version' is given twice"),
        ("subjects: [{prompt: a, prompt: b}]", "the key 'prompt' is given twice"),
        ("!!python/object/apply:os.system ['true']", "could not determine a constructor"),
        ("version: 1\n  prompt: x", "line 2"),
        ("? [a]\n: b", "a key must be a plain word"),
        ("- 1", "a scene is a mapping of keys; found list [1]; start with 'version: 1'"),
        ("", "a scene is a mapping of keys; found NoneType None"),
        ("prompt: 2020-13-45", "not plain YAML"),
        ("seed: " + "9" * 5000, "not plain YAML"),
        ("[" * 5000, "not plain YAML"),
        ("prompt: \0", "not plain YAML"),
    ],
)
def test_yaml_is_plain_data(tmp_path, text, message):
    assert message in refused_file(write(tmp_path, text))


def test_an_alias_bomb_is_stopped_at_its_first_anchor(tmp_path):
    lines = ["a0: &a0 [x, x]"] + [f"a{i}: &a{i} [{', '.join([f'*a{i - 1}'] * 9)}]" for i in range(1, 30)]
    assert "line 1: anchors and aliases" in refused_file(write(tmp_path, "\n".join(lines)))


def test_scene_files_are_bounded(tmp_path):
    path = write(tmp_path, "#" * MAX_SCENE_BYTES + "\n")
    assert "is larger than 256 KiB" in refused_file(path)
    path.write_bytes(b"version: 1\nprompt: \xff")
    assert "byte 19 is not UTF-8" in refused_file(path)
    assert "missing or not a regular file" in refused_file(tmp_path / "none.yaml")
    assert "missing or not a regular file" in refused_file(tmp_path)


def test_long_values_are_not_repeated_in_messages():
    assert len(refusal({**BASE, "steps": "x" * 100_000, "controls": [{"name": "y" * 100_000}]})) < 1000
