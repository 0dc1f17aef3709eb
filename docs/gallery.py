"""The pictures of the gallery: `make gallery`, or `python docs/gallery.py [NAME ...]`, draws them into assets/gallery/.

Every plate shows what the model draws by itself beside what a method makes of it: the same prompts, the same seeds,
regions drawn on. A plate's model is one on which there is something to see; its seeds count up from one number.
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Mapping, Sequence
from functools import lru_cache
from pathlib import Path
from typing import Any

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
from PIL import Image

import attnctrl as ac
from attnctrl import files, maps
from attnctrl.pictures import draw_regions, enlarge, grid
from attnctrl.toybox.suites_run import Runner
from attnctrl.toybox.world import WorldScene, WorldSubject, render

HERE = Path(__file__).parent.parent / "assets" / "gallery"
SIDE = 160
TWINS = [
    Subject("a striped red circle left", box=(0.05, 0.25, 0.47, 0.75)),
    Subject("a dotted blue circle right", box=(0.53, 0.25, 0.95, 0.75)),
]


@lru_cache(maxsize=2)
def stock(model: str) -> Any:
    """A pipeline of an embedded model with its settings, shared by the plates."""
    return Runner.load(model)


def wrapped(kind: Any, model: str) -> Any:
    """A wrapper around the shared pipeline, with the model's own settings."""
    return kind.from_pipe(stock(model).pipe)


def sheet(columns: Mapping[str, Sequence[Image.Image]], rows: Sequence[str]) -> Image.Image:
    """Pictures by column, a label for each row."""
    cells = [[enlarge(column[number], SIDE) for column in columns.values()] for number in range(len(rows))]
    return grid(cells, rows, list(columns), side=SIDE)


def demo(name: str, steps: int | None, model: str | None = None) -> Image.Image:
    """An example scene without and with control, on three seeds."""
    scene = example(name) if steps is None else example(name).replace(steps=steps)
    return draw_demo(wrapped(ScenePipeline, model or scene.model), [scene], 3).image


def layout(steps: int | None) -> Image.Image:
    """Four subjects in boxes, FLUX."""
    return demo("four_shapes", steps)


def masks(steps: int | None) -> Image.Image:
    """Subjects in drawn masks."""
    return demo("mask_drawn", steps)


def isolation(steps: int | None) -> Image.Image:
    """Two of a shape that must not melt into one, FLUX."""
    prompt = "a striped red circle left, a dotted blue circle right, white background"
    pipe = wrapped(LayoutPipeline, "toy-flux")
    told: dict[str, Any] = {"seeds": 11, "num_images_per_prompt": 4, "num_inference_steps": steps}
    ways = {"prompt alone": pipe(prompt, TWINS, controls=[], **told), "with boxes": pipe(prompt, TWINS, **told)}
    regions = [ac.Region(one.prompt, one.box, name="striped" if n == 0 else "dotted") for n, one in enumerate(TWINS)]
    columns = {name: [draw_regions(enlarge(p.image, SIDE), regions) for p in drawn] for name, drawn in ways.items()}
    return sheet(columns, [f"seed {picture.seed}" for picture in ways["with boxes"]])


def references(steps: int | None) -> Image.Image:
    """Three reference pictures, each for a place of its own, FLUX Kontext."""
    name = "three_references"
    scene = example(name) if steps is None else example(name).replace(steps=steps)
    pipe = wrapped(ScenePipeline, "toy-flux")
    shown = [Image.open(scene.folder / one.reference) for one in scene.subjects]
    rows = []
    for seed in (3, 4, 5):
        drawn = [pipe(scene, [seed], controlled=controlled)[0].image for controlled in (False, True)]
        rows.append([*shown, *(draw_regions(enlarge(one, SIDE), scene.regions(), names=False) for one in drawn)])
    labels = ["top left", "top right", "bottom", "all three at once", "each to its place"]
    return grid(rows, ["seed 3", "seed 4", "seed 5"], labels, side=SIDE)


