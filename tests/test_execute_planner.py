"""The planner chooses, says why, and refuses what cannot work."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from execute_tools import EXACT, INF, hard, inputs, random_visibility

from attnctrl.errors import PlanError
from attnctrl.execute import Host, Pass, plan, planner, sdpa
from attnctrl.execute import bench as benchmarks
from attnctrl.execute.grouped import GroupedPlan
from attnctrl.execute.terms import build_terms
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


def cuda_costs(visibility: Visibility, monkeypatch: pytest.MonkeyPatch, **extra: bool) -> tuple[dict[str, float], Any]:
    """Costs as if this machine had a CUDA device with a kernel of variable length."""
    monkeypatch.setattr(planner, "find_kernel", lambda device, soft: object())
    terms = build_terms([Pass(visibility)])
    return planner.estimate(terms, "cuda", Host(own_kernels=True, **extra)), terms


def test_planner_packs_on_cuda_where_classes_are_many(monkeypatch: pytest.MonkeyPatch) -> None:
    visibility = benchmarks.CASES["four references, phase A"](8704)
    costs, terms = cuda_costs(visibility, monkeypatch)
    assert set(costs) == {"grouped", "dense", "varlen"}
    name, reason = planner.choose(costs, terms)
    assert name == "varlen"
    assert "one packed call is estimated at 0." in reason
    assert f"of {len(terms.classes)} grouped calls" in reason


def test_planner_takes_flex_only_when_compiling_on_cuda(monkeypatch: pytest.MonkeyPatch) -> None:
    visibility = benchmarks.regional_text(8704)
    terms = build_terms([Pass(visibility)])
    assert "flex" not in planner.estimate(terms, "cpu", Host(own_kernels=True, compiling=True))
    assert "flex" not in cuda_costs(visibility, monkeypatch)[0]
    costs, terms = cuda_costs(visibility, monkeypatch, compiling=True)
    assert costs["flex"] < costs["dense"]
    name, reason = planner.choose({"grouped": 4e8, "dense": 5e8, "flex": 1e8}, terms)
    assert (name, reason) == ("flex", "one compiled block-sparse call is estimated at 0.20 of a dense mask and 0.25 of 5 grouped calls")  # fmt: skip


def test_planner_prices_what_a_packed_call_copies(monkeypatch: pytest.MonkeyPatch) -> None:
    """Two classes of 10 and 20 queries that see 10 and 30 keys."""
    costs, _ = cuda_costs(hard([0] * 10 + [1] * 20, [[1, 0], [1, 1]]), monkeypatch)
    assert costs["varlen"] == 100 + 600 + planner.COPY_COST_CUDA * (10 + 30) + planner.CALL_COST_CUDA


def test_planner_never_chooses_a_lowering_without_its_kernel() -> None:
    terms = build_terms([Pass(benchmarks.regional_text(2000))])
    for device in ("cpu", "meta", "cuda"):
        assert set(planner.estimate(terms, device)) == {"grouped", "dense"}


def test_planner_keeps_to_the_given_kernel_unless_told_otherwise(monkeypatch: pytest.MonkeyPatch) -> None:
    """A user who selected an attention backend gets it."""
    terms = build_terms([Pass(benchmarks.regional_text(2000))])
    monkeypatch.setattr(planner, "find_kernel", lambda device, soft: object())
    assert set(planner.estimate(terms, "cuda", Host(compiling=True))) == {"grouped", "dense"}


def test_soft_rows_take_a_bias_on_cpu_and_levels_where_asked() -> None:
    atom, table = torch.arange(900) // 300, torch.tensor([[0, -1.0, -INF], [-1.0, 0, 0.5], [0, 0, 0]])
    visibility = Visibility.joint(atom, table, "abc")
    levels = {}
    for soft in ("auto", "bias", "lse"):
        made = plan(visibility, executor="grouped", soft=soft)
        assert isinstance(made, GroupedPlan)
        levels[soft] = sorted(0 if call.levels is None else len(call.levels.keys) for call in made.calls)
    assert levels == {"auto": [0, 0, 0], "bias": [0, 0, 0], "lse": [0, 2, 3]}


@pytest.mark.parametrize("executor", ["grouped", "varlen", "flex", "dense"])
def test_a_query_that_sees_nothing_is_an_error_of_the_plan(executor: str) -> None:
    with pytest.raises(PlanError, match=r"'atom 1' \(1 tokens\)"):
        plan(hard([0, 0, 1], [[1, 1], [0, 0]]), executor=executor)


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
