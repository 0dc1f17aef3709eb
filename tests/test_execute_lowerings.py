"""Packed, block-sparse and merged lowerings equal the dense float64 formula, with masks of the model merged in."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import pytest
import torch
from execute_tools import INF, Spy, formula, hard, inputs, random_visibility
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from attnctrl.errors import PlanError
from attnctrl.execute import ExecutionPlan, Pass, plan, sdpa
from attnctrl.visibility import Visibility

pytestmark = pytest.mark.filterwarnings("ignore:flex_attention called without torch.compile")

LOWERINGS = ("bias", "lse", "varlen", "dense")


def made_by(lowering: str, passes: Any) -> ExecutionPlan:
    if lowering in ("bias", "lse"):
        return plan(passes, executor="grouped", soft=lowering)
    return plan(passes, executor=lowering)


def masked_formula(passes: Sequence[Pass], q: Tensor, k: Tensor, v: Tensor, mask: Tensor) -> Tensor:
    """`formula` with a model's additive mask on top of every pass."""
    total = torch.zeros(*q.shape[:3], v.shape[-1], dtype=torch.float64)
    for one in passes:
        scores = q.double() @ k.double().mT * q.shape[-1] ** -0.5 + one.visibility.dense(torch.float64) + mask.double()
        out = scores.softmax(-1) @ v.double()
        weight = 1.0 if one.weight is None else one.weight.double()[one.visibility.query_atom][:, None]
        total += out * weight
    return total


def mix(visibility: Visibility) -> list[Pass]:
    """The visibility on a quarter, open attention on the rest, except for the last atom: it is all the visibility's."""
    share = torch.full((len(visibility.query_names),), 0.25)
    share[-1] = 1
    opened = Visibility(
        visibility.query_atom,
        visibility.key_atom,
        torch.zeros_like(visibility.log_weight),
        visibility.query_names,
        visibility.key_names,
    )
    return [Pass(visibility, share), Pass(opened, 1 - share)]


@settings(max_examples=40)
@given(
    sizes=st.tuples(st.integers(1, 40), st.integers(1, 40)),
    groups=st.tuples(st.integers(1, 6), st.integers(1, 6)),
    seed=st.integers(0, 2**16),
    soft=st.booleans(),
    joint=st.booleans(),
    mixed=st.booleans(),
)
def test_every_lowering_equals_the_dense_formula(
    sizes: tuple[int, int], groups: tuple[int, int], seed: int, soft: bool, joint: bool, mixed: bool
) -> None:
    """lamic.md (a) 2: random atoms, empty ones and ones of one token among them; several passes; two batch entries."""
    visibility = random_visibility(*sizes, *groups, seed, soft=soft, joint=joint)
    passes = mix(visibility) if mixed else [Pass(visibility)]
    q, k, v = inputs(sizes[0], sizes[0] if joint else sizes[1], seed=seed)
    expected = formula(passes, q, k, v)
    for lowering in LOWERINGS:
        out = made_by(lowering, passes).run(q, k, v, kernel=sdpa)
        assert (out - expected).abs().max() < 1e-12, lowering


@settings(max_examples=4)
@given(seed=st.integers(0, 2**16), soft=st.booleans(), joint=st.booleans(), mixed=st.booleans())
def test_flex_equals_the_dense_formula(seed: int, soft: bool, joint: bool, mixed: bool) -> None:
    """More than one block of 128, the last one cut off."""
    visibility = random_visibility(300, 150, 5, 4, seed, soft=soft, joint=joint)
    passes = mix(visibility) if mixed else [Pass(visibility)]
    q, k, v = inputs(300, 300 if joint else 150, batch=1, seed=seed)
    out = plan(passes, executor="flex").run(q, k, v, kernel=sdpa)
    assert (out - formula(passes, q, k, v)).abs().max() < 1e-12


@pytest.mark.parametrize("lowering", [*LOWERINGS, "flex"])
def test_overlapping_boxes_in_raster_order(lowering: str) -> None:
    """A text, two overlapping boxes with a cell of their own, and an atom that no token has."""
    grid = torch.zeros(24, 24, dtype=torch.int64)
    grid[2:16, 2:16] += 1
    grid[8:22, 8:22] += 2
    sees = torch.tensor(
        [[1, 0, 0, 0, 1, 1], [0, 1, 0, 1, 1, 1], [0, 0, 1, 1, 1, 0], [0, 1, 1, 1, 1, 0], [1] * 6, [0, 0, 0, 0, 0, 1]]
    )
    table = torch.where(sees > 0, 0.0, -INF)
    table[1, 3] = -1.5
    names = ("free", "left", "right", "both", "text", "empty")
    visibility = Visibility.joint(torch.tensor([*[4] * 7, *grid.flatten().tolist()]), table, names)
    q, k, v = inputs(7 + 576, batch=1)
    out = made_by(lowering, visibility).run(q, k, v, kernel=sdpa)
    assert (out - formula(visibility, q, k, v)).abs().max() < 1e-12


