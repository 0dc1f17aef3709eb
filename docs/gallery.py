"""The pictures of the gallery: `make gallery`, or `python docs/gallery.py [NAME ...]`, draws them into assets/gallery/.

Every plate shows what the model draws by itself beside what a method makes of it: the same prompts, the same seeds,
regions drawn on. A plate's model is one on which there is something to see; its seeds count up from one number. The
files hold the facts of their plate, which tests compare.
"""

from __future__ import annotations

import hashlib
import json
import sys
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import lru_cache, partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from attnctrl.pipelines import (
    Character,
    LayoutPipeline,
    MultiSubjectPipeline,
    ScenePipeline,
    Shot,
    StylePipeline,
    Subject,
)
from attnctrl.pipelines.demo import draw_demo, example
from attnctrl.pipelines.editing import Editor, EditSettings
from attnctrl.pipelines.runner import Runner
from PIL import Image

import attnctrl as ac
from attnctrl import files, maps
from attnctrl.heads import Pair, PipelineSampler
from attnctrl.heads.atlas import atlas
from attnctrl.headset import HeadSet
from attnctrl.pictures import draw_regions, enlarge, grid
from attnctrl.toybox.world import WorldScene, WorldSubject, render

HERE = Path(__file__).parent.parent / "assets" / "gallery"
SIDE = 160
TWINS = [
    Subject("a striped red circle left", box=(0.05, 0.25, 0.47, 0.75)),
    Subject("a dotted blue circle right", box=(0.53, 0.25, 0.95, 0.75)),
]


FACTS = "attnctrl-plate"


@dataclass(frozen=True, eq=False)
class Plate:
    """A picture of the page, and what is compared on it.

    Attributes:
        model: what it is drawn with.
        pairs: pictures that differ in the method alone: (without, with).
        watches: the method only watches, so that none may differ.
    """

    image: Image.Image
    model: str
    pairs: Sequence[tuple[Image.Image, Image.Image]]
    watches: bool = False

    @property
    def apart(self) -> list[float]:
        """Mean distance of each pair, in levels of 255."""
        return [float(np.abs(np.subtract(a, b, dtype=float)).mean()) for a, b in self.pairs]

    @property
    def facts(self) -> dict[str, Any]:
        """What its file tells: the model, how far its pairs are apart, and whose these facts are."""
        apart = [round(one, 2) for one in self.apart]
        return {"model": self.model, "apart": apart, "pixels": digest(self.image)}


def digest(image: Image.Image) -> str:
    """Of the pixels of a picture."""
    return hashlib.sha256(np.asarray(image.convert("RGB")).tobytes()).hexdigest()[:16]


@lru_cache(maxsize=2)
def stock(model: str) -> Any:
    """A pipeline of an embedded model with its settings, shared by the plates."""
    return Runner.load(model)


def wrapped(kind: Any, model: str) -> Any:
    """A wrapper around the shared pipeline, with the model's own settings."""
    return kind.from_pipe(stock(model).pipe)


def sheet(
    model: str, columns: Mapping[str, Sequence[Image.Image]], rows: Sequence[str], before: int = 0, rows_first: int = 0
) -> Plate:
    """Pictures by column, a label for each row; column `before` is without the method, those behind it are with it."""
    cells = [[enlarge(column[number], SIDE) for column in columns.values()] for number in range(len(rows))]
    plain, *others = list(columns.values())[before:]
    pairs = [pair for column in others for pair in list(zip(plain, column, strict=True))[rows_first:]]
    return Plate(grid(cells, rows, list(columns), side=SIDE), model, pairs)


def demo(name: str, steps: int | None) -> Plate:
    """An example scene without and with control, on three seeds."""
    scene = example(name) if steps is None else example(name).replace(steps=steps)
    drawn = draw_demo(wrapped(ScenePipeline, scene.model), [scene], 3)
    half = len(drawn.pictures) // 2
    return Plate(drawn.image, scene.model, list(zip(drawn.pictures[:half], drawn.pictures[half:], strict=True)))


