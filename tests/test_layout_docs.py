"""The pages of layouts, presets and perturbed attention, and the example of layouts, are executed as they stand."""

from __future__ import annotations

import re
import runpy
from pathlib import Path

import pytest

from attnctrl import provenance
from attnctrl.presets import PRESETS
from attnctrl.presets_sets import SETS

ROOT = Path(__file__).parents[1]


def blocks(page: str) -> list[str]:
    return re.findall(r"```python\n(.*?)```", (ROOT / "docs" / page).read_text(encoding="utf-8"), flags=re.DOTALL)


def test_the_page_of_layouts_runs(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.chdir(tmp_path)
    names: dict = {}
    for block in blocks("layout.md"):
        exec(block, names)
    assert len(blocks("layout.md")) == 5
    assert [picture.seed for picture in names["pictures"]] == [1, 2]
    scene, _ = provenance.restore(tmp_path / "layout.png")
    assert len(scene.references()) == 1


def test_the_page_of_presets_runs_and_names_them_all() -> None:
    names: dict = {}
    for block in blocks("presets.md"):
        exec(block, names)
    assert "steps 0-9: regions, isolate" in str(names["told"])
    page = (ROOT / "docs" / "presets.md").read_text(encoding="utf-8")
    assert re.findall(r"^\| `([a-z0-9-]+)` \|", page, flags=re.MULTILINE) == list(PRESETS)


def test_the_example_runs(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.chdir(tmp_path)
    runpy.run_path(str(ROOT / "examples" / "layout.py"))
    scene, record = provenance.restore(tmp_path / "out" / "layout.png")
    assert [region.reference for region in scene.regions()] == [0, 1]
    assert record["controlled"] is True


def test_the_page_of_maps_runs(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.chdir(tmp_path)
    names: dict = {}
    for block in blocks("maps.md"):
        exec(block, names)
    assert len(blocks("maps.md")) == 2
    assert (tmp_path / "maps.png").is_file()
    assert names["mask"].any()
    assert names["shares"].masks.shape == names["grown"].masks.shape == (2, *names["found"].grid)


def test_the_page_of_inversion_runs(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.chdir(tmp_path)
    names: dict = {}
    for block in blocks("inversion.md"):
        exec(block, names)
    assert len(blocks("inversion.md")) == 3
    red, _, blue = names["again"].getpixel((32, 32))
    assert red > 200 > 100 > blue
    assert names["latents"].equal(names["trajectory"].latents[2])
    assert not names["held"].clean.allclose(names["inverter"].generate(names["trajectory"]).clean)


def test_the_page_of_perturbed_attention_runs() -> None:
    names: dict = {}
    first, second, third, fourth, fifth = blocks("perturb.md")
    exec(first, names)
    [told] = names["handle"].report().controls
    assert (told.steps, told.rows) == ((0, 1), (("perturbed", 0),))
    exec(second, names)
    assert names["handle"].report().forwards == 2 * 3
    exec(third, names)
    [told] = names["handle"].report().controls
    assert (names["handle"].report().forwards, told.forwards, told.rows) == (2 * 3, 2, (("perturbed", 0),))
    assert any(line.startswith("replayed") for line in told.plans)
    exec(fourth, names)
    [told] = names["handle"].report().controls
    assert (told.name, told.acted, told.steps) == ("skip", "mid.self:0", (0, 1))
    exec(fifth, names)
    [told] = names["handle"].report().controls
    assert (told.name, told.rows, names["handle"].report().forwards) == ("nag", (("cond", 0),), 2)


def test_the_page_of_reuse_runs() -> None:
    names: dict = {}
    first, second = blocks("reuse.md")
    exec(first, names)
    [told] = names["handle"].report().controls
    assert told.plans == ("outputs kept by pab",)
    assert told.steps == (3, 5)
    assert names["reuse"].predict(names["pipe"], width=64, height=64, text_tokens=40) > 0
    exec(second, names)
    [told] = names["handle"].report().controls
    assert (told.steps, told.plans) == ((4, 5, 6, 7), ("outputs kept by tgate",))


def test_the_page_of_sharing_runs() -> None:
    names: dict = {}
    first, second, third = blocks("sharing.md")
    exec(first, names)
    (told,) = names["handle"].report().controls
    assert (told.steps, told.rows) == ((0, 1), (("cond", 0), ("uncond", 0)))
    assert len(names["images"]) == 4
    exec(second, names)
    exec(third, names)


def test_the_page_of_reposition_runs() -> None:
    names: dict = {}
    turned, exchanged, placed = blocks("reposition.md")
    exec(turned, names)
    share, reposition = names["handle"].report().controls
    assert share.steps == reposition.steps == (0, 1)
    for block in (exchanged, placed):
        exec(block, names)
        assert len(names["kept"]) == 1
        assert names["pins"].forwards == 2


def test_the_page_of_subjects_runs(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.chdir(tmp_path)
    names: dict = {}
    for block in blocks("subjects.md"):
        exec(block, names)
    assert len(blocks("subjects.md")) == 5
    assert (tmp_path / "story.png").is_file()
    assert [region.box for region in names["rehearsal"].regions[1]] == [(0.25, 0.5, 0.75, 1.0)]
    assert [region.name for region in names["rehearsal"].regions[0]] == ["ball", "box"]
    assert [len(names[one].pictures) for one in ("story", "later", "kept", "saved")] == [2, 1, 2, 1]
    assert (tmp_path / "cast.safetensors").stat().st_size > names["bank"].nbytes > 0
    page = (ROOT / "docs" / "subjects.md").read_text(encoding="utf-8")
    assert re.findall(r"^\| `([a-z0-9-]+)` \|", page, flags=re.MULTILINE) == list(SETS)


def test_the_story_runs(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """The example, and the same story as a file."""
    from attnctrl.pipelines.storyfile import load_story

    monkeypatch.chdir(tmp_path)
    names = runpy.run_path(str(ROOT / "examples" / "story.py"))
    assert sorted(path.name for path in (tmp_path / "out").glob("*.png")) == [
        "later-0.png", "later.png", "story-0.png", "story-1.png", "story-2.png", "story-3.png", "story.png",
    ]  # fmt: skip
    told = load_story(ROOT / "examples" / "story.yaml")
    assert (told.characters, told.pictures, told.seed) == (names["CAST"], names["PANELS"], 4)


def test_the_page_of_heads_runs(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.chdir(tmp_path)
    names: dict = {}
    for block in blocks("heads.md"):
        exec(block, names)
    assert len(names["heads"].heads) == 2
    assert names["softer"].sets[0].strength == 0.5
    assert [row["name"] for row in names["told"]["rows"]] == ["none", "first 1", "first 2"]
    page = (ROOT / "docs" / "heads.md").read_text(encoding="utf-8")
    from attnctrl.heads import rungs

    found, before = 0, 0
    for size, pairs in rungs(576, 5, 3):
        found, before = found + (size + 1) * (pairs - before), pairs
    assert f"{found} pictures and not {577 * 5}" in page
