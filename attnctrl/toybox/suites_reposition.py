"""What acts in `attnctrl eval reposition`: the first picture of a task is read by the others, at their own places.

Where subjects stand is told by the words of their prompts, before anything is drawn. In models with rotary positions
the shared keys are moved; in others the subject is cut out of the first picture, put on a canvas at its new place, and
that canvas is read as a pinned row. Where positions are added to the picture, the first picture can be that row itself,
with other entries of the table.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import replace
from typing import Any

import numpy as np
from PIL import Image

import attnctrl
from attnctrl.attach import parts_of
from attnctrl.controls import Control, Reposition, Share
from attnctrl.families import family_of
from attnctrl.metrics.layout import Box
from attnctrl.pipelines.runner import Runner
from attnctrl.region import Region

from . import world
from .scorer import Expected, match, read_picture
from .suite import Acting, Drawing, Images, Picture, Suite, draw_pictures
from .suites_sets import Task, Told, fidelity, reposition_values, sample_reposition

SUBJECT = "subject"
EACH = 5
"""Pictures of a task, the first of which the others read."""
SIDES = {"large": 0.54, "small": 0.3}
"""Of the boxes of subjects, as shares of the canvas."""
FROM_EDGE = {"large": 0.3, "small": 0.25}
"""Of the middles of subjects that are told to a side."""


def place_of(told: Told) -> Box:
    """Where a picture's subject is told to stand."""
    words = told.prompt.split(",")[0].split()
    size = next(word for word in words if word in SIDES)
    edge, half = FROM_EDGE[size], SIDES[size] / 2
    x, y = (
        edge if near in words else 1 - edge if far in words else 0.5
        for near, far in (("left", "right"), ("top", "bottom"))
    )
    return x - half, y - half, x + half, y + half


def distance_slope(values: dict[str, float]) -> float:
    """Change of similarity with each place further away: the line through the same place, the next and the far one."""
    return float(np.polyfit((0, 1, 2), [values[name] for name in ("same_place", "near", "far")], 1)[0])


def values(task: Task, images: Images, plain: Images) -> dict[str, float]:
    """`reposition_values`, and their slope over the distance."""
    found = reposition_values(task, images, plain)
    return {**found, "slope": distance_slope(found)}


def pictures(task: Task, seed: int) -> list[Picture]:
    """With a region for each subject; the words of the prompt are what the canvas finds it by."""
    return [
        Picture(told.prompt, 10 * seed + number, [Region(told.prompt, box=place_of(told), name=SUBJECT)])
        for number, told in enumerate(task)
    ]


def anchored(
    runner: Runner, wanted: Sequence[Picture], *more: Control, group: int = EACH, **share: Any
) -> list[Control]:
    """The first picture of each group is read by the others, subject by subject."""
    cast = [list(one.regions) for one in wanted]
    how: dict[str, Any] = {"readers": "anchors", "anchors": 1, "tokens": "subject", "queries": "same", **share}
    return [Share(cast, group=group, **how), *more]


def on_canvas(
    runner: Runner, wanted: Sequence[Picture], done: Callable[[int], None] | None = None, **share: Any
) -> list[np.ndarray]:
    """The first picture of each task as it is without control; the others read its subject on canvases."""
    return _on_pinned(runner, wanted, done, lambda first, shown, one: (_cut(first, shown, one), one), **share)


def on_table(
    runner: Runner, wanted: Sequence[Picture], done: Callable[[int], None] | None = None, **share: Any
) -> list[np.ndarray]:
    """The same, but they read that picture itself, whose subject has the entries of its new place."""

    def itself(first: np.ndarray, shown: Picture, one: Picture) -> tuple[Image.Image, Picture]:
        return Image.fromarray(first), replace(shown, seed=one.seed)

    return _on_pinned(runner, wanted, done, itself, Reposition(mode="table"), **share)


