"""Embeddings from what the scorer reads: which subject it is, and in which style a picture is drawn.

Both are parts put side by side, each of them soft: a subject between two shapes lies between them, so that cosines fall
smoothly as identity or style is lost.
"""

from __future__ import annotations

from functools import cache

import numpy as np
from scipy import ndimage

from ..metrics.layout import mask_box
from . import world
from .scorer import Found, Reading
from .scorer_color import COLOR_NAMES, light_share, opponent
from .scorer_shape import fit_patterns, fit_shapes

PARTS = {"shape": 1.0, "silhouette": 0.5, "color": 1.0, "pattern": 1.0}
"""Squared weight of each part of an identity."""
_OVERLAP, _HUE, _CORRELATION = 0.05, 14.0, 0.12
"""Differences that halve a likeness or so: in overlap, in degrees, in correlation."""
_SIDE = 16
_SOLID_SHARE = 0.12
"""Share of light pixels above which nothing of a subject is solid; the scorer calls it solid up to half of that."""
_DRAWN_WAVES, _DRAWN_GRAIN = 22.0, 12.0
"""What the world draws, in levels; see `scorer_style.Evidence`."""
_REST = 0.25
"""Share of it that noise and decoders leave on any ground."""


def identity_embedding(image: np.ndarray, found: Found) -> np.ndarray:
    """Which subject it is, whatever its place, its size, the ground and the style of the picture.

    Four parts: the fit of each shape, the outline in its box, the nearness to each palette colour by hue (tints and
    shades that patterns, grain and light make do not turn it), the fit of each pattern.

    Args:
        image: uint8 [H, W, 3].
        found: a subject that was read from it.

    Returns:
        float64 [6 + 256 + 6 + 4], of unit length.
    """
    parts = {
        "shape": _shape(found.mask),
        "silhouette": _silhouette(found.mask),
        "color": _color(image, found.mask),
        "pattern": _pattern(image, found),
    }
    return _unit(np.concatenate([np.sqrt(PARTS[name]) * _unit(part) for name, part in parts.items()]))


def style_embedding(reading: Reading) -> np.ndarray:
    """In which style a picture is drawn, whatever stands in it and on which ground.

    Hatching at each angle, grain, no rim, a rim of each outline's colour. The colour of the ground is no part of it: a
    caption tells it, so it is content. Nor is the grain's seed: no eye would call another one another style.

    Returns:
        float64 [4 + 1 + 4], of unit length.
    """
    evidence = reading.evidence
    ground = np.minimum(np.append(evidence.waves / _DRAWN_WAVES, evidence.grain / _DRAWN_GRAIN), 1.0)
    ground = np.clip((ground - _REST) / (1 - _REST), 0, 1)
    # What is not known of rims is any of them. Between waves or grain rims do not show: they count on a plain ground.
    rims = evidence.rims + (1 - evidence.rims.sum()) / len(evidence.rims)
    return _unit(np.concatenate([ground, rims * max(0.0, 1 - 3 * float(ground.max()))]))


def _unit(vector: np.ndarray) -> np.ndarray:
    """`vector` at length 1; zeros stay."""
    return vector / max(float(np.linalg.norm(vector)), 1e-12)


def _shape(mask: np.ndarray) -> np.ndarray:
    fits = {shape: score for score, shape, _ in fit_shapes(mask)}
    scores = np.array([fits[shape] for shape in world.SHAPES])
    return np.exp((scores - scores.max()) / _OVERLAP)


def _silhouette(mask: np.ndarray) -> np.ndarray:
    """The mask in a square around its box, resampled; inside +0.5, outside -0.5."""
    x0, y0, x1, y1 = np.array(mask_box(mask)) * np.tile(mask.shape[::-1], 2)
    side = max(x1 - x0, y1 - y0) / _SIDE
    offsets = (np.arange(_SIDE) + 0.5 - _SIDE / 2) * side - 0.5
    rows, columns = np.meshgrid((y0 + y1) / 2 + offsets, (x0 + x1) / 2 + offsets, indexing="ij")
    return (ndimage.map_coordinates(mask.astype(np.float64), [rows, columns], order=1) - 0.5).ravel()


@cache
def _palette_hues() -> np.ndarray:
    return _hue(opponent(np.array(list(world.COLORS.values()))))


def _hue(points: np.ndarray) -> np.ndarray:
    """Degrees of opponent colours [..., 3]."""
    return np.rad2deg(np.arctan2(points[..., 1], points[..., 0]))


def _color(image: np.ndarray, mask: np.ndarray) -> np.ndarray:
    """Nearness of the mask's hue to each palette colour's. Mixtures with the ground at the outline are left out."""
    inner = ndimage.binary_erosion(mask)
    mean = opponent(image[inner if inner.any() else mask]).mean(0)
    apart = np.abs((_hue(mean) - _palette_hues() + 180) % 360 - 180)
    return np.exp(-((apart / _HUE) ** 2))


def _pattern(image: np.ndarray, found: Found) -> np.ndarray:
    """Solid by the share of light pixels; the rest to the other patterns, the more the better they explain them."""
    inside = ndimage.binary_erosion(found.mask, np.ones((3, 3)))
    color = np.full(found.mask.size, COLOR_NAMES.index(found.color or COLOR_NAMES[0]))
    light = light_share(opponent(image.reshape(-1, 3)), color).reshape(found.mask.shape)
    share = float((light[inside] > 0.5).mean()) if inside.any() else 0.0
    solid = float(np.clip(1 - share / _SOLID_SHARE, 0, 1))
    fits = fit_patterns(light, inside)
    scores = np.array([fits.get(name, 0.0) for name in world.PATTERNS[1:]])
    others = np.exp((scores - scores.max()) / _CORRELATION)
    return np.append(solid, (1 - solid) * others / others.sum())
