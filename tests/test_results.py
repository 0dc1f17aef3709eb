"""The page of results holds what was stored, and nothing else."""

from __future__ import annotations

import json
from pathlib import Path

from attnctrl.toybox import results

ROOT = Path(__file__).parents[1]


def entry(
    vanilla: float, controlled: float | None = None, ci95: list[float] | None = None, better: str = "higher"
) -> dict:
    delta = None if controlled is None else controlled - vanilla
    return {"vanilla": vanilla, "controlled": controlled, "delta": delta, "ci95": ci95, "better": better}


def test_a_table_has_a_column_for_each_way_of_control():
    layout = {
        "suite": "layout", "model": "toy-sd", "n": 8, "seconds": 12.4, "split": "tune", "command": "attnctrl eval layout",
        "metrics": {
            "binding": entry(0.25, 0.5, [0.125, 0.375]),
            "time_ratio": entry(1.0, 1.5, None, "lower"),
            "other.binding": entry(0.25, 0.75, [0.4, 0.6]),
        },
    }  # fmt: skip
    model = {
        "suite": "model",
        "model": "toy-sd",
        "n": 200,
        "seconds": 3.0,
        "metrics": {"single": entry(0.9, None, [0.85, 0.95])},
    }
    text = results.page([layout, model])
    lines = text.splitlines()
    assert lines.index("## model") < lines.index("## layout")
    assert "| `single` ↑ | 0.900 (0.850 .. 0.950) |" in lines
    assert "| metric | toy-sd (tune) | toy-sd (tune), controlled | toy-sd (tune), other |" in lines
    assert "| `binding` ↑ | 0.250 | 0.500 (+0.125 .. +0.375) | 0.750 (+0.400 .. +0.600) |" in lines
    assert "| `time_ratio` ↓ | 1.000 | 1.500 |  |" in lines
    assert "| toy-sd | 8 | 12 | `attnctrl eval layout` |" in lines


def test_other_files_are_passed_over(tmp_path):
    (tmp_path / "a.json").write_text(json.dumps({"suite": "execute", "rows": []}))
    (tmp_path / "b.json").write_text(json.dumps({"suite": "style", "model": "b", "n": 1, "seconds": 0, "metrics": {}}))
    (tmp_path / "c.json").write_text(json.dumps({"suite": "model", "model": "z", "n": 1, "seconds": 0, "metrics": {}}))
    assert [one["suite"] for one in results.stored(tmp_path)] == ["model", "style"]


def test_the_command_writes_the_page(tmp_path, capsys):
    results.main(["--results", str(tmp_path), "--out", str(tmp_path / "page.md")])
    assert (tmp_path / "page.md").read_text() == results.INTRODUCTION + "\n"
    assert capsys.readouterr().out.strip() == str(tmp_path / "page.md")


def test_the_page_is_what_the_results_say():
    page = (ROOT / "docs" / "results.md").read_text(encoding="utf-8")
    assert page == results.page(results.stored(ROOT / "benchmarks" / "results"))