@pytest.mark.parametrize("lowering", ["lse", "varlen", "flex"])
@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float32, 1e-5), (torch.bfloat16, 2e-2), (torch.float16, 2e-3)])
def test_lower_precisions(lowering: str, dtype: torch.dtype, tolerance: float) -> None:
    visibility = random_visibility(300, 300, 6, 6, 1, soft=True, joint=True)
    q, k, v = inputs(300, dtype=dtype)
    for passes in ([Pass(visibility)], mix(visibility)):
        out = made_by(lowering, passes).run(q, k, v, kernel=sdpa)
        assert out.dtype == dtype
        assert (out.double() - formula(passes, q, k, v)).abs().max() < tolerance


@pytest.mark.parametrize("lowering", ["lse", "varlen", "flex"])
@pytest.mark.parametrize("width", [8, 6])
@pytest.mark.parametrize("soft", [True, False])
def test_fewer_key_heads_other_value_width_and_scale(lowering: str, width: int, soft: bool) -> None:
    visibility = random_visibility(50, 50, 4, 4, 5, soft=soft, joint=True)
    q, k, v = (x.contiguous() for x in inputs(50, heads=4))
    k, v = k[:, :2], v[:, :2, :, :width].contiguous()
    out = made_by(lowering, visibility).run(q, k, v, kernel=sdpa, scale=0.7)
    scores = q @ k.repeat_interleave(2, 1).mT * 0.7 + visibility.dense(torch.float64)
    assert out.shape == (2, 4, 50, width)
    assert (out - scores.softmax(-1) @ v.repeat_interleave(2, 1)).abs().max() < 1e-12


@pytest.mark.parametrize("lowering", [*LOWERINGS, "flex"])
@pytest.mark.parametrize("soft", [True, False])
def test_gradients_equal_those_of_the_formula(lowering: str, soft: bool) -> None:
    visibility = random_visibility(40, 40, 5, 5, 11, soft=soft, joint=True)
    passes = mix(visibility)
    made = made_by(lowering, passes)
    ours, theirs = (
        torch.autograd.grad(run(*leaves).square().sum(), leaves)
        for run, leaves in (
            (lambda q, k, v: made.run(q, k, v, kernel=sdpa), [x.clone().requires_grad_() for x in inputs(40)]),
            (lambda q, k, v: formula(passes, q, k, v), [x.clone().requires_grad_() for x in inputs(40)]),
        )
    )
    for mine, reference in zip(ours, theirs, strict=True):
        assert (mine - reference).abs().max() < 1e-11


@pytest.mark.parametrize("lowering", ["lse", "varlen", "flex"])
def test_invisible_keys_have_no_influence(lowering: str) -> None:
    """Huge values behind invisible keys change no bit of the output."""
    visibility = hard([0, 0, 1, 1, 1, 2, 2, 3], [[1, 0, 0, 1], [0, 1, 0, 1], [1, 1, 1, 0], [0, 1, 1, 1]])
    made = made_by(lowering, visibility)
    q, k, v = inputs(8, batch=1)
    before = made.run(q, k, v, kernel=sdpa)
    sees = visibility.dense().isfinite()
    for token in range(8):
        key, value = k.clone(), v.clone()
        key[:, :, token], value[:, :, token] = 1e3, 1e6
        same = (made.run(q, key, value, kernel=sdpa) == before).all(-1).all(1)[0]
        assert torch.equal(same, ~sees[:, token])


# --- masks of the model --------------------------------------------------------------------------------------------


