"""`attnctrl info` and `attnctrl replay`: what a picture says of itself, and the same picture made again."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import Annotated, Any

import typer

from attnctrl.cli.groups import with_groups
from attnctrl.cli.loading import Loading, ModelOption, load, model_for
from attnctrl.cli.output import Format, FormatOption, emit, hush, note, progress_bar

_MAX_THREADS = 1024
Picture = Annotated[Path, typer.Argument(metavar="IMAGE", help="A PNG that attnctrl made.")]


def info(image: Picture, form: FormatOption = Format.human) -> None:
    """Print what a picture was made from: prompt, regions, controls, seed, settings, model, versions.

    Examples:

      attnctrl info out/two_shapes-0.png

      attnctrl info out/two_shapes-0.png --format json
    """
    from attnctrl.provenance import read

    record = read(image)
    emit(form, {"command": "info", "image": str(image), "record": record}, partial(_text, image, record), [str(image)])


def _text(image: Path, record: Mapping[str, Any]) -> Any:
    from rich.table import Table

    scene, model = record.get("scene", {}), record.get("model", {})
    table = Table(box=None, show_header=False, padding=(0, 2, 0, 0))
    rows = {
        "image": image,
        "prompt": scene.get("prompt", ""),
        "negative prompt": scene.get("negative_prompt", ""),
        **{f"subject {n}": _subject(one) for n, one in enumerate(scene.get("subjects", []), 1)},
        "controls": _controls(record),
        "seed": record.get("seed"),
        "settings": _pairs(record.get("settings", {})),
        "model": " ".join(str(value) for value in model.values()),
        "pipeline": record.get("pipeline"),
        "scheduler": record.get("scheduler", {}).get("class"),
        "set up with": _pairs(record.get("setup", {})),
        "device": f"{record.get('device')}, {record.get('dtype')}",
        "versions": _pairs(record.get("versions", {})),
        "files": ", ".join(record.get("files", {})),
    }
    for name, value in rows.items():
        if value not in ("", None):
            table.add_row(name, str(value), style=None)
    return table


def _subject(subject: Mapping[str, Any]) -> str:
    places = {key: subject[key] for key in ("box", "mask", "reference", "strength") if subject.get(key) is not None}
    return f"{subject.get('name') or subject.get('prompt')}: {_pairs(places)}"


def _controls(record: Mapping[str, Any]) -> str:
    if not record.get("controlled", True):
        return "left out"
    if "story" in record:
        return f"preset {record['story'].get('preset')} of a story"
    asked = record.get("scene", {}).get("controls")
    return "those of the model's preset" if asked is None else str(asked)


def _pairs(values: Mapping[str, Any]) -> str:
    return ", ".join(f"{key} {value}" for key, value in values.items() if value not in (None, ""))


@with_groups
def replay(
    image: Picture,
    output: Annotated[
        Path | None, typer.Option("--output", "-o", help="Keep the picture that was made again, as this PNG.")
    ] = None,
    bank: Annotated[
        Path | None, typer.Option("--bank", "-b", help="The file of what the picture read, if a bank held it.")
    ] = None,
    form: FormatOption = Format.human,
    model: ModelOption = None,
    loading: Loading = Loading(),
) -> None:
    """Make a picture again from what it carries, and say whether it is the same to the bit (exit code 1 if not).

    LoRAs, attention backend, compilation and a CPU's threads are those of the record, unless options say otherwise.

    Examples:

      attnctrl replay out/two_shapes-0.png

      attnctrl replay out/two_shapes-0.png -o again.png --device cpu
    """
    import numpy as np
    from PIL import Image

    from attnctrl.provenance import carried, differences, restore

    if output is not None and output.resolve() == image.resolve():
        raise typer.BadParameter(f"{output} is the picture itself; choose another file.", param_hint="--output")
    scene, record = restore(image)
    found, setup = model_for(scene, image, model), loading.setup(record, image.parent)
    hush()
    from attnctrl.bank import Bank
    from attnctrl.pipelines import MultiSubjectPipeline, ScenePipeline, StylePipeline

    kind: Any = MultiSubjectPipeline if "story" in record else StylePipeline if "set" in record else ScenePipeline
    if bank is not None and "bank" not in (record.get("story") or record.get("set") or {}):
        raise typer.BadParameter(f"{image} read no bank. Leave it out.", param_hint="--bank")
    pipe = load(found, loading, kind, loading.dtype_of(record), setup)
    held = None if bank is None else Bank.load(bank, pipe.pipe)
    with progress_bar(f"replay {image.stem}", form) as advance, _threads_of(record):
        if kind is ScenePipeline:
            again = pipe(scene, controlled=bool(record.get("controlled", True)), progress=advance)[0]
        else:
            # a set in the style of a picture carries it
            files = {"files": carried(image)} if kind is StylePipeline else {}
            again = pipe.again(record, advance, bank=held, **files)
    with Image.open(image) as opened:
        before, after = np.asarray(opened.convert("RGB"), int), np.asarray(again.image.convert("RGB"), int)
    same = before.shape == after.shape and bool((before == after).all())
    farthest = int(np.abs(before - after).max()) if before.shape == after.shape else None
    changed = differences(record, again.record)
    if output is not None:
        again.save(output)
    for line in changed:
        note(f"not as when {image} was made: {line}")
    data = {
        "command": "replay",
        "image": str(image),
        "equal": same,
        "largest_difference": farthest,
        "differences": changed,
        "output": None if output is None else str(output),
    }
    off = "of another size" if farthest is None else f"up to {farthest} of 255 levels apart"
    emit(form, data, lambda: f"{image}: {'bit-equal' if same else f'not the same, {off}'}", [str(same).lower()])
    if not same:
        raise typer.Exit(1)


@contextmanager
def _threads_of(record: Mapping[str, Any]) -> Iterator[None]:
    """With as many threads as a picture was drawn with, if it tells: sums round otherwise with another number."""
    import torch

    told, own = record.get("threads"), torch.get_num_threads()
    torch.set_num_threads(told if isinstance(told, int) and 1 <= told <= _MAX_THREADS else own)
    try:
        yield
    finally:
        torch.set_num_threads(own)
