"""The picture of the README: example scenes without and with control, on the same seeds."""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from importlib import resources
from pathlib import Path
from typing import TYPE_CHECKING, Any

from attnctrl.pipelines.scene import ScenePipeline

from attnctrl import files
from attnctrl.pictures import draw_regions, enlarge, grid
from attnctrl.scene import Scene, load_scene

if TYPE_CHECKING:
    from PIL import Image

EXAMPLES = ("two_shapes", "four_shapes", "mask_drawn")
SIDE = 240
ROWS = ((False, "prompt alone"), (True, "with boxes"))


@dataclass(frozen=True)
class Sheet:
    """A labelled grid; the pictures in it as they were drawn and their records, row by row; how many there are."""

    image: Image.Image
    pictures: list[Image.Image]
    records: list[dict[str, Any]]

    @property
    def count(self) -> int:
        """Number of pictures on the sheet."""
        return len(self.records)

    def save(self, path: str | Path) -> Path:
        """Write a PNG that carries the records; whole or not at all."""
        return files.write_png(path, self.image, {"attnctrl-demo": json.dumps(self.records, sort_keys=True)})


def example(name: str) -> Scene:
    """The example scene called `name`, as installed with the package."""
    with resources.as_file(resources.files("attnctrl.examples") / f"{name}.yaml") as path:
        return load_scene(path)


def demo_scenes() -> list[Scene]:
    """The scenes of `attnctrl demo`."""
    return [example(name) for name in EXAMPLES]


def draw_demo(
    pipe: ScenePipeline,
    scenes: Sequence[Scene],
    seeds: int,
    progress: Callable[[int, int], None] | None = None,
) -> Sheet:
    """Every scene with `seeds` seeds from its own one up: above without, below with control, boxes drawn on both.

    Args:
        pipe: What the scenes run on.
        scenes: At least one.
        seeds: Columns for each scene.
        progress: Called after every denoising step with (steps done, steps in all).
    """
    columns = [(scene, scene.seed + i) for scene in scenes for i in range(seeds)]
    total = len(ROWS) * sum(pipe.settings(scene).steps for scene, _ in columns)
    done = 0

    def advance(_step: int, _steps: int) -> None:
        nonlocal done
        done += 1
        if progress is not None:
            progress(done, total)

    rows, pictures, records = [], [], []
    for controlled, _ in ROWS:
        row = []
        for scene, seed in columns:
            picture = pipe(scene, [seed], controlled=controlled, progress=advance)[0]
            row.append(draw_regions(enlarge(picture.image, SIDE), scene.regions(), names=controlled))
            pictures.append(picture.image)
            records.append(picture.record)
        rows.append(row)
    sheet = grid(
        rows,
        row_labels=[label for _, label in ROWS],
        column_labels=[f"seed {seed}" for _, seed in columns],
        groups=[(scene.prompt, seeds) for scene in scenes],
        side=SIDE,
    )
    return Sheet(sheet, pictures, records)
