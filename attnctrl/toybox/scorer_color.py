"""Pixels to colour classes, for the scorer: which palette colour a pixel shows, if any.

Grain and hatching shift all three channels alike, so pixels are compared in an opponent space whose first two axes do
not see such shifts; lightness, the third, counts a quarter. There every palette colour and its light tint (patterns mix
the two) lie on one ray, which blurring only moves along.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import cache

import numpy as np
from scipy import ndimage

from . import world

COLOR_NAMES = tuple(world.COLORS)
TINT = 0.55
"""Share of white in the light colour of patterns."""
LIGHTNESS = 0.25
"""Weight of lightness against the two opponent axes."""
SHADE = 42.0
"""How much hatching darkens the ground (or lightens a black one)."""

_AXES = np.array([[1, -1, 0], [1, 1, -2], [1, 1, 1]], dtype=np.float32) / np.sqrt(
    np.array([[2], [6], [3]], dtype=np.float32)
)
_MAX_DRIFT = 14.0
"""How far the ground of a picture may lie from its palette colour, in opponent units, and still be followed."""


def opponent(rgb: np.ndarray) -> np.ndarray:
    """RGB [..., 3] in 0..255 to (red-green, yellow-blue, weighted lightness) [..., 3]."""
    result = rgb.astype(np.float32) @ _AXES.T
    result[..., 2] *= LIGHTNESS
    return result


def tint(rgb: np.ndarray, share: float = 1.0) -> np.ndarray:
    """A palette colour with `share` of the full light tint."""
    return rgb + share * TINT * (255.0 - rgb)


@dataclass(frozen=True)
class Classes:
    """`color`: int8 [H, W], index into `COLOR_NAMES` or -1; `background`: a name; `light`: float [H, W] in [0, 1], how
    light the tint is at pixels that show a colour."""

    color: np.ndarray
    background: str
    light: np.ndarray


@cache
def _color_prototypes() -> tuple[np.ndarray, np.ndarray]:
    points, owners = [], []
    for index, rgb in enumerate(world.COLORS.values()):
        for share in (0.0, 0.35, 0.7, 1.0):
            points.append(tint(np.array(rgb, dtype=float), share))
            owners.append(index)
    return opponent(np.array(points)), np.array(owners)


@cache
def _ground_points(background: str) -> np.ndarray:
    """The ground's colour at the three shades of hatching, in opponent units [3, 3]."""
    base = np.array(world.BACKGROUNDS[background], dtype=float)
    shade = SHADE if base.mean() < 90 else -SHADE
    return opponent(base + shade * np.array([[0.0], [0.5], [1.0]]))


def _squared(points: np.ndarray, prototypes: np.ndarray) -> np.ndarray:
    """Squared distances [P, K] of points [P, 3] to prototypes [K, 3]."""
    return (points**2).sum(1)[:, None] - 2 * points @ prototypes.T + (prototypes**2).sum(1)[None]


def _find_background(points: np.ndarray, free: np.ndarray) -> str:
    """The ground that is nearest to most pixels of `free` (those that no palette colour is nearest to)."""
    chosen = points[free] if free.any() else points
    names = list(world.BACKGROUNDS)
    distance = np.stack([_squared(chosen, _ground_points(n)).min(1) for n in names], axis=1)
    return names[int(np.bincount(distance.argmin(1), minlength=len(names)).argmax())]


def _ground_and_lines(points: np.ndarray, background: str) -> np.ndarray:
    """Prototypes that are no subject [K, 3]: the ground as this picture really has it, outlines, mixtures of both."""
    ground = _ground_points(background)
    near = points[_squared(points, ground).min(1) < 40.0**2]
    if len(near):
        drift = (np.median(near, axis=0) - ground[0])[:2]
        size = float(np.hypot(*drift))
        ground = ground.copy()
        ground[:, :2] += drift * min(1.0, _MAX_DRIFT / max(size, 1e-6))
    lines = opponent(np.array(list(world.OUTLINES.values()), dtype=float))
    mixtures = [(ground[0] + line) / 2 for line in lines]
    return np.concatenate([ground, lines, np.stack(mixtures)])


def classify(image: np.ndarray) -> Classes:
    """Colour class of every pixel of a picture uint8 [H, W, 3]."""
    height, width = image.shape[:2]
    points = opponent(image.reshape(-1, 3))
    palette, owners = _color_prototypes()
    to_palette = _squared(points, palette)
    neutral = np.concatenate([_ground_points(n) for n in world.BACKGROUNDS])
    free = _squared(points, neutral).min(1) < to_palette.min(1)
    background = _find_background(points, free)
    to_rest = _squared(points, _ground_and_lines(points, background)).min(1)
    nearest = to_palette.argmin(1)
    color = np.where(to_palette.min(1) < to_rest, owners[nearest], -1).astype(np.int8).reshape(height, width)
    return Classes(_despeckle(color), background, light_share(points, color.ravel()).reshape(height, width))


def _despeckle(color: np.ndarray) -> np.ndarray:
    """Drop pixels of a class with fewer than two of their eight neighbours in it: noise, and edges between colours."""
    result = color.copy()
    for index in np.unique(color[color >= 0]):
        mask = color == index
        near = ndimage.uniform_filter(mask.astype(np.float32), 3, mode="constant") * 9
        result[mask & (near < 2.5)] = -1
    return result


def light_share(points: np.ndarray, color: np.ndarray) -> np.ndarray:
    """How light pixels are: 0 at the palette colour, 1 at its light tint, by the length along the colour's ray.

    Args:
        points: [P, 3] in opponent units.
        color: int [P], index into `COLOR_NAMES`, or -1 for none.

    Returns:
        float32 [P] in [0, 1]; 0 where no colour is.
    """
    rays = opponent(np.array(list(world.COLORS.values()), dtype=float))[:, :2]
    ray = rays[np.maximum(color, 0)]
    length = (points[:, :2] * ray).sum(1) / (ray**2).sum(1)
    return np.where(color >= 0, np.clip((1 - length) / TINT, 0, 1), 0).astype(np.float32)