def layout(steps: int | None) -> Plate:
    """Four subjects in boxes, FLUX."""
    return demo("four_shapes", steps)


def masks(steps: int | None) -> Plate:
    """Subjects in drawn masks."""
    return demo("mask_drawn", steps)


def isolation(steps: int | None) -> Plate:
    """Two of a shape that must not melt into one, FLUX."""
    prompt = "a striped red circle left, a dotted blue circle right, white background"
    pipe = wrapped(LayoutPipeline, "toy-flux")
    told: dict[str, Any] = {"seeds": 11, "num_images_per_prompt": 4, "num_inference_steps": steps}
    ways = {"prompt alone": pipe(prompt, TWINS, controls=[], **told), "with boxes": pipe(prompt, TWINS, **told)}
    regions = [ac.Region(one.prompt, one.box, name="striped" if n == 0 else "dotted") for n, one in enumerate(TWINS)]
    columns = {name: [draw_regions(enlarge(p.image, SIDE), regions) for p in drawn] for name, drawn in ways.items()}
    return sheet("toy-flux", columns, [f"seed {picture.seed}" for picture in ways["with boxes"]])


def references(steps: int | None) -> Plate:
    """Three reference pictures, each for a place of its own, FLUX Kontext."""
    name = "three_references"
    scene = example(name) if steps is None else example(name).replace(steps=steps)
    pipe = wrapped(ScenePipeline, "toy-flux")
    shown = [Image.open(scene.folder / one.reference) for one in scene.subjects]
    rows, pairs = [], []
    for seed in (3, 4, 5):
        drawn = [pipe(scene, [seed], controlled=controlled)[0].image for controlled in (False, True)]
        pairs.append((drawn[0], drawn[1]))
        rows.append([*shown, *(draw_regions(enlarge(one, SIDE), scene.regions(), names=False) for one in drawn)])
    labels = ["top left", "top right", "bottom", "all three at once", "each to its place"]
    return Plate(grid(rows, ["seed 3", "seed 4", "seed 5"], labels, side=SIDE), "toy-flux", pairs)


def subjects(steps: int | None) -> Plate:
    """One cast in four scenes."""
    cast = [Character("ball", "a red circle"), Character("star", "a blue star")]
    shots = [
        Shot("{ball} left, {star} right, white background"),
        Shot("{star} top, {ball} bottom, gray background"),
        Shot("{ball} center, beige background"),
        Shot("{star} left, {ball} right, black background"),
    ]
    story = wrapped(MultiSubjectPipeline, "toy-sd")(cast, shots, seed=4, num_inference_steps=steps)
    both = zip(story.rehearsal.pictures, story.pictures, strict=True)
    return Plate(story.sheet(SIDE), "toy-sd", [(plain.image, drawn.image) for plain, drawn in both])


def reposition(steps: int | None) -> Plate:
    """A subject of the first picture, read by others at its old place, and moved to where it stands now."""
    # the size and the places that the model gives what is told so
    places = {"left": (0.05, 0.25, 0.55, 0.75), "right": (0.38, 0.25, 0.88, 0.75), "bottom right": (0.5, 0.5, 1.0, 1.0)}
    prompts = [f"a red circle {place}, white background" for place in places]
    regions = [[ac.Region(name="circle", box=box)] for box in places.values()]
    ways: dict[str, list[Any]] = {"prompt alone": []}
    for name, mode in (("read where it was", None), ("moved to its place", "rope")):
        ways[name] = ac.preset("subjects", regions, anchors=1, reposition=mode)
    columns = {name: drawn("toy-flux", prompts, 5, controls, steps) for name, controls in ways.items()}
    # the first picture is the one that others read
    return sheet("toy-flux", columns, list(places), rows_first=1)


def drawn(
    model: str, prompts: Sequence[str], seed: int, controls: Sequence[Any], steps: int | None
) -> list[Image.Image]:
    """Pictures of prompts in one batch, seeds counting up."""
    runner = stock(model)
    if steps is not None:
        runner = runner.with_steps(steps)
    seeds = [seed + number for number in range(len(prompts))]
    images = runner.draw(prompts, seeds, (lambda start, stop: ac.attach(runner.pipe, controls)) if controls else None)
    return [Image.fromarray(image) for image in images]


