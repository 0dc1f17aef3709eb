"""`attnctrl demo`: the same seeds without and with control."""

from __future__ import annotations

import time
from pathlib import Path
from typing import Annotated

import typer

from attnctrl.cli.loading import DeviceOption, check_device, named_model
from attnctrl.cli.output import Format, FormatOption, emit, hush, note, progress_bar


def demo(
    output: Annotated[Path, typer.Option("--output", "-o", help="The picture to write.")] = Path("out/demo.png"),
    model: Annotated[
        str | None, typer.Option("--model", "-m", help="A folder or a hub id instead of toy-flux.")
    ] = None,
    seeds: Annotated[int, typer.Option(min=1, max=16, help="Seeds of each scene.")] = 2,
    steps: Annotated[int | None, typer.Option(min=1, max=500, help="Denoising steps; else the model's.")] = None,
    device: DeviceOption = None,
    form: FormatOption = Format.human,
) -> None:
    """Draw the example scenes without and with control, the same seeds, boxes shown.

    Example:

      attnctrl demo -o out/demo.png
    """
    hush()
    from attnctrl.pipelines import ScenePipeline
    from attnctrl.pipelines.demo import demo_scenes, draw_demo

    if output.suffix.lower() != ".png":
        raise typer.BadParameter(f"'{output}' must end in .png", param_hint="--output")
    scenes = [scene if steps is None else scene.replace(steps=steps) for scene in demo_scenes()]
    pipe = ScenePipeline.from_pretrained(named_model(model) if model else "toy-flux", device=check_device(device))
    started = time.perf_counter()
    with progress_bar("drawing", form) as advance:
        sheet = draw_demo(pipe, scenes, seeds, advance)
    seconds = round(time.perf_counter() - started, 3)
    path = sheet.save(output)
    if form is Format.human:
        note("above: the prompt alone; below: the same seeds with boxes")
    data = {"command": "demo", "path": str(output), "pictures": sheet.count, "seconds": seconds}
    emit(form, data, lambda: f"{path}  {sheet.count} pictures  {seconds:.1f} s", [str(output)])
