"""`attnctrl generate`: pictures from scenes."""

from __future__ import annotations

import time
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from attnctrl.cli.groups import FileSeed, Num, Sampling, folder, with_groups
from attnctrl.cli.loading import Loading, ModelOption, load, model_for
from attnctrl.cli.output import Advance, Format, FormatOption, emit, hush, note, progress_bar
from attnctrl.cli.processes import processes

if TYPE_CHECKING:
    from attnctrl.pipelines.models import Model
    from attnctrl.pipelines.setup import Setup
    from attnctrl.scene import Scene


@dataclass(frozen=True)
class _Job:
    """One scene to be drawn: one picture is written to each of `targets` (seed to path).

    Attributes:
        model, dtype, setup: what is loaded for it, and how.
        record: of the picture that the scene comes from, if it comes from one.
    """

    source: Path
    scene: Scene
    model: Model
    dtype: str | None
    setup: Setup
    targets: dict[int, Path]
    record: dict[str, Any] = field(default_factory=dict)


@with_groups
def generate(
    scenes: Annotated[list[Path], typer.Argument(metavar="SCENE...", help="Scene files, or PNGs that attnctrl made.")],
    output: Annotated[Path, folder("the pictures")] = Path("out"),
    seed: FileSeed = None,
    num: Num = 1,
    no_control: Annotated[
        bool, typer.Option("--no-control", help="Leave the scene's controls out, to compare.")
    ] = False,
    again: Annotated[
        bool, typer.Option("--again", help="Draw pictures anew that are there from the very same run.")
    ] = False,
    form: FormatOption = Format.human,
    model: ModelOption = None,
    loading: Loading = Loading(),
    sampling: Sampling = Sampling(),
) -> None:
    """Make pictures from scenes. Each PNG carries all that is needed to make it again.

    A run that was interrupted goes on where it stopped: pictures that would come out the same are kept. A scene that
    fails does not stop the others. `torchrun --nproc-per-node 2 -m attnctrl generate ...` splits the pictures over two
    processes, and so does `accelerate launch -m attnctrl generate ...` over those that it starts, one for each GPU.
    Write -n behind torchrun, which takes --num for an option of its own.

    Examples:

      attnctrl generate examples/two_shapes.yaml -o out/ --num 4

      attnctrl generate out/two_shapes-0.png -o again/
    """
    jobs = _jobs(scenes, output, seed, num, model, loading, sampling)
    hush()
    part = processes(loading.device)
    mine = part.share([(job, one, target) for job in jobs for one, target in job.targets.items()])
    made: list[dict[str, Any]] = []
    failures: list[Exception] = []
    painter = _Painter(replace(loading, device=loading.device or part.device), not no_control, again)
    with progress_bar("drawing", form) as advance:
        total = sum(_steps(job) for job, _, _ in mine)
        done = 0
        for job, seed_now, target in mine:
            try:
                entry = painter.draw(job, seed_now, target, partial(_further, advance, done, total))
            except Exception as error:
                if len(mine) == part.count == 1:
                    raise
                failures.append(error)
                note(f"failed: {job.source}, seed {seed_now}: {_said(error)}")
            else:
                made.append(entry)
                tell(entry, form)
            done += _steps(job)
    images = sorted(part.gathered(made), key=lambda one: one["path"])
    failed = part.gathered([_said(error) for error in failures])
    if form is Format.json and part.index == 0:
        emit(form, {"command": "generate", "images": images, "failed": failed})
    if failures:
        note(f"{len(failures)} of {len(mine)} pictures failed; the first:")
        raise failures[0]


