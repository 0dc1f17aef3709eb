"""Where things stand in a scene: boxes that fit the picture, and what is outside all of them."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    import numpy as np


def box_problems(box: tuple[float, ...], right: float, bottom: float, units: str) -> list[tuple[str, str]]:
    """(problem, remedy) of each thing wrong with a box on the canvas [0, right] x [0, bottom]."""
    x0, y0, x1, y1 = box
    if not (x0 < x1 and y0 < y1):
        return [("a box needs x0 < x1 and y0 < y1", "write it as [left, top, right, bottom]")]
    if x0 < 0 or y0 < 0 or x1 > right or y1 > bottom:
        canvas = f"[0, 0, {right:g}, {bottom:g}] in {units} units"
        remedy = "add 'units: pixels'" if units == "normalised" and max(box) > 2 else "move or shrink the box"
        return [(f"the box is not inside the picture {canvas}", remedy)]
    return []


def outside_of(places: Sequence[Any], canvas: tuple[int, int]) -> np.ndarray:
    """Bool mask [height, width] of the pixels whose centre is in none of the boxes and masks."""
    import numpy as np

    height, width = canvas
    y, x = (np.arange(height) + 0.5) / height, (np.arange(width) + 0.5) / width
    outside = np.ones(canvas, dtype=bool)
    for place in places:
        if place is None:
            continue
        if isinstance(place, tuple):
            x0, y0, x1, y1 = place
            outside &= ~(((y >= y0) & (y < y1))[:, None] & ((x >= x0) & (x < x1))[None, :])
        else:
            rows = (y * place.shape[0]).astype(int)
            outside &= ~place[np.ix_(rows, (x * place.shape[1]).astype(int))]
    return outside
