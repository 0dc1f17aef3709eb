"""`attnctrl bench`: speed and memory on this machine."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Annotated, Any

import typer

from attnctrl.cli.output import Format, FormatOption, emit, hush

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
    result = bench_idle(load_pipeline(find_model(model), torch.float32, "cpu"))
    lines = [f"{row['case']}\t{row['ratio']:.3f}\t{row['bit_equal']}" for row in result["rows"]]
    emit(form, result, lambda: idle_table(result), lines)


def idle_table(result: Mapping[str, Any]) -> Table:
    """The rows for people."""
    from rich.table import Table

    shown = Table("case", "tokens", "idle", "vanilla", "ratio", "bit-equal", title="whole forward, seconds")
    for row in result["rows"]:
        times = (f"{row[name]:.4f}" for name in ("idle_s", "vanilla_s"))
        shown.add_row(row["case"], str(row["tokens"]), *times, f"{row['ratio']:.3f}", str(row["bit_equal"]))
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
