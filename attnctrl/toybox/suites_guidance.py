"""`attnctrl eval guidance`: how good pictures are in themselves, against renders of the scenes that are told.

Plain pictures are drawn without guidance, controlled ones with a perturbed branch; classifier-free guidance, which the
models are used with, is a variant beside it.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np

from attnctrl.attach import parts_of
from attnctrl.controls import Control, Perturb
from attnctrl.families import family_of
from attnctrl.metrics.frechet import frechet_distance

from . import world
from .embed import identity_embedding, style_embedding
from .scorer import Expected, Found, agrees, match, read_picture
from .suite import Drawing, Images, Picture, Stack, Suite, Whole, draw_pictures
from .suites_layout import told_share
from .suites_run import Runner

PER_TASK = 2
"""Pictures of each prompt, for their diversity."""


@dataclass(frozen=True)
class Task:
    """One or two told subjects, and the scene that they were taken from."""

    scene: world.WorldScene
    prompt: str

    @property
    def expected(self) -> list[Expected]:
        return [Expected(one.shape, one.color) for one in self.scene.subjects]


def sample(rng: np.random.Generator) -> Task:
    """A flat scene whose subjects' shapes, colours and places are told, and its ground."""
    drawn = world.sample_scene(rng, int(rng.integers(1, 3)))
    scene = world.WorldScene(drawn.subjects, drawn.background)
    telling = world.Telling(shape=1, color=1, pattern=0, size=0, place=1, background=1, style=1)
    return Task(scene, world.caption(scene, rng, telling))


def _pictures(task: Task, seed: int) -> list[Picture]:
    return [Picture(task.prompt, PER_TASK * seed + number) for number in range(PER_TASK)]


def values(task: Task, images: Images, plain: Images) -> dict[str, float]:
    """`binding`: share of told subjects that are there, and no more of them than told; `saturation`: mean distance of
    the pictures' colourfulness from that of the render, as a share of 255; `style`: share of pictures in the told style
    (too much contrast at edges is read as outlines)."""
    render = world.render(task.scene, *images[0].shape[:2]).image
    readings = [read_picture(image) for image in images]
    right = [_bound(task, reading.subjects) for reading in readings]
    off = [abs(_colourfulness(image) - _colourfulness(render)) for image in images]
    told = [reading.style.name == task.scene.style.name for reading in readings]
    return {"binding": float(np.mean(right)), "saturation": float(np.mean(off)), "style": float(np.mean(told))}


def _bound(task: Task, found: Sequence[Found]) -> float:
    pairs = zip(task.expected, match(task.expected, found), strict=True)
    return float(np.mean([agrees(want, one) for want, one in pairs])) * (len(found) == len(task.expected))


def _colourfulness(image: np.ndarray) -> float:
    """Mean distance between a pixel's strongest and weakest channel, as a share of 255."""
    return float((image.max(-1).astype(float) - image.min(-1)).mean()) / 255


def features(image: np.ndarray) -> np.ndarray:
    """What the scorer sees of a whole picture [D]: ground, number of subjects, their mean identity, style."""
    reading = read_picture(image)
    ground = np.array([reading.background == name for name in world.BACKGROUNDS], dtype=float)
    style = style_embedding(reading)
    identities = [identity_embedding(image, one) for one in reading.subjects]
    blank = identity_embedding(*_anything())
    mean = np.mean(identities, axis=0) if identities else np.zeros_like(blank)
    return np.concatenate([ground, [len(identities) / 2], mean, style])


def _anything() -> tuple[np.ndarray, Found]:
    """A picture with a subject, to know how long an embedding is."""
    scene = world.WorldScene((world.WorldSubject("square", "red", "solid", 0.5, 0.5, 0.3),), "white")
    image = world.render(scene).image
    return image, read_picture(image).subjects[0]


def _seen(task: Task, images: Images) -> tuple[list[np.ndarray], np.ndarray]:
    """`features` of the pictures, and of the render of the told scene."""
    return [features(image) for image in images], features(world.render(task.scene, *images[0].shape[:2]).image)


def frechet(seen: Sequence[tuple[list[np.ndarray], np.ndarray]]) -> float:
    """Frechet distance of `features` between the pictures and renders of the told scenes."""
    return frechet_distance(np.array([one for own, _ in seen for one in own]), np.array([one for _, one in seen]))


def fidelity(task: Task, images: Images) -> float:
    """Share of what is told that the pictures show."""
    return float(np.mean([told_share(task.expected, task.scene.background, read_picture(one)) for one in images]))


CHOSEN: Mapping[str, Mapping[str, Any]] = {
    "unet": {"kind": "identity", "layers": "up.self", "scale": 0.5},
    "flux": {"kind": "identity", "layers": "single", "scale": 0.5},
    "sd3": {"kind": "identity", "layers": "middle", "scale": 1.5},
}
"""What is perturbed in the model of each family, chosen on "tune"."""
SCALES = (0.5, 1.0, 2.0, 4.0, 8.0)
"""Of the curve from too little to too much."""
EARLY = (0.0, 0.3)
"""The share of steps in which places and shapes are decided, and edges are not."""


def perturbed(**other: Any) -> Stack:
    """The branch that was chosen for the runner's model, with these settings in the place of its own."""

    def stack(runner: Runner, _pictures: Sequence[Picture]) -> list[Control]:
        return [Perturb(**{**CHOSEN[family_of(parts_of(runner.pipe)[0]).name], **other})]

    return stack


def guided(acting: Stack | None) -> Drawing:
    """Pictures with the guidance that the model is used with, and with what acts besides."""

    def draw(runner: Runner, wanted: Sequence[Picture], done: Callable[[int], None] | None) -> list[np.ndarray]:
        from attnctrl.pipelines.models import read_defaults

        usual = read_defaults(Path(str(runner.pipe.name_or_path or "")))
        scales = {name: usual[name] for name in GUIDANCE.runs if name in usual}
        return draw_pictures(replace(runner, **scales), wanted, acting or {}, done)

    return Drawing(draw)


GUIDANCE = Suite(
    name="guidance",
    sample=sample,
    pictures=_pictures,
    values=values,
    better={"binding": "higher", "saturation": "lower", "style": "higher"},
    fidelity=fidelity,
    whole={"frechet": Whole("lower", _seen, frechet)},
    controls=perturbed(),
    variants={
        "early": perturbed(window=EARLY),
        **{f"scale_{scale:g}".replace(".", "_"): perturbed(scale=scale) for scale in SCALES},
        "cfg": guided(None),
        "cfg_and_perturbed": guided(perturbed()),
    },
    runs={"guidance_scale": 1.0, "true_cfg_scale": 1.0},
)
