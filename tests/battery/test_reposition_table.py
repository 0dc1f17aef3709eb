"""Subjects of other pictures whose entries of a table of positions are exchanged: against models that are given another
table, entry by entry, and what such a table cannot do.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import pytest
import torch
from harness import FAMILIES, branches, flux, probe, sd3, traces, unet
from torch import Tensor

import attnctrl as ac
from attnctrl.families import all_families, family_of
from attnctrl.tables import entries

TABLED = ["sd3", "auraflow", "pixart"]
GRID = (4, 6)
FOX = [(0, 0, 2 / 6, 1), (3 / 6, 0, 1, 0.5)]
OWL = (4 / 6, 0, 1, 1)
SCENES = [
    [ac.Region(name="fox", box=FOX[0]), ac.Region(name="owl", box=OWL)],
    [ac.Region(name="fox", box=FOX[1])],
]
"""On 4 x 6 tokens the fox is 4 x 2 tokens at (0, 0), then 2 x 3 at (0, 3); only the first picture has an owl."""
ONE: dict[str, Any] = {"readers": "anchors", "anchors": 1, "tokens": "subject", "queries": "same"}


def placed(box: tuple[float, float, float, float]) -> list[ac.Region]:
    return [ac.Region(name="fox", box=box)]


def own_table(setting: Any) -> Tensor:
    """[4, 6, D]: what the model adds to the tokens of this picture, found without the library."""
    latents = setting.inputs["hidden_states"]
    module = setting.model.pos_embed
    with torch.no_grad():
        seen = module(latents)[0]
        if hasattr(module, "cropped_pos_embed") and module.pos_embed_max_size:
            return module.cropped_pos_embed(*latents.shape[-2:])[0].view(*GRID, -1)
        if hasattr(module, "pe_selection_index_based_on_dim"):
            found = module.pe_selection_index_based_on_dim(*latents.shape[-2:])
            return module.pos_embed[0, found].view(*GRID, -1)
        return (seen - module.proj(latents)[0].flatten(1).T).view(*GRID, -1)


def between(table: Tensor, y: float, x: float) -> Tensor:
    """The table at a place, as the sum over its entries with hat functions, held at its edges."""
    y, x = min(max(y, 0.0), GRID[0] - 1.0), min(max(x, 0.0), GRID[1] - 1.0)
    found = torch.zeros_like(table[0, 0])
    for row in range(GRID[0]):
        for column in range(GRID[1]):
            found = found + max(0.0, 1 - abs(y - row)) * max(0.0, 1 - abs(x - column)) * table[row, column]
    return found


def of_fox(y: int, x: int, strength: float = 1.0) -> tuple[float, float]:
    """Where the first picture's fox stands in the second: half as tall, one and a half times as wide."""
    goal = (y + 0.5) * 0.5 - 0.5, 3 + (x + 0.5) * 1.5 - 0.5
    return y + strength * (goal[0] - y), x + strength * (goal[1] - x)


@contextmanager
def with_table(setting: Any, change: Tensor, rows: list[int]) -> Iterator[None]:
    """The model's rows with another table: `change` [24, D] is added to what its embedding gives."""

    def changed(module: Any, inputs: Any, output: Tensor) -> Tensor:
        told = torch.zeros_like(output)
        told[rows] = change
        return output + told

    handle = setting.model.pos_embed.register_forward_hook(changed)
    yield
    handle.remove()


@pytest.mark.parametrize("strength", [1.0, 0.4])
@pytest.mark.parametrize("name", TABLED)
def test_a_picture_that_is_read_runs_with_other_entries(name: str, strength: float) -> None:
    """x - pos(p) + pos(p') for the fox's tokens of row 0 alone, in all layers, and its weight by area."""
    setting = FAMILIES[name](batch=2, dtype=torch.float64)
    table = own_table(setting)
    change = torch.zeros(24, table.shape[-1], dtype=torch.float64)
    for y in range(4):
        for x in (0, 1):
            change[6 * y + x] = between(table, *of_fox(y, x, strength)) - table[y, x]
    before, base = traces(setting.model), setting.run()
    told = branches(setting.model)
    with (
        with_table(setting, change, [0]),
        ac.attach(setting.model, ac.Share(SCENES, weight=0.75**strength, **ONE), branches=told),
    ):
        expected = setting.run()
    stack = [ac.Share(SCENES, **ONE), ac.Reposition(mode="table", strength=strength)]
    with pytest.warns(UserWarning, match="owl"), ac.attach(setting.model, stack, branches=told) as handle:
        out = setting.run()
    assert (out - expected).abs().max() < 1e-10
    assert (out - base).abs().amax((1, 2, 3)).min() > 1e-5
    assert "picture 0 runs with its subjects at picture 1's" in str(handle.report())
    assert torch.equal(setting.run(), base)
    assert traces(setting.model) == before


def test_whole_cells_are_exact_entries_and_halves_are_between_them() -> None:
    table = torch.randn(4, 6, 5, generator=torch.Generator().manual_seed(0))
    cells = torch.tensor([[0, 0], [3, 5], [2, 1]])
    assert torch.equal(entries(table, cells.double()), table[cells[:, 0], cells[:, 1]])
    found = entries(table.double(), torch.tensor([[1.5, 2.25], [-3, 9.0], [3.5, 0.5]], dtype=torch.float64))
    wanted = [between(table.double(), y, x) for y, x in ((1.5, 2.25), (0, 5), (3, 0.5))]
    assert (found - torch.stack(wanted)).abs().max() < 1e-15


