"""Stacks of controls for pictures with the same subjects or the same scene, under the names of their methods.

Regions are one list per picture: where its subjects are, each under its name. What differs from the papers, and why, is
told in docs/subjects.md.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch

from .attach import parts_of
from .controls import Control, Harmonize, Isolate, PlainQueries, Regions, Reposition, Share
from .controls.base import scenes_of
from .controls.harmony import Features
from .controls.reposition import Mode
from .families import family_of
from .region import Overlap, Region, coverage
from .schedule import Window
from .select import Selector

__all__ = [
    "CHOSEN",
    "SETS",
    "chosen_options",
    "consistory",
    "diffuhaul",
    "ir_diffusion",
    "scene",
    "storydiffusion",
    "storysync",
    "subjects",
]

_AFTER_THE_FIRST = (0.02, 1.0)
"""All steps of fifty but the first one."""


def _read(anchors: int | None, group: int | None) -> dict[str, Any]:
    """Who reads: all each other, or all the first pictures; of the batch, or of groups of so many."""
    return {"group": group, **({} if anchors is None else {"readers": "anchors", "anchors": anchors})}


def subjects(
    regions: Any,
    *,
    overlap: Overlap = "union",
    weight: float = 0.5,
    window: Window = (0.1, 1.0),
    harmony: float = 0.0,
    features: Features = "value",
    apart: Window = (0.1, 0.5),
    reposition: Mode | None = None,
    layers: Selector = "shared",
    anchors: int | None = None,
    group: int | None = None,
) -> list[Control]:
    """Ours: subjects read their namesakes in all other pictures; those of different names do not see each other for the
    first half.

    Args:
        weight: of the namesakes' tokens against the picture's own.
        window: of reading; what comes before it decides where things stand.
        harmony: strength of `Harmonize` on top, from a tenth of the run to six tenths; 0 is not there.
        features: what `Harmonize` matches tokens by; "place" brings the namesake's pattern over as it lies on it.
        apart: of the isolation, which is there where some picture has several subjects.
        layers: in which subjects are read.
        reposition: how what is read is moved to its namesake's place, see `Reposition`; None leaves it where it stands.
        anchors: so many pictures at the beginning are read; None lets all read each other.
        group: so many pictures that follow each other are a set; None makes one of the batch.
    """
    told: dict[str, Any] = {"overlap": overlap, "layers": layers, **_read(anchors, group)}
    several = any(len({region.label for region in scene}) > 1 for scene in scenes_of(regions, "regions"))
    stack: list[Control] = []
    if several:
        stack.append(Isolate(regions, overlap=overlap, background="shared", text=False, branch="all", window=apart))
    stack.append(Share(regions, tokens="subject", queries="same", weight=weight, window=window, **told))
    if reposition is not None:
        stack.append(Reposition(mode=reposition, layers=layers, window=window))
    if harmony:
        # of tokens that lie upon each other the nearest one always counts
        floor = 0.0 if features == "place" else 0.5
        stack.append(Harmonize(regions, strength=harmony, features=features, window=(0.1, 0.6), floor=floor, **told))
    return stack


def consistory(
    regions: Any,
    *,
    overlap: Overlap = "union",
    anchors: int = 2,
    group: int | None = None,
    ratio: float = 0.5,
    plain: tuple[float, float] = (0.9, 0.818),
    seed: int = 0,
) -> list[Control]:
    """ConsiStory (arXiv 2402.03286): all tokens read half of the anchors' subjects, and subjects take in the outputs of
    the tokens that they match there; in the first tenth of the run most of the queries are those of plain pictures.

    Args:
        plain: shares of plain queries at the first and the last of these steps, see `PlainQueries`; each step at which
            something is shared costs one more forward (5 of 50 more). (0, 0) leaves them out.
    """
    told: dict[str, Any] = {"overlap": overlap, "layers": "shared", **_read(anchors, group)}
    return [
        Share(regions, tokens="subject", ratio=ratio, seed=seed, window=_AFTER_THE_FIRST, **told),
        *([PlainQueries(*plain, layers="shared")] if any(plain) else []),
        Harmonize(regions, temperature=0.0, **told),
    ]


def storydiffusion(
    regions: Any = (),
    *,
    overlap: Overlap = "union",
    anchors: int = 4,
    group: int | None = None,
    ratio: float = 0.5,
    seed: int = 0,
) -> list[Control]:
    """StoryDiffusion (arXiv 2405.01434): half of all tokens of the first pictures are read, in seven layers of ten at
    first, later in nine. It asks for no regions."""
    told: dict[str, Any] = {"overlap": overlap, "layers": "shared", **_read(anchors, group)}
    phases = ((0.7, (_AFTER_THE_FIRST[0], 0.4)), (0.9, (0.4, 1.0)))
    return [Share(regions, ratio=ratio, seed=seed, gate=gate, window=window, **told) for gate, window in phases]


def storysync(
    regions: Any,
    *,
    overlap: Overlap = "union",
    anchors: int | None = None,
    group: int | None = None,
    ratio: float = 0.5,
    seed: int = 0,
) -> list[Control]:
    """StorySync (arXiv 2508.03735), as far as it is published: subjects are read by all pictures, and blended where
    small regions of them match."""
    told: dict[str, Any] = {"overlap": overlap, "layers": "shared", **_read(anchors, group)}
    return [
        Share(regions, tokens="subject", ratio=ratio, seed=seed, window=_AFTER_THE_FIRST, **told),
        Harmonize(regions, radius=1, **told),
    ]


def scene(regions: Any, *, overlap: Overlap = "union", anchors: int = 2, group: int | None = None) -> list[Control]:
    """SceneDecorator (arXiv 2510.22994): what is behind the subjects of the first pictures is read by all."""
    told: dict[str, Any] = {"overlap": overlap, "layers": "shared", **_read(anchors, group)}
    return [Share(regions, tokens="background", window=_AFTER_THE_FIRST, **told)]


def ir_diffusion(
    regions: Any,
    *,
    overlap: Overlap = "union",
    anchors: int = 2,
    group: int | None = None,
    query_ratio: float = 0.5,
    seed: int = 0,
    reposition: Mode = "resample",
    portraits: float = 0.0,
) -> list[Control]:
    """IR-Diffusion (arXiv 2411.19261): subjects of one picture do not see each other, and half of the tokens of each
    read their namesake in the first pictures.

    Args:
        portraits: in [0, 1], how much subjects read of their region's own prompt in the place of the picture's: masked
            mutual cross attention, 0.9 in the published code. Meant for cross attention; 0 leaves it out.
        reposition: "resample" is what the published code comes to; "rope" moves what is read, as the paper means it, in
            models with rotary positions.
    """
    told: dict[str, Any] = {"overlap": overlap, **_read(anchors, group)}
    texts = [Regions(regions, overlap=overlap, base_ratio=1 - portraits)] if portraits else []
    return [
        *texts,
        Isolate(regions, overlap=overlap, background="shared", text=False, branch="all"),
        Share(regions, tokens="subject", queries="same", query_ratio=query_ratio, seed=seed, layers="shared", **told),
        Reposition(mode=reposition, layers="shared"),
    ]


def diffuhaul(
    regions: Any,
    *,
    overlap: Overlap = "union",
    layers: Selector = "shared",
    own: float = 0.0,
    anchoring: float = 0.2,
    copying: Window = (0.2, 0.8),
    copied: float = 0.8,
    reposition: Mode | None = None,
    group: int | None = None,
) -> list[Control]:
    """DiffUHaul (arXiv 2406.01594), as we read it: the first picture's subjects and ground, drawn again elsewhere.

    Its parts are the paper's: attention masked between each subject and the rest, keys and values of the first picture
    in place of the own ones, outputs anchored to those of the first picture, later copied from the tokens that match
    there. Nobody published its windows, layers and shares, nor whether anchoring moves what it anchors; here outputs of
    a subject are taken along to its new place, those of the ground stay, and what the subject left is the model's.

    Args:
        regions: one list per picture: where the subjects are in the first, and in the others.
        layers: in which all of it acts.
        own: weight of the own image tokens beside those of the first picture, see `Share`.
        anchoring: part of the run: all the way in its first half, half the way in its second.
        copying, copied: when outputs are copied from matching tokens, and how far.
        reposition: how keys of subjects are moved along, see `Reposition`; "rope" for rotary models.
    """
    scenes = scenes_of(regions, "regions")
    told: dict[str, Any] = {"overlap": overlap, "layers": layers, **_read(1, group)}
    carried: dict[str, Any] = {**told, "branch": "all", "temperature": 0.0}
    parted = [_with_rest(scene, [scene], "rest") for scene in scenes]
    # the first picture is left alone; through the prompt a subject would come back to where it stood
    masked = [[] if number % (group or len(scenes)) == 0 else scene for number, scene in enumerate(parted)]
    stack: list[Control] = [
        Isolate(masked, overlap=overlap, hub="source", text=False, branch="all", layers=layers),
        Share(parted, own=own, **told),
    ]
    if reposition is not None:
        stack.append(Reposition(mode=reposition, layers=layers))
    half, grounded = anchoring / 2, [_with_rest(scene, scenes, "ground") for scene in scenes]
    if anchoring:
        for share, window in ((1.0, (0.0, half)), (0.5, (half, anchoring))):
            carried_along = {**carried, "features": "place", "floor": 0.0}
            stack.append(Harmonize(grounded, strength=share, window=window, **carried_along))
    if copied:
        stack.append(Harmonize(scenes, strength=copied, window=copying, features="out", floor=-1.0, **carried))
    return stack


def _with_rest(scene: Sequence[Region], covering: Sequence[Sequence[Region]], name: str) -> list[Region]:
    """The regions of a picture, and one of this name of all that the scenes `covering` do not cover, if anything."""
    squares = [coverage(region, (64, 64)) for one in covering for region in one]
    left = 1 - torch.stack(squares).amax(0) if squares else torch.ones(64, 64)
    return [*scene, *([Region(mask=left, name=name)] if bool((left > 0).any()) else [])]


SETS: Mapping[str, Callable[..., list[Control]]] = {
    "subjects": subjects,
    "consistory": consistory,
    "storydiffusion": storydiffusion,
    "storysync": storysync,
    "scene": scene,
    "ir-diffusion": ir_diffusion,
}

CHOSEN: Mapping[tuple[str, str], Mapping[str, Any]] = {
    ("subjects", "unet"): {"weight": 2.0, "harmony": 0.8, "features": "place"},
    ("subjects", "flux"): {"reposition": "rope", "weight": 1.5},
    ("subjects", "sd3"): {"layers": "edit", "weight": 1.0},
    ("ir-diffusion", "unet"): {"portraits": 0.9},
}
"""By preset and family: options that were measured better on its embedded model than the preset's own, or belong to a
method where it can be followed."""


def chosen_options(name: str, pipe: Any, leading: bool) -> dict[str, Any]:
    """The options with which a pipeline or model is given a preset unless its user says otherwise.

    Subjects that read one picture stayed themselves better than such that read all; that needs a first picture with
    everybody in it.

    Args:
        leading: the first picture shows every subject.
    """
    family = family_of(parts_of(pipe)[0]).name
    first = {"anchors": 1} if leading and name == "subjects" else {}
    return {**first, **CHOSEN.get((name, family), {})}
