"""`attnctrl maps`: which image tokens attend to which words while a scene is drawn."""

from __future__ import annotations

import json
import re
from collections.abc import Mapping
from enum import Enum
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from attnctrl.cli.generate import read_scene
from attnctrl.cli.groups import FileSeed, Sampling, folder, with_groups
from attnctrl.cli.loading import Loading, ModelOption, check_device, load, model_for
from attnctrl.cli.output import Format, FormatOption, emit, hush, progress_bar

if TYPE_CHECKING:
    from attnctrl.maps import Recording


class When(str, Enum):
    """Attention as it is before controls hide anything, or after."""

    pre = "pre"
    post = "post"


@with_groups
def maps(
    source: Annotated[Path, typer.Argument(metavar="SCENE", help="A scene file, or a PNG that attnctrl made.")],
    words: Annotated[list[str], typer.Option("--words", "-w", help="Words of the prompt; give it once for each map.")],
    output: Annotated[Path, folder("the pictures and the JSON")] = Path("out"),
    layers: Annotated[
        list[str] | None, typer.Option("--layers", help="Layers to read, such as single:0-18; else all.")
    ] = None,
    when: Annotated[When, typer.Option(help="The model's own attention, or as controls make it.")] = When.pre,
    seed: FileSeed = None,
    no_control: Annotated[bool, typer.Option("--no-control", help="Leave the scene's controls out.")] = False,
    form: FormatOption = Format.human,
    model: ModelOption = None,
    loading: Loading = Loading(),
    sampling: Sampling = Sampling(),
) -> None:
    """Draw a scene and, for words of its prompt, where in the picture they are attended to.

    Writes a heat map for each of the words, a sheet of all, and a JSON with the attention they got at each step.

    Example:

      attnctrl maps examples/two_shapes.yaml --words "red circle" --words "blue square" -o out/
    """
    names = {word: re.sub(r"\W+", "-", word).strip("-").lower() or "words" for word in words}
    if len(set(names.values())) < len(words):
        raise typer.BadParameter(f"two of {', '.join(words)} are the same words; name each once.", param_hint="--words")
    scene, record_of_source = read_scene(source)
    scene = scene.replace(**sampling.changes())
    number = scene.seed if seed is None else seed
    stem = f"{source.stem.removesuffix(f'-{scene.seed}')}-{number}"
    targets = {word: output / f"{stem}-{name}.png" for word, name in names.items()}
    sheet, numbers = output / f"{stem}-maps.png", output / f"{stem}-maps.json"
    paths = [*targets.values(), sheet, numbers]
    if len(set(paths)) < len(paths) or any(path.resolve() == source.resolve() for path in paths):
        raise typer.BadParameter(f"{source} and its maps would share a file; choose another -o or other words.")
    found_model = model_for(scene, source, model)
    check_device(loading.device)
    setup = loading.setup(record_of_source, source.parent)
    hush()
    from attnctrl import files
    from attnctrl.maps import legend, overlay, record
    from attnctrl.pipelines import ScenePipeline

    pipe = load(found_model, loading, ScenePipeline, setup=setup)
    asked = {"layers": layers, "when": when.value, "max_sequence_length": pipe.settings(scene).max_sequence_length}
    with record(pipe.pipe, words, prompt=scene.prompt, **asked) as found, progress_bar(f"maps {stem}", form) as advance:
        picture = pipe(scene, [number], controlled=not no_control, progress=advance)[0]
    heats = {word: found[word][0] for word in words}
    told = _told(found, words, {"scene": str(source), "seed": number, "when": when.value}, picture.record)
    for word, path in targets.items():
        files.write_png(path, overlay(picture.image, heats[word]))
    files.write_png(sheet, legend(picture.image, heats, f"seed {number}"))
    files.write_text(numbers, json.dumps(told, indent=2, ensure_ascii=False) + "\n")
    emit(
        form,
        {"command": "maps", "files": [str(path) for path in paths], **told},
        lambda: _table(told, paths),
        map(str, paths),
    )


def _told(found: Recording, words: list[str], asked: Mapping[str, Any], record: Mapping[str, Any]) -> dict[str, Any]:
    """What was read, as data: per word the mean share of an image token's attention at each step."""
    return {
        **asked,
        "model": record["model"],
        "controlled": record["controlled"],
        "layers": list(found.layers),
        "grid": list(found.grid),
        "steps": list(found.steps),
        "mass": {word: [round(value, 6) for value in found.masses(word)[:, 0].tolist()] for word in words},
    }


def _table(told: Mapping[str, Any], paths: list[Path]) -> str:
    """For people: the mass of each word at the first and the last step, and where things are."""
    first, last = told["steps"][0], told["steps"][-1]
    lines = [
        f"{word}: {mass[0]:.4f} at step {first}, {mass[-1]:.4f} at step {last}" for word, mass in told["mass"].items()
    ]
    return "\n".join(
        [f"mean attention of an image token, {len(told['layers'])} layers, {told['when']}", *lines, *map(str, paths)]
    )
