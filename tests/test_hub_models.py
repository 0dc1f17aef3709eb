"""The commands of docs/hub-models.md are commands: all that they say is understood, up to the loading of the model."""

from __future__ import annotations

import re
import shlex
import shutil
from pathlib import Path

import numpy as np
import pytest
from attnctrl.pipelines.base import Wrapper
from PIL import Image
from safetensors.numpy import save_file

from attnctrl.cli import run

ROOT = Path(__file__).parents[1]
PAGE = (ROOT / "docs" / "hub-models.md").read_text("utf-8")
LINES = re.findall(r"^\$ attnctrl (.+)$", PAGE, flags=re.MULTILINE)
MODELS = {
    "black-forest-labs/FLUX.1-dev", "black-forest-labs/FLUX.1-Kontext-dev", "stabilityai/stable-diffusion-xl-base-1.0",
    "stabilityai/stable-diffusion-3.5-medium", "stabilityai/stable-diffusion-3.5-large",
}  # fmt: skip


class Loads(Exception):
    """In place of a model."""


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """A folder with the files that the page names."""
    made = tmp_path_factory.mktemp("hub")
    shutil.copytree(ROOT / "examples", made / "examples")
    for name in ("cat", "dog", "photo", "poster"):
        Image.new("RGB", (96, 64), "red").save(made / f"{name}.png")
    mask = np.zeros((64, 64), np.uint8)
    mask[:, :32] = 255
    Image.fromarray(mask).save(made / "cat-mask.png")
    (made / "loras").mkdir()
    save_file({"x": np.zeros(1, np.float32)}, made / "loras" / "ink.safetensors")
    return made


@pytest.mark.parametrize("line", LINES)
def test_the_line_is_understood_up_to_the_model(folder, monkeypatch, line):
    def load(cls, model, *, device, dtype, setup=None):
        raise Loads(model.source, setup)

    monkeypatch.setattr(Wrapper, "from_pretrained", classmethod(load))
    monkeypatch.chdir(folder)
    words = shlex.split(line)
    with pytest.raises(Loads) as loading:
        run(["--debug", *words])
    source, setup = loading.value.args
    assert source == words[words.index("-m") + 1]
    told = setup.record() if setup is not None else {}
    asked = {name for name in ("cpu_offload", "attention_backend", "compile") if f"--{name.replace('_', '-')}" in words}
    assert set(told) == asked | ({"loras"} if "--lora" in words else set())
    assert not (folder / "out").exists()


def test_the_page_tells_every_use_on_every_model():
    told = {(words[words.index("-m") + 1], words[0]) for words in map(shlex.split, LINES)}
    assert {model for model, _ in told} == MODELS
    assert {command for _, command in told} == {"layout", "style", "subjects", "generate", "edit", "maps", "invert"}
    assert PAGE.count("nobody here has run them") == 1
