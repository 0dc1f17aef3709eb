"""Every executor equals the dense float64 formula; nothing blocked has influence; nothing is tokens x tokens."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from attnctrl.errors import PlanError
from attnctrl.execute import ExecutionPlan, Pass, plan, sdpa
from attnctrl.execute import bench as benchmarks
from attnctrl.execute.dense import DensePlan
from attnctrl.execute.grouped import GroupedPlan, sort_keys
from attnctrl.execute.terms import build_terms
from attnctrl.execute.tokens import find_runs, row_bias, token_set
from attnctrl.visibility import Visibility

INF = float("inf")
EXACT = ("grouped", "dense", "auto")


def inputs(
    queries: int,
    keys: int | None = None,
    *,
    batch: int = 2,
    heads: int = 2,
    dim: int = 8,
    seed: int = 0,
    dtype: Any = torch.float64,
) -> list[Tensor]:
    """q, k, v [B, H, T, D] as views of [B, T, H, D] memory."""
    generator = torch.Generator().manual_seed(seed)
    sizes = (queries, keys or queries, keys or queries)
    return [
        torch.randn(batch, t, heads, dim, generator=generator, dtype=torch.float64).to(dtype).transpose(1, 2)
        for t in sizes
    ]


def formula(passes: Visibility | Sequence[Pass], q: Tensor, k: Tensor, v: Tensor, scale: float | None = None) -> Tensor:
    """sum_p w_p * softmax(q k^T * scale + W_p) v, dense, in float64."""
    total = torch.zeros_like(q, dtype=torch.float64)
    for one in [Pass(passes)] if isinstance(passes, Visibility) else passes:
        scores = q.double() @ k.double().transpose(-1, -2) * (scale or q.shape[-1] ** -0.5)
        out = (scores + one.visibility.dense(torch.float64)).softmax(-1) @ v.double()
        if one.weight is None:
            total += out
        else:
            weight = one.weight.double()[one.visibility.query_atom][:, None]
            total += torch.where(weight > 0, out * weight, 0.0)
    return total


def random_visibility(
    queries: int,
    keys: int,
    query_groups: int,
    key_groups: int,
    seed: int,
    *,
    soft: bool,
    joint: bool,
    blocked: float = 0.4,
) -> Visibility:
    """Random atoms (some may be empty, some have one token) where every query sees a key."""
    generator = torch.Generator().manual_seed(seed)
    query_atom = torch.randint(query_groups, (queries,), generator=generator)
    key_atom = query_atom if joint else torch.randint(key_groups, (keys,), generator=generator)
    columns = query_groups if joint else key_groups
    table = torch.randn(query_groups, columns, generator=generator) if soft else torch.zeros(query_groups, columns)
    table[torch.rand(table.shape, generator=generator) < blocked] = -INF
    table[:, key_atom[int(torch.randint(key_atom.numel(), (1,), generator=generator))]] = 0
    rows, cols = [f"q{g}" for g in range(query_groups)], [f"k{g}" for g in range(columns)]
    return Visibility(query_atom, key_atom, table, tuple(rows), tuple(rows if joint else cols))


def hard(atom: Sequence[int], sees: Sequence[Sequence[int]]) -> Visibility:
    table = torch.where(torch.tensor(sees) > 0, 0.0, -INF)
    return Visibility.joint(torch.tensor(atom), table, [f"atom {g}" for g in range(len(sees))])


class Spy:
    """The kernel, with a record of what it was given."""

    def __init__(self) -> None:
        self.calls: list[tuple[Tensor, Tensor, Tensor, Tensor | None, float | None]] = []

    def __call__(
        self, q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None = None, scale: float | None = None
    ) -> Tensor:
        self.calls.append((q, k, v, mask, scale))
        return sdpa(q, k, v, mask, scale)


# --- equality with the dense formula -------------------------------------------------------------------------------


@settings(max_examples=40, deadline=None, derandomize=True)
@given(
    queries=st.integers(1, 40),
    keys=st.integers(1, 40),
    groups=st.tuples(st.integers(1, 6), st.integers(1, 6)),
    seed=st.integers(0, 2**16),
    soft=st.booleans(),
    joint=st.booleans(),
)
def test_all_executors_equal_the_dense_formula(
    queries: int, keys: int, groups: tuple[int, int], seed: int, soft: bool, joint: bool
) -> None:
    """lamic.md (a) 2, on random atoms and tables, joint and cross."""
    visibility = random_visibility(queries, keys, *groups, seed, soft=soft, joint=joint)
    q, k, v = inputs(queries, queries if joint else keys, seed=seed)
    expected = formula(visibility, q, k, v)
    for executor in EXACT:
        out = plan(visibility, executor=executor).run(q, k, v, kernel=sdpa)
        assert (out - expected).abs().max() < 1e-12


@settings(max_examples=40, deadline=None, derandomize=True)
@given(
    tokens=st.integers(1, 30),
    count=st.integers(2, 4),
    seed=st.integers(0, 2**16),
    soft=st.booleans(),
    joint=st.booleans(),
)
def test_passes_equal_the_dense_formula(tokens: int, count: int, seed: int, soft: bool, joint: bool) -> None:
    """Weights are multiples of 1/8, exact in float32; the last pass takes the rest, so weights of 0 and 1 occur."""
    generator = torch.Generator().manual_seed(seed)
    parts = [random_visibility(tokens, tokens, 3, 3, seed + p, soft=soft, joint=joint) for p in range(count)]
    atom = parts[0].query_atom
    rest, passes = torch.ones(3), []
    for number, part in enumerate(parts):
        part = Visibility(atom, atom if joint else part.key_atom, part.log_weight, part.query_names, part.key_names)
        if joint:
            part = Visibility.joint(atom, part.log_weight.clone().fill_diagonal_(0), part.query_names)
        share = rest if number == count - 1 else (rest * torch.randint(9, (3,), generator=generator)).floor() / 8
        rest = rest - share
        passes.append(Pass(part, share))
    q, k, v = inputs(tokens, seed=seed)
    expected = formula(passes, q, k, v)
    for executor in EXACT:
        out = plan(passes, executor=executor).run(q, k, v, kernel=sdpa)
        assert (out - expected).abs().max() < 1e-12


@pytest.mark.parametrize("executor", ["grouped", "dense"])
@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float32, 1e-5), (torch.bfloat16, 2e-2), (torch.float16, 2e-3)])
def test_lower_precisions(executor: str, dtype: torch.dtype, tolerance: float) -> None:
    visibility = random_visibility(300, 300, 6, 6, 1, soft=True, joint=True)
    q, k, v = inputs(300, dtype=dtype)
    mixed = [Pass(visibility, torch.full((6,), 0.25)), Pass(Visibility.open(300), torch.tensor([0.75]))]
    for passes in (visibility, mixed):
        out = plan(passes, executor=executor).run(q, k, v, kernel=sdpa)
        assert out.dtype == dtype
        assert (out.double() - formula(passes, q, k, v)).abs().max() < tolerance


@pytest.mark.parametrize("executor", ["grouped", "dense"])
def test_shares_are_combined_in_float32_and_cast_once(executor: str) -> None:
    shares = (0.3, 0.6, 0.1)
    atom = torch.arange(50) % 3
    one_row = [torch.randn(1, 3, generator=torch.Generator().manual_seed(seed)) for seed in range(3)]
    passes = [
        Pass(Visibility(torch.zeros_like(atom), atom, row, ("all",), ("a", "b", "c")), torch.tensor([share]))
        for row, share in zip(one_row, shares, strict=True)
    ]
    outs: list[Tensor] = []

    def kernel(q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None = None, scale: float | None = None) -> Tensor:
        outs.append(sdpa(q, k, v, mask, scale))
        return outs[-1]

    made = plan(passes, executor=executor)
    out = made.run(*inputs(50, dtype=torch.bfloat16), kernel=kernel)
    weights: list[Tensor | None] = []
    if isinstance(made, GroupedPlan):
        weights += [call.weight for call in made.calls]
    if isinstance(made, DensePlan):
        weights += [layer.weight for layer in made._layers]
    expected = torch.zeros_like(outs[0], dtype=torch.float32)
    for part, weight in zip(outs, weights, strict=True):
        assert weight is not None
        expected += part.float() * weight[:, None]
    assert torch.equal(out, expected.bfloat16())


def test_overlapping_regions_and_raster_order() -> None:
    """Two overlapping boxes on a grid: many short runs, the sorted key order, gathered queries."""
    grid = torch.zeros(24, 24, dtype=torch.int64)
    grid[2:16, 2:16] += 1
    grid[8:22, 8:22] += 2
    table = [[1, 0, 0, 0, 1], [0, 1, 0, 1, 1], [0, 0, 1, 1, 1], [0, 1, 1, 1, 1], [1, 1, 1, 1, 1]]
    visibility = hard([*[4] * 7, *grid.flatten().tolist()], table)
    q, k, v = inputs(7 + 576, batch=1)
    made = plan(visibility, executor="grouped")
    assert isinstance(made, GroupedPlan)
    assert any(call.from_sorted for call in made.calls)
    assert any(call.queries.index is not None for call in made.calls)
    assert sum(call.queries.count for call in made.calls) == 583
    assert (made.run(q, k, v, kernel=sdpa) - formula(visibility, q, k, v)).abs().max() < 1e-12


def test_soft_rows_in_the_sorted_key_order() -> None:
    atom = torch.arange(60) % 3
    table = torch.tensor([[0, -1.0, -INF], [-INF, 0, 0.5], [1.0, -INF, 0]])
    visibility = Visibility.joint(atom, table, ("a", "b", "c"))
    made = plan(visibility, executor="grouped")
    assert isinstance(made, GroupedPlan)
    assert all(call.from_sorted for call in made.calls)
    q, k, v = inputs(60)
    assert (made.run(q, k, v, kernel=sdpa) - formula(visibility, q, k, v)).abs().max() < 1e-12


def test_one_token_classes_share_a_call() -> None:
    """Eight one-token atoms with rows of their own and a big one: two calls, exact."""
    atom = [*range(1, 9), *[0] * 200]
    sees = torch.ones(9, 9, dtype=torch.int64)
    for g in range(1, 9):
        sees[g, g % 8 + 1] = 0
    visibility = hard(atom, sees.tolist())
    made = plan(visibility, executor="grouped")
    assert isinstance(made, GroupedPlan)
    assert made.classes == 9
    assert len(made.calls) == 2
    spy = Spy()
    q, k, v = inputs(208)
    assert (made.run(q, k, v, kernel=spy) - formula(visibility, q, k, v)).abs().max() < 1e-12
    masks = [mask.shape for *_, mask, _ in spy.calls if mask is not None]
    assert masks == [(1, 1, 8, 208)]


def test_shared_calls_stay_small() -> None:
    """As many classes as tokens would share a mask of tokens x tokens; a shared call has at most 512 rows."""
    count = 700
    sees = torch.ones(count, count).fill_diagonal_(0)
    sees[:, 0] = 1
    made = plan(hard(list(range(count)), sees.tolist()), executor="grouped")
    assert isinstance(made, GroupedPlan)
    assert max(call.queries.count for call in made.calls) <= 512
    assert len(made.calls) == 2


def test_a_query_in_two_tiny_passes_is_added_twice() -> None:
    atom = torch.tensor([0, *[1] * 100])
    half = torch.tensor([0.5, 0.0])
    own = Visibility.joint(atom, torch.tensor([[0, -INF], [0, 0]]), ("a", "b"))
    other = Visibility.joint(atom, torch.tensor([[-INF, 0], [0, 0]]), ("a", "b"))
    passes = [Pass(own, half), Pass(other, half), Pass(Visibility.open(101), None)]
    passes[2] = Pass(Visibility.joint(atom, torch.zeros(2, 2), ("a", "b")), torch.tensor([0.0, 1.0]))
    q, k, v = inputs(101)
    made = plan(passes, executor="grouped")
    assert (made.run(q, k, v, kernel=sdpa) - formula(passes, q, k, v)).abs().max() < 1e-12


@pytest.mark.parametrize("executor", ["grouped", "dense"])
def test_scale_reaches_every_call(executor: str) -> None:
    visibility = random_visibility(40, 40, 4, 4, 3, soft=True, joint=True)
    q, k, v = inputs(40)
    out = plan(visibility, executor=executor).run(q, k, v, kernel=sdpa, scale=0.9)
    assert (out - formula(visibility, q, k, v, scale=0.9)).abs().max() < 1e-12
    untouched = plan(Visibility.open(40)).run(q, k, v, kernel=sdpa, scale=0.9)
    assert (untouched - formula(Visibility.open(40), q, k, v, scale=0.9)).abs().max() < 1e-12


@pytest.mark.parametrize("executor", ["grouped", "dense", "untouched"])
def test_contiguous_inputs_other_value_width_and_fewer_key_heads(executor: str) -> None:
    visibility = (
        Visibility.open(50) if executor == "untouched" else random_visibility(50, 50, 4, 4, 5, soft=False, joint=True)
    )
    q, k, v = (x.contiguous() for x in inputs(50, heads=4))
    k, v = k[:, :2], v[:, :2, :, :6].contiguous()
    out = plan(visibility, executor=executor).run(q, k, v, kernel=sdpa)
    q64, k64, v64 = q, k.repeat_interleave(2, 1), v.repeat_interleave(2, 1)
    expected = (q64 @ k64.transpose(-1, -2) * 8**-0.5 + visibility.dense(torch.float64)).softmax(-1) @ v64
    assert out.shape == (2, 4, 50, 6)
    assert (out - expected).abs().max() < 1e-12


# --- identities of the method specs --------------------------------------------------------------------------------


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


# --- what a run costs ----------------------------------------------------------------------------------------------


def test_untouched_hands_over_the_given_tensors() -> None:
    q, k, v = inputs(5)
    spy = Spy()
    made = plan(Visibility.open(5))
    out = made.run(q, k, v, kernel=spy, scale=0.3)
    ((got_q, got_k, got_v, mask, scale),) = spy.calls
    assert got_q is q
    assert got_k is k
    assert got_v is v
    assert mask is None
    assert scale == 0.3
    assert torch.equal(out, sdpa(q, k, v, scale=0.3))
    assert (made.executor, made.nbytes, made.classes, made.density) == ("untouched", 0, 1, 1.0)


def test_grouped_calls_are_unmasked_and_cost_the_density() -> None:
    visibility = hard([0] * 30 + [1] * 40 + [2] * 30, [[1, 0, 1], [0, 1, 0], [1, 0, 1]])
    spy = Spy()
    q, k, v = inputs(100)
    made = plan(visibility, executor="grouped")
    made.run(q, k, v, kernel=spy)
    assert [mask for *_, mask, _ in spy.calls] == [None, None]
    assert sum(q.shape[2] * k.shape[2] for q, k, *_ in spy.calls) == 60 * 60 + 40 * 40
    assert made.density == visibility.density() == (60 * 60 + 40 * 40) / 100**2
    assert made.classes == 2


def test_contiguous_classes_are_views() -> None:
    visibility = hard([0] * 30 + [1] * 30, [[1, 0], [1, 1]])
    spy = Spy()
    q, k, v = inputs(60)
    made = plan(visibility, executor="grouped")
    assert made.nbytes == 4 * 16, "two runs of queries and two of keys, and no index"
    made.run(q, k, v, kernel=spy)
    for got_q, got_k, got_v, *_ in spy.calls:
        for got, given_tensor in ((got_q, q), (got_k, k), (got_v, v)):
            assert got.untyped_storage().data_ptr() == given_tensor.untyped_storage().data_ptr()


def test_classes_with_the_same_keys_gather_them_once() -> None:
    """Also when a class with other keys lies between them in size."""
    table = torch.tensor([[0, 1.0, -INF], [0, 2.0, -INF], [0, -INF, 0.0]])
    atom = torch.tensor([0, 1, 1, 1, 2, 2] * 15)
    visibility = Visibility.joint(atom, table, ("a", "b", "c"))
    spy = Spy()
    q, k, v = inputs(90)
    out = plan(visibility, executor="grouped").run(q, k, v, kernel=spy)
    of_both = [key for _, key, *_ in spy.calls if key.shape[2] == 60]
    assert len(of_both) == 2
    assert of_both[0] is of_both[1]
    assert (out - formula(visibility, q, k, v)).abs().max() < 1e-12


def test_soft_rows_take_one_bias_per_key() -> None:
    visibility = Visibility.joint(
        torch.tensor([0] * 50 + [1] * 50), torch.tensor([[0.0, -0.5], [-0.5, 0.0]]), ("a", "b")
    )
    spy = Spy()
    plan(visibility, executor="grouped").run(*inputs(100, dtype=torch.float32), kernel=spy)
    assert [mask.shape for *_, mask, _ in spy.calls if mask is not None] == [(1, 1, 1, 100)] * 2


class LargestTensor(TorchDispatchMode):
    """Remembers the largest tensor that any operation makes."""

    def __init__(self) -> None:
        super().__init__()
        self.numel = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = func(*args, **(kwargs or {}))
        for one in out if isinstance(out, (tuple, list)) else (out,):
            if isinstance(one, Tensor):
                self.numel = max(self.numel, one.numel())
        return out


def test_grouped_makes_nothing_of_tokens_times_tokens() -> None:
    """Law 7, planning and running: no tensor beyond G x T or B x H x T x D."""
    visibility = benchmarks.lamic(2200, [(0.1, 0.1, 0.5, 0.9), (0.5, 0.1, 0.9, 0.9)], isolate_regions=True)
    tokens = visibility.query_atom.numel()
    q, k, v = inputs(tokens, batch=1, heads=1, dtype=torch.float32)
    with LargestTensor() as seen:
        plan(visibility, executor="grouped").run(q, k, v, kernel=sdpa)
    assert seen.numel <= 16 * tokens < tokens**2 / 80


@pytest.mark.parametrize("executor", ["grouped", "dense"])
@pytest.mark.parametrize("tokens", [1000, 8000])
def test_plan_bytes_grow_with_tokens_only(executor: str, tokens: int) -> None:
    """lamic.md (a) 7: a plan holds at most five numbers a token and pass, and its tables."""
    visibility = benchmarks.lamic(tokens, [(0, 0, 0.6, 0.6), (0.3, 0.3, 1, 1)], isolate_regions=False)
    count, groups = visibility.query_atom.numel(), len(visibility.query_names)
    passes = [Pass(visibility, torch.full((groups,), 0.5)), Pass(Visibility.open(count), torch.tensor([0.5]))]
    assert 0 < plan(visibility, executor=executor).nbytes <= 8 * count * 3 + groups**2 * 8
    assert plan(passes, executor=executor).nbytes <= 8 * count * 5 + groups**2 * 8


def test_dense_mask_is_made_once_per_dtype_and_aligned() -> None:
    visibility = random_visibility(21, 21, 4, 4, 2, soft=True, joint=True)
    made = plan(visibility, executor="dense")
    before = made.nbytes
    spy = Spy()
    for dtype in (torch.float32, torch.float32, torch.bfloat16):
        made.run(*inputs(21, dtype=dtype), kernel=spy)
    masks = [mask for *_, mask, _ in spy.calls]
    assert masks[0] is masks[1]
    assert masks[2] is not None
    assert masks[2].dtype == torch.bfloat16
    assert masks[2].stride(2) % 8 == 0
    assert made.nbytes == before
    moved = made.to("cpu")
    assert isinstance(moved, DensePlan)
    assert not moved._masks
    assert torch.equal(masks[0][0, 0], visibility.dense())  # type: ignore[index]


@pytest.mark.parametrize("executor", ["grouped", "dense", "untouched"])
def test_compiles_as_one_graph(executor: str) -> None:
    """No branching on data and no waiting for the device: full graph with the eager backend."""
    visibility = (
        Visibility.open(60) if executor == "untouched" else random_visibility(60, 60, 4, 4, 7, soft=True, joint=True)
    )
    made = plan(visibility, executor=executor)
    torch._dynamo.reset()

    @torch.compile(backend="eager", fullgraph=True)
    def run(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        return made.run(q, k, v, kernel=sdpa)

    q, k, v = inputs(60)
    assert (run(q, k, v) - formula(visibility, q, k, v)).abs().max() < 1e-12
    assert not isinstance(made, DensePlan) or not made._masks


@pytest.mark.parametrize("executor", ["grouped", "dense", "untouched"])
def test_plans_move_with_all_their_tensors(executor: str) -> None:
    visibility = (
        Visibility.open(40) if executor == "untouched" else random_visibility(40, 40, 4, 4, 7, soft=True, joint=True)
    )
    names = visibility.query_names
    passes = [Pass(visibility, torch.full((len(names),), 0.5)), Pass(visibility, torch.full((len(names),), 0.5))]
    passes[1] = Pass(Visibility.open(40), torch.tensor([0.5]))
    made = plan(passes, executor=executor)
    meta = made.to("meta")
    assert (meta.executor, meta.nbytes) == (made.executor, made.nbytes)
    assert {t.device.type for t in _tensors(meta)} <= {"meta"}
    assert {t.device.type for t in _tensors(made)} <= {"cpu"}
    q, k, v = (x.to("meta") for x in inputs(40))
    assert meta.run(q, k, v, kernel=sdpa).shape == q.shape
    assert plan(passes, executor=executor, device="meta").run(q, k, v, kernel=sdpa).device.type == "meta"


def _tensors(value: Any) -> list[Tensor]:
    """All tensors held by a plan."""
    if isinstance(value, Tensor):
        return [value]
    if isinstance(value, (tuple, list)):
        return [t for one in value for t in _tensors(one)]
    if isinstance(value, ExecutionPlan) or hasattr(value, "__dataclass_fields__"):
        return [t for one in vars(value).values() for t in _tensors(one)]
    return []


# --- choosing ------------------------------------------------------------------------------------------------------


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
    with pytest.raises(PlanError, match=r"'flash'.*auto, untouched, grouped, dense"):
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


# --- token sets ----------------------------------------------------------------------------------------------------


def test_runs_and_indices() -> None:
    assert find_runs(torch.tensor([3, 4, 5, 9, 0, 1])) == ((3, 3), (9, 1), (0, 2))
    assert find_runs(torch.tensor([], dtype=torch.int64)) == ()
    few, many = token_set(torch.tensor([1, 2, 5])), token_set(torch.arange(0, 40, 2))
    assert (few.count, few.runs, few.index, few.nbytes) == (3, ((1, 2), (5, 1)), None, 32)
    assert many.runs == ()
    assert many.nbytes == 8 * 20


@pytest.mark.parametrize("tokens", [[2, 3, 4], [0, 1, 5, 7], list(range(0, 40, 2))])
def test_put_undoes_take(tokens: list[int]) -> None:
    chosen = token_set(torch.tensor(tokens))
    for x in (inputs(40)[0], inputs(40)[0].contiguous()):
        taken = chosen.take(x)
        assert torch.equal(taken, x[:, :, tokens])
        out = torch.zeros_like(x)
        chosen.put(out, taken)
        chosen.put(out, taken, add=True)
        expected = torch.zeros_like(x)
        expected[:, :, tokens] = 2 * x[:, :, tokens]
        assert torch.equal(out, expected)


@pytest.mark.parametrize("tokens", [[0, 1, 5], list(range(0, 40, 2))])
@pytest.mark.parametrize("add", [True, False])
def test_put_casts_to_the_output(tokens: list[int], add: bool) -> None:
    out = torch.zeros(2, 2, 40, 8, dtype=torch.float64)
    values = torch.ones(2, 2, len(tokens), 8, dtype=torch.bfloat16)
    token_set(torch.tensor(tokens)).put(out, values, add=add)
    assert out.sum() == values.numel()


def test_keys_are_sorted_by_who_sees_them_and_keep_their_order() -> None:
    """Class a sees 0 and 2, b sees 1 and 2; a is larger: its keys come first, the shared ones in the middle."""
    sees = torch.tensor([[1, 0, 1], [0, 1, 1], [1, 0, 1]])
    terms = build_terms([Pass(hard([0, 1, 2, 0, 1, 2, 0], sees.tolist()))])
    assert sort_keys(terms).tolist() == [2, 5, 0, 3, 6, 1, 4]


def test_row_bias_looks_rows_up() -> None:
    rows = torch.tensor([[0.0, -INF], [1.0, 2.0]])
    bias = row_bias(rows, torch.tensor([1, 0, 1]), torch.tensor([1, 0, 1]), torch.float64)
    assert bias.tolist() == [[[[2.0, 1.0, 2.0], [-INF, 0.0, -INF], [2.0, 1.0, 2.0]]]]
    assert row_bias(rows[1:], None, torch.tensor([1, 0]), torch.float32).tolist() == [[[[2.0, 1.0]]]]


# --- bench ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("isolate", [True, False])
def test_bench_cases_have_the_pairs_of_the_closed_formula(isolate: bool) -> None:
    """lamic.md section 6, formulas for disjoint regions."""
    visibility = benchmarks.lamic(1000, [(0, 0, 0.4, 1), (0.5, 0.2, 0.9, 1)], isolate_regions=isolate)
    n = dict(zip(visibility.query_names, visibility.query_counts.tolist(), strict=True))
    total, hubs = sum(n.values()), n["C"] + n["P"]
    noise = n["R0"] + n["R1"] + n["U"]
    pairs = 0
    for i in "01":
        own = n["S" + i] + n["F" + i]
        pairs += own * (own + n["R" + i] + hubs)
        pairs += n["R" + i] * (own + (n["R" + i] + n["P"] if isolate else noise + hubs))
    if isolate:
        texts = n["S0"] + n["S1"] + n["F0"] + n["F1"]
        pairs += n["U"] * (n["U"] + n["P"]) + n["C"] * (texts + hubs) + n["P"] * total
    else:
        pairs += n["U"] * (noise + hubs) + hubs * total
    assert visibility.density() == pytest.approx(pairs / total**2, rel=1e-12)
    assert torch.equal(visibility.log_weight, visibility.log_weight.T)


def test_bench_reports_its_rows_and_leaves_the_global_generator_alone() -> None:
    before = torch.get_rng_state()
    result = benchmarks.bench_execute(tokens=600, repeats=1)
    assert torch.equal(torch.get_rng_state(), before)
    assert result["suite"] == "execute"
    assert [row["case"] for row in result["rows"]] == list(benchmarks.CASES)
    for row in result["rows"]:
        assert row["max_err"] < 1e-5
        assert 0 < row["density"] < 1
        assert row["plan_bytes"] <= 8 * row["tokens"] * 3 + 17**2 * 8
        assert min(row["ours_s"], row["unmasked_s"], row["dense_s"]) > 0


def test_full_size_case_is_flux_with_four_references() -> None:
    visibility = benchmarks.CASES["four references, phase A"](8704)
    assert visibility.query_atom.numel() == 4096 + 4 * 1024 + 512
    assert visibility.density() < 0.35


def test_bench_error_is_the_distance_to_the_formula() -> None:
    visibility = random_visibility(40, 40, 4, 4, 0, soft=True, joint=True)
    q, k, v = inputs(40)
    expected = formula(visibility, q, k, v)
    wrong = expected.clone()
    wrong[0, 0, 39, 0] += 0.25
    assert benchmarks._error(expected, visibility, q, k, v) < 1e-12
    assert benchmarks._error(wrong, visibility, q, k, v) == pytest.approx(0.25, abs=1e-12)
