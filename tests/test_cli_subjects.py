"""`attnctrl subjects` end to end on a tiny model: pictures, the sheet, and what is refused before a model is loaded."""

from __future__ import annotations

import json

import pytest
from attnctrl.pipelines.storyfile import StoryFile, load_story
from PIL import Image
from shell import save_tiny

from attnctrl import provenance
from attnctrl.cli import run
from attnctrl.errors import SceneError

STORY = """\
version: 1
model: ./tiny
cast: {ball: a red circle, box: a blue square}
shots:
  - {prompt: "{ball} left, white background", boxes: {ball: [0, 0, 0.5, 1]}}
  - {prompt: "{ball} right, {box} left", boxes: {ball: [0.5, 0, 1, 1], box: [0, 0, 0.5, 1]}, seed: 9}
options: {weight: 3}
seed: 5
"""


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    made = save_tiny(tmp_path_factory.mktemp("stories"))
    (made / "two.yaml").write_text(STORY)
    return made


def test_a_story_file_becomes_pictures_and_a_sheet(folder, tmp_path, capsys):
    assert run(["subjects", str(folder / "two.yaml"), "-o", str(tmp_path), "--device", "cpu", "--format", "json"]) == 0
    told = json.loads(capsys.readouterr().out)
    assert [(one["prompt"], one["seed"], one["found"]) for one in told["images"]] == [
        ("a red circle left, white background", 5, ["ball"]),
        ("a red circle right, a blue square left", 9, ["ball", "box"]),
    ]
    assert sorted(path.name for path in tmp_path.iterdir()) == ["two-0.png", "two-1.png", "two-sheet.png"]
    scene, record = provenance.restore(tmp_path / "two-1.png")
    assert (scene.prompt, scene.seed) == ("a red circle right, a blue square left", 9)
    assert record["story"]["options"] == {"reposition": "rope", "weight": 3}
    with Image.open(tmp_path / "two-sheet.png") as sheet:
        assert sheet.width > 2 * 256


def test_a_picture_of_a_story_is_replayed_with_the_whole_story(folder, tmp_path, capsys):
    assert run(["subjects", str(folder / "two.yaml"), "-o", str(tmp_path), "--device", "cpu", "--format", "quiet"]) == 0
    model = ["--model", str(folder / "tiny")]
    for number in range(2):
        capsys.readouterr()
        assert run(["replay", str(tmp_path / f"two-{number}.png"), *model]) == 0
        assert capsys.readouterr().out == f"{tmp_path / f'two-{number}.png'}: bit-equal\n"
    assert run(["generate", str(tmp_path / "two-1.png"), *model, "-o", str(tmp_path / "again")]) == 2
    assert "was drawn together with other pictures" in capsys.readouterr().err
    assert run(["info", str(tmp_path / "two-1.png")]) == 0
    assert "preset subjects of a story" in capsys.readouterr().out


def test_cast_and_shots_may_be_options(folder, tmp_path, capsys):
    words = ["--cast", "ball=a red circle", "--shot", "{ball} left", "--shot", "{ball} right", "--steps", "1"]
    more = ["--model", str(folder / "tiny"), "--preset", "storysync", "--seed", "3", "--format", "quiet"]
    assert run(["subjects", *words, *more, "-o", str(tmp_path), "--device", "cpu"]) == 0
    names = ["story-0.png", "story-1.png", "story-sheet.png"]
    assert capsys.readouterr().out.split() == [str(tmp_path / name) for name in names]


def test_a_story_goes_on_by_what_was_kept_of_it(folder, tmp_path, capsys):
    bank, device = str(tmp_path / "cast.safetensors"), ["--device", "cpu", "--format", "json"]
    assert run(["subjects", str(folder / "two.yaml"), "--keep", bank, "-o", str(tmp_path), *device]) == 0
    assert json.loads(capsys.readouterr().out)["bank"] == bank
    model, before = ["--model", str(folder / "tiny")], sorted(path.name for path in tmp_path.iterdir())
    more = ["subjects", "--more", str(tmp_path / "two-1.png"), "--bank", bank, "--shot", "{box} right, {ball} left"]
    assert run([*more, "--seed", "4", "-o", str(tmp_path / "later"), *model, *device]) == 0
    (told,) = json.loads(capsys.readouterr().out)["images"]
    assert (told["prompt"], told["seed"]) == ("a blue square right, a red circle left", 4)
    later = tmp_path / "later" / "two-1-more-0.png"
    assert sorted(path.name for path in later.parent.iterdir()) == ["two-1-more-0.png", "two-1-more-sheet.png"]
    assert run(["replay", str(later), "--bank", bank, *model, "--format", "quiet"]) == 0
    assert capsys.readouterr().out == "true\n"
    assert run(["replay", str(tmp_path / "two-1.png"), "--bank", bank, *model]) == 2
    assert "read no bank" in capsys.readouterr().err
    assert run(["replay", str(later), *model]) == 2
    assert "none was given" in capsys.readouterr().err
    assert run([*more, "--shot", "{cat}", "-o", str(tmp_path / "never"), *model]) == 2
    assert "'cat' is not in the cast" in " ".join(capsys.readouterr().err.split())
    assert sorted(path.name for path in tmp_path.iterdir()) == sorted([*before, "later"])


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--more", "a.png", "--shot", "x"], "--bank what was kept of it; give both"),
        (["two.yaml", "--bank", "x.safetensors"], "give both"),
        (["--more", "a.png", "--bank", "b", "--shot", "x", "--steps", "3"], "keeps its own; leave --steps out"),
        (["--more", "a.png", "--bank", "b", "--shot", "x", "--guidance-scale", "0"], "leave --guidance-scale out"),
        (["two.yaml", "--keep", "."], ". is a folder"),
        (["--cast", "b=x", "--shot", "{b}", "--keep", "c"], "one picture, which nobody reads"),
        (["--more", "a.png", "--bank", "b"], "say what the new pictures show"),
        (["--more", "two.yaml", "--bank", "b", "--shot", "x"], "two.yaml"),
        ([], "give a story file, or at least one --cast and one --shot"),
        (["--cast", "ball", "--shot", "x"], "'ball' is no character; write name=description"),
        (["--cast", "b=x", "--cast", "b=y", "--shot", "x"], "two characters have one name"),
        (["--cast", "b=x", "--shot", "{c}"], "shot 0: 'c' is not in the cast, which is b"),
        (["--cast", "b=x", "--shot", "{b}", "--preset", "consistent"], "no preset 'consistent'"),
        (["two.yaml", "--cast", "b=x"], "not both"),
    ],
)
def test_what_is_refused(words, message, folder, monkeypatch, capsys):
    monkeypatch.chdir(folder)
    assert run(["subjects", *words]) == 2
    assert message in " ".join(capsys.readouterr().err.replace("│", " ").split())


def test_the_file_is_checked_key_by_key():
    good = {"version": 1, "cast": {"ball": "a circle"}, "shots": [{"prompt": "{ball}"}]}
    assert StoryFile.from_dict(good).pictures[0].boxes == {}
    for change, message in (
        ({"casts": {}}, "casts: unknown key"),
        ({"cast": {}}, "cast:"),
        ({"shots": [{"prompt": "{ball}", "box": 1}]}, r"shots\[0\].box: unknown key"),
        ({"shots": [{"prompt": "{ball}", "boxes": {"ball": [0, 1]}}]}, "a box is four numbers"),
        ({"width": 33}, "width"),
    ):
        with pytest.raises(SceneError, match=message):
            StoryFile.from_dict({**good, **change})
    with pytest.raises(SceneError, match="nowhere"):
        load_story("nowhere.yaml")
