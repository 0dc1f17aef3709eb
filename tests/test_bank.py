"""Banks: what is read of one is what a joint batch reads, to rounding; what is kept is what the kernel got."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest
import torch
from bank_tools import PIPES, captured, run

import attnctrl as ac
from attnctrl.attach import parts_of
from attnctrl.bank import Held
from attnctrl.bank.identity import digest_of
from attnctrl.controls.reposition import _WEIGHTS
from attnctrl.families import family_of
from attnctrl.maps import record

CAST = [
    [ac.Region(name="star", box=(0, 0, 0.5, 1)), ac.Region(name="heart", box=(0.5, 0, 1, 1))],
    [ac.Region(name="heart", box=(0, 0, 0.5, 1))],
    [ac.Region(name="heart", box=(0.25, 0, 0.5, 1)), ac.Region(name="star", box=(0.5, 0, 1, 1))],
    [ac.Region(name="star", box=(0, 0.5, 1, 1))],
]
CASES: dict[str, dict[str, Any]] = {
    "all": {},
    "drawn": {"ratio": 0.5, "weight": 2.0},
    "namesakes": {"tokens": "subject", "queries": "same"},
    "scene": {"tokens": "background", "queries": "background"},
    "drawn subjects": {"tokens": "subject", "ratio": 0.5, "seed": 3},
    "window": {"window": (0.3, 1)},
}


@pytest.fixture(params=PIPES, scope="module")
def pipe(request: pytest.FixtureRequest) -> Any:
    return PIPES[request.param]()


def layers(pipe: Any) -> Any:
    model = parts_of(pipe)[0]
    return family_of(model).layers(model)


def close(one: torch.Tensor, other: torch.Tensor) -> None:
    torch.testing.assert_close(one, other, rtol=0, atol=1e-4)


@pytest.mark.parametrize("case", CASES.values(), ids=CASES)
def test_recalled_pictures_are_those_of_the_joint_batch(pipe: Any, case: dict[str, Any]) -> None:
    """C7, S4: anchors and readers in one batch, and the readers of a bank of the anchors, all at once or one by one."""
    held = [] if case.get("tokens", "all") == "all" else CAST
    joint = run(pipe, range(4), ac.Share(held, readers="anchors", **case))
    keep = {name: case[name] for name in ("tokens", "window") if name in case}
    # the anchors read each other while they are kept
    bank = captured(pipe, range(2), [ac.Share(held[:2], **case)], regions=held[:2], **keep)
    both = run(pipe, range(2, 4), ac.Share(held[2:], bank=bank, **case))
    close(both, joint[2:])
    close(run(pipe, range(3, 4), ac.Share(held[3:], bank=bank, **case)), joint[3:])
    assert (run(pipe, range(3, 4)) - joint[3:]).abs().max() > 2e-3


def test_moved_keys_are_those_of_the_joint_batch() -> None:
    pipe = PIPES["flux"]()
    joint = run(pipe, range(3), ac.Share(readers="anchors", positions="apart"))
    bank = captured(pipe, range(2), [ac.Share(positions="apart")])
    close(run(pipe, range(2, 3), ac.Share(bank=bank, positions="apart")), joint[2:])
    assert (run(pipe, range(2, 3), ac.Share(bank=bank)) - joint[2:]).abs().max() > 1e-4
    with pytest.raises(ac.ControlError, match="cannot be turned to places here"):
        run(pipe, range(2, 3), ac.Share(bank=bank, positions="apart"), width=16)


def test_capture_changes_nothing_and_keeps_what_the_kernel_got(pipe: Any) -> None:
    whole = captured(pipe)
    bank = ac.Bank()
    assert torch.equal(run(pipe, range(2), ac.Keep(bank=bank, regions=CAST[:2], tokens="subject")), run(pipe, range(2)))
    assert bank.branches == ("cond", "uncond")
    assert bank.steps == (0, 1, 2)
    assert bank.pictures == 2
    assert bank.entries.keys() == whole.entries.keys()
    frames = {layer.name: layer.frame for layer in layers(pipe)}
    for entry, packed in bank.entries.items():
        held = bank.places[frames[entry.layer], entry.picture]
        assert torch.equal(packed.states, whole.entries[entry].states[:, :, held.tokens])
        assert len(held.tokens) == held.grid[0] * held.grid[1] // (1 + entry.picture)
    assert bank.nbytes == whole.nbytes * 3 // 4


def test_perturbed_branches_read_what_was_kept_of_theirs() -> None:
    pipe = PIPES["flux"]()
    perturb = ac.Perturb(layers="double", scale=2.0)
    joint = run(pipe, range(3), [ac.Share(readers="anchors"), perturb], guidance=1.0)
    bank = captured(pipe, range(2), [ac.Share(), perturb], guidance=1.0)
    assert bank.branches == ("cond", "perturbed")
    close(run(pipe, range(2, 3), [ac.Share(bank=bank), perturb], guidance=1.0), joint[2:])
    assert (run(pipe, range(2, 3), perturb, guidance=1.0) - joint[2:]).abs().max() > 2e-3


@pytest.mark.parametrize(("mode", "expected"), [("resample", [2.0] * 8), ("rope", [2.0] * 8)])
def test_subjects_of_a_larger_picture_are_told_by_its_own_grid(mode: Any, expected: list[float]) -> None:
    """The left upper quarter of 4 x 8 tokens, read by a subject that fills 4 x 4: twice as many rows, as many columns."""
    tokens = torch.tensor([0, 1, 2, 3, 8, 9, 10, 11])
    held = Held((4, 8), tokens, ("star",), torch.ones(1, 8, dtype=torch.bool), ((0.0, 0.0, 0.5, 0.5),))
    situation: Any = SimpleNamespace(
        stored=(held,),
        shared={0: torch.tensor([[True] * 8, [False] * 8])},
        regions=(ac.Region(name="star", box=(0, 0, 1, 1)),),
        member=torch.ones(1, 16, dtype=torch.bool),
        frame=SimpleNamespace(queries=SimpleNamespace(grid=(4, 4))),
    )
    assert _WEIGHTS[mode](ac.Reposition(mode=mode), situation, 0).tolist() == expected


def test_outputs_are_kept_for_the_steps_that_a_step_stands_for() -> None:
    """Every second of ten steps: the first is read at the second as well, which the window holds."""
    pipe, window = PIPES["sd"](), (0.1, 0.34)
    levels = [1 - step / 10 for step in range(10)]
    keep = ac.Keep(bank=ac.Bank(), every=2, outputs=window)
    assert [step for step in range(10) if keep.is_kept(step) and keep.keeps_outputs(step, levels)] == [0, 2]
    plain = ac.Keep(bank=ac.Bank(), every=2)
    more = (
        keep.predict(pipe, width=32, height=32, steps=10).nbytes
        - plain.predict(pipe, width=32, height=32, steps=10).nbytes
    )
    # keys and values are two states at five steps, outputs one at two
    assert more * 5 == plain.predict(pipe, width=32, height=32, steps=10).nbytes
    for wrong in ((0.5, 0.5), (0.6, 0.9)):
        with pytest.raises(ac.ControlError, match="meet, and they do not"):
            ac.Keep(bank=ac.Bank(), window=(0.0, 0.5), outputs=wrong)


def test_what_differs_in_places_alone_has_another_digest() -> None:
    pipe = PIPES["sd"]()
    left, right = (
        captured(pipe, range(1), regions=[[ac.Region(name="star", box=box)]])
        for box in ((0, 0, 0.5, 1), (0.5, 0, 1, 1))
    )
    again = captured(pipe, range(1), regions=[[ac.Region(name="star", box=(0, 0, 0.5, 1))]])
    assert digest_of(left) == digest_of(again) != digest_of(right)


def test_what_harmonize_cannot_take_in_is_told() -> None:
    pipe, one = PIPES["sd"](), [[ac.Region(name="star", box=(0, 0, 0.5, 1))]]
    ground = captured(pipe, range(1), regions=one, tokens="background", outputs=(0, 1))
    whole, keys = captured(pipe, range(1), regions=one, outputs=(0, 1)), captured(pipe, range(1), regions=one)

    def reading(bank: ac.Bank, **more: Any) -> Any:
        return run(pipe, range(1, 2), ac.Harmonize(one, bank=bank, window=(0, 1), layers="up.self"), **more)

    assert reading(whole).isfinite().all()
    with pytest.raises(ac.ControlError, match="keeps tokens='background' alone"):
        reading(ground)
    with pytest.raises(ac.ControlError, match="no outputs of attention at this step"):
        reading(keys)
    with pytest.raises(ac.ControlError, match="so outputs of one are no match"):
        reading(whole, width=16)
    # outputs belong to no token that is asked or read, so attention can be recorded beside them
    harmony = ac.Harmonize(one, bank=whole, window=(0, 1), layers="up.self")
    with record(pipe, {"star": ["red star"]}, prompt=["a red star"], when="post") as found:
        run(pipe, range(1), harmony)
    assert found["star"].shape[0] == 1
