"""Ways of drawing the same tasks, as they were measured, and every metric of one against another.

Ways go to JSON and back (`Way.row`, `Way.restored`), so that parts of a measurement, drawn by several processes, are
compared as one: `python -m attnctrl.toybox.pooled`.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np

from attnctrl.metrics import metric, set_metric
from attnctrl.metrics.stats import Metric

if TYPE_CHECKING:
    from .suite import Suite

VANILLA, CONTROLLED = "vanilla", "controlled"
"""Names of the pictures without control, and of those with the suite's own; all others are variants."""


@dataclass(frozen=True)
class Way:
    """One way of drawing.

    Attributes:
        values: a value for each metric, task by task.
        reads: by the metrics of whole sets, what they read of each task.
    """

    values: Sequence[Mapping[str, float]]
    reads: Mapping[str, Sequence[Any]]

    def row(self, index: int) -> tuple[Mapping[str, float], dict[str, Any]]:
        """A task's values, and what was read of it as JSON can hold it."""
        return self.values[index], {name: _plain(reads[index]) for name, reads in self.reads.items()}

    @classmethod
    def restored(cls, rows: Sequence[tuple[Mapping[str, float], Mapping[str, Any]]]) -> Way:
        """The way whose rows these are."""
        values, reads = zip(*rows, strict=True)
        return cls(values, {name: [_restored(read[name]) for read in reads] for name in reads[0]})


def compared(suite: Suite[Any], ways: Mapping[str, Way]) -> dict[str, Metric]:
    """Every metric: of all ways against the plain one, and of control against the suite's rivals where they are there;
    where there is one way alone, of that."""
    plain = ways[VANILLA]
    found: dict[str, Metric] = {}
    for label, way in ways.items():
        if label != VANILLA:
            found |= _against(suite, plain, way, prefix(label))
    for rival in suite.rivals:
        if rival in ways and CONTROLLED in ways:
            found |= _against(suite, ways[rival], ways[CONTROLLED], f"over_{rival}.")
    return found or _against(suite, plain, None, "")


def prefix(label: str) -> str:
    """What the names of a way's metrics begin with."""
    return "" if label == CONTROLLED else f"{label}."


def _against(suite: Suite[Any], first: Way, second: Way | None, start: str) -> dict[str, Metric]:
    """Every metric in the first way and in the second; without a second one, of the first alone."""
    found = {}
    for name, way in suite.directions.items():
        other = None if second is None else [value[name] for value in second.values]
        found[start + name] = metric([value[name] for value in first.values], other, way)
    for name, whole in suite.whole.items():
        read = None if second is None else second.reads[name]
        found[start + name] = set_metric(whole.of, first.reads[name], read, whole.better)
    return found


def _plain(read: Any) -> Any:
    """Arrays and tuples as lists."""
    if isinstance(read, np.ndarray):
        return read.tolist()
    return [_plain(one) for one in read] if isinstance(read, (list, tuple)) else read


def _restored(read: Any) -> Any:
    """Lists of numbers as arrays."""
    if not isinstance(read, list):
        return read
    if read and all(isinstance(one, (int, float)) for one in read):
        return np.array(read, dtype=float)
    return [_restored(one) for one in read]
