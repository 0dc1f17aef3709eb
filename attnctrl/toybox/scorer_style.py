"""How a picture is drawn, for the scorer: rims around subjects, waves on the ground, grain; from how the world draws.

Evidence is measured apart from what it is taken for, so that embeddings can use it as well. A style has a name only
when its own evidence is clear and that of the others is clearly missing.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import cache

import numpy as np
from scipy import ndimage

from . import world

CLEAR = 4.0
"""Pixels from a subject where the ground begins: past the widest rim and its blur."""
_WAVE, _CELL = 6.0, 4
"""Pixels of a wave of hatching, and of a side of a cell of grain."""
_LEAST = 8
"""Fewer pixels of a ring say nothing."""
_NORMAL_MEDIAN = 0.6745
"""Median magnitude of a standard normal variable."""
WAVES = (5.0, 9.0)
"""Amplitude in levels below which there is no hatching, and above which there is: drawn 22, blurred and decoded 15."""
GRAIN = (3.0, 4.5)
"""Likewise the deviation of grain: drawn 13; blurred 6, and 5 on white, where it is clipped."""
CLEAR_SHARE = 0.6
"""Share of a kind of rim (or of none) from which it is taken for sure."""
RIM_NAMES = tuple(world.OUTLINES)


@dataclass(frozen=True)
class Style:
    """`name` of `world.STYLES`; `outline` of `world.OUTLINES` if outlined; `hatch_angle` of `world.HATCH_ANGLES` if
    hatched. None where the scorer does not know, or where there is none."""

    name: str | None
    outline: str | None = None
    hatch_angle: int | None = None


@dataclass(frozen=True, eq=False)
class Evidence:
    """What shows how a picture is drawn.

    Attributes:
        waves: float [4], amplitude of hatching at each of `world.HATCH_ANGLES`, in levels of 255.
        grain: standard deviation of cells of grain, in levels; 0 where noise explains what is there.
        rims: float [1 + 3], shares of no rim and of a rim of each of `world.OUTLINES`; they sum to 1 at most, and to
            less the less is known (0 without subjects).
    """

    waves: np.ndarray
    grain: float
    rims: np.ndarray


def read_style(evidence: Evidence) -> Style:
    """The style that the evidence is clear about; a picture without subjects is never called flat."""
    order = np.argsort(evidence.waves)
    highest, second = evidence.waves[order[-1]], evidence.waves[order[-2]]
    hatched = _between(highest, WAVES)
    grainy = _between(evidence.grain, GRAIN)
    # A decoder's errors on hatching step at the edges of cells as well.
    if hatched and evidence.grain < highest / 2:
        return Style("hatched", hatch_angle=world.HATCH_ANGLES[order[-1]] if highest > 2 * second else None)
    if grainy and hatched is False:
        return Style("grainy")
    rim = int(evidence.rims.argmax())
    if hatched is False and grainy is False and evidence.rims[rim] >= CLEAR_SHARE:
        return Style("outlined", outline=RIM_NAMES[rim - 1]) if rim else Style("flat")
    return Style(None)


def _between(value: float, limits: tuple[float, float]) -> bool | None:
    """False below the lower limit, True from the upper one, None between."""
    return True if value >= limits[1] else False if value < limits[0] else None


def measure_style(image: np.ndarray, subjects: np.ndarray, background: str) -> Evidence:
    """Evidence of style.

    Args:
        image: uint8 [H, W, 3].
        subjects: bool [N, H, W], the pixels of each subject; N may be 0.
        background: what the ground was read as.
    """
    value = image.astype(np.float64)
    light = value.mean(2)
    union = subjects.any(0) if len(subjects) else np.zeros(light.shape, dtype=bool)
    outside = ndimage.distance_transform_edt(~union) if union.any() else np.full(light.shape, np.inf)
    ground = outside > CLEAR
    rims = np.zeros(1 + len(RIM_NAMES))
    if union.any() and ground.any():
        distance = np.where(union, 0.5 - ndimage.distance_transform_edt(union), outside - 0.5)
        rims = _rims(value, distance, value[ground], background)
    return Evidence(_waves(light, ground), _grain(light, ground), rims)


@cache
def _wave_bases(height: int, width: int) -> np.ndarray:
    """Cosine and sine of a wave of hatching at each angle, float64 [4, 2, H, W]."""
    y, x = np.mgrid[0:height, 0:width]
    angles = np.deg2rad(world.HATCH_ANGLES)[:, None, None]
    phase = (x * np.sin(angles) + y * np.cos(angles)) * (2 * np.pi / _WAVE)
    return np.stack([np.cos(phase), np.sin(phase)], axis=1)


def _waves(light: np.ndarray, ground: np.ndarray) -> np.ndarray:
    """Amplitude of the wave at each angle that fits `light` best where `ground` is True; whatever its phase."""
    if ground.sum() < 64:
        return np.zeros(len(world.HATCH_ANGLES))
    value = light[ground] - light[ground].mean()
    result = []
    for basis in _wave_bases(*light.shape)[:, :, ground]:
        basis = basis - basis.mean(1, keepdims=True)
        result.append(np.hypot(*np.linalg.lstsq(basis.T, value, rcond=None)[0]))
    return np.array(result)


def _grain(light: np.ndarray, ground: np.ndarray) -> float:
    """How much more the ground steps between cells of grain than within them, as a deviation of the cells.

    By medians: a VAE leaves a few large steps beside strong outlines, at the edges of cells as well.
    """
    between, within = [], []
    for axis in (0, 1):
        value, valid = np.moveaxis(light, axis, 0), np.moveaxis(ground, axis, 0)
        step, both = np.abs(np.diff(value, axis=0)), valid[:-1] & valid[1:]
        between.append(step[_CELL - 1 :: _CELL][both[_CELL - 1 :: _CELL]])
        within.append(step[1::_CELL][both[1::_CELL]])
    at, off = np.concatenate(between), np.concatenate(within)
    if min(at.size, off.size) < 32:
        return 0.0
    square = (float(np.median(at)) ** 2 - float(np.median(off)) ** 2) / _NORMAL_MEDIAN**2
    return float(np.sqrt(max(0.0, square / 2)))


_STEP, _REACH = 0.1, 8.0
_BLURS = (0.0, 0.5, 0.8, 1.1)
_OFFSETS = np.arange(-0.9, 1.0, 0.3)
"""Outlines of masks lie up to a pixel beside those that were drawn."""


@cache
def _profiles() -> np.ndarray:
    """Share of fill and of rim at signed distances from -reach to reach, for each blur: float64 [B, 2, D]."""
    d = np.arange(-_REACH, _REACH + _STEP / 2, _STEP)
    fill = np.clip(0.5 - d, 0, 1)
    pair = np.stack([fill, np.clip(2.4 - d, 0, 1) * (1 - fill)])
    return np.stack([ndimage.gaussian_filter1d(pair, b / _STEP, axis=1, mode="nearest") if b else pair for b in _BLURS])


def _rim_fits(
    value: np.ndarray, distance: np.ndarray, ground: np.ndarray, colors: np.ndarray
) -> tuple[np.ndarray, np.ndarray]:
    """How well rims of `colors` [K, 3] explain the pixels between subjects and `ground` [3].

    `distance` [H, W]: pixels to the nearest outline of a subject, negative inside.

    Returns:
        (mean squared error [K] per channel of each, at its best blur and offset of outlines; RGB [3] of the rim of any
        colour that explains them best).
    """
    deep = ndimage.distance_transform_edt(distance > -1.5, return_distances=False, return_indices=True)
    band = (distance > -1) & (distance < 5)
    fill, pixels, d = value[tuple(deep)][band] - ground, value[band] - ground, distance[band]
    asked = colors - ground
    errors, least, best = np.full(len(colors), np.inf), np.inf, np.zeros(3)
    for profile in _profiles():
        for offset in _OFFSETS:
            index = np.clip(np.rint((d - offset + _REACH) / _STEP).astype(int), 0, profile.shape[1] - 1)
            rest = pixels - profile[0][index][:, None] * fill
            rim = profile[1][index]
            # |rest - rim c|^2 of every channel, for all colours c at once
            square, along, norm = float((rest**2).sum()), rim @ rest, float(rim @ rim)
            errors = np.minimum(errors, square - 2 * asked @ along + norm * (asked**2).sum(1))
            if square - float(along @ along) / norm < least:
                least, best = square - float(along @ along) / norm, along / norm
    return errors / pixels.size, ground + best


_FAINT = 60.0
"""Outlines nearer than this to the ground (black on black, white on white) drown in the mixtures of fill and ground, so
they are told by how far whole rings around the subjects lie their way."""
_FAINT_SHARES = (0.07, 0.14)
"""How far, as a share, without and with a faint rim. Spoilt by everything, rims of black on black show 0.10 to 0.36, of
white on white 0.02 to 0.21 (they are 8 levels high), none at most 0.04; a decoder alone rings up to 0.12 without any.
"""
_RINGS = ((0.4, 0.6), (0.8, 1.0), (1.4, 1.8), (2.2, 2.6))
"""Distances of the pixels next to a subject, straight and aslant, and of the next ones."""
_EVIDENCE = 0.03
"""How much a pixel says: errors of neighbours go together, and profiles are not quite those of a decoder."""
_LEAST_ERROR = 4.0
"""Squared levels below which an error is a matter of rounding."""
_SPREAD, _STRANGE = 50.0, 90.0
"""How far a rim's colour is read from the true one, and how far is too far for any."""


