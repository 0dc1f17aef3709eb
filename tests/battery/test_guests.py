"""Every guest x every family: controls act as the formula says, or refuse with a reason; leaving restores.

`docs/compatibility.md` is what this table says: `python -m pytest tests/battery/test_guests.py --write-compatibility`
writes it anew.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import pytest
from guest_caches import run_steps
from guest_checks import Guest
from guests import EVERYWHERE, GUESTS
from harness import FAMILIES, Setting
from settings_video import sana

FULL = ("flux", "sd3", "unet")
MODELS = {**FAMILIES, "sana": sana}
OTHERS = tuple(name for name in MODELS if name not in FULL)
PAGE = Path(__file__).parents[2] / "docs" / "compatibility.md"
PAIRS = [
    *((family, name, guest) for name, guest in GUESTS.items() for family in FULL),
    *((family, name, guest) for name, guest in EVERYWHERE.items() for family in OTHERS),
]


def pairs(*, absent: bool) -> Any:
    chosen = [
        pytest.param(family, guest, id=f"{family}-{name}")
        for family, name, guest in PAIRS
        if (family in guest.absent) == absent
    ]
    return pytest.mark.parametrize(("family", "guest"), chosen)


def made(family: str, guest: Guest) -> Setting:
    return MODELS[family](**guest.options)


@pairs(absent=False)
def test_guest(family: str, guest: Guest) -> None:
    with guest.mode():
        guest.check(guest, made(family, guest))


@pairs(absent=True)
def test_there_is_no_such_guest(family: str, guest: Guest) -> None:
    """What the page calls "none" does not work without controls either."""
    setting = made(family, guest)
    with pytest.raises(Exception), guest.enter(setting):  # noqa: B017, PT011
        run_steps(setting)


def test_the_page_says_what_is_tested(request: Any) -> None:
    notes: list[str] = []
    tables = [table(GUESTS, FULL, notes), table(EVERYWHERE, OTHERS, notes)]
    listed = [f"{number}. {note}" for number, note in enumerate(notes, start=1)]
    text = "\n".join([INTRODUCTION, *tables, "Notes:", "", *listed]) + "\n"
    if request.config.getoption("--write-compatibility"):
        PAGE.parent.mkdir(exist_ok=True)
        PAGE.write_text(text)
    assert PAGE.read_text() == text


def table(guests: Mapping[str, Guest], families: Sequence[str], notes: list[str]) -> str:
    """A table in Markdown; notes are numbered in the order they come."""
    lines = ["| guest | " + " | ".join(families) + " |", "|---|" + "---|" * len(families)]
    for name, guest in guests.items():
        cells = []
        for family in families:
            word, note = guest.outcome(family)
            if note and note not in notes:
                notes.append(note)
            cells.append(f"{word} [{notes.index(note) + 1}]" if note else word)
        lines.append(f"| {name} | " + " | ".join(cells) + " |")
    return "\n".join(lines) + "\n"


INTRODUCTION = """# Compatibility

What may be on a model together with controls. This page is written by `tests/battery/test_guests.py`, which tries every
cell on a tiny random model of the real class: "acts" means that in every kernel call the output equals the dense
formula in float64, and that leaving restores the model bit by bit; "refused" means an error that names the remedy;
"none" that diffusers itself has no such thing, or that it fails there without controls as well. Sana's controls are
those of its cross attention (`layers="cross"`). Numbers lead to the notes below.
"""
