"""What a run costs: the calls it makes, the memory it takes, that it compiles; nothing is tokens x tokens."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from execute_tools import INF, LargestTensor, Spy, formula, hard, inputs, random_visibility
from torch import Tensor

from attnctrl.execute import ExecutionPlan, Pass, plan, sdpa
from attnctrl.execute import bench as benchmarks
from attnctrl.execute.dense import DensePlan
from attnctrl.visibility import Visibility


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
