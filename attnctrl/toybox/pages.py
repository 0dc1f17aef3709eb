"""Measured figures in README.md, benchmarks/ and docs/: `python -m attnctrl.toybox.pages` (or `make results`).

Nothing measured is typed. In a page stands

    <!-- table: NAME -->              above a table, whose lines are written here as `tables.TABLES` says
    0.664<!-- = RESULT KEY FORMAT --> behind a figure in a sentence, which is written here: the format, filled with what
                                      the result of that name in benchmarks/results/ says at the key (`figures`)

`--check` writes nothing, prints what would change, and fails if anything would.
"""

from __future__ import annotations

import argparse
import difflib
import json
import re
import statistics
import string
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from attnctrl.errors import AssetError
from attnctrl.files import write_text

from .tables import TABLES, Cell, Each, Table

PAGES = ("README.md", "benchmarks/README.md", "docs/*.md")
RESULTS = "benchmarks/results"
TABLE = re.compile(r"(<!-- table: (.*?) -->\n)((?:\|.*\n)*)")
FIGURE = re.compile(r"[-+.\d%e]*(<!-- = (\S+) (\S+) (\S+) -->)")
COMMANDS = {
    "compile-cpu": "attnctrl bench compile --format json",
    "execute-cpu": "attnctrl bench execute --format json",
    "guidance-bench-cpu": "attnctrl bench guidance --format json",
    "idle-cpu": "attnctrl bench idle --format json",
    "idle-families-cpu": "python benchmarks/idle_families.py",
    "plan-memory": "python benchmarks/plan_memory.py",
}
"""Of the results that do not say it themselves."""
RATIOS = {
    "of_dense": ("ours_s", "dense_s"),
    "of_unmasked": ("ours_s", "unmasked_s"),
    "of_mask": ("peak_bytes", "mask_bytes"),
}
NAMES = ("case", "method", "family", "door", "steps", "layer", "cfg", "name")
"""Columns that tell the rows of a measurement apart."""
SUMMARIES = {"min": min, "max": max, "median": statistics.median}

Figures = Mapping[str, Mapping[str, Mapping[str, Any]]]
"""Name of a result -> key within it -> what a format may name."""


def figures(found: Mapping[str, Any]) -> dict[str, dict[str, Any]]:
    """What a stored result says, by key.

    `metric` or `variant.metric` of a suite with `vanilla`, `controlled`, `delta`, `low` and `high`; the rows of a
    measurement by the words that name them, as `midpoint_10`; `min`, `max` and `median` of its columns, over all rows
    and over those of a method (`midpoint_min`); and `all`, what it says of itself.
    """
    told: dict[str, dict[str, Any]] = {
        "all": {name: value for name, value in found.items() if isinstance(value, (int, float, str))}
    }
    for name, entry in found.get("metrics", {}).items():
        low, high = entry["ci95"] or (None, None)
        told[name] = {**entry, "low": low, "high": high}
    listed = (found.get("rows", ()), found.get("sharing", ()), found.get("confirm", {}).get("rows", ()))
    rows = [_row(one) for some in listed for one in some]
    for row in rows:
        told[re.sub(r"\W+", "_", " ".join(str(row[name]) for name in NAMES if name in row))] = row
    methods = sorted({row["method"] for row in rows if "method" in row})
    groups = {f"{method}_": [row for row in rows if row.get("method") == method] for method in methods}
    for group, mine in {"": rows, **groups}.items():
        told.update({f"{group}{name}": _columns(mine, how) for name, how in SUMMARIES.items()})
    return told


def _row(row: Mapping[str, Any]) -> dict[str, Any]:
    """With the ratios that it tells, bytes in GB, and its intervals as `low` and `high`, `over_...` what it is over."""
    ratios = {name: row[above] / row[below] for name, (above, below) in RATIOS.items() if {above, below} <= set(row)}
    sizes = {f"{name[:-6]}_gb": value / 1e9 for name, value in row.items() if name.endswith("_bytes")}
    ends = dict(zip(("low", "high"), row.get("ci95", ()), strict=False))
    over = [
        {"over_delta": one["delta"], "over_low": one["ci95"][0], "over_high": one["ci95"][1]}
        for one in row.get("over", {}).values()
    ]
    return {**row, **ratios, **sizes, **ends, **(over[0] if over else {})}