def model_mask(kind: str, tokens: int) -> Tensor:
    """Key padding of the second sample, or a random mask; the last eight keys stay visible."""
    generator = torch.Generator().manual_seed(0)
    padding = torch.ones(2, 1, 1, tokens, dtype=torch.bool)
    padding[1, ..., 3 : tokens // 2] = False
    random = torch.rand(2, 2, tokens, tokens, generator=generator) > 0.3
    random[..., -8:] = True
    return {
        "padding": padding,
        "bool": random,
        "additive": torch.randn(1, 2, tokens, tokens, generator=generator),
        "queries and keys": random[0, 0],
    }[kind]


@pytest.mark.parametrize("lowering", [*LOWERINGS, "flex", "untouched"])
@pytest.mark.parametrize("kind", ["padding", "bool", "additive", "queries and keys"])
def test_masks_of_the_model_are_merged(lowering: str, kind: str) -> None:
    tokens = 60
    visibility = random_visibility(tokens, tokens, 4, 4, 2, soft=True, joint=True)
    visibility.log_weight[:, visibility.key_atom[-8:]] = 0.5
    passes = [Pass(Visibility.open(tokens))] if lowering == "untouched" else mix(visibility)
    mask = model_mask(kind, tokens)
    bias = torch.zeros(mask.shape).masked_fill(~mask, -INF) if mask.dtype == torch.bool else mask
    q, k, v = inputs(tokens)
    out = made_by(lowering, passes).run(q, k, v, kernel=sdpa, mask=mask)
    assert (out - masked_formula(passes, q, k, v, bias)).abs().max() < 1e-12


def test_masks_follow_the_sorted_key_order() -> None:
    """Hard classes whose keys lie in many runs get their part of the mask in the order they read the keys."""
    atom = (torch.arange(90) % 3).tolist()
    visibility = hard(atom, [[1, 1, 0], [0, 1, 1], [1, 0, 1]])
    q, k, v = inputs(90)
    mask = torch.randn(2, 1, 90, 90, generator=torch.Generator().manual_seed(1))
    spy = Spy()
    out = plan(visibility, executor="grouped").run(q, k, v, kernel=spy, mask=mask)
    assert {one.shape[-1] for *_, one, _ in spy.calls if one is not None} == {60}
    assert (out - masked_formula([Pass(visibility)], q, k, v, mask)).abs().max() < 1e-12


# --- soft rows without a mask --------------------------------------------------------------------------------------


def test_levels_call_no_masked_kernel_and_record_no_gradients() -> None:
    atom = torch.arange(200) // 50
    table = torch.tensor([[0, -1.0, -INF, 0.5], [-INF, 0, 0.5, 0.5], [0, 0, 0, 0], [1.0, -INF, 0, -2.0]])
    visibility = Visibility.joint(atom, table, ("a", "b", "c", "d"))
    made = plan(visibility, executor="grouped", soft="lse")
    assert not made.needs_mask
    assert made.explain().endswith("; 3 soft classes merged from unmasked calls")
    spy = Spy()
    q, k, v = inputs(200)
    out = made.run(q, k, v, kernel=spy)
    assert [mask for *_, mask, _ in spy.calls] == [None], "only the hard class uses the given kernel"
    assert (out - formula(visibility, q, k, v)).abs().max() < 1e-12
    made.run(q.requires_grad_(), k, v, kernel=spy)
    assert len(spy.calls) == 1 + 4, "with gradients every class does"


def test_levels_scattered_over_the_sequence_read_runs_of_sorted_keys() -> None:
    """The class sees a contiguous stretch, but its two levels alternate there."""
    atom = torch.tensor([0] * 40 + [1, 2] * 30)
    visibility = Visibility.joint(
        atom, torch.tensor([[0, 0, 0], [-INF, 0, 1.0], [-INF, 1.0, 0]]), ("text", "even", "odd")
    )
    made = plan(visibility, executor="grouped", soft="lse")
    assert all(one.index is None for call in made.calls if call.levels for one in call.levels.keys)  # type: ignore[attr-defined]
    q, k, v = inputs(100)
    assert (made.run(q, k, v, kernel=sdpa) - formula(visibility, q, k, v)).abs().max() < 1e-12


def test_extreme_log_weights_do_not_overflow() -> None:
    atom = torch.arange(60) // 20
    table = torch.tensor([[0, 80.0, -80.0], [-300.0, 0, 0], [1024.0, 1016.0, -1000.0]])
    visibility = Visibility.joint(atom, table, ("a", "b", "c"))
    q, k, v = inputs(60, dtype=torch.bfloat16)
    for lowering in ("lse", "varlen"):
        out = made_by(lowering, visibility).run(q, k, v, kernel=sdpa)
        assert (out.double() - formula(visibility, q, k, v)).abs().max() < 2e-2


def test_wrong_ways_of_soft_rows_are_refused() -> None:
    with pytest.raises(PlanError, match="'exact'; choose one of auto, bias, lse"):
        plan(Visibility.open(3), soft="exact")


# --- what plans hold, and compilation ------------------------------------------------------------------------------


@pytest.mark.parametrize("lowering", ["lse", "varlen", "flex"])
def test_plans_move_with_all_their_tensors(lowering: str) -> None:
    visibility = random_visibility(40, 40, 4, 4, 7, soft=True, joint=True)
    made = made_by(lowering, mix(visibility))
    meta = made.to("meta")
    assert (meta.executor, meta.nbytes) == (made.executor, made.nbytes)
    q, k, v = inputs(40)
    if lowering != "flex":
        out = meta.run(*(x.to("meta") for x in (q, k, v)), kernel=sdpa)
        assert (out.device.type, out.shape) == ("meta", q.shape)
    assert (made.run(q, k, v, kernel=sdpa) - formula(mix(visibility), q, k, v)).abs().max() < 1e-12


@pytest.mark.parametrize("lowering", ["lse", "varlen", "flex"])
@pytest.mark.parametrize("soft", [True, False])
def test_compiles_as_one_graph(lowering: str, soft: bool) -> None:
    visibility = random_visibility(60, 60, 4, 4, 7, soft=soft, joint=True)
    made = made_by(lowering, visibility)
    torch._dynamo.reset()

    @torch.compile(backend="eager", fullgraph=True)
    def run(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        return made.run(q, k, v, kernel=sdpa)

    q, k, v = inputs(60)
    assert (run(q, k, v) - formula(visibility, q, k, v)).abs().max() < 1e-12
