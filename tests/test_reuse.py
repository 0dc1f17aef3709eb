"""When outputs of attention are kept, and what is kept: the tables of T-GATE and PAB, step by step."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

import attnctrl as ac
from attnctrl.reuse import Action, Kept, Key, Part, broadcast, gated, joined, parted

LETTERS = {"c": "compute", "s": "store", "m": "mean", "r": "reuse"}
RUN = object()


def spelled(table: str) -> list[Action]:
    return [LETTERS[letter] for letter in table]  # type: ignore[misc]


@pytest.mark.parametrize(
    ("numbers", "crossed", "itself"),
    [
        # SDXL: m 10, s 5, f 1, omega 2
        ({"gate": 10, "early": 5, "late": 1, "warmup": 2}, "cccccccccmrrrrr", "ccsrrsrrrcccccc"),
        ({"gate": 6, "early": 2, "late": 3, "warmup": 1}, "cccccmrrrrrr", "cssrsmsrrsrr"),
        # LCM: m 1, s = f = 1, no warm-up
        ({"gate": 1, "early": 1, "late": 1, "warmup": 0}, "mrrr", "cccc"),
        # DeepCache: s 1
        ({"gate": 3, "early": 1, "late": 1, "warmup": 2}, "ccmrrr", "cccccc"),
    ],
)
def test_the_table_of_tgate(numbers: dict[str, int], crossed: str, itself: str) -> None:
    for table, cross in ((crossed, True), (itself, False)):
        found = [gated(step, cross, **numbers) for step in range(len(table))]
        assert found == spelled(table), cross


def test_the_rule_of_pyramid_attention_broadcast() -> None:
    times = [1000.0, 900.0, 800.0, 799.0, 500.0, 300.0, 101.0, 100.0, 50.0]
    found = [broadcast(step, time, every=3, between=(100.0, 800.0)) for step, time in enumerate(times)]
    assert found == spelled("ssssrrsss")
    assert [broadcast(step, 500.0, every=1, between=(100.0, 800.0)) for step in range(3)] == spelled("ccc")


def entry(kept: Kept, branch: str, value: Tensor, step: int, *, mean: bool = False, layer: str = "a") -> Key:
    key = Key("control", layer, branch, ())
    kept.store(key, part(branch), value, RUN, step, mean)
    return key


def part(branch: str, epoch: Any = 0) -> Part:
    return Part(branch, (), slice(0, 1), epoch)


def test_the_mean_is_that_of_the_guided_and_the_unguided_branch() -> None:
    kept, values = Kept(), torch.randn(2, 1, 3, generator=torch.Generator().manual_seed(0)).half()
    first = entry(kept, "uncond", values[0], 4, mean=True)
    assert torch.equal(kept.take([first], [part("uncond")], 4, False)[0], values[0])  # type: ignore[index]
    second = entry(kept, "cond", values[1], 4, mean=True)
    entry(kept, "perturbed", values[1], 4, mean=True)
    wanted = (values.double().sum(0) / 2).half()
    for key in (first, second):
        (found,) = kept.take([key], [part(key.branch)], 5, False) or [None]
        assert torch.equal(found, wanted)
    # one tensor for both, and that of the perturbed branch
    assert kept.nbytes == 2 * wanted.nbytes
    alone = Kept()
    only = entry(alone, "cond", values[0], 0, mean=True)
    assert torch.equal(alone.take([only], [part("cond")], 1, False)[0], values[0])  # type: ignore[index]


def test_entries_live_from_step_to_step_of_one_run_and_one_epoch() -> None:
    kept, value = Kept(), torch.ones(1, 1)
    key = entry(kept, "cond", value, 3)
    assert kept.take([key], [part("cond", 1)], 4, False) is None
    for step in (4, 5):
        kept.age(RUN, step)
        assert kept.take([key], [part("cond")], step, False) == [value]
    both = [key, key._replace(branch="uncond")]
    assert kept.take(both, [part("cond"), part("uncond")], 5, False) is None
    kept.age(RUN, 7)
    assert kept.entries == {}
    for run, step in ((object(), 4), (RUN, 2), (RUN, None)):
        entry(kept, "cond", value, 3)
        kept.age(run, step)
        assert kept.entries == {}
    entry(kept, "cond", value, 3)
    assert kept.take([key], [part("cond")], 4, True) == [value]
    assert kept.entries == {}


def test_outputs_are_parted_by_branch_and_joined_again() -> None:
    image, text = torch.randn(3, 4, 2), torch.randn(3, 1, 2)
    parts = [Part("uncond", (), slice(0, 1), 0), Part("cond", (), slice(1, 3), 0)]
    for output in (image, (image, text), (image, None)):
        found = joined(parted(output, parts, "a"))
        flat = found if isinstance(found, tuple) else (found,)
        assert [None if one is None else one.tolist() for one in flat] == [
            None if one is None else one.tolist() for one in (output if isinstance(output, tuple) else (output,))
        ]
    with pytest.raises(ac.PlanError, match=r"Layer a returns \[3\] rows for a batch of 4"):
        parted(image, [parts[0], Part("cond", (), slice(1, 4), 0)], "a")


def test_what_it_is_told_is_checked_and_written_down() -> None:
    for wrong, text in (
        ({"every": 0}, "every must be a whole number from 1 on; found 0"),
        ({"gate": 2.5}, "gate must be a whole number from 1 on"),
        ({"between": (800, 100)}, "between is two timesteps"),
        ({"between": (100, 500, 800)}, "between is two timesteps"),
        ({"strength": 0.5}, "strength is 0 or 1"),
        ({"policy": "gate"}, "policy must be one of pab, tgate"),
    ):
        with pytest.raises(ac.ControlError, match=text):
            ac.Reuse(**wrong)
    data = ac.Reuse("tgate", gate=5, layers="cross").to_dict()
    assert data == {"name": "reuse", "policy": "tgate", "gate": 5, "layers": "cross"}
    assert ac.Control.from_dict(data).to_dict() == data
    between = ac.Control.from_dict(ac.Reuse(between=(0, 900)).to_dict())
    assert isinstance(between, ac.Reuse)
    assert between.between == (0.0, 900.0)
    assert ac.Reuse(every=1, cross_every=1).is_idle
    assert not ac.Reuse(every=1).is_idle