def style(steps: int | None) -> Plate:
    """Sets whose first picture gives the style."""
    prompts = [f"a {color} {shape} center, white background" for color, shape in (
        ("red", "star"), ("blue", "heart"), ("green", "circle"), ("purple", "square"),
    )]  # fmt: skip
    rows = {}
    for seed in (1, 21):
        for name, controls in (("prompt alone", []), ("shared style", None)):
            pipe = wrapped(StylePipeline, "toy-sd3")
            made = pipe(prompts, controls=controls, seeds=seed, num_inference_steps=steps)
            rows[f"seeds from {seed}, {name}"] = [one.image for one in made]
    image = grid(list(rows.values()), list(rows), ["gives the style", "heart", "circle", "square"], side=SIDE)
    sets = list(rows.values())
    pairs = [pair for number in (0, 2) for pair in zip(sets[number][1:], sets[number + 1][1:], strict=True)]
    return Plate(image, "toy-sd3", pairs)


def style_picture(steps: int | None) -> Plate:
    """The style of a real picture."""
    poster = rendered("star", "yellow", "hatched")
    prompts = ["a red heart center, white background", "a blue circle center, white background"]
    pipe = wrapped(StylePipeline, "toy-sd")
    told: dict[str, Any] = {"seeds": 4, "num_inference_steps": steps}
    plain = drawn("toy-sd", prompts, 4, [], steps)
    told |= {"picture_prompt": "a yellow star center, white background, hatched style", "match": ("query", "key")}
    made = pipe(prompts, picture=poster, **told)
    return sheet(
        "toy-sd",
        {"the picture": [poster] * 2, "prompt alone": plain, "in its style": [one.image for one in made]},
        ["heart", "circle"],
        before=1,
    )


def rendered(shape: str, color: str, style_name: str = "flat", pattern: str = "solid") -> Image.Image:
    """A picture of the toy models' world that no model drew."""
    from attnctrl.toybox.world import WorldStyle

    scene = WorldScene((WorldSubject(shape, color, pattern, 0.5, 0.5, 0.3),), "white", WorldStyle(style_name))
    return Image.fromarray(render(scene).image)


def edit(steps: int | None) -> Plate:
    """A picture drawn again in another colour, holding on to it for none, some or all of the run."""
    source = rendered("triangle", "blue")
    editor = Editor.from_pipe(stock("toy-flux").pipe)
    columns = {"the picture": [source]}
    for share in (0.0, 0.3, 0.6):
        settings = EditSettings(
            "a red triangle center, white background", source="a blue triangle center, white background",
            steps=steps or 10, share=share,
        )  # fmt: skip
        columns[f"values for {share:.0%}"] = [editor.edit(source, settings).images[0]]
    return sheet("toy-flux", columns, ["blue to red"], before=1)


def attention(steps: int | None) -> Plate:
    """Where words of the prompt are attended to."""
    prompt = "a red circle left, a blue square right, gray background"
    words = {"red circle": "red circle", "blue square": "blue square", "background": "gray background"}
    runner = stock("toy-sd")
    if steps is not None:
        runner = runner.with_steps(steps)
    with maps.record(runner.pipe, words, prompt=prompt, window=(0.3, 1.0)) as found:
        image = Image.fromarray(runner.draw([prompt], [2])[0])
    shown = maps.legend(image, {name: found[name][0] for name in words}, "seed 2", side=SIDE)
    return Plate(shown, "toy-sd", [(Image.fromarray(runner.draw([prompt], [2])[0]), image)], watches=True)