def _on_pinned(
    runner: Runner,
    wanted: Sequence[Picture],
    done: Callable[[int], None] | None,
    read: Callable[[np.ndarray, Picture, Picture], tuple[Image.Image, Picture]],
    *more: Control,
    **share: Any,
) -> list[np.ndarray]:
    """`read`: (first picture, what it shows, what reads) -> the picture that is read, and what its row is told."""
    tasks = [wanted[start : start + EACH] for start in range(0, len(wanted), EACH)]
    firsts = runner.draw([task[0].prompt for task in tasks], [task[0].seed for task in tasks], progress=done)
    others = [(one, read(first, task[0], one)) for task, first in zip(tasks, firsts, strict=True) for one in task[1:]]
    rows = [row for one, (_, told) in others for row in (told, one)]
    pinned = [picture for _, (picture, _) in others]

    @contextmanager
    def around(start: int, stop: int) -> Iterator[None]:
        from attnctrl.pipelines.canvas import pinned_pictures

        shown = {row - start: pinned[row // 2] for row in range(start, stop, 2)}
        seeds = {row - start: rows[row].seed for row in range(start, stop, 2)}
        with ExitStack() as held:
            held.enter_context(pinned_pictures(runner.pipe, shown, seeds))
            held.enter_context(
                attnctrl.attach(runner.pipe, anchored(runner, rows[start:stop], *more, group=2, **share))
            )
            yield

    paired = runner.with_batch(max(2, runner.batch // 2 * 2))
    tick = None if done is None else lambda count: done(count // 2)
    drawn = paired.draw([one.prompt for one in rows], [one.seed for one in rows], around, tick)[1::2] if rows else []
    each = EACH - 1
    return [one for n, first in enumerate(firsts) for one in (first, *drawn[n * each : (n + 1) * each])]


def _cut(first: np.ndarray, shown: Picture, wanted: Picture) -> Image.Image:
    """The first picture's subject where another's should stand, on the ground of the first."""
    from attnctrl.pipelines.canvas import Cutout, canvas

    words = shown.prompt.split(",")[0].split()
    shape, color = (next(word for word in words if word in known) for known in (world.SHAPES, world.COLORS))
    (found,) = match([Expected(shape, color)], read_picture(first).subjects)
    # where it is not found, whatever stands at its place
    subject = shown.regions[0] if found is None else Region(mask=found.mask, name=SUBJECT)
    height, width = first.shape[:2]
    return canvas([Cutout(Image.fromarray(first), subject, wanted.regions[0])], (width, height))


def on_ropes(runner: Runner, wanted: Sequence[Picture]) -> list[Control]:
    """Shared keys, moved to where the reading picture's subject stands."""
    return anchored(runner, wanted, Reposition())


def on_resampled(runner: Runner, wanted: Sequence[Picture]) -> list[Control]:
    """Shared keys, each as often as resizing the subject would take it."""
    return anchored(runner, wanted, Reposition(mode="resample"))


def moved(runner: Runner, wanted: Sequence[Picture], done: Callable[[int], None] | None = None) -> list[np.ndarray]:
    """Turned keys where the model has rotary positions, canvases elsewhere."""
    if family_of(parts_of(runner.pipe)[0]).rotary is None:
        return on_canvas(runner, wanted, done)
    return draw_pictures(runner, wanted, on_ropes, done, max(1, len(wanted) // EACH))


def ways(runner: Runner) -> dict[str, Acting]:
    """What else can be read, by what the model knows of positions."""
    family = family_of(parts_of(runner.pipe)[0])
    found: dict[str, Acting] = {"shared": anchored, "resample": on_resampled}
    if family.rotary is not None:
        found["canvas"] = Drawing(on_canvas)
    return {**found, "table": Drawing(on_table)} if family.table else found


REPOSITION = Suite(
    name="reposition",
    sample=sample_reposition,
    pictures=pictures,
    values=values,
    better=dict.fromkeys(("identity_similarity", "same_place", "near", "far", "far_and_small", "slope"), "higher"),
    fidelity=fidelity,
    controls=Drawing(moved),
    variants=ways,
)
