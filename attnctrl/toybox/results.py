"""The page of results, written from stored ones: `python -m attnctrl.toybox.results` (or `make results`).

Nothing on the page is typed: it is what `attnctrl eval ... --format json` printed into `benchmarks/results/`.
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from attnctrl.files import write_text

ORDER = ("model", "scorer", "layout", "isolation", "references", "masks", "subjects", "reposition", "style", "guidance")
INTRODUCTION = """# Results

Written by `make results` from `benchmarks/results/`, where the output of each command is kept. The toy models are
small: read these numbers as how a method acts, with its price, not as what it reaches on a large model.

A cell is the mean with control, and in brackets the 95 % bootstrap interval of its difference from the same seeds
without (of the mean itself where nothing is controlled). An arrow says where better is. Tasks are of the split "test",
on which no setting was chosen, unless the row says otherwise. In columns named `over_...` a cell is control again, and
the interval that of its difference from the variant of that name.
"""


def stored(folder: Path) -> list[dict[str, Any]]:
    """The results of suites in a folder, in the page's order; other measurements there are passed over."""
    found = [json.loads(path.read_text(encoding="utf-8")) for path in sorted(folder.glob("*.json"))]
    return sorted(
        (one for one in found if one.get("suite") in ORDER), key=lambda one: (ORDER.index(one["suite"]), one["model"])
    )


def page(results: Sequence[Mapping[str, Any]]) -> str:
    """The page in Markdown: a table for each suite, metrics down, models and ways of control across."""
    parts = [INTRODUCTION]
    for suite in ORDER:
        mine = [one for one in results if one["suite"] == suite]
        if mine:
            parts.append("\n".join([f"## {suite}", "", *_table(mine), "", *_commands(mine)]))
    return "\n".join(parts) + "\n"


def _table(results: Sequence[Mapping[str, Any]]) -> list[str]:
    models = [one["model"] for one in results]
    columns = [column for one in results for column in _columns(one, models.count(one["model"]) > 1)]
    metrics = list(dict.fromkeys(name for _, values in columns for name in values))
    better = {name: entry["better"] for _, values in columns for name, (entry, _) in values.items()}
    lines = ["| metric | " + " | ".join(title for title, _ in columns) + " |", "|---|" + "---|" * len(columns)]
    for name in metrics:
        arrow = {"higher": "↑", "lower": "↓"}.get(better[name], "")
        cells = [_cell(*values[name]) if name in values else "" for _, values in columns]
        lines.append(f"| `{name}` {arrow} | " + " | ".join(cells) + " |")
    return lines


def _columns(
    found: Mapping[str, Any], counted: bool = False
) -> list[tuple[str, dict[str, tuple[Mapping[str, Any], bool]]]]:
    """Of one result: (title, metric -> (entry, with control)) for the plain pictures and each way of control.

    Args:
        counted: the title says the number of tasks, where a model was measured more than once.
    """
    split = found.get("split", "test")
    told = [f"{found['n']} tasks"] * counted + [split] * (split != "test")
    where = found["model"] + (f" ({', '.join(told)})" if told else "")
    first = {name: (entry, False) for name, entry in found["metrics"].items() if "." not in name}
    columns = [(where, first)]
    names = dict.fromkeys(name.rpartition(".")[0] for name in found["metrics"])
    for prefix in names:
        mine = {
            name.rpartition(".")[2]: (entry, True)
            for name, entry in found["metrics"].items()
            if name.rpartition(".")[0] == prefix and entry["controlled"] is not None
        }
        if mine:
            columns.append((f"{where}, {prefix or 'controlled'}", mine))
    return columns


def _cell(entry: Mapping[str, Any], controlled: bool) -> str:
    value = entry["controlled"] if controlled else entry["vanilla"]
    interval = entry["ci95"] if controlled or entry["controlled"] is None else None
    shown = f"{value:.3f}"
    if interval is None:
        return shown
    sign = "+" if controlled else ""
    return f"{shown} ({interval[0]:{sign}.3f} .. {interval[1]:{sign}.3f})"


def _commands(results: Sequence[Mapping[str, Any]]) -> list[str]:
    lines = ["| model | n | seconds | command |", "|---|---|---|---|"]
    for one in results:
        lines.append(f"| {one['model']} | {one['n']} | {one['seconds']:.0f} | `{one.get('command', '')}` |")
    return [*lines, ""]


def main(arguments: Sequence[str] | None = None) -> None:
    """Write the page."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--results", type=Path, default=Path("benchmarks/results"))
    parser.add_argument("--out", type=Path, default=Path("docs/results.md"))
    asked = parser.parse_args(arguments)
    path = write_text(asked.out, page(stored(asked.results)))
    sys.stdout.write(f"{path}\n")


if __name__ == "__main__":
    main()
