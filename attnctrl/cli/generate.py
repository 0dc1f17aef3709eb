"""`attnctrl generate`: pictures from scenes."""

from __future__ import annotations

import time
from collections.abc import Mapping
from dataclasses import dataclass, field
from enum import Enum
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from attnctrl.cli.output import Advance, Format, FormatOption, emit, hush, note, progress_bar
from attnctrl.cli.processes import processes

if TYPE_CHECKING:
    from attnctrl.pipelines.models import Model
    from attnctrl.scene import Scene

ModelOption = Annotated[
    str | None, typer.Option("--model", "-m", help="toy-flux, a folder, or a hub id; otherwise the scene's.")
]
DeviceOption = Annotated[
    str | None, typer.Option("--device", help="cpu, cuda, cuda:1, mps; otherwise the best there is.")
]


class Dtype(str, Enum):
    """Number formats of weights and arithmetic."""

    float32 = "float32"
    bfloat16 = "bfloat16"
    float16 = "float16"


@dataclass(frozen=True)
class _Job:
    """One scene to be drawn: `model` is loaded for it, one picture is written to each of `targets` (seed to path)."""

    source: Path
    scene: Scene
    model: Model
    targets: dict[int, Path]
    record: dict[str, Any] = field(default_factory=dict)


def generate(
    scenes: Annotated[list[Path], typer.Argument(metavar="SCENE...", help="Scene files, or PNGs that attnctrl made.")],
    output: Annotated[Path, typer.Option("--output", "-o", help="Folder for the pictures.")] = Path("out"),
    seed: Annotated[
        int | None, typer.Option(min=0, max=2**63 - 1, help="Seed of the first picture; else the scene's.")
    ] = None,
    num: Annotated[
        int, typer.Option("--num", "-n", min=1, max=10_000, help="Pictures of each scene; seeds count up.")
    ] = 1,
    model: ModelOption = None,
    steps: Annotated[
        int | None, typer.Option(min=1, max=500, help="Denoising steps; else the scene's or model's.")
    ] = None,
    device: DeviceOption = None,
    dtype: Annotated[Dtype | None, typer.Option(help="Else float32 on the CPU, bfloat16 elsewhere.")] = None,
    no_control: Annotated[
        bool, typer.Option("--no-control", help="Leave the scene's controls out, to compare.")
    ] = False,
    again: Annotated[
        bool, typer.Option("--again", help="Draw pictures anew that are there from the very same run.")
    ] = False,
    form: FormatOption = Format.human,
) -> None:
    """Make pictures from scenes. Each PNG carries all that is needed to make it again.

    A run that was interrupted goes on where it stopped: pictures that would come out the same are kept. A scene that
    fails does not stop the others. `torchrun --nproc-per-node 2 -m attnctrl generate ...` splits the pictures over two
    processes, and so does `accelerate launch -m attnctrl generate ...` over those that it starts, one for each GPU.

    Examples:

      attnctrl generate examples/two_shapes.yaml -o out/ --num 4

      attnctrl generate out/two_shapes-0.png -o again/
    """
    jobs = _jobs(scenes, output, seed, num, model, steps)
    hush()
    part = processes(device)
    mine = part.share([(job, one, target) for job in jobs for one, target in job.targets.items()])
    made: list[dict[str, Any]] = []
    failures: list[Exception] = []
    painter = _Painter(device or part.device, dtype, not no_control, again)
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
                _tell(entry, form)
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
    """Draws pictures of jobs, all in one way; keeps the pipeline loaded last for those of its model and number format.

    Attributes:
        device, dtype: None for what suits the model.
        controlled: False leaves the controls of all scenes out.
        again: draw what is there from the very same run.
    """

    device: str | None
    dtype: Dtype | None
    controlled: bool
    again: bool
    loaded: tuple[Model, str | None] | None = None
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
        wanted = (job.model, self.dtype.value if self.dtype else recorded_dtype(job.record))
        if self.loaded != wanted:
            self.pipe, self.loaded = load(job.model, self.device, wanted[1]), wanted
        return self.pipe


