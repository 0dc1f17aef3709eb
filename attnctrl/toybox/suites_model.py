"""`attnctrl eval model`: does the toy model draw what its prompt says; nothing is controlled."""

from __future__ import annotations

import time
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from PIL import Image

from attnctrl.metrics import metric, result
from attnctrl.pictures import grid
from attnctrl.pipelines.runner import Counter, Progress, Runner

from . import world
from .scorer import Expected, Found, agrees, match, read_picture
from .suite import Options

LEAST = 200
"""Captions and renders at least, whatever number of seeds is asked for: fewer say little about a rate near 0.9."""
HELD_OUT = 77_000_017
"""First part of the seeds of held-out scenes; training draws from other ones."""
TELLING = world.Telling(shape=1, color=1)
"""Captions tell shape and colour; the rest at random, as in training."""
GRID = 8
"""Pictures of each kind in a grid."""
NAMES = {1: "single_subject", 2: "two_subjects", 3: "three_subjects"}


def model_suite(
    model: str, seeds: int, progress: Progress | None = None, options: Options = Options()
) -> dict[str, Any]:
    """`single_subject`, `two_subjects`, `three_subjects`: share of pictures with exactly the told subjects, shape and
    colour both right; `scorer_accuracy`: the same of held-out single-subject renders, the ceiling of what is measured.
    `single_shape`, `single_color`: each attribute for itself.
    """
    return measure_model(Runner.load(model), model, max(seeds, LEAST), progress, options)


def measure_model(
    runner: Runner, model: str, count: int, progress: Progress | None = None, options: Options = Options()
) -> dict[str, Any]:
    """As `model_suite`, on a loaded pipeline, with `count` captions and renders."""
    begin = time.monotonic()
    tick = Counter(len(NAMES) * count, progress)
    renders = [_Read.of(scene, image) for scene, image in held_out_renders(count, runner.size)]
    metrics = {"scorer_accuracy": metric([float(one.right) for one in renders])}
    rows, tiles = [], []
    for subjects, name in NAMES.items():
        scenes, captions = held_out_captions(count, subjects, runner.size)
        seeds = [HELD_OUT + 10_000 * subjects + i for i in range(count)]
        images = runner.draw(captions, seeds, progress=tick)
        reads = [_Read.of(scene, image) for scene, image in zip(scenes, images, strict=True)]
        metrics[name] = metric([float(one.right) for one in reads])
        parts = zip(captions, seeds, reads, strict=True)
        rows += [{"prompts": [text], "seed": seed, "vanilla": {name: float(one.right)}} for text, seed, one in parts]
        tiles.append([Image.fromarray(image) for image in images[:GRID]])
        if subjects == 1:
            metrics["single_shape"] = metric([float(one.has("shape")) for one in reads])
            metrics["single_color"] = metric([float(one.has("color")) for one in reads])
    if options.grid is not None:
        shown = min(GRID, count)
        options.grid(grid(tiles, list(NAMES.values()), [str(number) for number in range(shown)], side=192))
    found = result("model", model, count, time.monotonic() - begin, metrics)
    return {**found, "rows": rows} if options.rows else found


def held_out_captions(count: int, subjects: int, size: tuple[int, int]) -> tuple[list[world.WorldScene], list[str]]:
    """Scenes of `subjects` subjects and their captions; `size` is (width, height)."""
    rng = np.random.default_rng([HELD_OUT, subjects])
    scenes = [world.sample_scene(rng, subjects, size[1], size[0]) for _ in range(count)]
    return scenes, [world.caption(scene, rng, TELLING) for scene in scenes]


def held_out_renders(count: int, size: tuple[int, int]) -> list[tuple[world.WorldScene, np.ndarray]]:
    """Single-subject scenes and their pictures, as the world draws them."""
    rng = np.random.default_rng([HELD_OUT, 0])
    scenes = [world.sample_scene(rng, 1, size[1], size[0]) for _ in range(count)]
    return [(scene, world.render(scene, size[1], size[0]).image) for scene in scenes]


def expected_of(subjects: Sequence[world.WorldSubject]) -> list[Expected]:
    """What a caption by `TELLING` surely tells."""
    return [Expected(shape=s.shape, color=s.color) for s in subjects]


@dataclass(frozen=True)
class _Read:
    """A picture beside what was told: the expected subjects, the found one of each, and how many there are."""

    expected: list[Expected]
    found: list[Found | None]
    count: int

    @classmethod
    def of(cls, scene: world.WorldScene, image: np.ndarray) -> _Read:
        subjects = read_picture(image).subjects
        expected = expected_of(scene.subjects)
        return cls(expected, match(expected, subjects), len(subjects))

    @property
    def right(self) -> bool:
        """As many subjects as told, each with its shape and colour."""
        pairs = zip(self.expected, self.found, strict=True)
        return self.count == len(self.expected) and all(agrees(want, one) for want, one in pairs)

    def has(self, attribute: str) -> bool:
        """Every told subject has this attribute right."""
        pairs = zip(self.expected, self.found, strict=True)
        return all(one is not None and getattr(one, attribute) == getattr(want, attribute) for want, one in pairs)
