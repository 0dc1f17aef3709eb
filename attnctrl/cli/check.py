"""`attnctrl check`: what a scene would do, without weights."""

from __future__ import annotations

import json
from dataclasses import asdict
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from attnctrl.cli.generate import read_scene
from attnctrl.cli.loading import ModelOption, model_for
from attnctrl.cli.output import Format, FormatOption, emit, hush

if TYPE_CHECKING:
    from attnctrl.explain import Explanation
    from attnctrl.pipelines.settings import Settings
    from attnctrl.scene import Scene


def check(
    scene: Annotated[
        Path | None, typer.Argument(metavar="SCENE", help="A scene file, or a PNG that attnctrl made.")
    ] = None,
    model: ModelOption = None,
    schema: Annotated[bool, typer.Option("--schema", help="Print the JSON Schema of scene files instead.")] = False,
    form: FormatOption = Format.human,
) -> None:
    """Validate a scene and show its tokens, regions and selected layers. Reads configurations, no weights.

    What reads what is told by `attnctrl explain`.

    Examples:

      attnctrl check examples/two_shapes.yaml

      attnctrl check --schema > scene.schema.json
    """
    if schema == (scene is not None):
        raise typer.BadParameter("give a scene file, or --schema", param_hint="SCENE")
    if scene is None:
        from attnctrl.scene import scene_schema

        typer.echo(json.dumps(scene_schema(), indent=2))
        return
    loaded, _ = read_scene(scene)
    hush()
    from attnctrl.pipelines.outline import Outline

    found = model_for(loaded, scene, model)
    outline = Outline.of(found)
    settings, explanation, regions = outline.settings(loaded), outline.explain(loaded), _regions(loaded)
    data = {
        "command": "check",
        "scene": str(scene),
        "model": found.name,
        "settings": asdict(settings),
        "regions": regions,
        "explanation": explanation.to_dict(),
    }
    unplaced = [
        f"{subject.name or subject.prompt}: a reference for the whole picture; without a place its prompt is not used"
        for subject in loaded.subjects
        if subject.box is None and subject.mask is None
    ]
    human = partial(_text, scene, found.name, settings, regions, unplaced, explanation)
    emit(form, data, human, [str(scene)])


def _regions(scene: Scene) -> list[dict[str, Any]]:
    return [
        {"name": region.label, "prompt": region.prompt, "box": region.box, "mask": region.mask is not None,
         "strength": region.strength}
        for region in scene.regions()
    ]  # fmt: skip


def _text(
    path: Path,
    model: str,
    settings: Settings,
    regions: list[dict[str, Any]],
    unplaced: list[str],
    explanation: Explanation,
) -> str:
    guidance = "no guidance" if settings.guidance_scale is None else f"guidance {settings.guidance_scale:g}"
    if settings.true_cfg_scale is not None:
        guidance += f", true CFG {settings.true_cfg_scale:g}"
    size = f"{settings.width} x {settings.height}"
    lines = [f"{path}: valid", f"{model}, {size}, {settings.steps} steps, {guidance}"]
    for region in regions:
        place = "a mask" if region["mask"] else "box " + ", ".join(f"{share:.3g}" for share in region["box"])
        lines.append(f"  {region['name']}: '{region['prompt']}' in {place}, strength {region['strength']:g}")
    lines += [f"  {line}" for line in unplaced]
    if regions and not explanation.controls:
        lines.append("  no controls: boxes and masks have no effect (leave 'controls' out for text regions)")
    return "\n".join([*lines, explanation.summary()])
