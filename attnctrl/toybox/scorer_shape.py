"""Shape and pattern of one subject's mask, for the scorer: the world's own shapes and patterns laid over it."""

from __future__ import annotations

from functools import cache

import numpy as np

from . import world

_REACH, _CELLS = 2.2, 221
"""Tables of signed distance span [-reach, reach] radii with so many cells a side."""


@cache
def _table(shape: str) -> np.ndarray:
    """Signed distance of a shape of unit radius, float32 [cells * cells]."""
    axis = np.linspace(-_REACH, _REACH, _CELLS)
    x, y = np.meshgrid(axis, axis)
    return world.signed_distance(shape, x, y).astype(np.float32).ravel()


@cache
def _moments(shape: str) -> tuple[float, float, float]:
    """Area in squared radii, and the centroid's offset from the centre in radii."""
    axis = np.linspace(-_REACH, _REACH, _CELLS)
    x, y = np.meshgrid(axis, axis)
    inside = _table(shape).reshape(_CELLS, _CELLS) < 0
    cell = (axis[1] - axis[0]) ** 2
    return float(inside.sum() * cell), float(x[inside].mean()), float(y[inside].mean())


def _overlaps(shape: str, places: np.ndarray, x: np.ndarray, y: np.ndarray, mask: np.ndarray) -> np.ndarray:
    """Soft intersection over union [K] of `mask` [P] at pixels x, y [P] with a shape at `places` [K, 3] (cx, cy, r)."""
    radius = places[:, 2:3]
    scale = (_CELLS - 1) / (2 * _REACH)
    column = np.clip(((x - places[:, 0:1]) / radius + _REACH) * scale + 0.5, 0, _CELLS - 1).astype(np.int32)
    row = np.clip(((y - places[:, 1:2]) / radius + _REACH) * scale + 0.5, 0, _CELLS - 1).astype(np.int32)
    cover = np.clip(0.5 - _table(shape)[row * _CELLS + column] * radius.astype(np.float32), 0, 1)
    return np.minimum(cover, mask).sum(1) / np.maximum(np.maximum(cover, mask).sum(1), 1e-6)


_STEPS = np.array([(dx, dy, dr) for dx in (-1, 0, 1) for dy in (-1, 0, 1) for dr in (-1, 0, 1)], dtype=np.float64)


def _refined(shape: str, start: np.ndarray, x: np.ndarray, y: np.ndarray, mask: np.ndarray) -> tuple[float, np.ndarray]:
    best, place = float(_overlaps(shape, start[None], x, y, mask)[0]), start
    for step in (0.06, 0.03, 0.03):
        around = place + _STEPS * max(0.4, step * start[2])
        around[:, 2] = np.maximum(around[:, 2], 1.5)
        scores = _overlaps(shape, around, x, y, mask)
        if scores.max() > best:
            best, place = float(scores.max()), around[int(scores.argmax())]
    return best, place


def fit_shapes(mask: np.ndarray) -> list[tuple[float, str, np.ndarray]]:
    """All shapes laid over `mask` (bool or share in [0, 1], [H, W]), best first.

    Returns:
        (intersection over union, shape, (cx, cy, radius) in pixels) of each shape. Those that are far behind at the
        place that area and centroid suggest are not refined.
    """
    rows, columns = np.flatnonzero((mask > 0).any(1)), np.flatnonzero((mask > 0).any(0))
    y0, y1 = max(0, rows[0] - 5), min(mask.shape[0], rows[-1] + 6)
    x0, x1 = max(0, columns[0] - 5), min(mask.shape[1], columns[-1] + 6)
    yy, xx = np.mgrid[y0:y1, x0:x1]
    x, y = xx.ravel() + 0.5, yy.ravel() + 0.5
    value = mask[y0:y1, x0:x1].astype(np.float32).ravel()
    area = float(value.sum())
    mean_x, mean_y = float((x * value).sum()) / area, float((y * value).sum()) / area
    first = []
    for shape in world.SHAPES:
        unit, ox, oy = _moments(shape)
        radius = max(2.0, (area / unit) ** 0.5)
        place = np.array([mean_x - ox * radius, mean_y - oy * radius, radius])
        first.append((float(_overlaps(shape, place[None], x, y, value)[0]), shape, place))
    lead = max(score for score, _, _ in first)
    fits = []
    for score, shape, place in first:
        refined = _refined(shape, place, x, y, value) if score > lead - 0.2 else (score, place)
        fits.append((refined[0], shape, refined[1]))
    return sorted(fits, key=lambda fit: -fit[0])


_SIDE = 32
_SHIFTS = {"striped": (1, 7), "dotted": (7, 7), "checked": (10, 10)}
"""Pixels after which each pattern repeats, (x, y)."""


@cache
def _templates(pattern: str) -> np.ndarray:
    """The pattern at every shift of whole pixels, float32 [K, side * side]."""
    columns, rows = _SHIFTS[pattern]
    y, x = np.mgrid[0:_SIDE, 0:_SIDE].astype(np.float64)
    shifted = [world._pattern(pattern, x + dx, y + dy).ravel() for dy in range(rows) for dx in range(columns)]
    return np.array(shifted, dtype=np.float32)


def fit_patterns(light: np.ndarray, inside: np.ndarray) -> dict[str, float]:
    """How well each pattern but "solid" explains `light` [H, W] where `inside` is True: best correlation over shifts.

    Only a middle part of at most 32 x 32 pixels is looked at. Empty when there is nothing to correlate.
    """
    rows, columns = np.flatnonzero(inside.any(1)), np.flatnonzero(inside.any(0))
    if not rows.size:
        return {}
    y0 = max(rows[0], (rows[0] + rows[-1] + 1 - _SIDE) // 2)
    x0 = max(columns[0], (columns[0] + columns[-1] + 1 - _SIDE) // 2)
    tile = np.zeros((2, _SIDE, _SIDE), dtype=np.float32)
    part = np.s_[y0 : y0 + _SIDE, x0 : x0 + _SIDE]
    height, width = light[part].shape
    tile[0, :height, :width], tile[1, :height, :width] = light[part], inside[part]
    weight = tile[1].ravel()
    count = float(weight.sum())
    value = tile[0].ravel()
    value = (value - (value * weight).sum() / max(count, 1)) * weight
    norm = float(np.sqrt((value**2).sum()))
    if count < 12 or norm < 1e-3:
        return {}
    result = {}
    for pattern in _SHIFTS:
        templates = _templates(pattern)
        mean = templates @ weight / count
        spread = np.sqrt(np.maximum((templates**2) @ weight - count * mean**2, 1e-6))
        result[pattern] = float(((templates @ value) / (norm * spread)).max())
    return result
