"""Parts of one measurement as one: `python -m attnctrl.toybox.pooled PART.json PART.json > whole.json`.

Parts are what `attnctrl eval SUITE --rows --format json` printed for different tasks (`--first`), each in a process of
its own. Every metric and its interval is worked out anew from all tasks; times are those of the parts together, ratios
of time and memory their mean. A picture that is alone in its task is compared with a neighbour of its part
(`diversity`).
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from attnctrl.errors import AssetError
from attnctrl.metrics import result

from .compare import Way, compared
from .suites import PAIRED

ALIKE = ("suite", "model", "split", "versions")


def pooled(parts: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    """The result of all tasks of the parts.

    Raises:
        AssetError: Parts are of different measurements, have no rows, or a task in common.
    """
    first = parts[0]
    for name in ALIKE:
        if len(told := {json.dumps(part.get(name), sort_keys=True) for part in parts}) > 1:
            raise AssetError(f"parts of one measurement agree in {name!r}; found {' and '.join(sorted(told))}")
    if first["suite"] not in PAIRED or not all("rows" in part and "whole" in part["rows"][0] for part in parts):
        raise AssetError("parts are what 'attnctrl eval ... --rows --format json' printed of a suite that compares")
    rows = sorted((row for part in parts for row in part["rows"]), key=lambda row: row["task"])
    numbers = [row["task"] for row in rows]
    if len(set(numbers)) < len(numbers):
        raise AssetError("parts have tasks in common; draw them with --first, so that each task is there once")
    ways = [list(row["whole"]) for row in rows]
    if ways.count(ways[0]) < len(ways):
        raise AssetError("parts were measured with different variants; draw them with the same --variant")
    metrics = compared(
        PAIRED[first["suite"]], {way: Way.restored([(row[way], row["whole"][way]) for row in rows]) for way in ways[0]}
    )
    ratios = {name: _mean(parts, name) for name in first["metrics"] if name not in metrics}
    found = result(
        first["suite"], first["model"], len(rows), sum(part["seconds"] for part in parts), {**metrics, **ratios}
    )
    command = ", ".join(part["command"] for part in parts) + ", python -m attnctrl.toybox.pooled"
    return {**found, "split": first["split"], "command": command, "versions": first["versions"]}


def _mean(parts: Sequence[Mapping[str, Any]], name: str) -> dict[str, Any]:
    """The mean of the parts' entries, which have no interval, by their tasks."""
    entries = [(part["metrics"][name], part["n"]) for part in parts]
    value = sum(entry["controlled"] * n for entry, n in entries) / sum(n for _, n in entries)
    return {**entries[0][0], "controlled": value, "delta": value - entries[0][0]["vanilla"]}


def main(arguments: Sequence[str] | None = None) -> None:
    """Print the result of the parts; exit with 1 and a message where they are missing or do not fit."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("parts", type=Path, nargs="+")
    asked = parser.parse_args(arguments)
    try:
        found = pooled([json.loads(path.read_text(encoding="utf-8")) for path in asked.parts])
    except (OSError, ValueError, AssetError) as error:
        parser.exit(1, f"pooled: {error}\n")
    sys.stdout.write(json.dumps(found, indent=2) + "\n")


if __name__ == "__main__":
    main()