@dataclass
class _Painter:
    """Draws pictures of jobs, all in one way; keeps the pipeline loaded last for those that take the same.

    Attributes:
        loading: what the device is taken from.
        controlled: False leaves the controls of all scenes out.
        again: draw what is there from the very same run.
    """

    loading: Loading
    controlled: bool
    again: bool
    loaded: tuple[Model, str | None, Setup] | None = None
    pipe: Any = None

    def draw(self, job: _Job, seed: int, target: Path, advance: Advance) -> dict[str, Any]:
        """Draw one picture and write it, unless it is there; what there is to tell of it."""
        from attnctrl.provenance import same_run

        pipe, started = self._pipe_of(job), time.perf_counter()
        controlled = self.controlled and bool(job.record.get("controlled", True))
        expected = pipe.record(job.scene, seed, controlled)
        kept = None if self.again else same_run(target, expected, job.scene.files())
        if kept is None:
            picture = pipe(job.scene, [seed], controlled=controlled, progress=advance)[0]
            picture.save(target)
        record = picture.record if kept is None else kept
        _compare(job, record)
        return {
            "path": str(target), "scene": str(job.source), "seed": seed,
            "size": [record["settings"]["width"], record["settings"]["height"]],
            "controlled": record["report"] is not None, "model": record["model"], "kept": kept is not None,
            "seconds": round(time.perf_counter() - started, 3),
        }  # fmt: skip

    def _pipe_of(self, job: _Job) -> Any:
        from attnctrl.pipelines import ScenePipeline

        wanted = (job.model, job.dtype, job.setup)
        if self.loaded != wanted:
            self.pipe, self.loaded = load(job.model, self.loading, ScenePipeline, job.dtype, job.setup), wanted
        return self.pipe


def _said(error: Exception) -> str:
    """What an error says, or its name where it says nothing."""
    return str(error) or type(error).__name__


def tell(entry: Mapping[str, Any], form: Format) -> None:
    """Print what was drawn, as it comes; --format json prints all at the end."""
    width, height = entry["size"]
    took = "was there" if entry.get("kept") else f"{entry['seconds']:.1f} s"
    about = f"  seed {entry['seed']}  {width} x {height}  {took}"
    if form is not Format.json:
        typer.echo(entry["path"] if form is Format.quiet else f"{entry['path']}{about}")


def _steps(job: _Job) -> int:
    """Denoising steps of a picture, for progress."""
    return int(job.scene.steps or job.model.defaults.get("steps") or 28)


def _further(advance: Advance, before: int, total: int, done: int, _steps: int) -> None:
    advance(before + done, total)


def _jobs(
    sources: list[Path],
    output: Path,
    seed: int | None,
    num: int,
    model: str | None,
    loading: Loading,
    sampling: Sampling,
) -> list[_Job]:
    """Everything that can be wrong with the request is found here, before a model is loaded."""
    jobs: list[_Job] = []
    taken: dict[Path, Path] = {source.resolve(): source for source in sources}
    for source in sources:
        scene, record = read_scene(source)
        if changes := sampling.changes():
            scene = scene.replace(**changes)
        first = scene.seed if seed is None else seed
        stem = source.stem.removesuffix(f"-{scene.seed}") if record else source.stem
        targets = {first + i: output / f"{stem}-{first + i}.png" for i in range(num)}
        for target in targets.values():
            other = taken.setdefault(target.resolve(), source)
            if other is not source or target.resolve() == source.resolve():
                raise typer.BadParameter(f"{source} would write {target}, which belongs to {other}; choose another -o.")
        found, setup = model_for(scene, source, model), loading.setup(record, source.parent)
        jobs.append(_Job(source, scene, found, loading.dtype_of(record), setup, targets, record))
    return jobs


def read_scene(source: Path) -> tuple[Scene, dict[str, Any]]:
    """The scene in a scene file; of a PNG that attnctrl made, the scene and the record. Raises `SceneError`."""
    if source.suffix.lower() == ".png":
        from attnctrl.errors import SceneError
        from attnctrl.provenance import restore

        scene, record = restore(source)
        if {"set", "story"} & set(record):
            raise SceneError(
                f"{source} was drawn together with other pictures, which it reads; `attnctrl replay` draws it again."
            )
        return scene, record
    from attnctrl.scene import load_scene

    return load_scene(source), {}


def _compare(job: _Job, record: dict[str, Any]) -> None:
    """Say what differs from the run that a picture came from, if one is being made again."""
    if job.record:
        from attnctrl.provenance import differences

        for line in differences(job.record, record):
            note(f"not as when {job.source} was made: {line}")
