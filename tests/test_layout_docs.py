"""The page and the example of layouts are executed as they stand."""

from __future__ import annotations

import re
import runpy
from pathlib import Path

import pytest

from attnctrl import provenance

ROOT = Path(__file__).parents[1]


def test_the_page_runs(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    blocks = re.findall(
        r"```python\n(.*?)```", (ROOT / "docs" / "layout.md").read_text(encoding="utf-8"), flags=re.DOTALL
    )
    monkeypatch.chdir(tmp_path)
    names: dict = {}
    for block in blocks:
        exec(block, names)
    assert len(blocks) == 4
    assert [picture.seed for picture in names["pictures"]] == [1, 2]
    scene, _ = provenance.restore(tmp_path / "layout.png")
    assert len(scene.references()) == 1


def test_the_example_runs(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.chdir(tmp_path)
    runpy.run_path(str(ROOT / "examples" / "layout.py"))
    scene, record = provenance.restore(tmp_path / "out" / "layout.png")
    assert [region.reference for region in scene.regions()] == [0, 1]
    assert record["controlled"] is True
