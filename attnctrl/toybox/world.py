"""The toy world: what can stand in a picture, how it is drawn, and how it is told.

A scene is data (`WorldScene`); `render` turns it into pixels with exact ground truth and is pure; `caption` tells it
in words and may leave any attribute out, so that what a caption leaves open differs from seed to seed. All randomness
comes from the `numpy.random.Generator` that is passed in.

Positions and radii are fractions: x of the width, y of the height (downwards), radius of the shorter side.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import cache

import numpy as np

from ..metrics.layout import mask_box

SHAPES = ("circle", "square", "triangle", "star", "heart", "cross")
COLORS: dict[str, tuple[int, int, int]] = {
    "red": (214, 40, 44),
    "orange": (240, 136, 30),
    "yellow": (242, 214, 48),
    "green": (46, 160, 67),
    "blue": (42, 92, 214),
    "purple": (142, 58, 186),
}
PATTERNS = ("solid", "striped", "dotted", "checked")
BACKGROUNDS: dict[str, tuple[int, int, int]] = {
    "white": (244, 244, 242),
    "gray": (150, 152, 156),
    "black": (30, 30, 34),
    "beige": (226, 204, 166),
}
STYLES = ("flat", "outlined", "hatched", "grainy")
OUTLINES: dict[str, tuple[int, int, int]] = {"black": (12, 12, 12), "white": (252, 252, 252), "brown": (112, 64, 32)}
HATCH_ANGLES = (0, 45, 90, 135)
SIZES = ("small", "large")
PLACES = (
    "top left", "top", "top right", "left", "center", "right", "bottom left", "bottom", "bottom right",
)  # fmt: skip
WORDS = tuple(
    dict.fromkeys(
        ["a", "this", "and", ",", "thing", "on", "at", "the", "in", "with", "background", "style", "picture", "of",
         *SHAPES, *COLORS, *PATTERNS, *BACKGROUNDS, *STYLES, *SIZES,
         "top", "bottom", "left", "right", "center"]
    )
)  # fmt: skip
"""Every word a caption may hold; the tokenizers give each of them one token."""


@dataclass(frozen=True)
class WorldSubject:
    """One subject. `x`, `y`: centre; `radius`: circumscribed radius (see the module's units)."""

    shape: str
    color: str
    pattern: str
    x: float
    y: float
    radius: float

    @property
    def size_word(self) -> str | None:
        return "small" if self.radius < 0.15 else "large" if self.radius > 0.2 else None

    @property
    def place_word(self) -> str:
        column = "left" if self.x < 0.4 else "right" if self.x > 0.6 else ""
        row = "top" if self.y < 0.4 else "bottom" if self.y > 0.6 else ""
        return f"{row} {column}".strip() or "center"


@dataclass(frozen=True)
class WorldStyle:
    """How a scene is drawn. `outline` and `hatch_angle` are never told in captions; nor is the grain's seed."""

    name: str = "flat"
    outline: str = "black"
    hatch_angle: int = 45
    grain_seed: int = 0


@dataclass(frozen=True)
class WorldScene:
    """Subjects (drawn in order, later ones on top), the name of a background, a style."""

    subjects: tuple[WorldSubject, ...]
    background: str
    style: WorldStyle = WorldStyle()


@dataclass(frozen=True)
class Rendered:
    """`image`: uint8 [H, W, 3]; `masks`: bool [N, H, W], visible pixels; `boxes`: [N, 4], x0 y0 x1 y1, fractions."""

    image: np.ndarray
    masks: np.ndarray
    boxes: np.ndarray


@cache
def _polygon(shape: str) -> np.ndarray | None:
    """Vertices [V, 2] of a shape within the unit circle, y downwards; None for the circle."""
    if shape == "circle":
        return None
    if shape == "square":
        return np.array([(-0.8, -0.8), (0.8, -0.8), (0.8, 0.8), (-0.8, 0.8)])
    if shape == "triangle":
        return np.array([(0.0, -1.0), (0.98, 0.78), (-0.98, 0.78)])
    if shape == "star":
        turn = -np.pi / 2 + np.arange(10) * np.pi / 5
        reach = np.where(np.arange(10) % 2 == 0, 1.06, 0.44)
        return np.stack([reach * np.cos(turn), reach * np.sin(turn) + 0.06], axis=1)
    if shape == "heart":
        t = np.linspace(0, 2 * np.pi, 28, endpoint=False)
        x = 16 * np.sin(t) ** 3
        y = 13 * np.cos(t) - 5 * np.cos(2 * t) - 2 * np.cos(3 * t) - np.cos(4 * t)
        return np.stack([x / 16.5, -(y + 2.5) / 16.5], axis=1)
    a, b = 0.36, 0.98
    return np.array(
        [(-a, -b), (a, -b), (a, -a), (b, -a), (b, a), (a, a), (a, b), (-a, b), (-a, a), (-b, a), (-b, -a), (-a, -a)]
    )


def signed_distance(shape: str, x: np.ndarray, y: np.ndarray) -> np.ndarray:
    """Distance to the outline of a shape of unit radius, negative inside. `x`, `y`: any equal shape, in radii."""
    vertices = _polygon(shape)
    if vertices is None:
        return np.hypot(x, y) - 0.95
    best = np.full(x.shape, np.inf)
    inside = np.zeros(x.shape, dtype=bool)
    for (ax, ay), (bx, by) in zip(vertices, np.roll(vertices, -1, axis=0), strict=True):
        ex, ey, wx, wy = bx - ax, by - ay, x - ax, y - ay
        along = np.clip((wx * ex + wy * ey) / (ex * ex + ey * ey), 0.0, 1.0)
        best = np.minimum(best, (wx - ex * along) ** 2 + (wy - ey * along) ** 2)
        if ay != by:
            crosses = (ay > y) != (by > y)
            inside ^= crosses & (wx < ex * wy / ey)
    return np.where(inside, -1.0, 1.0) * np.sqrt(best)


def _pattern(pattern: str, dx: np.ndarray, dy: np.ndarray) -> np.ndarray:
    """Share of the light colour per pixel, in [0, 1]. `dx`, `dy`: pixels from the subject's centre."""
    if pattern == "striped":
        return np.clip(0.5 + 2.2 * np.sin(dy * (2 * np.pi / 7.0)), 0, 1)
    if pattern == "dotted":
        u, v = (dx + 3.5) % 7.0 - 3.5, (dy + 3.5) % 7.0 - 3.5
        return np.clip(2.2 - np.hypot(u, v) + 0.5, 0, 1)
    if pattern == "checked":
        return np.clip(0.5 + 3.0 * np.sin(dx * (np.pi / 5.0)) * np.sin(dy * (np.pi / 5.0)), 0, 1)
    return np.zeros_like(dx)


def _backdrop(scene: WorldScene, height: int, width: int) -> np.ndarray:
    canvas = np.empty((height, width, 3))
    canvas[:] = BACKGROUNDS[scene.background]
    if scene.style.name == "hatched":
        angle = np.deg2rad(scene.style.hatch_angle)
        yy, xx = np.mgrid[0:height, 0:width]
        wave = np.sin((xx * np.sin(angle) + yy * np.cos(angle)) * (2 * np.pi / 6.0))
        shade = 42.0 if canvas.mean() < 90 else -42.0
        canvas += shade * np.clip(wave * 2 - 0.6, 0, 1)[..., None]
    return canvas


def render(scene: WorldScene, height: int = 64, width: int = 64) -> Rendered:
    """Draw a scene, anti-aliased. Pure: equal arguments give equal pixels."""
    canvas = _backdrop(scene, height, width)
    masks = np.zeros((len(scene.subjects), height, width), dtype=bool)
    for index, subject in enumerate(scene.subjects):
        radius = subject.radius * min(height, width)
        cx, cy = subject.x * width, subject.y * height
        x0, x1 = max(0, int(cx - radius - 4)), min(width, int(cx + radius + 5))
        y0, y1 = max(0, int(cy - radius - 4)), min(height, int(cy + radius + 5))
        yy, xx = np.mgrid[y0:y1, x0:x1]
        dx, dy = xx + 0.5 - cx, yy + 0.5 - cy
        distance = signed_distance(subject.shape, dx / radius, dy / radius) * radius
        alpha = np.clip(0.5 - distance, 0, 1)[..., None]
        base = np.array(COLORS[subject.color], dtype=float)
        light = base + 0.55 * (255.0 - base)
        share = _pattern(subject.pattern, dx, dy)[..., None]
        fill = base * (1 - share) + light * share
        window = canvas[y0:y1, x0:x1]
        if scene.style.name == "outlined":
            rim = np.clip(2.4 - distance, 0, 1)[..., None]
            window[:] = window * (1 - rim) + np.array(OUTLINES[scene.style.outline], dtype=float) * rim
        window[:] = window * (1 - alpha) + fill * alpha
        solid = distance < 0
        masks[:, y0:y1, x0:x1] &= ~solid
        masks[index, y0:y1, x0:x1] = solid
    if scene.style.name == "grainy":
        noise = np.random.default_rng(scene.style.grain_seed).normal(0, 13.0, (-(-height // 4), -(-width // 4)))
        canvas += np.kron(noise, np.ones((4, 4)))[:height, :width, None]
    image = np.clip(np.rint(canvas), 0, 255).astype(np.uint8)
    return Rendered(image, masks, np.array([mask_box(m) for m in masks]).reshape(-1, 4))


_RADII = {1: (0.15, 0.34), 2: (0.14, 0.23), 3: (0.13, 0.19), 4: (0.12, 0.17)}


def sample_subject(
    rng: np.random.Generator, radius: tuple[float, float], aspect: tuple[float, float] = (1.0, 1.0)
) -> WorldSubject:
    """A random subject that lies within the canvas. `aspect`: (width, height) in units of the shorter side."""
    r = float(rng.uniform(*radius))
    mx, my = (r + 0.02) / aspect[0], (r + 0.02) / aspect[1]
    return WorldSubject(
        shape=str(rng.choice(SHAPES)), color=str(rng.choice(list(COLORS))),
        pattern=str(rng.choice(PATTERNS, p=(0.4, 0.2, 0.2, 0.2))),
        x=float(rng.uniform(mx, 1 - mx)), y=float(rng.uniform(my, 1 - my)), radius=r,
    )  # fmt: skip


def sample_style(rng: np.random.Generator) -> WorldStyle:
    """A random style, with parameters that captions do not tell."""
    return WorldStyle(
        name=str(rng.choice(STYLES, p=(0.46, 0.18, 0.18, 0.18))), outline=str(rng.choice(list(OUTLINES))),
        hatch_angle=int(rng.choice(HATCH_ANGLES)), grain_seed=int(rng.integers(1 << 31)),
    )  # fmt: skip


def sample_scene(rng: np.random.Generator, subjects: int, height: int = 64, width: int = 64) -> WorldScene:
    """A random scene with `subjects` (1 to 4) that do not overlap."""
    short = min(height, width)
    aspect = (width / short, height / short)
    while True:
        placed: list[WorldSubject] = []
        for _ in range(80):
            new = sample_subject(rng, _RADII[subjects], aspect)
            gaps = [
                np.hypot((new.x - old.x) * aspect[0], (new.y - old.y) * aspect[1]) - new.radius - old.radius
                for old in placed
            ]
            if all(gap > 0.02 for gap in gaps):
                placed.append(new)
            if len(placed) == subjects:
                # Reading order, so that the order of mention carries information when no place is told.
                placed.sort(key=lambda s: s.x + 0.35 * s.y)
                return WorldScene(tuple(placed), str(rng.choice(list(BACKGROUNDS))), sample_style(rng))


def reference_scene(subject: WorldSubject, rng: np.random.Generator) -> WorldScene:
    """The subject alone, large and centred on a plain ground: the reference picture of a Kontext-like model."""
    return WorldScene((replace(subject, x=0.5, y=0.5, radius=0.4),), str(rng.choice(list(BACKGROUNDS))))


@dataclass(frozen=True)
class Telling:
    """Probabilities that a caption tells an attribute."""

    shape: float = 0.94
    color: float = 0.9
    pattern: float = 0.55
    size: float = 0.4
    place: float = 0.6
    background: float = 0.7
    style: float = 0.55


EVERYTHING = Telling(1, 1, 1, 1, 1, 1, 1)


def tell_subject(
    subject: WorldSubject, rng: np.random.Generator, telling: Telling = Telling(), article: str = "a"
) -> str:
    """A phrase such as 'a large striped red circle top left'."""
    words = [article]
    if subject.size_word and rng.random() < telling.size:
        words.append(subject.size_word)
    if rng.random() < telling.pattern:
        words.append(subject.pattern)
    if rng.random() < telling.color:
        words.append(subject.color)
    words.append(subject.shape if rng.random() < telling.shape else "thing")
    if rng.random() < telling.place:
        words.append(subject.place_word)
    return " ".join(words)


def caption(
    scene: WorldScene, rng: np.random.Generator, telling: Telling = Telling(), this: int | None = None,
) -> str:  # fmt: skip
    """A caption of the scene. `this`: index of the subject that the reference picture shows (told as 'this ...')."""
    shy = replace(telling, color=0.25, pattern=0.15, size=telling.size * 0.5)
    phrases: Sequence[str] = [
        tell_subject(s, rng, shy if i == this else telling, "this" if i == this else "a")
        for i, s in enumerate(scene.subjects)
    ]
    parts = list(phrases)
    if rng.random() < telling.background:
        parts.append(f"{scene.background} background")
    if rng.random() < telling.style:
        parts.append(f"{scene.style.name} style")
    return ", ".join(parts)