def _columns(rows: Sequence[Mapping[str, Any]], summary: Any) -> dict[str, float]:
    columns = {name: [row[name] for row in rows if row.get(name) is not None] for row in rows for name in row}
    numbers = {name: values for name, values in columns.items() if all(type(one) in (int, float) for one in values)}
    return {name: summary(values) for name, values in numbers.items() if values}


def stored(folder: Path) -> Figures:
    """Every result of a folder by its name, and `commands`: of each file what wrote it.

    Raises:
        AssetError: A result says no command, and none is known here.
    """
    found = {path.stem: json.loads(path.read_text(encoding="utf-8")) for path in sorted(folder.glob("*.json"))}
    commands = {}
    for name, one in found.items():
        command = one.get("command") or COMMANDS.get(name)
        if command is None:
            raise AssetError(
                f"{folder / name}.json has no 'command'; store what the command prints, or name it in pages.COMMANDS"
            )
        commands[name] = {"file": f"{name}.json", "command": command}
    return {**{name: figures(one) for name, one in found.items()}, "commands": commands}


def _filled(form: str, entry: Mapping[str, Any]) -> str | None:
    """The format with what it names; nothing if that was not measured."""
    names = [name.partition("[")[0] for _, name, _, _ in string.Formatter().parse(form) if name]
    return form.format(**entry) if all(entry.get(name) is not None for name in names) else None


def _cell(cell: Cell, results: Figures) -> str | None:
    if isinstance(cell, str):
        return cell
    result, key, form = cell
    return _filled(form, results.get(result, {}).get(key, {}))


def lines(table: Table | Each, results: Figures) -> list[str]:
    """The table in Markdown, without the rows that were not measured."""
    if isinstance(table, Each):
        rows = [[_filled(form, one) for form in table.formats] for one in results.get(table.result, {}).values()]
    else:
        rows = [[_cell(cell, results) for cell in row] for row in table.rows]
    whole = [[cell for cell in row if cell is not None] for row in rows if None not in row]
    return [_line(table.head), "|" + "---|" * len(table.head), *map(_line, whole)]


def _line(cells: Sequence[str]) -> str:
    return f"| {' | '.join(cells)} |"


def written(page: str, results: Figures) -> str:
    """The page with its tables and figures as the results say.

    Raises:
        AssetError: A marker names no table, or something that was not stored.
    """

    def table(marker: re.Match[str]) -> str:
        name = marker[2]
        if name not in TABLES:
            raise AssetError(f"{marker[1].strip()} names no table; there are {', '.join(TABLES)}")
        return marker[1] + "".join(f"{line}\n" for line in lines(TABLES[name], results))

    def figure(marker: re.Match[str]) -> str:
        text = _cell((marker[2], marker[3], marker[4]), results)
        if text is None:
            raise AssetError(f"{marker[1]} names what is not stored; keys are metrics, variant.metric, rows or 'all'")
        return text + marker[1]

    if (told := len(re.findall("<!-- =", page))) != (read := len(FIGURE.findall(page))):
        raise AssetError(f"{told} figures are marked, {read} can be read; they are <!-- = RESULT KEY FORMAT -->")
    return FIGURE.sub(figure, TABLE.sub(table, page))


def pages(root: Path) -> dict[Path, tuple[str, str]]:
    """Every page of a repository: as it is, and as it should be."""
    results = stored(root / RESULTS)
    texts = {path: path.read_text(encoding="utf-8") for name in PAGES for path in sorted(root.glob(name))}
    return {path: (text, written(text, results)) for path, text in texts.items()}


def main(arguments: Sequence[str] | None = None) -> int:
    """Write the pages that differ, or with --check print how; the status is 1 if it found any."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--root", type=Path, default=Path(), help="of the repository")
    parser.add_argument("--check", action="store_true", help="write nothing, fail if a page differs")
    asked = parser.parse_args(arguments)
    differing = {path: texts for path, texts in pages(asked.root).items() if texts[0] != texts[1]}
    for path, (before, after) in differing.items():
        if asked.check:
            sys.stdout.writelines(difflib.unified_diff(before.splitlines(True), after.splitlines(True), str(path)))
        else:
            sys.stdout.write(f"{write_text(path, after)}\n")
    return int(asked.check and bool(differing))


if __name__ == "__main__":
    sys.exit(main())
