"""`attnctrl edit`: a picture drawn again with another prompt."""

from __future__ import annotations

import time
from pathlib import Path
from typing import Annotated, Any

import typer

from attnctrl.cli.invert import read_picture
from attnctrl.cli.loading import DeviceOption, DtypeOption, check_device, named_model
from attnctrl.cli.output import Format, FormatOption, emit, hush, progress_bar


def edit(
    picture: Annotated[Path, typer.Argument(metavar="IMAGE", help="A PNG, JPEG or WebP.")],
    prompt: Annotated[str, typer.Option("--prompt", "-p", help="What the picture shall show.")],
    source: Annotated[str, typer.Option("--source", "-s", help="What it shows.")] = "",
    output: Annotated[Path, typer.Option("--output", "-o", help="The PNG that is written.")] = Path("edited.png"),
    model: Annotated[str, typer.Option("--model", "-m", help="toy-flux, a folder, or a hub id.")] = "toy-flux",
    negative: Annotated[str, typer.Option("--negative", help="What it shall not show; with guidance above 1.")] = "",
    method: Annotated[
        str | None,
        typer.Option(help="midpoint, euler, fireflow or controlled for flow models (else midpoint), ddim for UNets."),
    ] = None,
    steps: Annotated[int | None, typer.Option(min=1, max=1000, help="Else the model's own.")] = None,
    share: Annotated[
        float, typer.Option(min=0, max=1, help="Part of the steps in which the picture's states are kept.")
    ] = 0.3,
    states: Annotated[str, typer.Option(help="Which: some of query, key and value, with commas.")] = "value",
    tokens: Annotated[str, typer.Option(help="Those of the image, or of the texts too: all.")] = "image",
    strength: Annotated[float, typer.Option(min=0, max=1, help="How far they are.")] = 1.0,
    guidance: Annotated[float, typer.Option(min=1, help="Classifier-free, of the drawing.")] = 2.0,
    distilled: Annotated[float, typer.Option(min=1, help="Guidance that distilled models are told.")] = 2.0,
    device: DeviceOption = None,
    dtype: DtypeOption = None,
    form: FormatOption = Format.human,
) -> None:
    """Edit a picture: find the noise it comes from, and draw it from there with another prompt.

    In the first steps values of the model's last blocks are those of the picture, which keeps its layout (--share);
    or queries and keys (--states query,key): who looks where is the picture's, what is seen the new one's.
    The PNG carries the settings; `attnctrl info` prints them.

    Example:

      attnctrl edit photo.png --source "a red circle" --prompt "a blue circle" --steps 20 -o edited.png
    """
    import torch

    from attnctrl.pipelines.editing import Editor, EditSettings

    held: dict[str, Any] = {"states": tuple(one.strip() for one in states.split(",")), "tokens": tokens}
    settings = EditSettings(
        prompt, source, negative, method, steps, guidance, distilled, share=share, strength=strength, **held
    )  # fmt: skip
    if output.suffix.lower() != ".png":
        raise typer.BadParameter(f"{output} is no PNG; name a file that ends in .png.", param_hint="--output")
    if output.resolve() == picture.resolve():
        raise typer.BadParameter(f"{output} is the picture itself; choose another file.", param_hint="--output")
    image, found = read_picture(picture), named_model(model)
    hush()
    checked = check_device(device)
    editor = Editor.from_pretrained(found, device=checked, dtype=getattr(torch, dtype.value) if dtype else None)
    started = time.perf_counter()
    with progress_bar(f"edit {picture.stem}", form) as advance:
        made = editor.edit(image, settings, progress=advance)
    seconds = round(time.perf_counter() - started, 3)
    path = made.save(output)
    result = {"command": "edit", "picture": picture.name, "image": str(path), **made.record, "seconds": seconds}
    emit(form, result, lambda: _human(result), [str(path)])


def _human(result: dict[str, Any]) -> str:
    told = result["settings"]
    named = " and ".join(f"{one[:-1]}ies" if one == "query" else f"{one}s" for one in told["states"])
    kept = f"{named} of {told['share']:.0%} of the steps kept" if told["share"] * told["strength"] else "nothing kept"
    return f"{result['image']}\n{told['method']}, {told['steps']} steps each way, {kept}, {result['seconds']:.1f} s"
