"""`attnctrl eval scorer`: does the scorer read renders as they were drawn, clean and spoilt as generations are.

Its scenes are its own: nothing is trained or tuned on their seeds. The scorer's limits were set on other ones.
"""

from __future__ import annotations

import time
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
from scipy.optimize import linear_sum_assignment

from attnctrl.metrics import metric, result
from attnctrl.metrics.stats import Better, Metric
from attnctrl.pipelines.runner import Counter, Progress, Runner

from . import world
from .degrade import ALL, KINDS, degrade
from .scorer import Found, Reading, read_picture
from .scorer_style import Style
from .suite import Options
from .suites_scorer_same import PICTURES, measure_separation

HELD_OUT = 77_200_033
"""First part of the seeds of scenes, of what spoils them, and of the pairs that embeddings are tried on."""
LEAST = 24
"""Pictures at least, whatever number of seeds is asked for: each style with one, two and three subjects, twice."""
_SAME_PLACE = 0.3
"""Intersection over union from which a found subject is taken for the one that was drawn there."""
NAMED = ("shape", "color", "pattern")
SPOILT = (None, *KINDS, ALL)


def scorer_suite(
    model: str, seeds: int, progress: Progress | None = None, options: Options = Options()
) -> dict[str, Any]:
    """Accuracies on `seeds` renders (at least `LEAST`), and separation of embeddings on as many anchors.

    `shape`, `color`, `pattern`, `background`, `style`: share that is read as it was drawn; what the scorer does not
    know counts as missed. `outline`, `hatch_angle`: of pictures that have one. `count`: of pictures with as many
    subjects as were drawn. `mask`: intersection over union with the pixels drawn. `sure_and_wrong_...`: share that has
    a wrong name. `identity_auc`, `style_auc`: see `suites_scorer_same`. Names that end in _blur, _vae, _shift and
    _noise: the same renders spoilt by one of these; in _degraded: by all of them. Of `options` nothing is used: renders
    are no pictures of the model.
    """
    return measure_scorer(Runner.load(model), model, max(seeds, LEAST), progress)


def measure_scorer(runner: Runner, model: str, count: int, progress: Progress | None = None) -> dict[str, Any]:
    """As `scorer_suite`, with the VAE and the size of a loaded pipeline and `count` renders."""
    begin = time.monotonic()
    tick = Counter(count * (len(SPOILT) + PICTURES), progress)
    scenes = held_out_scenes(count, runner.size)
    drawn = [world.render(scene, runner.size[1], runner.size[0]) for scene in scenes]
    clean = np.stack([one.image for one in drawn])
    metrics: dict[str, Metric] = {}
    for kind in SPOILT:
        rng = np.random.default_rng([HELD_OUT, 1])
        images = clean if kind is None else degrade(clean, kind, rng, runner.pipe.vae)
        values = []
        for scene, truth, image in zip(scenes, drawn, images, strict=True):
            values.append(picture_values(scene, truth.masks, read_picture(image)))
            tick(1)
        metrics.update(_metrics(values, "" if kind is None else f"_{kind}"))
    metrics.update(measure_separation(runner.pipe.vae, runner.size, count, HELD_OUT, tick))
    return result("scorer", model, count, time.monotonic() - begin, metrics)


def held_out_scenes(count: int, size: tuple[int, int]) -> list[world.WorldScene]:
    """Scenes in which each style has one, two and three subjects equally often; `size` is (width, height)."""
    rng = np.random.default_rng([HELD_OUT, 0])
    scenes = []
    for index in range(count):
        turn, style = divmod(index, len(world.STYLES))
        scene = world.sample_scene(rng, 1 + turn % 3, size[1], size[0])
        scenes.append(replace(scene, style=replace(scene.style, name=world.STYLES[style])))
    return scenes


def visible_style(style: world.WorldStyle) -> Style:
    """What shows of a style: the outline only where there are outlines, the angle only where there is hatching."""
    return Style(
        style.name,
        outline=style.outline if style.name == "outlined" else None,
        hatch_angle=style.hatch_angle if style.name == "hatched" else None,
    )


def by_place(masks: np.ndarray, found: Sequence[Found]) -> list[tuple[Found | None, float]]:
    """For each drawn subject, bool [N, H, W], the one found at its place and the overlap of both; each is used once.

    By place alone, so that no subject is credited with what was read of another.
    """
    overlap = np.array([[_overlap(mask, one.mask) for one in found] for mask in masks]).reshape(len(masks), len(found))
    taken = dict(zip(*(axis.tolist() for axis in linear_sum_assignment(overlap, maximize=True)), strict=True))
    near = [(found[taken[i]], float(overlap[i, taken[i]])) if i in taken else (None, 0.0) for i in range(len(masks))]
    return [(one, share) if share >= _SAME_PLACE else (None, 0.0) for one, share in near]


def _overlap(mask: np.ndarray, other: np.ndarray) -> float:
    return float((mask & other).sum() / max(1, (mask | other).sum()))


@dataclass(frozen=True)
class _Value:
    """One attribute of one picture: share of what is right, share of what has a wrong name (None: is not counted)."""

    right: float
    wrong: float | None = None


def picture_values(scene: world.WorldScene, masks: np.ndarray, reading: Reading) -> dict[str, _Value]:
    """All attributes of one picture that it has; those of subjects are shares of the subjects drawn.

    `masks`: bool [N, H, W], where they were drawn.
    """
    pairs = by_place(masks, reading.subjects)
    values = {}
    for name in NAMED:
        seen = [
            (getattr(one, name) if one else None, getattr(s, name))
            for (one, _), s in zip(pairs, scene.subjects, strict=True)
        ]
        values[name] = _named(seen)
    want = visible_style(scene.style)
    values["background"] = _named([(reading.background, scene.background)])
    values["style"] = _named([(reading.style.name, want.name)])
    for name in ("outline", "hatch_angle"):
        if getattr(want, name) is not None:
            values[name] = _named([(getattr(reading.style, name), getattr(want, name))])
    values["count"] = _Value(float(len(reading.subjects) == len(scene.subjects)))
    values["mask"] = _Value(float(np.mean([share for _, share in pairs])))
    return values


def _named(pairs: Sequence[tuple[Any, Any]]) -> _Value:
    """Pairs of (seen, drawn); seen is None where the scorer does not know."""
    right = [seen == drawn for seen, drawn in pairs]
    wrong = [seen is not None and seen != drawn for seen, drawn in pairs]
    return _Value(float(np.mean(right)), float(np.mean(wrong)))


def _metrics(values: Sequence[dict[str, _Value]], suffix: str) -> dict[str, Metric]:
    """Entries of a result; attributes that no picture has are left out."""
    entries: dict[str, Metric] = {}
    names = dict.fromkeys(name for one in values for name in one)
    sides: tuple[tuple[str, str, Better], ...] = (("", "right", "higher"), ("sure_and_wrong_", "wrong", "lower"))
    for prefix, field, better in sides:
        for name in names:
            found = [getattr(one[name], field) for one in values if name in one]
            if None not in found:
                entries[prefix + name + suffix] = metric(found, better=better)
    return entries
