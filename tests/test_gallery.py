"""The gallery: every plate can be drawn, is kept, and is shown."""

from __future__ import annotations

import json
import sys
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

ROOT = Path(__file__).parents[1]
sys.path.insert(0, str(ROOT / "docs"))
from gallery import FACTS, HERE, PLATES, digest  # noqa: E402


@pytest.mark.parametrize("name", PLATES)
def test_every_plate_shows_what_its_method_changes(name):
    """Drawn in a few steps: every pair differs, by two levels at least somewhere, unless the method only watches."""
    # of two steps none lies where attention is reused
    drawn = PLATES[name](5 if name == "reuse" else 2)
    assert np.asarray(drawn.image).std() > 20
    assert drawn.pairs
    for plain, made in drawn.pairs:
        furthest = np.abs(np.subtract(plain, made, dtype=float)).max()
        assert furthest == 0 if drawn.watches else furthest >= 2
    with Image.open(HERE / f"{name}.png") as kept:
        facts = json.loads(kept.text[FACTS])
        assert kept.size == drawn.image.size
        assert facts["pixels"] == digest(kept)
    assert facts["model"] == drawn.model
    assert len(facts["apart"]) == len(drawn.pairs)
    assert all(one == 0 if drawn.watches else one > 0.1 for one in facts["apart"])


@pytest.mark.parametrize("name", PLATES)
def test_every_plate_is_on_the_page_with_its_model(name):
    page = (ROOT / "docs" / "gallery.md").read_text(encoding="utf-8")
    before, found, _ = page.partition(f"(../assets/gallery/{name}.png)")
    assert found
    with Image.open(HERE / f"{name}.png") as kept:
        assert json.loads(kept.text[FACTS])["model"] in before.rpartition("(../assets/gallery/")[2]


def test_nothing_else_is_kept():
    assert {path.stem for path in HERE.glob("*")} == set(PLATES)
