"""`attnctrl subjects`: one cast in several pictures."""

from __future__ import annotations

import time
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from attnctrl.cli.groups import FileSeed, Sampling, folder, preset_like, with_groups
from attnctrl.cli.loading import Loading, ModelOption, check_preset, load, named_model
from attnctrl.cli.output import Format, FormatOption, emit, hush, progress_bar

if TYPE_CHECKING:
    from attnctrl.pipelines.storyfile import StoryFile


@with_groups
def subjects(
    source: Annotated[
        Path | None, typer.Argument(metavar="[STORY]", help="A story file; or give cast and shots.")
    ] = None,
    cast: Annotated[
        list[str] | None, typer.Option("--cast", "-c", help='A character: "ball=a red circle"; once for each.')
    ] = None,
    shot: Annotated[
        list[str] | None, typer.Option("--shot", "-s", help='A prompt: "{ball} left"; once for each picture.')
    ] = None,
    output: Annotated[Path, folder("the pictures and a sheet")] = Path("out"),
    preset: Annotated[str | None, preset_like("consistory", "the story's")] = None,
    seed: FileSeed = None,
    form: FormatOption = Format.human,
    model: ModelOption = None,
    loading: Loading = Loading(),
    sampling: Sampling = Sampling(),
) -> None:
    """Draw the same characters in several pictures: a plain rehearsal finds them, then all are drawn together.

    Writes a PNG for each shot and a sheet that shows the rehearsal, where characters were found, and the story.

    Examples:

      attnctrl subjects examples/story.yaml -o out/

      attnctrl subjects -c "ball=a red circle" -s "{ball} left, white background" -s "{ball} right, gray background"
    """
    from attnctrl.pipelines.cast import resolve
    from attnctrl.pipelines.models import find_scene_model
    from attnctrl.presets_sets import SETS

    story = _story(source, cast or [], shot or [])
    given = {"preset": preset, "seed": seed, **sampling.changes()}
    story = story.model_copy(update={name: value for name, value in given.items() if value is not None})
    check_preset(story.preset, SETS)
    resolve(story.characters, story.pictures, story.seed)
    stem = "story" if source is None else source.stem
    folder = Path() if source is None else source.parent
    found_model = named_model(model) if model is not None else find_scene_model(story.model, folder)
    setup = loading.setup()
    hush()
    from attnctrl import files
    from attnctrl.pipelines import MultiSubjectPipeline

    pipe = load(found_model, loading, MultiSubjectPipeline, setup=setup)
    started = time.perf_counter()
    with progress_bar(stem, form) as advance:
        drawn = pipe(story.characters, story.pictures, progress=advance, **story.settings)
    seconds = round(time.perf_counter() - started, 3)
    paths = [picture.save(output / f"{stem}-{number}.png") for number, picture in enumerate(drawn.pictures)]
    sheet = files.write_png(output / f"{stem}-sheet.png", drawn.sheet())
    told: dict[str, Any] = {
        "command": "subjects",
        "images": [
            {"path": str(path), "prompt": one.prompt, "seed": one.seed, "found": [region.name for region in regions]}
            for path, one, regions in zip(paths, drawn.rehearsal.shots, drawn.rehearsal.regions, strict=True)
        ],
        "sheet": str(sheet),
        "preset": drawn.preset,
        "model": pipe.identity,
        "seconds": seconds,
    }
    files_written = [*map(str, paths), str(sheet)]
    emit(form, told, lambda: "\n".join([*files_written, f"{len(paths)} pictures, {seconds:.1f} s"]), files_written)


def _story(source: Path | None, cast: list[str], shots: list[str]) -> StoryFile:
    """The story of a file, or of options. Raises `typer.BadParameter`, `SceneError`."""
    from attnctrl.pipelines.storyfile import StoryFile, load_story

    if source is not None:
        if cast or shots:
            raise typer.BadParameter("a story file has its cast and shots; give it, or --cast and --shot, not both.")
        return load_story(source)
    if not cast or not shots:
        raise typer.BadParameter("give a story file, or at least one --cast and one --shot.")
    parts = [one.partition("=") for one in cast]
    if wrong := [name for name, equals, words in parts if not (equals and name.strip() and words.strip())]:
        raise typer.BadParameter(f"'{wrong[0]}' is no character; write name=description.", param_hint="--cast")
    known = {name.strip(): words.strip() for name, _, words in parts}
    if len(known) < len(parts):
        raise typer.BadParameter("two characters have one name; rename one.", param_hint="--cast")
    return StoryFile.from_dict({"version": 1, "cast": known, "shots": [{"prompt": one} for one in shots]})
