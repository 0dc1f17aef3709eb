"""`attnctrl info` and `replay`: what a picture says of itself, and the same picture made again to the bit."""

from __future__ import annotations

import json

import numpy as np
import pytest
import torch
from PIL import Image
from shell import SIZE, save_tiny

from attnctrl import provenance


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return save_tiny(tmp_path_factory.mktemp("scenes"))


@pytest.fixture(scope="module")
def picture(folder):
    from attnctrl.cli import run

    assert run(["generate", str(folder / "pair.yaml"), "-o", str(folder), "--device", "cpu", "--format", "quiet"]) == 0
    return folder / "pair-5.png"


def tampered(picture, path, **changes):
    """The picture with one pixel or parts of its record changed."""
    with Image.open(picture) as image:
        values, text = np.asarray(image.convert("RGB")).copy(), dict(image.text)
    if changes.pop("pixel", False):
        values[0, 0, 0] ^= 0x10
    text[provenance.KEY] = json.dumps({**json.loads(text[provenance.KEY]), **changes})
    from attnctrl import files

    return files.write_png(path, Image.fromarray(values), text)


def test_info_tells_what_made_it(call, picture):
    code, out, err = call("info", picture)
    assert (code, err) == (0, "")
    record = provenance.read(picture)
    for told in (
        record["scene"]["prompt"],
        "subject 1",
        "FluxPipeline",
        f"width {SIZE}",
        record["model"]["fingerprint"],
    ):
        assert told in out
    data = json.loads(call("info", picture, "--format", "json")[1])
    assert data["record"] == record
    assert call("info", picture, "--format", "quiet") == (0, f"{picture}\n", "")


def test_info_of_a_picture_without_control(call, folder, tmp_path):
    assert call("generate", folder / "pair.yaml", "-o", tmp_path, "--no-control", "--device", "cpu")[0] == 0
    assert "left out" in call("info", tmp_path / "pair-5.png")[1]


def test_replay_is_bit_equal(call, picture, tmp_path):
    kept = tmp_path / "again.png"
    code, out, err = call("replay", picture, "-o", kept, "--format", "json")
    data = json.loads(out)
    assert (code, err) == (0, "")
    assert (data["equal"], data["largest_difference"], data["differences"]) == (True, 0, [])
    assert kept.read_bytes() == picture.read_bytes()
    assert call("replay", picture)[:2] == (0, f"{picture}: bit-equal\n")


def test_replay_runs_with_the_threads_of_the_picture(call, picture, folder):
    assert provenance.read(picture)["threads"] == torch.get_num_threads() == 1
    torch.set_num_threads(2)
    try:
        assert json.loads(call("replay", picture, "--format", "json")[1])["differences"] == []
        # what is no number of threads is left aside, and what then differs is told
        for wrong in (0, -1, 10**9, "1", 2.5, None):
            changed = tampered(picture, folder / "threads.png", threads=wrong)
            told = json.loads(call("replay", changed, "--format", "json")[1])["differences"]
            assert told == [f"threads: {wrong} then, 2 now"]
        assert torch.get_num_threads() == 2
        # a picture that is there is not made again for its threads
        assert call("generate", folder / "pair.yaml", "-o", folder, "--device", "cpu")[0] == 0
        assert provenance.read(picture)["threads"] == 1
    finally:
        torch.set_num_threads(1)


def test_replay_sees_one_changed_pixel(call, picture, folder):
    changed = tampered(picture, folder / "changed.png", pixel=True)
    code, out, _ = call("replay", changed, "--format", "json")
    data = json.loads(out)
    assert (code, data["equal"], data["largest_difference"]) == (1, False, 16)
    assert call("replay", changed)[1] == f"{changed}: not the same, up to 16 of 255 levels apart\n"


def test_replay_says_what_differs_from_the_first_run(call, picture, folder):
    changed = tampered(picture, folder / "older.png", versions={"torch": "1.0"})
    code, _, err = call("replay", changed)
    assert code == 0
    assert "versions.torch: 1.0 then" in err


@pytest.mark.parametrize("command", ["info", "replay"])
def test_pictures_of_others_are_refused(call, command, tmp_path):
    Image.new("RGB", (8, 8)).save(tmp_path / "foreign.png")
    code, out, err = call(command, tmp_path / "foreign.png")
    assert (code, out) == (2, "")
    assert "carries no record of attnctrl" in err
    assert call(command, tmp_path / "missing.png")[0] == 2


def test_replay_never_writes_over_the_picture(call, picture):
    code, _, err = call("replay", picture, "-o", picture)
    assert code == 2
    assert "is the picture itself" in err
