"""`attnctrl heads`: which attention heads to perturb for an aim."""

from __future__ import annotations

from collections.abc import Mapping
from enum import Enum
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from attnctrl.cli.output import Format, FormatOption, emit, hush, note, progress_bar

if TYPE_CHECKING:
    from rich.table import Table

    from attnctrl.heads import Pair

app = typer.Typer(no_args_is_help=True, rich_markup_mode="rich")

_HELD_SEEDS = 1_000_000
"""Seeds of held-out pairs on prompts of a file begin here."""


class Mode(str, Enum):
    """All candidates on all pairs, or on more pairs those that are left."""

    halving = "halving"
    exhaustive = "exhaustive"


@app.callback()
def heads() -> None:
    """Search the attention heads whose perturbation serves an aim, and look at what was found."""


@app.command()
def search(
    model: Annotated[str, typer.Option("--model", "-m", help="A toy model, a folder, or a hub id.")] = "toy-sd3",
    objective: Annotated[
        list[str] | None,
        typer.Option("--objective", help="toybox, clip, unclipped or MODULE:FUNCTION, with =WEIGHT; once for each."),
    ] = None,
    prompts: Annotated[Path | None, typer.Option(help="A text file, one a line; else those of the toy world.")] = None,
    seeds: Annotated[int, typer.Option(min=1, max=10_000, help="Pictures of each prompt; tasks of the toy world.")] = 8,
    rounds: Annotated[int, typer.Option(min=1, max=1000)] = 1,
    topk: Annotated[int, typer.Option(min=1, max=10_000, help="Heads that each round takes.")] = 3,
    layers: Annotated[list[str] | None, typer.Option("--layers", help="Selector of candidates; else all.")] = None,
    kind: Annotated[str, typer.Option(help="What becomes of the maps, as of Perturb.")] = "identity",
    strength: Annotated[float, typer.Option(min=0, max=1, help="u, the share of the perturbed map.")] = 1.0,
    scale: Annotated[float, typer.Option(min=0, help="w of the branch.")] = 3.0,
    window: Annotated[tuple[float, float], typer.Option(help="Of the progress, in which it acts.")] = (0.0, 1.0),
    mode: Annotated[Mode, typer.Option(help="exhaustive is the published algorithm.")] = Mode.halving,
    keep: Annotated[int, typer.Option(min=1, max=100, help="Candidates of a halving's end, for each head taken.")] = 2,
    steps: Annotated[int | None, typer.Option(min=1, max=500, help="Else the model's own.")] = None,
    size: Annotated[tuple[int, int] | None, typer.Option(help="Width and height; else the model's own.")] = None,
    guidance: Annotated[float, typer.Option(min=0, help="Classifier-free; 1 is none, as published.")] = 1.0,
    batch: Annotated[int, typer.Option(min=1, max=4096, help="Candidates that are drawn at once.")] = 16,
    budget: Annotated[int | None, typer.Option(min=1, help="Rows of forwards; the same line goes on later.")] = None,
    confirm: Annotated[int, typer.Option(min=0, help="Held-out pictures of each prompt; 0 does without.")] = 0,
    held_out: Annotated[Path | None, typer.Option(help="Prompts of the confirmation; else other seeds.")] = None,
    report: Annotated[Path | None, typer.Option(help="Folder for a picture of every head.")] = None,
    estimate: Annotated[bool, typer.Option("--estimate", help="Only say what it would cost.")] = False,
    output: Annotated[Path, typer.Option("--output", "-o", help="The set of heads.")] = Path("heads.json"),
    form: FormatOption = Format.human,
) -> None:
    """Find the heads whose perturbation raises an objective most (HeadHunter), and write them as a set.

    Scores are kept beside the set, in NAME.scores.jsonl: what was interrupted, or ran out of its budget, goes on there.

    Examples:

      attnctrl heads search -m toy-sd3 --objective toybox --seeds 8 --rounds 2 --confirm 64 -o heads.json

      attnctrl heads search -m owner/name --objective clip --objective unclipped=0.5 --prompts prompts.txt --estimate
    """
    from attnctrl.heads.job import Job, load_sampler
    from attnctrl.heads.objectives import objective_of
    from attnctrl.heads.search import Plan
    from attnctrl.versions import versions

    hush()
    asked = [objective_of(one) for one in objective or ["toybox"]]
    found = load_sampler(model, layers=layers, kind=_kind(kind), steps=steps, size=size, guidance=guidance, batch=batch)
    pairs = _pairs(prompts, seeds, "tune", 0)
    plan = Plan(pairs, topk, rounds, strength, scale, window, _kind(kind), mode.value, keep=keep)
    held = _pairs(held_out or prompts, confirm, "test", _HELD_SEEDS) if confirm else ()
    scores = output.with_suffix(".scores.jsonl")
    job = Job(found, asked, plan, output, scores, held, report, budget)
    told = job.estimate()
    if estimate:
        lines = [f"{name}\t{value}" for name, value in told.items()]
        emit(form, told, lambda: "\n".join(f"{name}: {value}" for name, value in told.items()), lines)
        return
    note(f"{told['candidates']} candidates, about {told['forwards'] + told['confirm'] + told['report']} forwards")
    with progress_bar("heads search", form) as advance:
        result = job.run(advance)
    result |= {"command": "heads search", "model": model, "estimate": told, "versions": versions()}
    emit(form, result, lambda: _shown(result), [f"{one['layer']}\t{one['head']}" for one in result["heads"]])


