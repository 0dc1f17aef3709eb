"""`attnctrl eval subjects`, `style` and `reposition`: sets of pictures that should have something in common.

`subjects`: one told subject in four scenes, whose untold pattern should stay. `style`: four different subjects whose
untold style should be one. `reposition`: one subject near to, far from and smaller than where it was first.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from itertools import combinations
from typing import Any, TypeVar

import numpy as np

from attnctrl.attach import parts_of
from attnctrl.controls import Control
from attnctrl.families import family_of
from attnctrl.metrics import identity_similarity, set_consistency
from attnctrl.pipelines.runner import Runner
from attnctrl.presets import preset, style
from attnctrl.presets_sets import chosen_options
from attnctrl.region import Region

from . import world
from .embed import identity_embedding, style_embedding
from .scorer import Expected, Reading, match, read_picture
from .suite import Acting, Images, Picture, Suite, Whole
from .suites_layout import told_share

SET = 4
"""Pictures of a set."""


@dataclass(frozen=True)
class Told:
    """One picture as it is told: its prompt, the subject in it, and the ground."""

    prompt: str
    expected: Expected
    background: str


Task = tuple[Told, ...]
T = TypeVar("T")


def _told(shape: str, color: str, pattern: str | None, place: str, background: str, size: str | None = None) -> Told:
    words = " ".join(filter(None, ("a", size, pattern, color, shape, place)))
    return Told(f"{words}, {background} background", Expected(shape, color, pattern), background)


def _one(rng: np.random.Generator, words: Sequence[str]) -> str:
    return str(rng.choice(list(words)))


def sample_subjects(rng: np.random.Generator) -> Task:
    """One shape and colour at four places on grounds of their own."""
    shape, color = _one(rng, world.SHAPES), _one(rng, list(world.COLORS))
    places = rng.choice(world.PLACES, SET, replace=False)
    grounds = rng.permutation(list(world.BACKGROUNDS))
    return tuple(_told(shape, color, None, str(p), str(g)) for p, g in zip(places, grounds, strict=True))


def sample_style(rng: np.random.Generator) -> Task:
    """Four subjects that differ in shape and colour, all in the middle, on one ground."""
    shapes = rng.choice(world.SHAPES, SET, replace=False)
    colors = rng.choice(list(world.COLORS), SET, replace=False)
    ground = _one(rng, list(world.BACKGROUNDS))
    return tuple(_told(str(s), str(c), "solid", "center", ground) for s, c in zip(shapes, colors, strict=True))


def sample_reposition(rng: np.random.Generator) -> Task:
    """Where it was first; the same place, the neighbouring one, the far one, and there in the other size."""
    shape, color = _one(rng, world.SHAPES), _one(rng, list(world.COLORS))
    first, near, far = [("left", "center", "right"), ("top", "center", "bottom")][int(rng.integers(2))]
    ground = _one(rng, list(world.BACKGROUNDS))
    wanted = [(first, "large"), (first, "large"), (near, "large"), (far, "large"), (far, "small")]
    return tuple(_told(shape, color, None, place, ground, size) for place, size in wanted)


def _pictures(task: Task, seed: int) -> list[Picture]:
    return [
        Picture(told.prompt, 10 * seed + number, worded=[Region(f"{told.expected.color} {told.expected.shape}")])
        for number, told in enumerate(task)
    ]


def rehearsed(runner: Runner, pictures: Sequence[Picture], name: str, **options: object) -> list[Control]:
    """The preset called `name` on the told subjects, where attention to their words finds them in a plain run: what
    `attnctrl.pipelines.MultiSubjectPipeline` does. Its run is part of the time that control takes.
    """
    from attnctrl.maps import attended, record
    from attnctrl.pipelines.masks import CELLS, READING

    prompts, words = [one.prompt for one in pictures], [one.worded[0].prompt for one in pictures]
    length = runner.max_sequence_length
    keys = {"subject": words, "cells": CELLS}
    with record(runner.pipe, keys, prompt=prompts, window=READING, max_sequence_length=length) as found:
        runner.draw(prompts, [one.seed for one in pictures])
    regions = []
    for word, heat, cells in zip(words, found["subject"], found["cells"], strict=True):
        (mask,), (undecided,) = attended(heat[None], cells, (CELLS.rows, CELLS.columns))
        regions.append([] if undecided else [Region(name=word, mask=mask)])
    return preset(name, regions, group=SET, **{**chosen_options(name, runner.pipe, leading=True), **options})


def _identities(task: Task, images: Images) -> list[np.ndarray | None]:
    """The embedding of each picture's told subject, as shape and colour find it; None where it is missing."""
    found = []
    for told, image in zip(task, images, strict=True):
        wanted = Expected(told.expected.shape, told.expected.color)
        (subject,) = match([wanted], read_picture(image).subjects)
        found.append(None if subject is None else identity_embedding(image, subject))
    return found


def _cosine(a: np.ndarray | None, b: np.ndarray | None) -> float:
    """0 where either is missing: what is not there is consistent with nothing."""
    return 0.0 if a is None or b is None else identity_similarity(a, b)


def subjects_values(task: Task, images: Images, plain: Images) -> dict[str, float]:
    """`identity_similarity`: mean cosine of identity embeddings over pairs of pictures."""
    pairs = combinations(_identities(task, images), 2)
    return {"identity_similarity": float(np.mean([_cosine(a, b) for a, b in pairs]))}


