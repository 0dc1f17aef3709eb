"""The page of styles and its example are executed as they stand."""

from __future__ import annotations

import runpy
from pathlib import Path

import numpy as np
import pytest
from test_layout_docs import blocks

from attnctrl import provenance

ROOT = Path(__file__).parents[1]


def test_the_page_of_styles_runs(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.chdir(tmp_path)
    names: dict = {}
    first, second, third, fourth, fifth = blocks("style.md")
    exec(first, names)
    assert [one.seed for one in names["pictures"]] == [1, 2, 3]
    assert "share_style" in names["pictures"][1].report
    exec(second, names)
    (told,) = names["handle"].report().controls
    assert told.acted == "single:0-3"
    exec(third, names)
    assert len(names["styled"]) == 2
    again, styled = (np.asarray(one.image).astype(int) for one in (names["again"], names["styled"][0]))
    assert np.abs(again - styled).max() <= 1
    exec(fourth, names)
    assert len(names["kept"]) == 2
    assert names["kept"][0].record["set"]["bank"]
    exec(fifth, names)
    assert names["drawn"].size == (64, 64)


def test_the_example_draws_ten_icons(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.chdir(tmp_path)
    runpy.run_path(str(ROOT / "examples" / "style.py"))
    records = [provenance.read(path) for path in sorted((tmp_path / "out").glob("icon-*.png"))]
    assert len(records) == 10
    assert {record["set"]["prompts"][0] for record in records} == {records[0]["scene"]["prompt"]}
    assert [record["seed"] for record in records] == list(range(4, 14))