def _said(error: Exception) -> str:
    """What an error says, or its name where it says nothing."""
    return str(error) or type(error).__name__


def _tell(entry: Mapping[str, Any], form: Format) -> None:
    width, height = entry["size"]
    took = "was there" if entry["kept"] else f"{entry['seconds']:.1f} s"
    about = f"  seed {entry['seed']}  {width} x {height}  {took}"
    if form is not Format.json:
        typer.echo(entry["path"] if form is Format.quiet else f"{entry['path']}{about}")


def _steps(job: _Job) -> int:
    """Denoising steps of a picture, for progress."""
    return int(job.scene.steps or job.model.defaults.get("steps") or 28)


def _further(advance: Advance, before: int, total: int, done: int, _steps: int) -> None:
    advance(before + done, total)


def _jobs(
    sources: list[Path], output: Path, seed: int | None, num: int, model: str | None, steps: int | None
) -> list[_Job]:
    """Everything that can be wrong with the request is found here, before a model is loaded."""
    jobs: list[_Job] = []
    taken: dict[Path, Path] = {source.resolve(): source for source in sources}
    for source in sources:
        scene, record = read_scene(source)
        if steps is not None:
            scene = scene.replace(steps=steps)
        first = scene.seed if seed is None else seed
        stem = source.stem.removesuffix(f"-{scene.seed}") if record else source.stem
        targets = {first + i: output / f"{stem}-{first + i}.png" for i in range(num)}
        for target in targets.values():
            other = taken.setdefault(target.resolve(), source)
            if other is not source or target.resolve() == source.resolve():
                raise typer.BadParameter(f"{source} would write {target}, which belongs to {other}; choose another -o.")
        found = model_for(scene, source, model)
        jobs.append(_Job(source, scene, found, targets, record))
    return jobs


def model_for(scene: Scene, source: Path, option: str | None) -> Model:
    """The model that --model names, else the scene's own. Raises `typer.BadParameter`, `AssetError`, `SceneError`."""
    from attnctrl.pipelines.models import find_scene_model

    return named_model(option) if option is not None else find_scene_model(scene.model, scene.folder or source.parent)


def named_model(option: str) -> Model:
    """The model that --model names. Raises `typer.BadParameter`."""
    from attnctrl.errors import AssetError
    from attnctrl.pipelines.models import find_model

    try:
        return find_model(option)
    except AssetError as error:
        raise typer.BadParameter(str(error), param_hint="--model") from error


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


def recorded_dtype(record: Mapping[str, Any]) -> str | None:
    """The number format a picture was made in; None lets the device choose."""
    recorded = record.get("dtype")
    return recorded if recorded in Dtype.__members__ else None


def load(model: Model, device: str | None, dtype: str | None, kind: Any = None) -> Any:
    """The pipeline of a model, of a `kind` of `attnctrl.pipelines` (for scenes if left out).

    Raises:
        typer.BadParameter: for a device that is not there.
    """
    import torch

    from attnctrl.pipelines import ScenePipeline

    checked, wrapper = check_device(device), kind or ScenePipeline
    return wrapper.from_pretrained(model, device=checked, dtype=getattr(torch, dtype) if dtype else None)


def check_device(device: str | None) -> str | None:
    """`device` if this machine has it, as torch writes it. Raises `typer.BadParameter`."""
    import torch

    if device is None:
        return None
    try:
        torch.empty(1, device=device)
    except (RuntimeError, AssertionError, NotImplementedError) as error:
        reason = str(error).strip().splitlines()[0]
        raise typer.BadParameter(f"'{device}' cannot be used here: {reason}", param_hint="--device") from error
    return device


def _compare(job: _Job, record: dict[str, Any]) -> None:
    """Say what differs from the run that a picture came from, if one is being made again."""
    if job.record:
        from attnctrl.provenance import differences

        for line in differences(job.record, record):
            note(f"not as when {job.source} was made: {line}")
