"""`attnctrl maps` end to end on a tiny model: files, their content, and what is refused before a model is loaded."""

from __future__ import annotations

import json

import numpy as np
import pytest
import torch
from PIL import Image
from shell import SIZE, save_tiny

from attnctrl.cli import run

WORDS = ("--words", "red circle", "--words", "blue square")
NAMES = ("pair-5-red-circle.png", "pair-5-blue-square.png", "pair-5-maps.png", "pair-5-maps.json")


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return save_tiny(tmp_path_factory.mktemp("scenes"))


def maps(folder, output, *more):
    return ["maps", str(folder / "pair.yaml"), *WORDS, "-o", str(output), "--device", "cpu", *more]


@pytest.fixture(scope="module")
def made(folder, tmp_path_factory):
    output = tmp_path_factory.mktemp("maps")
    assert run(maps(folder, output, "--format", "quiet")) == 0
    return output


def test_it_writes_a_map_for_each_of_the_words_a_sheet_and_the_numbers(made):
    assert sorted(path.name for path in made.iterdir()) == sorted(NAMES)
    for name in NAMES[:2]:
        with Image.open(made / name) as image:
            assert image.size == (SIZE, SIZE)
            assert np.asarray(image).std() > 1
    with Image.open(made / NAMES[2]) as sheet:
        assert sheet.width > 3 * 256
    told = json.loads((made / NAMES[3]).read_text())
    assert (told["seed"], told["when"], told["steps"], told["controlled"]) == (5, "pre", [0, 1], True)
    assert len(told["layers"]) == 4
    assert set(told["mass"]) == {"red circle", "blue square"}
    assert all(len(mass) == 2 and min(mass) > 0 and max(mass) < 1 for mass in told["mass"].values())


def test_the_numbers_are_those_of_the_library(folder, made):
    from attnctrl.pipelines import ScenePipeline

    from attnctrl.maps import record
    from attnctrl.scene import load_scene

    scene = load_scene(folder / "pair.yaml")
    pipe = ScenePipeline.from_pretrained(str(folder / "tiny"), device="cpu")
    with record(pipe.pipe, ["red circle"], prompt=scene.prompt, max_sequence_length=40) as found:
        pipe(scene, [5])
    told = json.loads((made / NAMES[3]).read_text())
    assert torch.allclose(found.masses("red circle")[:, 0], torch.tensor(told["mass"]["red circle"]), atol=1e-6)


def test_options_reach_the_record(call, folder, tmp_path):
    code, out, err = call(
        *maps(
            folder,
            tmp_path,
            "--layers",
            "single:1",
            "--when",
            "post",
            "--no-control",
            "--steps",
            "1",
            "--seed",
            "7",
            "--format",
            "json",
        )
    )
    assert (code, err) == (0, "")
    told = json.loads(out)
    assert told["layers"] == ["single_transformer_blocks.1.attn"]
    assert (told["when"], told["controlled"], told["steps"], told["seed"]) == ("post", False, [0], 7)
    assert [path.rsplit("/", 1)[1] for path in told["files"]] == [name.replace("-5-", "-7-") for name in NAMES]


@pytest.mark.parametrize(
    ("more", "said"),
    [
        (["--words", "green star"], "is not in the prompt"),
        (["--words", "red circle"], "same words; name"),
        (["--words", "a", "--layers", "triple"], "selects no layer"),
        (["--when", "during"], "during"),
    ],
)
def test_wrong_requests_write_nothing(call, folder, tmp_path, more, said):
    code, out, err = call(*maps(folder, tmp_path / "out", *more))
    assert (code, out) == (2, "")
    assert said in err
    assert not (tmp_path / "out").exists()


def test_words_are_asked_for(call, folder):
    code, out, err = call("maps", folder / "pair.yaml")
    assert (code, out) == (2, "")
    assert "--words" in err
