"""Do embeddings tell the same subject, and the same style, from another one: pairs of renders, clean and spoilt.

Each anchor has one picture that shows the same and one that shows something else; the area under the ROC (`auc`) is the
probability that a pair of the same is more alike than a pair of others.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import numpy as np

from attnctrl.metrics import auc_metric, identity_similarity
from attnctrl.metrics.stats import Metric

from . import world
from .degrade import ALL, degrade
from .embed import identity_embedding, style_embedding
from .scorer import read_picture

PICTURES = 2 * 2 * 3
"""Pictures an anchor takes in all: identity and style, clean and spoilt, itself and two others."""
STYLES = (
    world.WorldStyle("flat"),
    world.WorldStyle("grainy"),
    *(world.WorldStyle("outlined", outline=outline) for outline in world.OUTLINES),
    *(world.WorldStyle("hatched", hatch_angle=angle) for angle in world.HATCH_ANGLES),
)
"""Styles that look different; the seed of grain makes no other style."""

Trio = tuple[world.WorldScene, world.WorldScene, world.WorldScene]
Embed = Callable[[np.ndarray], "np.ndarray | None"]


def identity_trio(index: int, rng: np.random.Generator, size: tuple[int, int]) -> Trio:
    """A subject; the same elsewhere, at another size, on another ground, in another style; one that differs likewise
    and in shape, colour or pattern, in turn. `size` is (width, height)."""
    scenes = [world.sample_scene(rng, 1, size[1], size[0]) for _ in range(3)]
    kept = scenes[0].subjects[0]
    changed = _another(kept, ("shape", "color", "pattern")[index % 3], rng)
    shown = (kept, kept, changed)
    a, b, c = (
        replace(scene, subjects=(replace(one, x=at.x, y=at.y, radius=at.radius),))
        for scene, one in zip(scenes, shown, strict=True)
        for at in scene.subjects
    )
    return a, b, c


def _another(subject: world.WorldSubject, attribute: str, rng: np.random.Generator) -> world.WorldSubject:
    words = {"shape": world.SHAPES, "color": tuple(world.COLORS), "pattern": world.PATTERNS}[attribute]
    others = [word for word in words if word != getattr(subject, attribute)]
    changed: dict[str, Any] = {attribute: str(rng.choice(others))}
    return replace(subject, **changed)


def style_trio(index: int, rng: np.random.Generator, size: tuple[int, int]) -> Trio:
    """Scenes of one to three subjects: two in a style of `STYLES`, in turn, and one in any other of them."""
    kept = index % len(STYLES)
    other = (kept + int(rng.integers(1, len(STYLES)))) % len(STYLES)
    a, b, c = (
        replace(
            world.sample_scene(rng, int(rng.integers(1, 4)), size[1], size[0]),
            style=replace(STYLES[which], grain_seed=int(rng.integers(1 << 31))),
        )
        for which in (kept, kept, other)
    )
    return a, b, c


def embed_identity(image: np.ndarray) -> np.ndarray | None:
    """Of the largest subject in the picture; None if there is none."""
    subjects = read_picture(image).subjects
    return identity_embedding(image, subjects[0]) if subjects else None


def embed_style(image: np.ndarray) -> np.ndarray | None:
    """Of the picture."""
    return style_embedding(read_picture(image))


TRIALS: dict[str, tuple[Callable[[int, np.random.Generator, tuple[int, int]], Trio], Embed]] = {
    "identity_auc": (identity_trio, embed_identity),
    "style_auc": (style_trio, embed_style),
}


def measure_separation(
    vae: Any, size: tuple[int, int], count: int, seed: int, tick: Callable[[int], None]
) -> dict[str, Metric]:
    """`identity_auc` and `style_auc` of `count` anchors, and both as "..._degraded"; `size` is (width, height)."""
    metrics = {}
    for part, (name, (draw, embed)) in enumerate(TRIALS.items()):
        rng = np.random.default_rng([seed, 2, part])
        scenes = [scene for index in range(count) for scene in draw(index, rng, size)]
        clean = np.stack([world.render(scene, size[1], size[0]).image for scene in scenes])
        for suffix, images in (("", clean), (f"_{ALL}", degrade(clean, ALL, rng, vae))):
            vectors = []
            for image in images:
                vectors.append(embed(image))
                tick(1)
            metrics[name + suffix] = auc_metric(*similarities(vectors))
    return metrics


def similarities(vectors: list[np.ndarray | None]) -> tuple[list[float], list[float]]:
    """Similarities of same and of other pairs, from the embeddings of trios in a row (anchor, same, other).

    A missing embedding counts against: it is unlike the same and just like the other.
    """
    trios = list(zip(vectors[::3], vectors[1::3], vectors[2::3], strict=True))
    same = [-1.0 if a is None or b is None else identity_similarity(a, b) for a, b, _ in trios]
    other = [1.0 if a is None or c is None else identity_similarity(a, c) for a, _, c in trios]
    return same, other
