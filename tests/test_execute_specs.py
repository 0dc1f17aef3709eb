"""The identities of the method specs, and that nothing blocked has influence."""

from __future__ import annotations

import math

import pytest
import torch
from execute_tools import EXACT, INF, Spy, formula, hard, inputs, random_visibility

from attnctrl.errors import PlanError
from attnctrl.execute import Pass, plan, sdpa
from attnctrl.execute import bench as benchmarks
from attnctrl.visibility import Visibility


@pytest.mark.parametrize("executor", ["grouped", "dense"])
def test_blocked_keys_have_exactly_zero_influence(executor: str) -> None:
    """lamic.md (a) 3, regional.md (a) 4: d out[q] / d (k, v)[j] = 0 exactly iff q does not see j."""
    visibility = hard([0, 0, 1, 1, 1, 2, 2, 3], [[1, 0, 0, 1], [0, 1, 0, 1], [1, 1, 1, 0], [0, 1, 1, 1]])
    q, k, v = inputs(8, batch=1)
    sees = visibility.dense().isfinite()
    made = plan(visibility, executor=executor)
    for token in range(8):
        key, value = k.clone().requires_grad_(), v.clone().requires_grad_()
        made.run(q, key, value, kernel=sdpa)[:, :, token].square().sum().backward()
        for grad in (key.grad, value.grad):
            assert grad is not None
            assert torch.equal(grad.abs().amax((0, 1, 3)) != 0, sees[token])


@pytest.mark.parametrize("executor", ["grouped", "dense"])
@pytest.mark.parametrize("blocks", [1, 2, 3])
def test_influence_over_blocks_is_reachability(executor: str, blocks: int) -> None:
    """lamic.md (a) 3: over L blocks with residuals the gradient is 0 iff not reachable in A^L."""
    table = [[1, 1, 0, 0, 0], [0, 1, 1, 0, 0], [0, 0, 1, 1, 0], [0, 0, 0, 1, 0], [1, 0, 0, 0, 1]]
    visibility = hard([0, 1, 1, 2, 3, 3, 4], table)
    made = plan(visibility, executor=executor)
    reachable = visibility.reachable(blocks)[visibility.query_atom][:, visibility.query_atom]
    start, *_ = inputs(7, batch=1)
    for token in range(7):
        x = start.clone().requires_grad_()
        state = x
        for _ in range(blocks):
            state = state + made.run(state, state, state, kernel=sdpa)
        state[:, :, token].square().sum().backward()
        assert x.grad is not None
        assert torch.equal(x.grad.abs().amax((0, 1, 3)) != 0, reachable[token])


@pytest.mark.parametrize("executor", ["grouped", "dense"])
def test_gradients_equal_those_of_the_formula(executor: str) -> None:
    visibility = random_visibility(40, 40, 5, 5, 11, soft=True, joint=True)
    passes = [Pass(visibility, torch.full((5,), 0.5)), Pass(Visibility.open(40), torch.tensor([0.5]))]
    made = plan(passes, executor=executor)
    ours, theirs = (
        torch.autograd.grad(run(*leaves).square().sum(), leaves)
        for run, leaves in (
            (lambda q, k, v: made.run(q, k, v, kernel=sdpa), [x.clone().requires_grad_() for x in inputs(40)]),
            (lambda q, k, v: formula(passes, q, k, v), [x.clone().requires_grad_() for x in inputs(40)]),
        )
    )
    for mine, reference in zip(ours, theirs, strict=True):
        assert (mine - reference).abs().max() < 1e-11


@pytest.mark.parametrize("executor", ["grouped", "dense"])
def test_group_that_nobody_reads_is_as_if_absent(executor: str) -> None:
    """lamic.md (a) 4."""
    visibility = hard([0] * 5 + [1] * 20 + [2] * 9, [[1, 1, 0], [1, 1, 0], [1, 0, 1]])
    q, k, v = inputs(34)
    out = plan(visibility, executor=executor).run(q, k, v, kernel=sdpa)[:, :, :25]
    assert (out - sdpa(q[:, :, :25], k[:, :, :25], v[:, :, :25])).abs().max() < 1e-12


