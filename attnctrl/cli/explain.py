"""`attnctrl explain`: which control acts where while a scene is drawn, and what still reaches what."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from attnctrl.cli.generate import read_scene
from attnctrl.cli.groups import Sampling, with_groups
from attnctrl.cli.loading import ModelOption, check_preset, model_for
from attnctrl.cli.output import Format, FormatOption, emit, hush

if TYPE_CHECKING:
    from rich.table import Table

    from attnctrl.pipelines.outline import Outline
    from attnctrl.scene import Scene

_ROWS = {"cond": "the prompt", "uncond": "the negative prompt"}


@with_groups
def explain(
    source: Annotated[Path, typer.Argument(metavar="SCENE", help="A scene file, or a PNG that attnctrl made.")],
    preset: Annotated[
        str | None, typer.Option("--preset", help="Explain this stack of controls instead of the scene's own.")
    ] = None,
    form: FormatOption = Format.human,
    model: ModelOption = None,
    sampling: Sampling = Sampling(),
) -> None:
    """Show which control acts on which layers, steps and rows, and what can still leak. Reads no weights.

    For each region's image tokens: whether words and image tokens of others reach them, from which layer on, through
    whom. What is never read has exactly no influence in that step.

    Examples:

      attnctrl explain examples/two_shapes.yaml

      attnctrl explain examples/two_shapes.yaml --preset lamic-fixed
    """
    scene, _ = read_scene(source)
    scene = scene.replace(**sampling.changes())
    found = model_for(scene, source, model)
    hush()
    from attnctrl.pipelines.outline import Outline

    outline = Outline.of(found)
    if preset is not None:
        scene = _with_preset(scene, outline, preset)
    branches = ["cond", "uncond"] if outline.settings(scene).guided else ["cond"]
    told = {branch: outline.explain(scene, branch).to_dict() for branch in branches}
    data = {"command": "explain", "scene": str(source), "model": found.name, "branches": told}
    emit(form, data, partial(_tables, data), _lines(told))


def _with_preset(scene: Scene, outline: Outline, name: str) -> Scene:
    """The scene under another stack of controls. Raises `typer.BadParameter`, `ControlError`."""
    from attnctrl.pipelines.settings import entries_of
    from attnctrl.presets import preset as stack_of

    check_preset(name)
    regions = scene.regions_on(outline, outline.settings(scene).max_sequence_length)
    return scene.replace(controls=entries_of(stack_of(name, regions)))


def _lines(told: Mapping[str, Mapping[str, Any]]) -> Iterator[str]:
    """Branch, steps, reader, source, how; separated by tabs."""
    for branch, explanation in told.items():
        for phase in explanation["scenes"][0]:
            for one in phase["reach"]:
                yield "\t".join([branch, phase["steps"], one["reader"], one["source"], _how(one)])


def _how(one: Mapping[str, Any]) -> str:
    if one["layer"] is None:
        return "never"
    through = f"through {', '.join(one['through'])}" if one["through"] else "directly"
    return through if one["layer"] == 1 else f"{through}, from layer {one['layer']} on"


def _tables(data: Mapping[str, Any]) -> Any:
    from rich.console import Group

    told = data["branches"]
    first = told["cond"]
    shown: list[Any] = [_controls(f"{data['model']} ({first['family']}), {first['steps']} steps", told)]
    shown += [
        _reaches(branch, one) for branch, one in told.items() if any(phase["reach"] for phase in one["scenes"][0])
    ]
    plans = {
        f"steps {phase['steps']}, {plan['layers']}: {plan['explain']}"
        for phase in first["scenes"][0]
        for plan in (*phase["plans"], *phase["outputs"])
    }
    shown += [*sorted(plans), *(f"note: {note}" for note in first["notes"])]
    return Group(*shown)


def _controls(title: str, told: Mapping[str, Mapping[str, Any]]) -> Table:
    from rich.table import Table

    table = Table(title=title, title_justify="left")
    for column in ("control", "strength", "layers"):
        table.add_column(column, overflow="fold")
    for branch in told:
        table.add_column(f"steps in rows of {_ROWS[branch]}")
    for rows in zip(*(one["controls"] for one in told.values()), strict=True):
        known = rows[0]
        about = ("idle", "") if known["idle"] else (f"{known['strength']:g}", known["layers"])
        table.add_row(known["name"], *about, *(one.get("steps") or "none" for one in rows))
    return table


def _reaches(branch: str, explanation: Mapping[str, Any]) -> Table:
    from rich.table import Table

    phases = [phase for phase in explanation["scenes"][0] if phase["reach"]]
    table = Table("whose tokens", "are reached by", title=f"in rows of {_ROWS[branch]}", title_justify="left")
    found: dict[tuple[str, str], dict[str, str]] = {}
    for phase in phases:
        table.add_column(f"steps {phase['steps']}")
        for one in phase["reach"]:
            found.setdefault((one["reader"], one["source"]), {})[phase["steps"]] = _how(one)
    for (reader, read), cells in found.items():
        # texts that are words of their own are there only in the steps of their control
        table.add_row(reader, read, *(cells.get(phase["steps"], "not there") for phase in phases))
    return table
