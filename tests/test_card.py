"""Model cards: written from facts and scores, and their code runs with stock Diffusers."""

from __future__ import annotations

import json
import re
from pathlib import Path

import pytest

from attnctrl.toybox import card
from attnctrl.toybox.models import RECIPES

ROOT = Path(__file__).parents[1]
MODELS = sorted(path.parent.name for path in (ROOT / "assets").glob("toy-*/model_index.json"))


def test_every_model_has_words_of_its_own():
    assert set(card.ABOUT) == set(RECIPES)
    assert "toy-flux" in MODELS


def test_a_card_holds_the_numbers_it_is_given():
    entry = {"vanilla": 0.9126, "ci95": [0.85, 0.951]}
    scores = {"n": 200, "command": "attnctrl eval model -m x", "metrics": dict.fromkeys(card.MEANING, entry)}
    text = card.card("toy-sd", {"training": {"samples": 123456, "seconds": 7200}}, scores, 12.34)
    flowing = " ".join(text.split())
    assert "123,456 samples in 2.0 hours" in flowing
    assert "fp16 safetensors, 12.3 MB" in flowing
    assert text.count("| 0.913 | 0.850 .. 0.951 |") == len(card.MEANING)
    assert "`attnctrl eval model -m x`, 200 held-out captions" in text


@pytest.mark.parametrize("name", MODELS)
def test_the_card_is_what_facts_and_scores_say(name):
    folder = ROOT / "assets" / name
    scores = json.loads((ROOT / "benchmarks" / "results" / f"model-{name}.json").read_text(encoding="utf-8"))
    facts = json.loads((folder / "attnctrl.json").read_text(encoding="utf-8"))
    size = card.megabytes(folder)
    assert 1 < size <= 20
    assert (folder / "README.md").read_text(encoding="utf-8") == card.card(name, facts, scores, size)


@pytest.mark.parametrize("name", MODELS)
def test_the_code_of_the_card_runs(name, monkeypatch):
    monkeypatch.chdir(ROOT)
    (code,) = re.findall(r"```python\n(.*?)```", (ROOT / "assets" / name / "README.md").read_text(), flags=re.DOTALL)
    assert "attnctrl" not in code
    names: dict = {}
    exec(code, names)
    assert names["image"].size == (64, 64)