@pytest.mark.parametrize("executor", ["grouped", "dense"])
@pytest.mark.parametrize("times", [2, 5])
def test_log_weight_is_repetition_of_keys(executor: str, times: int) -> None:
    """lamic.md (a) 6: W = log m on a group equals repeating its keys and values m times."""
    atom = torch.tensor([0] * 6 + [1] * 4)
    table = torch.zeros(2, 2)
    table[:, 1] = math.log(times)
    q, k, v = inputs(10)
    out = plan(Visibility.joint(atom, table, ("a", "b")), executor=executor).run(q, k, v, kernel=sdpa)
    repeated = [torch.cat([x[:, :, :6], x[:, :, 6:].repeat(1, 1, times, 1)], 2) for x in (k, v)]
    # log m is stored in float32
    assert (out - sdpa(q, *repeated)).abs().max() < 1e-7


def test_constant_finite_rows_are_vanilla() -> None:
    """lamic.md (a) 6: a finite constant per row changes nothing, and the planner knows it."""
    table = torch.tensor([[0.7, 0.7, -INF], [-3.0, -3.0, 0], [0, 0, 0]])
    visibility = Visibility.joint(torch.tensor([0, 1, 1, 0]), table, ("a", "b", "empty"))
    made = plan(visibility)
    assert made.executor == "untouched"
    q, k, v = inputs(4)
    assert torch.equal(made.run(q, k, v, kernel=sdpa), sdpa(q, k, v))
    assert (formula(visibility, q, k, v) - sdpa(q, k, v)).abs().max() < 1e-12


def test_constant_rows_over_part_of_the_keys_need_no_bias() -> None:
    visibility = Visibility.joint(torch.tensor([0, 0, 1]), torch.tensor([[2.0, -INF], [-INF, -1.0]]), ("a", "b"))
    spy = Spy()
    q, k, v = inputs(3)
    out = plan(visibility, executor="grouped").run(q, k, v, kernel=spy)
    assert [mask for *_, mask, _ in spy.calls] == [None, None]
    assert (out - formula(visibility, q, k, v)).abs().max() < 1e-12


def test_every_query_needs_a_key() -> None:
    """lamic.md (a) 6, regional.md (a) 10: never zero rows."""
    blind = hard([0, 0, 1], [[1, 1], [0, 0]])
    for executor in EXACT:
        with pytest.raises(PlanError, match=r"'atom 1' \(1 tokens\)"):
            plan(blind, executor=executor)


@pytest.mark.parametrize("executor", ["grouped", "dense"])
def test_coverage_of_one_half_is_a_bias_of_its_logarithm(executor: str) -> None:
    """regional.md (a) 7."""
    coverage = torch.tensor([[1.0, 0.5, 0.0], [0.5, 1.0, 1.0], [0.0, 1.0, 1.0]])
    atom = torch.tensor([0, 0, 1, 1, 2, 2])
    q, k, v = inputs(6)
    unnormalised = (q @ k.transpose(-1, -2) * 8**-0.5).exp() * coverage.double()[atom][:, atom]
    expected = unnormalised / unnormalised.sum(-1, keepdim=True) @ v
    out = plan(Visibility.joint(atom, coverage.log(), ("a", "b", "c")), executor=executor).run(q, k, v, kernel=sdpa)
    # log 0.5 is stored in float32
    assert (out - expected).abs().max() < 1e-7


def test_equal_passes_are_vanilla_whatever_the_mix() -> None:
    """regional.md (a) 1: with one region that is the whole canvas both passes agree, bit for bit."""
    open_three = Visibility.joint(torch.tensor([0, 1, 2, 2]), torch.zeros(3, 3), ("text", "global", "image"))
    passes = [Pass(open_three, torch.full((3,), 0.3)), Pass(Visibility.open(4), torch.tensor([0.7]))]
    made = plan(passes)
    assert made.executor == "untouched"
    q, k, v = inputs(4, dtype=torch.float32)
    assert torch.equal(made.run(q, k, v, kernel=sdpa), sdpa(q, k, v))


