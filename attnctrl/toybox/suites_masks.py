"""`attnctrl eval masks`: how well attention to its words tells where a subject is; nothing is controlled.

The plain pictures of `subjects` (one subject) and of `layout` (two) are drawn while attention is read, as a rehearsal
of `attnctrl.pipelines.MultiSubjectPipeline` does, and masks compared with where the scorer sees the subjects.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from attnctrl.maps import attended, otsu, record
from attnctrl.metrics import metric, result
from attnctrl.pipelines.masks import CELLS, READING
from attnctrl.pipelines.runner import Counter, Progress, Runner
from attnctrl.region import Region, labels

from .scorer import Expected, match, read_picture
from .suite import Options
from .suites_layout import LAYOUT
from .suites_sets import SUBJECTS

NAMES = {1: "one_subject", 2: "two_subjects"}
BATCH = 4
"""Pictures of one record."""


@dataclass(frozen=True)
class Scene:
    """A picture to draw: each subject's words in its prompt, and what the scorer should find."""

    prompt: str
    words: tuple[str, ...]
    expected: tuple[Expected, ...]
    seed: int


def masks_suite(
    model: str, seeds: int, progress: Progress | None = None, options: Options = Options()
) -> dict[str, Any]:
    """`iou`, `precision`, `recall` of masks, in tokens, mean over the subjects of a picture that the scorer finds:
    Otsu's threshold of the maps in the place of plain pictures, `attnctrl.maps.attended` in that of controlled ones.
    """
    return measure_masks(Runner.load(model), model, seeds, progress, options)


def measure_masks(
    runner: Runner, model: str, count: int, progress: Progress | None = None, options: Options = Options()
) -> dict[str, Any]:
    """As `masks_suite`, on a loaded pipeline, with `count` pictures of each kind."""
    begin = time.monotonic()
    tick = Counter(len(NAMES) * count, progress)
    metrics, rows, shown = {}, [], []
    for subjects, name in NAMES.items():
        scenes = [_scene(subjects, options, index) for index in range(count)]
        found: list[tuple[Scores, Scores]] = []  # of each picture that shows any of its subjects
        for start in range(0, count, BATCH):
            part = scenes[start : start + BATCH]
            for scene, image, masks in zip(part, *_drawn(runner, part, tick), strict=True):
                own = _scored(scene, image, masks)
                if own is not None:
                    found.append(own)
                    told = {"vanilla": own[0], "controlled": own[1]}
                    rows.append({"prompts": [scene.prompt], "seed": scene.seed, **told})
                shown.append((scene, image, masks))
        for score in ("iou", "precision", "recall") if found else ():
            pairs = [(before[score], after[score]) for before, after in found]
            metrics[f"{name}_{score}"] = metric([one for one, _ in pairs], [other for _, other in pairs])
    if options.grid is not None:
        options.grid(_grid([shown[at] for at in (*range(min(4, count)), *range(count, count + min(4, count)))]))
    whole = {**result("masks", model, count, time.monotonic() - begin, metrics), "split": options.split}
    return {**whole, "rows": rows} if options.rows else whole


Scores = dict[str, float]


def _scene(subjects: int, options: Options, index: int) -> Scene:
    if subjects == 1:
        cast, seed = SUBJECTS.task(options.split, index)
        told, (asked, *_) = cast[0], SUBJECTS.pictures(cast, seed)
        return Scene(told.prompt, (asked.worded[0].prompt,), (told.expected,), asked.seed)
    task, seed = LAYOUT.task(options.split, index)
    words = tuple(f"{expected.color} {expected.shape}" for expected in task.expected)
    return Scene(task.prompt, words, tuple(task.expected), seed)


def _drawn(
    runner: Runner, scenes: Sequence[Scene], tick: Callable[[int], None]
) -> tuple[list[np.ndarray], list[tuple[Tensor, Tensor]]]:
    """The pictures, and by Otsu's threshold and `attended` bool [subjects, h, w] for each."""
    prompts = [one.prompt for one in scenes]
    keys = {str(n): [one.words[n] for one in scenes] for n in range(len(scenes[0].words))}
    with record(
        runner.pipe,
        {**keys, "cells": CELLS},
        prompt=prompts,
        window=READING,
        max_sequence_length=runner.max_sequence_length,
    ) as found:
        images = runner.with_batch(len(scenes)).draw(prompts, [one.seed for one in scenes], progress=tick)
    heats, size = found.stacked(*keys).transpose(0, 1), (CELLS.rows, CELLS.columns)
    pairs = zip(heats, found["cells"], strict=True)
    return images, [(otsu(heat).masks, attended(heat, cells, size).masks) for heat, cells in pairs]


def _scored(scene: Scene, image: np.ndarray, masks: tuple[Tensor, Tensor]) -> tuple[Scores, Scores] | None:
    """Of each set of masks, the mean over the subjects that the scorer finds; None where it finds none."""
    grid = tuple(masks[0].shape[-2:])
    truths = {
        number: labels(Region(mask=torch.from_numpy(one.mask.astype(np.float32))), grid)
        for number, one in enumerate(match(scene.expected, read_picture(image).subjects))
        if one is not None
    }
    if not truths:
        return None
    before, after = ([_score(found[number], truth) for number, truth in truths.items()] for found in masks)
    return _mean(before), _mean(after)


def _mean(scores: Sequence[Scores]) -> Scores:
    return {name: float(np.mean([one[name] for one in scores])) for name in scores[0]}


def _score(mask: Tensor, truth: Tensor) -> Scores:
    both = float((mask & truth).sum())
    return {
        "iou": both / float((mask | truth).sum()),
        "precision": both / max(float(mask.sum()), 1.0),
        "recall": both / float(truth.sum()),
    }


def _grid(shown: Sequence[tuple[Scene, np.ndarray, tuple[Tensor, Tensor]]]) -> Image.Image:
    """Pictures with the outlines of their masks: Otsu's, and `attended`."""
    from attnctrl.pictures import draw_regions, enlarge, grid

    def outlined(image: np.ndarray, masks: Tensor) -> Image.Image:
        regions = [Region(mask=mask.float()) for mask in masks if bool(mask.any())]
        return draw_regions(enlarge(Image.fromarray(image), 192), regions, names=False)

    rows = [[outlined(image, one) for one in masks] for _, image, masks in shown]
    return grid(rows, [scene.prompt for scene, _, _ in shown], ["Otsu", "attended"], side=192)
