"""`attnctrl bench`: speed and memory on this machine."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Annotated, Any

import typer

from attnctrl.cli.output import Format, FormatOption, emit, hush, progress_bar

if TYPE_CHECKING:
    from rich.table import Table

app = typer.Typer(no_args_is_help=True, rich_markup_mode="rich")


@app.callback()
def bench() -> None:
    """Measure speed and memory on this machine."""


@app.command()
def execute(form: FormatOption = Format.human) -> None:
    """Time controlled attention against unmasked attention and against a dense mask, all in one interleaved run.

    Example:

      attnctrl bench execute --format json
    """
    from attnctrl.execute.bench import bench_execute

    result = bench_execute()
    emit(form, result, lambda: table(result), [f"{row['case']}\t{row['ours_s']:.4f}" for row in result["rows"]])


@app.command()
def idle(
    model: Annotated[str, typer.Option("--model", "-m", help="Whose transformer to time.")] = "toy-flux",
    form: FormatOption = Format.human,
) -> None:
    """Time a whole forward with idle controls attached against one without, interleaved.

    Example:

      attnctrl bench idle --format json
    """
    import torch

    from attnctrl.bench import bench_idle
    from attnctrl.pipelines.models import find_model, load_pipeline

    hush()
    found = find_model(model)
    # three times the model's own size in each direction, as users of real ones have more tokens
    width, height = (3 * side for side in found.defaults.get("size", (336, 336)))
    result = bench_idle(load_pipeline(found, torch.float32, "cpu"), (width // 16 * 16, height // 16 * 16))
    lines = [f"{row['case']}\t{row['ratio']:.3f}\t{row['bit_equal']}" for row in result["rows"]]
    emit(form, result, lambda: idle_table(result), lines)


@app.command("compile")
def compile_(form: FormatOption = Format.human) -> None:
    """Count the graphs of compiled models with and without controls.

    Example:

      attnctrl bench compile --format json
    """
    from attnctrl.bench import bench_compile

    hush()
    result = bench_compile()
    lines = [f"{row['case']}\t{row['door']}\t{row['vanilla']}\t{row['controlled']}" for row in result["rows"]]
    emit(form, result, lambda: compile_table(result), lines)


@app.command()
def guidance(
    repeats: Annotated[int, typer.Option(min=1, max=1000, help="Rounds of the interleaved loops.")] = 9,
    form: FormatOption = Format.human,
) -> None:
    """Time steps with a perturbed branch against vanilla ones, against their bound, and against diffusers' own.

    Example:

      attnctrl bench guidance --format json
    """
    from attnctrl.bench_guidance import bench_guidance
    from attnctrl.versions import versions

    hush()
    result = {**bench_guidance(repeats), "versions": versions()}
    lines = [f"{row['family']}\t{row['layer']}\t{row['cfg']}\t{row['step_ratio']:.3f}" for row in result["rows"]]
    emit(form, result, lambda: guidance_table(result), lines)


@app.command()
def inversion(
    model: Annotated[str, typer.Option("--model", "-m", help="The toy model to measure.")] = "toy-flux",
    pictures: Annotated[int, typer.Option(min=1, max=10_000, help="Renders, inverted in one batch.")] = 8,
    form: FormatOption = Format.human,
) -> None:
    """Invert held-out renders and draw them again: the error over the number of steps, for each method.

    Example:

      attnctrl bench inversion --model toy-flux --format json
    """
    from attnctrl.pipelines.inversion import Inverter
    from attnctrl.toybox.inversion import bench_inversion
    from attnctrl.versions import versions

    hush()
    inverter = Inverter.from_pretrained(model)
    with progress_bar("bench inversion", form) as advance:
        measured = bench_inversion(inverter, pictures, progress=advance)
    command = f"attnctrl bench inversion --model {model} --pictures {pictures} --format json"
    result = {**measured, "model": inverter.identity, "command": command, "versions": versions()}
    lines = [f"{row['method']}\t{row['steps']}\t{row['rms']:.3e}\t{row['psnr']:.2f}" for row in result["rows"]]
    emit(form, result, lambda: inversion_table(result), lines)


def inversion_table(result: Mapping[str, Any]) -> Table:
    """The rows for people; `gain` is what twice the steps bring."""
    from rich.table import Table

    title = f"round trip of {result['n']} renders; the VAE alone: {result['vae_psnr']:.1f} dB"
    columns = ("method", "steps", "forwards", "rms", "worst", "gain", "PSNR", "least PSNR")
    shown = Table(*columns, title=title, title_justify="left")
    for row in result["rows"]:
        gain = "" if row["gain"] is None else f"{row['gain']:.1f}"
        errors = (f"{row[name]:.2e}" for name in ("rms", "worst"))
        quality = (f"{row[name]:.1f}" for name in ("psnr", "least_psnr"))
        shown.add_row(row["method"], str(row["steps"]), str(row["forwards"]), *errors, gain, *quality)
    return shown


def guidance_table(result: Mapping[str, Any]) -> Table:
    """The rows for people; all but the errors are ratios to a vanilla step."""
    from rich.table import Table

    columns = {
        "rho": "rho",
        "bound": "bound",
        "bound_s": "in seconds",
        "flop_ratio": "operations",
        "step_ratio": "time",
        "full_ratio": "in full",
    }
    shown = Table("family", "layer", "cfg", *columns.values(), "diffusers'", "max error", title="steps / vanilla steps")
    for row in result["rows"]:
        ratios = (f"{row[name]:.3f}" for name in columns)
        shown.add_row(row["family"], row["layer"], row["cfg"], *ratios, "", f"{row['max_err']:.1e}")
    for row in result["theirs"]:
        times = ("", "", "", f"{row['ours_ratio']:.3f}", "", f"{row['theirs_ratio']:.3f}")
        shown.add_row(row["family"], row["layer"], row["cfg"], *times, f"{row['max_err']:.1e}")
    return shown


def compile_table(result: Mapping[str, Any]) -> Table:
    """The rows for people."""
    from rich.table import Table

    columns = ("vanilla", "controlled", "idle", "strength", "off")
    shown = Table("case", "door", *columns, title="full graphs; idle, strength and off are those that come on top")
    for row in result["rows"]:
        shown.add_row(row["case"], row["door"], *(str(row[name]) for name in columns))
    return shown


def idle_table(result: Mapping[str, Any]) -> Table:
    """The rows for people."""
    from rich.table import Table

    shown = Table("case", "model", "size", "idle", "vanilla", "ratio", "bit-equal", title="whole forward, seconds")
    for row in result["rows"]:
        times = (f"{row[name]:.4f}" for name in ("idle_s", "vanilla_s"))
        size = " x ".join(map(str, row["size"]))
        shown.add_row(row["case"], row["model"], size, *times, f"{row['ratio']:.3f}", str(row["bit_equal"]))
    return shown


def table(result: Mapping[str, Any]) -> Table:
    """The rows for people; the ratios are times of ours over times of the other."""
    from rich.table import Table

    shown = Table("case", title="attention, seconds a call", title_justify="left")
    for column in ("tokens", "density", "ours", "unmasked", "dense", "/ unmasked", "/ dense", "plan", "max error"):
        shown.add_column(column, justify="right")
    for row in result["rows"]:
        ours, unmasked, dense = row["ours_s"], row["unmasked_s"], row["dense_s"]
        shown.add_row(
            *(row["case"], str(row["tokens"]), f"{row['density']:.2f}"),
            *(f"{seconds:.3f}" for seconds in (ours, unmasked, dense)),
            *(f"{ours / unmasked:.2f}", f"{ours / dense:.2f}"),
            *(f"{row['plan_bytes'] / 1024:.0f} KiB", f"{row['max_err']:.1e}"),
        )
    return shown
