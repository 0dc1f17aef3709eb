"""The planner chooses, says why, and refuses what cannot work."""

from __future__ import annotations

import pytest
import torch
from execute_tools import EXACT, hard, inputs, random_visibility

from attnctrl.errors import PlanError
from attnctrl.execute import Pass, plan, sdpa
from attnctrl.execute import bench as benchmarks
from attnctrl.visibility import Visibility


def test_planner_groups_large_sparse_masks_and_says_why() -> None:
    made = plan(benchmarks.lamic(2200, [(0, 0, 0.5, 1), (0.5, 0, 1, 1)], isolate_regions=True))
    assert made.executor == "grouped"
    assert "classes" in made.explain()
    assert f"density {made.density:.2f}" in made.explain()
    assert "of a dense mask" in made.explain()


def test_planner_takes_one_masked_call_for_few_tokens() -> None:
    made = plan(random_visibility(60, 60, 8, 8, 0, soft=False, joint=True))
    assert made.executor == "dense"
    assert "masked call" in made.explain()


def test_planner_does_not_take_a_dense_mask_for_high_density() -> None:
    """Seg2Any's SAA at density .94: unmasked calls still beat a mask."""
    made = plan(benchmarks.regional_text(8704))
    assert made.density > 0.9
    assert made.executor == "grouped"


def test_planner_expects_dearer_calls_on_an_accelerator() -> None:
    visibility = benchmarks.lamic(1000, [(0, 0, 0.5, 1), (0.5, 0, 1, 1)], isolate_regions=True)
    assert plan(visibility).executor == "grouped"
    assert plan(visibility, device="meta").executor == "dense"


def test_explain_names_both_sides_of_cross_attention() -> None:
    made = plan(random_visibility(10, 20, 2, 2, 0, soft=False, joint=False), executor="grouped")
    assert "10 queries x 20 keys" in made.explain()
    assert "10 tokens" in plan(Visibility.open(10)).explain()


def test_wrong_requests_are_refused() -> None:
    visibility = hard([0, 1], [[1, 0], [0, 1]])
    with pytest.raises(PlanError, match=r"'flash'.*auto, untouched, grouped, varlen, flex, xformers, dense"):
        plan(visibility, executor="flash")
    with pytest.raises(PlanError, match=r"2 classes of queries at density 0\.50"):
        plan(visibility, executor="untouched")
    with pytest.raises(PlanError, match="at least one pass"):
        plan([])
    with pytest.raises(PlanError, match="empty sequence"):
        plan(Visibility.open(0))
    with pytest.raises(PlanError, match="query tokens per pass: 2, 3"):
        plan([Pass(visibility), Pass(Visibility.open(3))])


def test_weights_must_be_shares() -> None:
    visibility = hard([0, 1], [[1, 1], [0, 1]])
    with pytest.raises(PlanError, match=r"'atom 1' 0\.75"):
        plan([Pass(visibility, torch.tensor([1.0, 0.5])), Pass(visibility, torch.tensor([0.0, 0.25]))])
    with pytest.raises(PlanError, match=r"pass 0 has 'atom 0' 1\.5, 'atom 1' -0\.5"):
        plan([Pass(visibility, torch.tensor([1.5, -0.5]))])
    with pytest.raises(PlanError, match=r"\[2\].*found \(3,\)"):
        plan(Pass(visibility, torch.ones(3)))
    with pytest.raises(PlanError, match="'atom 0' 2"):
        plan([visibility, visibility])


def test_atoms_of_weight_zero_are_not_computed_and_need_no_key() -> None:
    blind = hard([0, 0, 1], [[1, 1], [0, 0]])
    passes = [
        Pass(blind, torch.tensor([1.0, 0.0])),
        Pass(Visibility.joint(blind.query_atom, torch.zeros(2, 2), "ab"), torch.tensor([0.0, 1.0])),
    ]
    q, k, v = inputs(3)
    for executor in EXACT:
        out = plan(passes, executor=executor).run(q, k, v, kernel=sdpa)
        assert (out - sdpa(q, k, v)).abs().max() < 1e-12
