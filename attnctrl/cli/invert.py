"""`attnctrl invert`: the noise that a model would draw a picture from."""

from __future__ import annotations

import json
import time
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from attnctrl.cli.groups import folder
from attnctrl.cli.loading import DeviceOption, DtypeOption, check_device, named_model
from attnctrl.cli.output import Format, FormatOption, emit, hush, progress_bar

if TYPE_CHECKING:
    from PIL import Image


def invert(
    picture: Annotated[Path, typer.Argument(metavar="IMAGE", help="A PNG, JPEG or WebP.")],
    output: Annotated[Path, folder("what is written")] = Path("out"),
    model: Annotated[str, typer.Option("--model", "-m", help="toy-flux, a folder, or a hub id.")] = "toy-flux",
    prompt: Annotated[str, typer.Option("--prompt", "-p", help="What the picture shows.")] = "",
    method: Annotated[
        str | None,
        typer.Option(help="midpoint, euler, fireflow or controlled for flow models (else midpoint), ddim for UNets."),
    ] = None,
    steps: Annotated[int | None, typer.Option(min=1, max=1000, help="Else the model's own.")] = None,
    guidance: Annotated[float, typer.Option(min=1, help="Classifier-free; above 1 it comes back less exactly.")] = 1.0,
    gamma: Annotated[float, typer.Option(min=0, max=1, help="Of controlled: pull towards noise.")] = 0.5,
    eta: Annotated[float, typer.Option(min=0, max=1, help="Of controlled: pull back towards the picture.")] = 0.9,
    seed: Annotated[int, typer.Option(min=0, max=2**63 - 1, help="Of controlled: of its noise.")] = 0,
    device: DeviceOption = None,
    dtype: DtypeOption = None,
    form: FormatOption = Format.human,
) -> None:
    """Invert a picture, draw it again from the noise that was found, and say how much of it came back.

    Writes NAME.trajectory.safetensors (the latents at every noise level), NAME.reconstruction.png and
    NAME.inversion.json.

    Example:

      attnctrl invert photo.png --model toy-flux --prompt "a red circle" --steps 20 -o out/
    """
    import torch

    from attnctrl import files
    from attnctrl.pipelines.inversion import InversionSettings, Inverter
    from attnctrl.pipelines.latents import decibels, squared_error
    from attnctrl.versions import versions

    settings = InversionSettings(
        prompt=prompt, method=method, steps=steps, guidance=guidance, gamma=gamma, eta=eta, seed=seed
    )  # fmt: skip
    image, found = read_picture(picture), named_model(model)
    hush()
    checked = check_device(device)
    inverter = Inverter.from_pretrained(found, device=checked, dtype=getattr(torch, dtype.value) if dtype else None)
    settings = inverter.completed(settings)
    clean, total = inverter.encode(image), 2 * int(settings.steps or 0)
    started = time.perf_counter()
    with progress_bar(f"invert {picture.stem}", form) as advance:
        trajectory = inverter.invert(image, settings, progress=lambda done, _: advance(done, total))
        again = inverter.generate(trajectory, progress=lambda done, _: advance(total // 2 + done, total))
    seconds = round(time.perf_counter() - started, 3)

    def told(latents: torch.Tensor) -> dict[str, float]:
        (error,) = squared_error(inverter.pixels(latents, image.size), [image])
        return {"mse": error, "psnr": decibels(error)}

    paths = {
        "trajectory": str(trajectory.save(output / f"{picture.stem}.trajectory.safetensors")),
        "reconstruction": str(
            files.write_png(output / f"{picture.stem}.reconstruction.png", inverter.pictures(again)[0])
        ),
    }
    result = {
        "command": "invert", "picture": picture.name, **paths, **trajectory.record,
        "round_trip": told(again.clean), "vae": told(clean), "seconds": seconds, "versions": versions(),
    }  # fmt: skip
    files.write_text(output / f"{picture.stem}.inversion.json", json.dumps(result, indent=2, ensure_ascii=False) + "\n")
    emit(form, result, lambda: _human(result), paths.values())


def read_picture(path: Path, option: str = "IMAGE") -> Image.Image:
    """The picture of an option as RGB. Raises `typer.BadParameter`."""
    from attnctrl.errors import AssetError
    from attnctrl.pipelines.references import load_reference

    try:
        return load_reference(path, "the picture")
    except AssetError as error:
        raise typer.BadParameter(str(error), param_hint=option) from error


def _human(result: dict[str, Any]) -> str:
    lines = [result["trajectory"], result["reconstruction"]]
    for name, label in (("round_trip", "there and back"), ("vae", "the VAE alone")):
        lines.append(f"{label}: {result[name]['psnr']:.1f} dB PSNR, mean squared error {result[name]['mse']:.2e}")
    told = result["settings"]
    return "\n".join([*lines, f"{told['method']}, {told['steps']} steps each way, {result['seconds']:.1f} s"])
