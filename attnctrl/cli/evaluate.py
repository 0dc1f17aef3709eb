"""`attnctrl eval`: effects measured on the toy models, without against with control, on the same seeds."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Annotated, Any

import typer

from attnctrl.cli.output import Format, FormatOption, emit, hush, progress_bar

if TYPE_CHECKING:
    from rich.table import Table


def evaluate(
    suite: Annotated[str, typer.Argument(metavar="SUITE", help="What to measure: layout, model, scorer, ...")],
    model: Annotated[str, typer.Option("--model", "-m", help="The toy model to measure.")] = "toy-flux",
    seeds: Annotated[int, typer.Option(min=1, max=100_000, help="Pairs of pictures.")] = 64,
    variants: Annotated[
        bool, typer.Option("--variants", help="Layout: also without isolation, and with isolation that never ends.")
    ] = False,
    form: FormatOption = Format.human,
) -> None:
    """Measure what control does: every metric without and with it, the difference and its 95 % interval.

    Example:

      attnctrl eval layout --model toy-flux --seeds 64 --format json
    """
    from attnctrl.toybox.suites import SUITES

    if suite not in SUITES:
        from attnctrl.scenecheck import nearest

        raise typer.BadParameter(f"no suite '{suite}'; {nearest(suite, SUITES)}", param_hint="SUITE")
    if variants and suite != "layout":
        raise typer.BadParameter(f"suite '{suite}' has no variants; layout has", param_hint="--variants")
    options = {"variants": True} if variants else {}
    hush()
    with progress_bar(f"eval {suite}", form) as advance:
        result = SUITES[suite](model, seeds, advance, **options)
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
