"""Every executor equals the dense float64 formula."""

from __future__ import annotations

import pytest
import torch
from execute_tools import EXACT, INF, Spy, formula, hard, inputs, random_visibility
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from attnctrl.execute import Pass, plan, sdpa
from attnctrl.execute.dense import DensePlan
from attnctrl.execute.grouped import GroupedPlan
from attnctrl.visibility import Visibility


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
