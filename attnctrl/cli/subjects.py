"""`attnctrl subjects`: one cast in several pictures."""

from __future__ import annotations

import time
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from attnctrl.cli.groups import FileSeed, Sampling, folder, preset_like, with_groups
from attnctrl.cli.loading import Loading, ModelOption, check_preset, load, model_for, named_model
from attnctrl.cli.output import Format, FormatOption, emit, hush, progress_bar

if TYPE_CHECKING:
    from attnctrl.bank import Bank
    from attnctrl.pipelines import Story
    from attnctrl.pipelines.storyfile import StoryFile

BankFile = Annotated[
    Path | None, typer.Option("--bank", "-b", help="A file that --keep wrote, for --more.", show_default=False)
]


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
    keep: Annotated[
        Path | None, typer.Option("--keep", "-k", help="Keep what new pictures read of the cast, in this file.")
    ] = None,
    more: Annotated[
        Path | None, typer.Option("--more", "-m", help="Go on with the story of this PNG, with --bank and --shot.")
    ] = None,
    bank: BankFile = None,
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

      attnctrl subjects examples/story.yaml --model toy-flux --keep cast.safetensors

      attnctrl subjects --more out/story-0.png --bank cast.safetensors -s "{box} left, black background"
    """
    if (more is None) != (bank is None):
        raise typer.BadParameter("--more names a picture of a story and --bank what was kept of it; give both.")
    if more is not None and bank is not None:
        changes = {f"--{name.replace('_', '-')}": value for name, value in sampling.changes().items()}
        asked = {"the story file": source, "--cast": cast, "--keep": keep, "--preset": preset, **changes}
        if told := next((name for name, value in asked.items() if value not in (None, [])), ""):
            raise typer.BadParameter(f"a story that goes on keeps its own; leave {told} out.", param_hint="--more")
        return _go_on(more, bank, shot or [], output, seed or 0, form, model, loading)
    from attnctrl.pipelines.cast import resolve
    from attnctrl.pipelines.models import find_scene_model
    from attnctrl.presets_sets import SETS

    story = _story(source, cast or [], shot or [])
    given = {"preset": preset, "seed": seed, **sampling.changes()}
    story = story.model_copy(update={name: value for name, value in given.items() if value is not None})
    check_preset(story.preset, SETS)
    resolve(story.characters, story.pictures, story.seed)
    if keep is not None and (len(story.shots) < 2 or keep.is_dir()):
        found = f"{keep} is a folder" if keep.is_dir() else "this story has one picture, which nobody reads"
        raise typer.BadParameter(f"it names the file for what several pictures share; {found}.", param_hint="--keep")
    stem = "story" if source is None else source.stem
    folder = Path() if source is None else source.parent
    found_model = named_model(model) if model is not None else find_scene_model(story.model, folder)
    setup = loading.setup()
    hush()
    from attnctrl.bank import Bank
    from attnctrl.pipelines import MultiSubjectPipeline

    pipe = load(found_model, loading, MultiSubjectPipeline, setup=setup)
    kept = None if keep is None else Bank(device="cpu")
    started = time.perf_counter()
    with progress_bar(stem, form) as advance:
        drawn = pipe(story.characters, story.pictures, bank=kept, progress=advance, **story.settings)
    seconds = round(time.perf_counter() - started, 3)
    _written(drawn, stem, output, pipe.identity, seconds, form, kept, keep)


def _go_on(
    picture: Path,
    bank: Path,
    shots: list[str],
    output: Path,
    seed: int,
    form: Format,
    model: str | None,
    loading: Loading,
) -> None:
    """New pictures of the story of a picture, which read what was kept of it."""
    from attnctrl.pipelines.cast import Shot, resolve
    from attnctrl.provenance import restore

    if not shots:
        raise typer.BadParameter("say what the new pictures show, such as --shot '{name} left'.", param_hint="--shot")
    scene, record = restore(picture)
    from attnctrl.pipelines.story import Story

    story = Story.of(record)
    wanted = [Shot(one) for one in shots]
    resolve(story.first.cast, wanted, seed, whole=False)
    found, setup = model_for(scene, picture, model), loading.setup(record, picture.parent)
    hush()
    from attnctrl.bank import Bank
    from attnctrl.pipelines import MultiSubjectPipeline

    pipe = load(found, loading, MultiSubjectPipeline, loading.dtype_of(record), setup)
    kept = Bank.load(bank, pipe.pipe)
    started = time.perf_counter()
    with progress_bar(picture.stem, form) as advance:
        drawn = pipe.more(story, wanted, bank=kept, seed=seed, progress=advance)
    seconds = round(time.perf_counter() - started, 3)
    _written(drawn, f"{picture.stem}-more", output, pipe.identity, seconds, form)


def _written(
    drawn: Story,
    stem: str,
    output: Path,
    identity: dict[str, str],
    seconds: float,
    form: Format,
    bank: Bank | None = None,
    keep: Path | None = None,
) -> None:
    """Write the pictures of a story, its sheet, and what was kept of it, and tell what was written."""
    from attnctrl import files

    paths = [picture.save(output / f"{stem}-{number}.png") for number, picture in enumerate(drawn.pictures)]
    sheet = files.write_png(output / f"{stem}-sheet.png", drawn.sheet())
    if bank is not None and keep is not None:
        bank.save(keep)
    told: dict[str, Any] = {
        "command": "subjects",
        "images": [
            {"path": str(path), "prompt": one.prompt, "seed": one.seed, "found": [region.name for region in regions]}
            for path, one, regions in zip(paths, drawn.rehearsal.shots, drawn.rehearsal.regions, strict=True)
        ],
        "sheet": str(sheet),
        **({} if keep is None else {"bank": str(keep)}),
        "preset": drawn.preset,
        "model": identity,
        "seconds": seconds,
    }
    files_written = [*map(str, paths), str(sheet), *([] if keep is None else [str(keep)])]
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