def _rims(value: np.ndarray, distance: np.ndarray, ground: np.ndarray, background: str) -> np.ndarray:
    """Shares of no rim and of each outline, see `Evidence`; `ground` [P, 3] are the pixels away from subjects."""
    plain = np.median(ground, axis=0)
    # A tint of the whole picture moves outlines as much as the ground.
    drift = plain - np.array(world.BACKGROUNDS[background], dtype=float)
    outlines = np.clip(np.array(list(world.OUTLINES.values())) + drift, 0, 255)
    known = np.vstack([plain, outlines])
    far = np.append(True, np.linalg.norm(outlines - plain, axis=1) > _FAINT)
    errors, color = _rim_fits(value, distance, plain, known)
    least = errors[far].min()
    pixels = 3 * int(((distance > -1) & (distance < 5)).sum())
    shares = np.where(far, np.exp(-(errors - least) / (2 * max(least, _LEAST_ERROR)) * pixels * _EVIDENCE), 0.0)
    gap = np.linalg.norm(known[shares.argmax()] - color)
    shares = shares / shares.sum() / (1 + np.exp((gap**2 - _STRANGE**2) / _SPREAD**2))
    for index in np.flatnonzero(~far[1:]):
        low, high = _FAINT_SHARES
        shown = _faint_rim(value, distance, ground.mean(0), outlines[index])
        part = shares[0] * np.clip((shown - low) / (high - low), 0, 1)
        shares[0], shares[1 + index] = shares[0] - part, part
    return shares


def _faint_rim(value: np.ndarray, distance: np.ndarray, ground: np.ndarray, outline: np.ndarray) -> float:
    """How far the ring around subjects that comes nearest to `outline` lies from `ground` to it: 0 none, 1 all the way.

    Mixtures with a fill lie the other way (beyond white is nothing brighter), so they never look like such a rim; a
    ring's median does not mind noise.
    """
    line = (outline - ground) / max(float(((outline - ground) ** 2).sum()), 1e-6)
    rings = [value[(distance > low) & (distance < high)] for low, high in _RINGS]
    return max((float(np.median((ring - ground) @ line)) for ring in rings if len(ring) >= _LEAST), default=0.0)