def test_a_fox_moved_by_whole_cells_is_one_that_stood_there() -> None:
    """Its latents at the new place give the keys that are read: row 0 with its columns exchanged, table and all."""
    setting = sd3(batch=2, dtype=torch.float64)
    scenes = [placed((0, 0, 2 / 6, 1)), placed((4 / 6, 0, 1, 1))]
    stack = [ac.Share(scenes, **ONE), ac.Reposition(mode="table")]
    with ac.attach(setting.model, stack, branches=("cond",)), probe() as calls:
        setting.run()
    latents = setting.inputs["hidden_states"].clone()
    latents[0, :, :, 4:] = latents[0, :, :, :2]
    with torch.no_grad(), probe() as again:
        setting.run(hidden_states=latents)
    fox, there = ([6 * y + x for y in range(4) for x in columns] for columns in ((0, 1), (4, 5)))
    # the first layer alone: behind it, the others of the row differ
    assert (calls[0].key[0, fox] - again[0].key[0, there]).abs().max() < 1e-12
    assert (calls[0].key[0, fox] - again[0].key[0, fox]).abs().max() > 1e-3


def test_equal_places_are_plain_sharing_to_the_bit() -> None:
    setting = sd3(batch=3)
    alike = [placed(FOX[0])] * 3
    for who in (ONE, {"tokens": "subject", "queries": "same"}):
        with ac.attach(setting.model, ac.Share(alike, **who), branches=("cond",)):
            plain = setting.run()
        stack = [ac.Share(alike, **who), ac.Reposition(mode="table")]
        with ac.attach(setting.model, stack, branches=("cond",)):
            assert torch.equal(setting.run(), plain)


def test_every_branch_and_group_has_its_own_references() -> None:
    """Two branches of two groups: each reader's row before it is moved to its own place."""
    setting = sd3(batch=8, dtype=torch.float64)
    scenes = [placed(box) for box in (FOX[0], FOX[1], FOX[0], (4 / 6, 0, 1, 1))]
    stack = [ac.Share(scenes, group=2, **ONE), ac.Reposition(mode="table")]
    with ac.attach(setting.model, stack, branches=("uncond", "cond")):
        out = setting.run()
    for start, pair in ((0, scenes[:2]), (2, scenes[2:]), (4, scenes[:2]), (6, scenes[2:])):
        rows = {key: value[start : start + 2] for key, value in setting.inputs.items() if isinstance(value, Tensor)}
        alone = [ac.Share(pair, **ONE), ac.Reposition(mode="table")]
        with ac.attach(setting.model, alone, branches=("cond",)):
            assert (setting.run(**rows) - out[start : start + 2]).abs().max() < 1e-10


def test_half_precision_is_rounded_once() -> None:
    setting = sd3(batch=2, dtype=torch.bfloat16)
    seen = []
    handle = setting.model.transformer_blocks[0].register_forward_pre_hook(
        lambda module, given, named: seen.append(named["hidden_states"]), with_kwargs=True
    )
    stack = [ac.Share([placed(FOX[0]), placed(FOX[1])], **ONE), ac.Reposition(mode="table", density=False)]
    with ac.attach(setting.model, stack, branches=("cond",)):
        setting.run()
    setting.run()
    handle.remove()
    table, tokens = own_table(setting).double(), seen[1][0].double()
    wanted = torch.stack([tokens[6 * y] + between(table, *of_fox(y, 0)) - table[y, 0] for y in range(4)])
    assert (seen[0][0, ::6].double() - wanted).abs().max() < 0.02
    assert torch.equal(seen[0][1], seen[1][1])


def test_which_families_have_a_table() -> None:
    assert [family.name for family in all_families() if family.table] == ["sd3", "auraflow", "pixart"]
    assert all(family_of(FAMILIES[name]().model).table == "pos_embed" for name in TABLED)


def test_what_cannot_be_exchanged_is_an_error_that_says_why() -> None:
    table = ac.Reposition(mode="table")

    def refused(match: str, scenes: Any, on: Any, error: Any = ac.ControlError, **who: Any) -> None:
        stack = [ac.Share(scenes, **{**ONE, **who}), table]
        with ac.attach(on.model, stack, branches=branches(on.model)), pytest.raises(error, match=match):
            on.run()
        assert not on.model.__dict__.get("_attnctrl_engine")
        with torch.no_grad():
            on.run()

    three, one = [placed(FOX[0]), placed(FOX[1]), placed(OWL)], [placed(FOX[0]), placed(FOX[1])]
    for make in (flux, unet):
        refused("adds no table of positions.*SD3", one, make(batch=2), ac.UnsupportedModelError)
    refused("rows 1 and 2 of the batch both read row 0.*group=2", three, sd3(batch=3))
    refused("is moved at its input for row.*anchors=1", one, sd3(batch=2), readers="all")
    wide = sd3(batch=2)
    handle = wide.model.pos_embed.register_forward_hook(lambda module, given, output: output[:1].expand(3, -1, -1))
    stack = [ac.Share(one, **ONE), table]
    with ac.attach(wide.model, stack, branches=("cond",)), pytest.raises(ac.PlanError, match="2 rows of 24 tokens"):
        wide.run()
    handle.remove()
    assert not wide.model.pos_embed._forward_hooks
    assert math.isfinite(wide.run().sum().item())
