"""`attnctrl generate` with many scenes: going on after an interruption, failures that stop nothing, several processes."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
from attnctrl.pipelines import ScenePipeline
from PIL import Image
from shell import SCENE, SIZE, save_tiny

DRAW = ScenePipeline.__call__


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    root = save_tiny(tmp_path_factory.mktemp("scenes"))
    Image.new("L", (SIZE, SIZE), 255).save(root / "half.png")
    (root / "masked.yaml").write_text(
        SCENE.replace("box: [0, 0, 0.5, 1]", "mask: half.png").replace("seed: 5", "seed: 9")
    )
    return root


@pytest.fixture
def drawn(monkeypatch):
    """Seeds of the pictures that were drawn, in order."""
    seeds = []

    def draw(self, scene, wanted, **options):
        seeds.extend(wanted)
        return DRAW(self, scene, wanted, **options)

    monkeypatch.setattr(ScenePipeline, "__call__", draw)
    return seeds


def test_a_run_goes_on_where_it_stopped(call, folder, tmp_path, drawn):
    arguments = ["generate", folder / "pair.yaml", "-o", tmp_path, "--steps", 1, "--device", "cpu"]
    assert call(*arguments, "-n", 2)[0] == 0
    before = {path.name: path.read_bytes() for path in tmp_path.iterdir()}
    (tmp_path / "pair-6.png").write_bytes(before["pair-6.png"][:-40])  # a copy that broke off
    code, out, err = call(*arguments, "-n", 3, "--format", "json")
    assert (code, err) == (0, "")
    assert drawn == [5, 6, 6, 7]
    assert [one["kept"] for one in json.loads(out)["images"]] == [True, False, False]
    assert {name: (tmp_path / name).read_bytes() for name in before} == before
    assert "was there" in call(*arguments)[1]


@pytest.mark.parametrize("changed", [["--steps", 2], ["--no-control"], ["--dtype", "bfloat16"], ["--again"]])
def test_pictures_of_another_run_are_drawn_anew(call, folder, tmp_path, drawn, changed):
    arguments = ["generate", folder / "pair.yaml", "-o", tmp_path, "--steps", 1, "--device", "cpu"]
    assert call(*arguments)[0] == call(*arguments, *changed)[0] == 0
    assert drawn == [5, 5]


def test_a_changed_mask_makes_another_picture(call, folder, tmp_path, drawn):
    arguments = ["generate", folder / "masked.yaml", "-o", tmp_path, "--steps", 1, "--device", "cpu"]
    assert call(*arguments)[0] == call(*arguments)[0] == 0
    assert drawn == [9]
    half = Image.new("L", (SIZE, SIZE), 0)
    half.paste(255, (0, 0, SIZE // 2, SIZE))
    half.save(folder / "half.png")
    assert call(*arguments)[0] == 0
    assert drawn == [9, 9]


def test_a_scene_that_fails_does_not_stop_the_others(call, folder, tmp_path, monkeypatch):
    def draw(self, scene, seeds, **options):
        if seeds == [5]:
            raise MemoryError("no room")
        return DRAW(self, scene, seeds, **options)

    monkeypatch.setattr(ScenePipeline, "__call__", draw)
    scenes = [folder / "pair.yaml", folder / "masked.yaml"]
    arguments = ["generate", *scenes, "-o", tmp_path, "--steps", 1, "--format", "json"]
    code, out, err = call(*arguments)
    data = json.loads(out)
    assert code == 1
    assert [one["seed"] for one in data["images"]] == [9]
    assert data["failed"] == ["no room"]
    assert f"failed: {scenes[0]}, seed 5: no room" in err
    assert "1 of 2 pictures failed" in err
    assert [path.name for path in tmp_path.iterdir()] == ["masked-9.png"]
    with pytest.raises(MemoryError):
        call(*arguments, "--debug")


def test_a_process_that_fails_waits_for_the_others(call, folder, tmp_path, monkeypatch):
    """Else the launcher would end them in the middle of their pictures; one picture of two is its part."""
    from attnctrl.cli import generate
    from attnctrl.cli.processes import Processes

    gathered = []

    class Second(Processes):
        def gathered(self, found):
            gathered.append(found)
            return found

    def fail(*_, **__):
        raise MemoryError

    monkeypatch.setattr(generate, "processes", lambda device: Second(1, 2))
    monkeypatch.setattr(ScenePipeline, "__call__", fail)
    code, out, err = call("generate", folder / "pair.yaml", "-n", 2, "-o", tmp_path, "--steps", 1, "--format", "json")
    assert (code, out) == (1, "")
    assert gathered == [[], ["MemoryError"]]
    assert "seed 6: MemoryError" in err


def test_two_processes_make_the_pictures_of_one(call, folder, tmp_path):
    command = ["generate", str(folder / "pair.yaml"), "-n", "3", "--steps", "1", "--device", "cpu", "--format", "json"]
    launch = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2", "-m", "attnctrl"]
    quiet = {**os.environ, "OMP_NUM_THREADS": "1", "TORCH_CPP_LOG_LEVEL": "ERROR"}
    done = subprocess.run(
        [*launch, *command, "-o", str(tmp_path / "two")], capture_output=True, text=True, check=False, env=quiet
    )
    assert done.returncode == 0, done.stderr
    images = json.loads(done.stdout)["images"]
    assert [one["seed"] for one in images] == [5, 6, 7]
    assert call(*command, "-o", tmp_path / "one")[0] == 0
    for one in images:
        name = Path(one["path"]).name
        assert (tmp_path / "two" / name).read_bytes() == (tmp_path / "one" / name).read_bytes()