@app.command()
def show(
    file: Annotated[Path, typer.Argument(metavar="FILE", help="A set of heads.")],
    form: FormatOption = Format.human,
) -> None:
    """What a set of heads holds, and how it was found.

    Example:

      attnctrl heads show heads.json
    """
    from attnctrl.heads.job import scores_of
    from attnctrl.headset import HeadSet

    found = HeadSet.load(file)
    rows = scores_of(found)
    data = found.model_dump(mode="json")
    emit(form, data, lambda: _table(rows, _title(data)), [f"{one['layer']}\t{one['head']}" for one in rows])


def _kind(name: str) -> Any:
    from typing import get_args

    from attnctrl.headset import Kind
    from attnctrl.scenecheck import nearest

    if name not in get_args(Kind):
        raise typer.BadParameter(f"no kind '{name}'; {nearest(name, get_args(Kind))}", param_hint="--kind")
    return name


def _pairs(prompts: Path | None, count: int, split: Any, first: int) -> list[Pair]:
    from attnctrl.heads.job import read_prompts
    from attnctrl.heads.objectives import pairs_of_prompts, toybox_pairs

    return toybox_pairs(count, split) if prompts is None else pairs_of_prompts(read_prompts(prompts), count, first)


def _title(data: Mapping[str, Any]) -> str:
    window = data["window"]
    text = f"{len(data['heads'])} heads, {data['kind']}, scale {data['scale']:g}, window {window}"
    return text if data["model"] is None else f"{text}, of {data['model'].get('class', 'a model')}"


def _table(rows: list[dict[str, Any]], title: str) -> Table:
    """Heads in the order in which they were found."""
    from rich.table import Table

    shown = Table("#", "layer", "head", "u", "round", "score", "gain", title=title, title_justify="left")
    for number, one in enumerate(rows, 1):
        error = "" if one.get("error") is None else f" ± {one['error']:.4f}"
        scores = (str(one["round"]), f"{one['mean']:.4f}", f"{one['delta']:+.4f}{error}") if "round" in one else ()
        shown.add_row(str(number), one["layer"], str(one["head"]), f"{one['strength']:g}", *scores)
    return shown


def _shown(result: Mapping[str, Any]) -> Any:
    from rich.console import Group
    from rich.table import Table

    cost = result["cost"]
    parts: list[Any] = [_table(result["heads"], f"heads for {result['model']}")]
    if "confirm" in result:
        title = f"on {result['confirm']['pairs']} held-out pairs; the best prefix has {result['confirm']['best']}"
        columns = ("gain", "95 % interval", "over the layer", "95 % interval")
        held = Table("set", "heads", "mean", *columns, title=title, title_justify="left")
        for row in result["confirm"]["rows"]:
            gains = [cell for one in (row, *row["over"].values()) for cell in _gain(one)]
            held.add_row(row["name"], str(row["heads"]), f"{row['controlled']:.4f}", *gains)
        parts.append(held)
    files = [str(result[name]) for name in ("output", "atlas") if name in result]
    parts.append(
        f"{cost['forwards']} forwards, {cost['block_forwards']:.1f} of them by blocks; wrote {', '.join(files)}"
    )
    return Group(*parts)


def _gain(told: Mapping[str, Any]) -> tuple[str, str]:
    low, high = told["ci95"]
    return f"{told['delta']:+.4f}", f"{low:+.4f} .. {high:+.4f}"
