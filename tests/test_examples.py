"""Every script of examples/ runs, with two steps a picture, and writes what it says."""

from __future__ import annotations

import runpy
from pathlib import Path

import pytest
from attnctrl.pipelines import models
from PIL import Image

from attnctrl import provenance

ROOT = Path(__file__).parents[1]
SCRIPTS = sorted(path for path in (ROOT / "examples").glob("*.py") if path.name != "__init__.py")


@pytest.fixture
def here(tmp_path, monkeypatch):
    """A folder with the examples in it, and models whose own number of steps is two."""
    own = models.read_defaults
    monkeypatch.setattr(models, "read_defaults", lambda folder: {**own(folder), "steps": 2})
    (tmp_path / "examples").symlink_to(ROOT / "examples")
    monkeypatch.chdir(tmp_path)
    return tmp_path


def test_there_is_a_short_script_for_each_main_use():
    assert [path.stem for path in SCRIPTS] == [
        "edit", "first_picture", "layout", "maps", "references", "story", "style", "style_picture",
    ]  # fmt: skip
    assert max(len(path.read_text("utf-8").splitlines()) for path in SCRIPTS) <= 60


@pytest.mark.parametrize("script", SCRIPTS, ids=lambda path: path.stem)
def test_the_script_runs_and_writes_its_pictures(here, capsys, script):
    names = runpy.run_path(str(script))
    told = capsys.readouterr().out
    written = sorted((here / "out").glob("*.png"))
    assert written
    for path in written:
        with Image.open(path) as image:
            assert image.convert("RGB").getcolors(2) is None, f"{path.name} is empty"
    named = [line for line in told.splitlines() if line.endswith(".png")]
    assert all((here / name).is_file() for name in named)
    CHECKS.get(script.stem, lambda folder, found: None)(here / "out", names)


def _references(out, names):
    scene, record = provenance.restore(out / "references.png")
    assert [region.reference for region in scene.regions()] == [0, 1, 2]
    assert record["settings"]["steps"] == 2
    assert sorted(names["bound"].files) == ["reference-0.png", "reference-1.png", "reference-2.png"]
    assert provenance.read(out / "references-loose.png")["controlled"] is False
    assert (out / "references.png").read_bytes() != (out / "references-loose.png").read_bytes()


def _style_picture(out, names):
    record = provenance.read(out / "styled-0.png")
    assert record["set"]["prompts"] == [
        "a red circle center, beige background",
        "a blue square center, beige background",
    ]
    assert (out / "styled-again.png").read_bytes() == (out / "styled-0.png").read_bytes()


def _edit(out, names):
    assert sorted(path.name for path in out.iterdir()) == ["edit-blue.png", "edit-held.png"]
    assert [provenance.read(out / f"edit-{name}.png")["settings"]["share"] for name in ("blue", "held")] == [0.3, 0.8]


def _maps(out, names):
    assert names["mask"].any()
    assert not names["mask"].all()
    assert [one.name for one in names["handle"].report().controls] == ["perturb"]


CHECKS = {"references": _references, "style_picture": _style_picture, "edit": _edit, "maps": _maps}