def compared(
    model: str, prompt: str, seeds: Sequence[int], ways: Mapping[str, Sequence[Any]], guidance: float, steps: int | None
) -> Plate:
    """One prompt on some seeds, in a column for each stack of controls."""
    runner = stock(model).with_guidance(guidance)
    if steps is not None:
        runner = runner.with_steps(steps)
    columns = {}
    for name, controls in ways.items():
        around = partial(_attached, runner.pipe, controls) if controls else None
        columns[name] = [Image.fromarray(one) for one in runner.draw([prompt] * len(seeds), seeds, around)]
    return sheet(model, columns, [f"seed {seed}" for seed in seeds])


def _attached(pipe: Any, controls: Sequence[Any], start: int, stop: int) -> Any:
    return ac.attach(pipe, controls)


def skip(steps: int | None) -> Plate:
    """Away from a model without one of its blocks, or without what the attention of one adds."""
    prompt = "a striped red circle left, a dotted blue square right, white background"
    ways = {
        "no guidance": [],
        "block left out": [ac.Skip("block", layers="joint:1", scale=1.5, window=(0.0, 1.0))],
        "attention left out": [ac.Skip("attention", layers="middle", scale=1.5, window=(0.0, 1.0))],
    }
    return compared("toy-sd3", prompt, [1, 3, 6], ways, 1.0, steps)


def nag(steps: int | None) -> Plate:
    """A negative prompt in a run without guidance; and too much of it."""
    ways = {
        "no guidance": [],
        "not red": [ac.NAG("a red circle", scale=3.0)],
        "far too much": [ac.NAG("a red circle", scale=6.0, tau=4.0, strength=1.0)],
    }
    return compared("toy-flux", "a circle center, white background", [1, 3, 5], ways, 1.0, steps)


def reuse(steps: int | None) -> Plate:
    """Attention that is computed at some steps only."""
    prompt = "a striped red circle left, a dotted blue square right, white background"
    ways = {
        "at every step": [],
        "every second": [ac.Reuse("pab", every=2)],
        "every fourth": [ac.Reuse("pab", every=4)],
        "and at the ends": [ac.Reuse("pab", every=4, between=(0, 1000))],
    }
    model = "toy-sd3"
    return compared(model, prompt, [1, 2, 4], ways, stock(model).guidance_scale, steps)


def heads(steps: int | None) -> Plate:
    """Each head of two layers perturbed by itself."""
    sampler = _Seen(stock("toy-sd3").with_guidance(1.0).with_steps(steps or 10), layers="joint:1-2")
    pair = Pair("a circle left, a square right, white background", 5)

    def weak(chosen: Sequence[tuple[str, int]]) -> HeadSet:
        return HeadSet(heads=tuple(chosen), scale=4.0)

    image = atlas(sampler, pair, weak, side=SIDE)
    plain, *others = sampler.pictures
    return Plate(image, "toy-sd3", [(plain, one) for one in others])


class _Seen(PipelineSampler):
    """Keeps what it draws."""

    def __init__(self, *told: Any, **more: Any) -> None:
        super().__init__(*told, **more)
        self.pictures: list[Image.Image] = []

    def draw(self, pair: Pair, sets: Sequence[HeadSet]) -> torch.Tensor:
        found = super().draw(pair, sets)
        self.pictures += [Image.fromarray((one * 255).byte().permute(1, 2, 0).numpy()) for one in found]
        return found


PLATES: Mapping[str, Callable[[int | None], Plate]] = {
    "layout": layout,
    "masks": masks,
    "isolation": isolation,
    "references": references,
    "subjects": subjects,
    "reposition": reposition,
    "style": style,
    "style-picture": style_picture,
    "edit": edit,
    "maps": attention,
    "nag": nag,
    "skip": skip,
    "heads": heads,
    "reuse": reuse,
}


def main(names: Sequence[str]) -> None:
    """Draw the plates of these names, all of them for none."""
    torch.set_grad_enabled(False)
    for name in names or PLATES:
        plate = PLATES[name](None)
        told = {FACTS: json.dumps(plate.facts)}
        sys.stdout.write(f"{files.write_png(HERE / f'{name}.png', plate.image, told)}\n")
        sys.stdout.flush()


if __name__ == "__main__":
    main(sys.argv[1:])
