"""Every guest x every full family: controls act as the formula says, or refuse with a reason; leaving restores.

`docs/compatibility.md` is what this table says: `python -m pytest tests/battery/test_guests.py --write-compatibility`
writes it anew.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from guests import GUESTS, Guest
from harness import FAMILIES, branches, dense, probe
from table import CASES
from test_battery import passes

import attnctrl as ac

FULL = ("flux", "sd3", "unet")
PAGE = Path(__file__).parents[2] / "docs" / "compatibility.md"
CASE = CASES["stack"]
every_pair = pytest.mark.parametrize(
    ("family", "guest"),
    [
        pytest.param(family, guest, id=f"{family}-{name}")
        for name, guest in GUESTS.items()
        for family in FULL
        if family not in guest.absent
    ],
)


@every_pair
def test_guest(family: str, guest: Guest) -> None:
    setting = FAMILIES[family]()
    scene = CASE.scene()
    refusal = guest.refused.get(family, guest.refused.get("all"))
    with guest.enter(setting):
        base = setting.run()
        with ac.attach(setting.model, CASE.controls(scene), branches=branches(setting.model)) as handle:
            if refusal:
                with pytest.raises(ac.AttnCtrlError, match=refusal):
                    setting.run()
            else:
                with torch.no_grad(), probe(backend=guest.backend) as calls:
                    out = setting.run()
                assert (out - base).abs().max() > 1e-3
                for call, kinds in setting.controlled(calls):
                    expected = passes(setting, CASE, scene, kinds)
                    difference = dense(call.query, call.key, call.value, *expected) - call.out
                    assert difference.abs().max() < guest.tolerance
                assert all(one.forwards == 1 for one in handle.report().controls)
        assert torch.equal(setting.run(), base)


def test_the_page_says_what_is_tested(request: Any) -> None:
    header = "| guest | " + " | ".join(FULL) + " |\n|---|" + "---|" * len(FULL)
    rows = [
        f"| {name} | " + " | ".join(guest.outcome(family) for family in FULL) + " |" for name, guest in GUESTS.items()
    ]
    text = "\n".join([INTRODUCTION, header, *rows]) + "\n"
    if request.config.getoption("--write-compatibility"):
        PAGE.parent.mkdir(exist_ok=True)
        PAGE.write_text(text)
    assert PAGE.read_text() == text


INTRODUCTION = """# Compatibility

What may be on a model together with controls. This page is written by `tests/battery/test_guests.py`, which tries every
cell on a tiny random model of the real class: "acts" means that in every kernel call the output equals the dense
formula in float64, and that leaving restores the model bit by bit; "refused" means an error that names the remedy.
"""