def identity_margin(casts: Sequence[Sequence[np.ndarray | None]]) -> float:
    """Mean similarity within casts (the identities in the pictures of each), less that between each cast and the next
    other one; a cast alone has nothing but the former."""
    # all pairs of directions at once: the square of their sum holds each pair twice and each one with itself
    sums = {id(one): _summed(one) for one in casts}
    alike = sum(float(np.sum(total**2)) - there for total, there in (sums[id(one)] for one in casts))
    within = alike / sum(len(one) * (len(one) - 1) for one in casts)
    between = [
        float(np.sum(sums[id(one)][0] * sums[id(other)][0])) / (len(one) * len(other))
        for one, other in _neighbours(casts)
    ]
    return within - (float(np.mean(between)) if between else 0.0)


def _summed(cast: Sequence[np.ndarray | None]) -> tuple[np.ndarray, int]:
    """The sum of the directions of a cast's identities (0 without any), and how many there are."""
    there = [one / np.linalg.norm(one) for one in cast if one is not None]
    return np.sum(there, axis=0), len(there)


def _neighbours(casts: Sequence[T]) -> Iterator[tuple[T, T]]:
    """Each one and the next one round the circle that is another."""
    for index, one in enumerate(casts):
        following = (*casts[index + 1 :], *casts[:index])
        if other := [found for found in following if found is not one][:1]:
            yield one, other[0]


def reposition_values(task: Task, images: Images, plain: Images) -> dict[str, float]:
    """Similarity to the first picture's subject where it stays, at a distance, and at another scale."""
    first, *others = _identities(task, images)
    names = ("same_place", "near", "far", "far_and_small")
    values = {name: _cosine(first, other) for name, other in zip(names, others, strict=True)}
    return {"identity_similarity": float(np.mean(list(values.values()))), **values}


def style_values(task: Task, images: Images, plain: Images) -> dict[str, float]:
    """`set_consistency`: mean cosine of style embeddings over pairs of pictures; `same_style`: share of pairs that are
    read as one style; `copied`: share of the first picture's told shape and colour that each other picture shows, which
    is told another shape and colour.
    """
    readings = [read_picture(image) for image in images]
    return {
        "set_consistency": set_consistency([style_embedding(reading) for reading in readings]),
        "same_style": float(np.mean([_same(a, b) for a, b in combinations(readings, 2)])),
        "copied": float(np.mean([_copied(task[0].expected, other) for other in readings[1:]])),
    }


def _copied(first: Expected, other: Reading) -> float:
    found = other.subjects
    return 0.5 * any(one.shape == first.shape for one in found) + 0.5 * any(one.color == first.color for one in found)


def _same(a: Reading, b: Reading) -> bool:
    return a.style.name is not None and a.style.name == b.style.name


def style_control(runner: Runner, pictures: Sequence[Picture]) -> list[Control]:
    """Each task's pictures in the style of its first, as `StylePipeline` draws them."""
    return style(runner.pipe, group=SET)


def style_variants(runner: Runner) -> dict[str, Acting]:
    """The parts of a style by themselves, in all layers: shared keys on the same places, beside the picture (where the
    model has rotary positions), and AdaIN; then AlignedGen's choice, or StyleAligned's."""
    naive: dict[str, Any] = {"match": (), "group": SET}
    variants: dict[str, Acting] = {
        "naive": {"share_style": naive},
        "adain": {"share_style": {"weight": 0, "group": SET}},
    }
    if family_of(parts_of(runner.pipe)[0]).rotary is None:
        return {**variants, "style_aligned": _of_preset("style-aligned")}
    apart: Acting = {"share_style": {**naive, "positions": "apart"}}
    return {**variants, "apart": apart, "alignedgen": _of_preset("alignedgen")}


def _of_preset(name: str) -> Acting:
    return lambda runner, pictures: preset(name, group=SET)


def fidelity(task: Task, images: Images) -> float:
    """Share of what is told that the pictures show."""
    pairs = zip(task, images, strict=True)
    return float(np.mean([told_share([t.expected], t.background, read_picture(image)) for t, image in pairs]))


SUBJECT_VARIANTS: dict[str, Acting] = {
    "shared": {"share": {"group": SET, "layers": "shared"}},
    "consistory": partial(rehearsed, name="consistory"),
    "storydiffusion": partial(rehearsed, name="storydiffusion"),
}
"""What else can be measured: plain shared attention of all tokens at all steps, and the published methods."""

SUBJECTS = Suite(
    name="subjects",
    sample=sample_subjects,
    pictures=_pictures,
    values=subjects_values,
    better={"identity_similarity": "higher"},
    fidelity=fidelity,
    whole={"identity_margin": Whole("higher", _identities, identity_margin)},
    controls=partial(rehearsed, name="subjects"),
    variants=SUBJECT_VARIANTS,
    rivals=("shared",),
)
STYLE = Suite(
    name="style",
    sample=sample_style,
    pictures=_pictures,
    values=style_values,
    better={"set_consistency": "higher", "same_style": "higher", "copied": "lower"},
    fidelity=fidelity,
    controls=style_control,
    variants=style_variants,
)
