"""`attnctrl eval`: effects measured on the toy models, without against with control, on the same seeds."""

from __future__ import annotations

import shlex
from collections.abc import Mapping
from enum import Enum
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from attnctrl.cli.output import Format, FormatOption, emit, hush, progress_bar

if TYPE_CHECKING:
    from rich.table import Table


class Split(str, Enum):
    """Tasks to choose settings on, and tasks to report on."""

    test = "test"
    tune = "tune"


def evaluate(
    suite: Annotated[
        str,
        typer.Argument(
            metavar="SUITE",
            help="Model, scorer, masks, layout, isolation, references, subjects, reposition, style or guidance.",
        ),
    ],
    model: Annotated[str, typer.Option("--model", "-m", help="The toy model to measure.")] = "toy-flux",
    seeds: Annotated[int, typer.Option(min=1, max=100_000, help="Pairs of pictures.")] = 64,
    variants: Annotated[
        bool, typer.Option("--variants", help="Also the suite's variants, such as isolation that never ends.")
    ] = False,
    variant: Annotated[
        list[str] | None, typer.Option("--variant", metavar="NAME", help="Also this one of them; may be repeated.")
    ] = None,
    split: Annotated[
        Split, typer.Option(help="Which tasks: settings are chosen on tune and reported on test.")
    ] = Split.test,
    first: Annotated[int, typer.Option(min=0, help="Number of the first task.")] = 0,
    rows: Annotated[bool, typer.Option("--rows", help="With --format json: the values of every task too.")] = False,
    grid: Annotated[Path | None, typer.Option("--grid", help="A PNG of the first pictures, to look at.")] = None,
    form: FormatOption = Format.human,
) -> None:
    """Measure what control does: every metric without and with it, the difference and its 95 % interval.

    Example:

      attnctrl eval layout --model toy-flux --seeds 64 --format json
    """
    from attnctrl.files import write_png
    from attnctrl.toybox.suite import Options
    from attnctrl.toybox.suites import PAIRED, SUITES
    from attnctrl.versions import versions

    if suite not in SUITES:
        from attnctrl.scenecheck import nearest

        raise typer.BadParameter(f"no suite '{suite}'; {nearest(suite, SUITES)}", param_hint="SUITE")
    if (variants or variant) and not (suite in PAIRED and PAIRED[suite].variants):
        having = ", ".join(name for name, one in PAIRED.items() if one.variants)
        raise typer.BadParameter(f"suite '{suite}' has no variants; these have: {having}", param_hint="--variants")
    if variants and variant:
        raise typer.BadParameter("--variants measures all of them: leave one of the two", param_hint="--variant")
    if first and suite not in PAIRED:
        raise typer.BadParameter(f"the tasks of suite '{suite}' have no numbers", param_hint="--first")
    if suite == "scorer" and (rows or grid is not None):
        raise typer.BadParameter("the scorer reads renders: it has neither rows nor a grid", param_hint="SUITE")
    hush()
    save = None if grid is None else partial(write_png, grid)
    options = Options(split=split.value, variants=tuple(variant or ()) or variants, rows=rows, first=first, grid=save)
    with progress_bar(f"eval {suite}", form) as advance:
        measured = SUITES[suite](model, seeds, advance, options)
    named = ["--variants"] if variants else [f"--variant {shlex.quote(name)}" for name in variant or ()]
    told = {f"--first {first}": first > 0, "--rows": rows, f"--split {split.value}": split is not Split.test}
    flags = [*(flag for flag, asked in told.items() if asked), *named]
    command = " ".join(["attnctrl eval", suite, "--model", model, "--seeds", str(seeds), *flags, "--format json"])
    result = {**measured, "command": command, "versions": versions()}
    emit(form, result, lambda: table(result), _lines(result))


def table(result: Mapping[str, Any]) -> Table:
    """A suite's result for people; an arrow says where better is."""
    from rich.table import Table

    title = f"{result['suite']} on {result['model']}: n = {result['n']}, {result['seconds']:.0f} s"
    shown = Table("metric", "better", title=title, title_justify="left")
    for column in ("vanilla", "controlled", "delta", "95 % interval"):
        shown.add_column(column, justify="right")
    for name, metric in result["metrics"].items():
        interval = metric.get("ci95")
        shown.add_row(
            name,
            {"higher": "↑", "lower": "↓"}.get(metric.get("better", ""), ""),
            _number(metric.get("vanilla")),
            _number(metric.get("controlled")),
            _number(metric.get("delta"), "+"),
            "" if interval is None else f"{_number(interval[0], '+')} .. {_number(interval[1], '+')}",
        )
    return shown


def _number(value: float | None, sign: str = "") -> str:
    return "" if value is None else f"{value:{sign}.3f}"


def _lines(result: Mapping[str, Any]) -> list[str]:
    """Metric, vanilla, controlled, separated by tabs."""
    return [
        "\t".join([name, _number(metric.get("vanilla")), _number(metric.get("controlled"))])
        for name, metric in result["metrics"].items()
    ]
