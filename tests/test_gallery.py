"""The gallery: every plate can be drawn, is kept, and is shown."""

from __future__ import annotations

import sys
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

ROOT = Path(__file__).parents[1]
sys.path.insert(0, str(ROOT / "docs"))
from gallery import HERE, PLATES  # noqa: E402


@pytest.mark.parametrize("name", PLATES)
def test_every_plate_is_drawn_kept_and_shown(name):
    drawn = PLATES[name](2)
    assert np.asarray(drawn).std() > 20
    with Image.open(HERE / f"{name}.png") as kept:
        assert kept.size == drawn.size
    assert f"(../assets/gallery/{name}.png)" in (ROOT / "docs" / "gallery.md").read_text(encoding="utf-8")


def test_nothing_else_is_kept():
    assert {path.stem for path in HERE.glob("*")} == set(PLATES)
