"""What acted where: which control, in which layers, steps and rows."""

from __future__ import annotations

import weakref
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace
from typing import Any

from .errors import ControlError
from .schedule import window_to_json
from .select import Layer, describe
from .tappable import stand_in_notes

__all__ = ["ControlReport", "Report", "report", "report_of"]


@dataclass(frozen=True)
class ControlReport:
    """What one control did: the layers it selected and those it acted in, the forwards, steps and rows, its plans.

    A row is (guidance branch, sample of the batch). `skipped` are forwards in which it was due, but a cache or a guider
    left its layers out.
    """

    name: str
    layers: str
    acted: str
    window: Any
    branch: str
    strength: float
    idle: bool
    forwards: int
    skipped: int
    steps: tuple[int, ...]
    rows: tuple[tuple[str, int], ...]
    plans: tuple[str, ...]


@dataclass(frozen=True)
class Report:
    """What acted where since attaching.

    Attributes:
        forwards: forwards of the model.
        controls: one entry per control, in list order.
        warnings: controls that were there and never acted.
        notes: processors that others stand in for where controls act.
    """

    forwards: int
    controls: tuple[ControlReport, ...]
    warnings: tuple[str, ...]
    notes: tuple[str, ...] = ()

    def to_dict(self) -> dict[str, Any]:
        """JSON-serialisable form."""
        listed = ("steps", "rows", "plans")
        controls = [{**vars(one), **{name: list(getattr(one, name)) for name in listed}} for one in self.controls]
        return {
            "forwards": self.forwards,
            "controls": controls,
            "warnings": list(self.warnings),
            "notes": list(self.notes),
        }

    def __str__(self) -> str:
        lines = [f"{self.forwards} forwards"]
        for one in self.controls:
            if one.idle:
                lines.append(f"{one.name}: idle")
                continue
            steps = f", steps {_spans(one.steps)}" if one.steps else ""
            only = f"; of these in {one.acted}" if one.forwards and one.acted != one.layers else ""
            lines.append(f"{one.name}: {one.layers}; acted in {one.forwards} forwards{steps}{_rows(one.rows)}{only}")
            lines += [f"  {plan}" for plan in one.plans]
        more = [*(f"note: {text}" for text in self.notes), *(f"warning: {text}" for text in self.warnings)]
        return "\n".join([*lines, *more])


def report() -> Report:
    """What the controls did that came last in this process: so far while they are on their model, else until they left.

    Raises:
        ControlError: when there have been none, or their model is gone.
    """
    if not _recent:
        raise ControlError("No controls have been on a model in this process. Attach some, and run the pipeline.")
    found = [one if isinstance(one, Report) else _alive(*one) for one in _recent]
    return merged(found)


def _alive(engine: Any, entry: Any) -> Report:
    if engine() is None or entry() is None:
        raise ControlError("The model of the last controls is gone. Ask for the report before it is deleted.")
    return report_of(engine(), entry())


def arrived(engine: Any, entry: Any) -> None:
    """An entry came: `report` tells of it unless it only observes, and keeps neither it nor its model alive."""
    if entry.controls and all(control.observes for control in entry.controls):
        return
    last = _recent[-1][1]() if _recent and not isinstance(_recent[-1], Report) else None
    # a pipeline with two denoisers has an entry on each
    if last is None or last.pipe is None or last.pipe is not entry.pipe or last.controls is not entry.controls:
        _recent.clear()
    _recent.append((weakref.ref(engine), weakref.ref(entry)))


def left(engine: Any, entry: Any) -> None:
    """An entry leaves: what it did is kept, the model is not."""
    for number, one in enumerate(_recent):
        if not isinstance(one, Report) and one[1]() is entry:
            _recent[number] = report_of(engine, entry)


_recent: list[Any] = []


def report_of(engine: Any, entry: Any) -> Report:
    """What each control of an entry did so far on an engine's model."""
    seats = {id(seat.control): seat for seat in entry.seats}
    reports = []
    for control in entry.controls:
        seat = seats.get(id(control))
        reports.append(
            ControlReport(
                name=control.name,
                layers=_described(engine, seat.layers if seat else ()),
                acted=_described(engine, seat.acted if seat else ()),
                window=window_to_json(control.window),
                branch=control.branch,
                strength=control.strength,
                idle=control.is_idle,
                forwards=seat.forwards if seat else 0,
                skipped=seat.skipped if seat else 0,
                steps=tuple(sorted(seat.steps)) if seat else (),
                rows=tuple(sorted({(row.branch or "one", row.sample) for row in seat.rows})) if seat else (),
                plans=tuple(sorted(seat.plans)) if seat else (),
            )
        )
    selected = {name for seat in seats.values() for name in seat.layers}
    notes = stand_in_notes([layer for layer in engine.layers if layer.name in selected])
    return _report(entry.forwards, reports, notes)


def merged(reports: Sequence[Report]) -> Report:
    """One report of the same controls on several denoisers of a pipeline."""
    controls = [
        replace(
            same[0],
            acted=next((one.acted for one in same if one.forwards), same[0].acted),
            **{name: sum(getattr(one, name) for one in same) for name in ("forwards", "skipped")},
            **{name: _union(getattr(one, name) for one in same) for name in ("steps", "rows", "plans")},
        )
        for same in zip(*(one.controls for one in reports), strict=True)
    ]
    notes = tuple(dict.fromkeys(note for one in reports for note in one.notes))
    return _report(sum(one.forwards for one in reports), controls, notes)


def _report(forwards: int, controls: Sequence[ControlReport], notes: tuple[str, ...]) -> Report:
    """A report that warns of the controls that acted in none of its forwards."""
    silent = [one for one in controls if forwards and not (one.idle or one.forwards)]
    warnings = tuple(
        f"'{one.name}' (window {one.window}, branch {one.branch}) acted in none of {forwards} forwards. "
        f"{_why_silent(one.skipped)}"
        for one in silent
    )
    return Report(forwards, tuple(controls), warnings, notes)


def _union(parts: Iterable[tuple[Any, ...]]) -> tuple[Any, ...]:
    return tuple(sorted({item for part in parts for item in part}))


def _described(engine: Any, names: Any) -> str:
    return describe(tuple(layer for layer in engine.layers if layer.name in names))


def _why_silent(skipped: int) -> str:
    if not skipped:
        return "Its window or branch never came."
    return (
        f"In {skipped} it was due, but a cache or a guider left its layers out. Call model.disable_cache(), or give it "
        "other layers."
    )


def _rows(rows: Sequence[tuple[str, int]]) -> str:
    """Rows in short form: ", rows cond 0-3"."""
    branches = dict.fromkeys(branch for branch, _ in rows)
    parts = [f"{branch} {_spans([n for name, n in rows if name == branch])}" for branch in branches]
    return f", rows {' and '.join(parts)}" if parts else ""


def _spans(steps: Sequence[int]) -> str:
    """Steps in short form, all of one stack: "0-13"."""
    return describe([Layer(str(step), "", step) for step in steps]).removeprefix(":")