@pytest.mark.parametrize("executor", ["grouped", "dense"])
@pytest.mark.parametrize("beta", [0.0, 0.25, 1.0])
def test_regional_and_base_pass(executor: str, beta: float) -> None:
    """regional.md 1: T_r from the regional pass, T_g from the base pass, image rows mixed; beta 0, 1 drop a pass."""
    names = ("global", "text 1", "text 2", "left", "right")
    atom = torch.tensor([0] * 4 + [1] * 3 + [2] * 5 + [3, 3, 4, 4] * 6)
    regional = torch.tensor([[0, 0, 0, 0, 0], [0, 1, 0, 1, 0], [0, 0, 1, 0, 1], [0, 1, 0, 1, 0], [0, 0, 1, 0, 1]])
    base = torch.tensor([[1, 0, 0, 1, 1]]).expand(5, 5)
    tables = [torch.where(table > 0, 0.0, -INF) for table in (regional, base)]
    passes = [
        Pass(Visibility.joint(atom, tables[0], names), torch.tensor([0, 1, 1, 1 - beta, 1 - beta])),
        Pass(Visibility.joint(atom, tables[1], names), torch.tensor([1, 0, 0, beta, beta])),
    ]
    spy = Spy()
    q, k, v = inputs(36)
    made = plan(passes, executor=executor)
    out = made.run(q, k, v, kernel=spy)
    expected = torch.empty_like(q)
    image = torch.arange(12, 36)
    expected[:, :, :4] = sdpa(q[:, :, :4], *(x[:, :, [*range(4), *image]] for x in (k, v)))
    for text, part in ((range(4, 7), image[atom[image] == 3]), (range(7, 12), image[atom[image] == 4])):
        own = [*text, *part.tolist()]
        expected[:, :, own] = sdpa(q[:, :, own], k[:, :, own], v[:, :, own])
    shared = sdpa(q[:, :, image], *(x[:, :, [*range(4), *image]] for x in (k, v)))
    expected[:, :, image] = (1 - beta) * expected[:, :, image] + beta * shared
    assert (out - expected).abs().max() < 1e-12
    if executor == "grouped":
        rows = {0.0: 4 + 8 + 24, 0.25: 4 + 8 + 24 + 24, 1.0: 4 + 8 + 24}
        assert sum(call[0].shape[2] for call in spy.calls) == rows[beta]


def test_relabelling_of_entities_changes_nothing() -> None:
    """lamic.md (a) 5, regional.md (a) 5: permuting tokens with their atoms permutes the output."""
    visibility = benchmarks.lamic(200, [(0, 0, 0.5, 1), (0.5, 0, 1, 1)], isolate_regions=True)
    count = visibility.query_atom.numel()
    order = torch.randperm(count, generator=torch.Generator().manual_seed(0))
    shuffled = Visibility.joint(visibility.query_atom[order], visibility.log_weight, visibility.query_names)
    q, k, v = inputs(count, batch=1)
    out = plan(visibility, executor="grouped").run(q, k, v, kernel=sdpa)
    moved = plan(shuffled, executor="grouped").run(q[:, :, order], k[:, :, order], v[:, :, order], kernel=sdpa)
    assert (moved - out[:, :, order]).abs().max() < 1e-12


def test_phase_b_on_whole_canvas_is_phase_a_with_the_scene_text_opened() -> None:
    """lamic.md (a) 5: regions that all equal the canvas leave only C <-> R cut in phase A."""
    names = ("S", "C", "P", "R", "F")
    phase_a = torch.ones(5, 5)
    phase_a[1, 3] = phase_a[3, 1] = 0
    opened = phase_a.clone()
    opened[1, 3] = opened[3, 1] = 1
    assert torch.equal(opened, torch.ones(5, 5))
    assert plan(Visibility.joint(torch.arange(5), opened.log(), names)).executor == "untouched"
    assert plan(Visibility.joint(torch.arange(5), phase_a.log(), names)).executor != "untouched"
