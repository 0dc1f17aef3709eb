"""The page that adds a control is executed as it stands, and its rows go through the battery."""

from __future__ import annotations

import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import test_battery as battery
from harness import DOORS, FAMILIES
from table import Case

from attnctrl.controls import CONTROLS, Control

PAGE = Path(__file__).parents[2] / "docs" / "adding-a-control.md"
ROWS = ("focus", "focus-soft")


@pytest.fixture(scope="module")
def page() -> Iterator[dict[str, Any]]:
    """What the page defines; its control is registered for these tests alone."""
    known, names = dict(CONTROLS), {"__name__": "adding_a_control"}
    for block in re.findall(r"```python\n(.*?)```", PAGE.read_text(encoding="utf-8"), flags=re.DOTALL):
        # a person's file has no annotations import unless it says so
        exec(compile(block, PAGE.name, "exec", dont_inherit=True), names)
    yield names
    CONTROLS.clear()
    CONTROLS.update(known)


def case(page: dict[str, Any], row: str) -> Case:
    controls, rules = page["ROWS"][row]
    return Case(controls, rules, texts=False)


def test_it_is_explained_and_written_to_documents(page: dict[str, Any]) -> None:
    assert set(page["ROWS"]) == set(ROWS)
    told = page["told"].to_dict()
    assert [(one["name"], one["steps"]) for one in told["controls"]] == [("focus", "0-3")]
    control = page["Focus"]([page["left"]], strength=0.8)
    again = Control.from_dict(control.to_dict())
    assert type(again) is page["Focus"]
    assert again.to_dict() == control.to_dict()


@pytest.mark.parametrize("row", ROWS)
@pytest.mark.parametrize("family", ["flux", "sd3", "unet"])
def test_the_rows_pass_the_battery(page: dict[str, Any], family: str, row: str) -> None:
    made, one = FAMILIES[family], case(page, row)
    for door in DOORS.values():
        battery.test_on_differs_and_leaves_no_trace(made, door, one)
        battery.test_off_equals_base(made, door, one)
        battery.test_equals_the_dense_formula_in_every_layer(made, door, one)
        battery.test_a_batch_equals_its_rows(made, door, one)
    battery.test_blocked_tokens_have_no_influence(made, one)
    battery.test_half_precision_has_no_nan_and_stays_near_the_formula(made, one)