def subjects(steps: int | None) -> Image.Image:
    """One cast in four scenes."""
    cast = [Character("ball", "a red circle"), Character("star", "a blue star")]
    shots = [
        Shot("{ball} left, {star} right, white background"),
        Shot("{star} top, {ball} bottom, gray background"),
        Shot("{ball} center, beige background"),
        Shot("{star} left, {ball} right, black background"),
    ]
    return wrapped(MultiSubjectPipeline, "toy-sd")(cast, shots, seed=4, num_inference_steps=steps).sheet(SIDE)


def reposition(steps: int | None) -> Image.Image:
    """A subject of the first picture, read by others at its old place, and moved to where it stands now."""
    # the size and the places that the model gives what is told so
    places = {"left": (0.05, 0.25, 0.55, 0.75), "right": (0.38, 0.25, 0.88, 0.75), "bottom right": (0.5, 0.5, 1.0, 1.0)}
    prompts = [f"a red circle {place}, white background" for place in places]
    regions = [[ac.Region(name="circle", box=box)] for box in places.values()]
    ways: dict[str, list[Any]] = {"prompt alone": []}
    for name, mode in (("read where it was", None), ("moved to its place", "rope")):
        ways[name] = ac.preset("subjects", regions, anchors=1, reposition=mode)
    columns = {name: drawn("toy-flux", prompts, 5, controls, steps) for name, controls in ways.items()}
    return sheet(columns, list(places))


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


def style(steps: int | None) -> Image.Image:
    """Sets whose first picture gives the style."""
    prompts = [f"a {color} {shape} center, white background" for color, shape in (
        ("red", "star"), ("blue", "heart"), ("green", "circle"), ("purple", "square"),
    )]  # fmt: skip
    rows = {}
    for seed in (1, 21):
        for name, controls in (("prompt alone", []), ("shared style", None)):
            pipe = wrapped(StylePipeline, "toy-sd")
            made = pipe(prompts, controls=controls, seeds=seed, num_inference_steps=steps)
            rows[f"seeds from {seed}, {name}"] = [one.image for one in made]
    return grid(list(rows.values()), list(rows), ["gives the style", "heart", "circle", "square"], side=SIDE)


def style_picture(steps: int | None) -> Image.Image:
    """The style of a real picture."""
    poster = rendered("star", "yellow", "hatched")
    prompts = ["a red heart center, white background", "a blue circle center, white background"]
    pipe = wrapped(StylePipeline, "toy-sd")
    told: dict[str, Any] = {"seeds": 4, "num_inference_steps": steps}
    plain = drawn("toy-sd", prompts, 4, [], steps)
    made = pipe(prompts, picture=poster, picture_prompt="a yellow star center, white background, hatched style", **told)
    return sheet(
        {"the picture": [poster] * 2, "prompt alone": plain, "in its style": [one.image for one in made]},
        ["heart", "circle"],
    )


def rendered(shape: str, color: str, style_name: str = "flat", pattern: str = "solid") -> Image.Image:
    """A picture of the toy models' world that no model drew."""
    from attnctrl.toybox.world import WorldStyle

    scene = WorldScene((WorldSubject(shape, color, pattern, 0.5, 0.5, 0.3),), "white", WorldStyle(style_name))
    return Image.fromarray(render(scene).image)


def edit(steps: int | None) -> Image.Image:
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
    return sheet(columns, ["blue to red"])


def attention(steps: int | None) -> Image.Image:
    """Where words of the prompt are attended to."""
    prompt = "a red circle left, a blue square right, gray background"
    words = {"red circle": "red circle", "blue square": "blue square", "background": "gray background"}
    runner = stock("toy-sd")
    if steps is not None:
        runner = runner.with_steps(steps)
    with maps.record(runner.pipe, words, prompt=prompt, window=(0.3, 1.0)) as found:
        image = Image.fromarray(runner.draw([prompt], [2])[0])
    return maps.legend(image, {name: found[name][0] for name in words}, "seed 2", side=SIDE)


PLATES: Mapping[str, Callable[[int | None], Image.Image]] = {
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
}


def main(names: Sequence[str]) -> None:
    """Draw the plates of these names, all of them for none."""
    torch.set_grad_enabled(False)
    for name in names or PLATES:
        sys.stdout.write(f"{files.write_png(HERE / f'{name}.png', PLATES[name](None), {})}\n")
        sys.stdout.flush()


if __name__ == "__main__":
    main(sys.argv[1:])
