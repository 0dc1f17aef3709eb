"""`attnctrl layout` and `style` on a tiny model: what the options mean, and pictures that replay makes again to the bit."""

from __future__ import annotations

import json

import numpy as np
import pytest
from PIL import Image
from shell import SIZE, save_tiny

from attnctrl import provenance
from attnctrl.cli import run

PAIR = [
    "a red circle and a blue square", "-s", "a red circle", "-a", "0,0,0.5,0.8", "-s", "a blue square", "-a", "0.5,0,1,0.8",
]  # fmt: skip
QUIET = ["--device", "cpu", "--format", "quiet"]


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    made = save_tiny(tmp_path_factory.mktemp("quick"))
    mask = np.zeros((SIZE, SIZE), np.uint8)
    mask[:, : SIZE // 2] = 255
    Image.fromarray(mask).save(made / "left.png")
    Image.new("RGB", (24, 16), "red").save(made / "look.png")
    return made


@pytest.fixture(scope="module")
def tiny(folder):
    return ["--model", str(folder / "tiny")]


def pixels(path):
    with Image.open(path) as image:
        return np.asarray(image.convert("RGB")).astype(int)


# layout


def test_subjects_and_places_are_paired_by_their_order(call, folder, tiny, tmp_path):
    code, out, err = call(
        "layout", *PAIR, "--background", "a gray wall", "--negative-prompt", "fog", "-n", 2, "--seed", 4, "-o", tmp_path,
        "--device", "cpu", "--steps", 1, "--guidance-scale", 2, "--true-cfg-scale", 4, "--format", "json", *tiny,
    )  # fmt: skip
    assert (code, err) == (0, "")
    data = json.loads(out)
    assert [(one["path"], one["seed"], one["size"], one["controlled"]) for one in data["images"]] == [
        (str(tmp_path / f"layout-{seed}.png"), seed, [SIZE, SIZE], True) for seed in (4, 5)
    ]
    scene, record = provenance.restore(tmp_path / "layout-5.png")
    assert [(one.prompt, one.box) for one in scene.subjects] == [
        ("a red circle", (0, 0, 0.5, 0.8)), ("a blue square", (0.5, 0, 1, 0.8)),
    ]  # fmt: skip
    assert (scene.background, scene.negative_prompt, scene.seed) == ("a gray wall", "fog", 5)
    assert (scene.steps, scene.guidance_scale, scene.true_cfg_scale) == (1, 2, 4)
    assert [entry["name"] for entry in scene.controls] == ["isolate", "group_isolation"]
    assert "setup" not in record


def test_the_prompt_alone_is_the_subject(call, tiny, tmp_path):
    assert call("layout", "a red circle", "--at", "0,0,.5,1", "-o", tmp_path, "--steps", 1, *QUIET, *tiny)[0] == 0
    (subject,) = provenance.restore(tmp_path / "layout-0.png")[0].subjects
    assert (subject.prompt, subject.box) == ("a red circle", (0, 0, 0.5, 1))


@pytest.mark.parametrize(
    "more",
    [
        [],
        ["--preset", "lamic-fixed", "--seed", "7"],
        ["--background", "a gray wall", "--width", "32"],
        ["-r", "look.png", "-r", "-"],
        ["-r", "look.png", "-r", "look.png", "--preset", "regional-prompting"],
    ],
)
def test_a_layout_is_replayed_to_the_bit(call, folder, tiny, tmp_path, monkeypatch, more):
    monkeypatch.chdir(folder)
    assert call("layout", *PAIR, *more, "-n", 2, "-o", tmp_path, *QUIET, *tiny)[0] == 0
    paths = sorted(tmp_path.iterdir())
    assert len(paths) == 2
    for path in paths:
        again = tmp_path / f"again-{path.name}"
        assert call("replay", path, *tiny, "-o", again) == (0, f"{path}: bit-equal\n", "")
    assert (pixels(paths[0]) != pixels(paths[1])).any()


def test_places_may_be_masks_or_what_is_left(call, folder, tiny, tmp_path, monkeypatch):
    monkeypatch.chdir(folder)
    words = ["a red circle and a blue square", "-s", "a red circle", "-s", "a blue square", "-r", "-", "-r", "look.png"]
    assert call("layout", *words, "-a", "left.png", "-a", "-", "--steps", 1, "-o", tmp_path, *QUIET, *tiny)[0] == 0
    scene, _ = provenance.restore(tmp_path / "layout-0.png")
    left, rest = (region.mask for region in scene.regions())
    assert left[:, : SIZE // 2].all()
    assert not left[:, SIZE // 2 :].any()
    assert (rest.shape[1], rest.any(0).sum()) == (512, 256)
    assert len(scene.references()) == 1


def test_a_preset_and_a_place_change_the_picture(call, tiny, tmp_path):
    """On is provable: another place and another stack are other pictures; the same line is the same file."""
    lines = {
        "one": PAIR, "same": PAIR, "stack": [*PAIR, "--preset", "texts"], "place": [*PAIR[:-1], "0.5,0.5,1,1"],
    }  # fmt: skip
    for name, line in lines.items():
        assert call("layout", *line, "-o", tmp_path / name, *QUIET, *tiny)[0] == 0
    first = (tmp_path / "one" / "layout-0.png").read_bytes()
    assert (tmp_path / "same" / "layout-0.png").read_bytes() == first
    for name in ("stack", "place"):
        assert (pixels(tmp_path / name / "layout-0.png") != pixels(tmp_path / "one" / "layout-0.png")).any()


def test_generate_takes_a_layout(call, tiny, tmp_path):
    assert call("layout", *PAIR, "-o", tmp_path, *QUIET, *tiny)[0] == 0
    code, _, err = call("generate", tmp_path / "layout-0.png", "-o", tmp_path / "again", *QUIET, *tiny)
    assert (code, err) == (0, "")
    assert (tmp_path / "again" / "layout-0.png").read_bytes() == (tmp_path / "layout-0.png").read_bytes()


# style


@pytest.mark.parametrize("batch", [[], ["--batch", "2"]])
def test_a_set_is_replayed_to_the_bit(call, tiny, tmp_path, batch):
    words = [
        "a red circle",
        "two cats",
        "a blue square",
        "--style",
        "in ink",
        "--seed",
        "3",
        "--negative-prompt",
        "fog",
    ]
    assert call("style", *words, *batch, "-o", tmp_path, *QUIET, *tiny)[0] == 0
    paths = sorted(tmp_path.iterdir())
    assert [path.name for path in paths] == ["style-0.png", "style-1.png", "style-2.png"]
    records = [provenance.read(path) for path in paths]
    assert [one["scene"]["prompt"] for one in records] == [f"{text}, in ink" for text in words[:3]]
    assert [one["seed"] for one in records] == [3, 4, 5]
    assert [len(one["batch"]["seeds"]) for one in records] == ([2, 2, 2] if batch else [3, 3, 3])
    for path in paths:
        assert call("replay", path, *tiny) == (0, f"{path}: bit-equal\n", "")


def test_the_style_of_a_real_picture(call, folder, tiny, tmp_path):
    picture = ["--picture", folder / "look.png", "--picture-prompt", "a red sheet", "--cleaner", 0.5]
    code, out, err = call("style", "two cats", *picture, "-o", tmp_path, "--device", "cpu", "--format", "json", *tiny)
    assert (code, err) == (0, "")
    data = json.loads(out)
    assert [(one["path"], one["prompt"], one["controlled"]) for one in data["images"]] == [
        (str(tmp_path / "style-0.png"), "two cats", True)
    ]
    record = provenance.read(tmp_path / "style-0.png")
    assert record["set"]["picture"] == {"file": "anchor.png", "cleaner": 0.5}
    assert call("replay", tmp_path / "style-0.png", *tiny)[:2] == (0, f"{tmp_path / 'style-0.png'}: bit-equal\n")


def test_the_preset_of_a_set_is_recorded(tiny, tmp_path, capsys):
    line = ["style", "a red circle", "two cats", "--preset", "alignedgen", "--steps", "1", "-o", str(tmp_path)]
    assert run([*line, *QUIET, *tiny]) == 0
    (control,) = provenance.read(tmp_path / "style-1.png")["scene"]["controls"]
    assert (control["name"], control["scale"], control["texts"]) == ("share_style", 1.1, True)
