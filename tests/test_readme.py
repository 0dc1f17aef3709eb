"""What the README shows is executed as it stands."""

from __future__ import annotations

import re
from pathlib import Path

import pytest
import yaml

ROOT = Path(__file__).parents[1]
README = (ROOT / "README.md").read_text(encoding="utf-8")


def blocks(language: str) -> list[str]:
    return re.findall(rf"```{language}\n(.*?)```", README, flags=re.DOTALL)


def test_python_blocks_run_in_order(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    from PIL import Image

    (tmp_path / "assets").symlink_to(ROOT / "assets")
    monkeypatch.chdir(tmp_path)
    names: dict = {}
    first, second = blocks("python")
    exec(first, names)
    originals = dict(names["pipe"].transformer.attn_processors)
    assert not any("attnctrl" in type(processor).__module__ for processor in originals.values())
    with Image.open(tmp_path / "two_shapes.png") as picture:
        assert picture.size == (64, 64)
    exec(second, names)
    assert all("attnctrl" in type(p).__module__ for p in names["pipe"].transformer.attn_processors.values())


def test_commands_exist_and_their_help_runs(capsys: pytest.CaptureFixture[str]) -> None:
    from typer.testing import CliRunner

    from attnctrl.cli import app

    shown = [line[2:].split("#")[0].split() for block in blocks("console") for line in block.splitlines() if line]
    commands = {line[1] for line in shown if line[0] == "attnctrl"}
    drawing = {"generate", "layout", "style", "subjects", "replay", "invert", "edit", "maps"}
    assert commands == {*drawing, "check", "explain", "models", "eval", "bench", "env"}
    for command in sorted(commands):
        assert CliRunner().invoke(app, [command, "--help"]).exit_code == 0
    targets = {line[1] for line in shown if line[0] == "make"}
    makefile = (ROOT / "Makefile").read_text(encoding="utf-8")
    assert targets == {"demo", "test"}
    assert all(re.search(rf"^{target}:", makefile, flags=re.MULTILINE) for target in targets)


def test_the_scene_shown_is_valid(tmp_path: Path) -> None:
    from attnctrl.scene import load_scene

    (text,) = blocks("yaml")
    path = tmp_path / "scene.yaml"
    path.write_text(text, encoding="utf-8")
    scene = load_scene(path)
    assert [region.prompt for region in scene.regions()] == [one["prompt"] for one in yaml.safe_load(text)["subjects"]]
