"""Acts: rows with plans of their own, masks of the model, and what plans may count on."""

from __future__ import annotations

import pytest
import torch
from execute_tools import INF, Spy, formula, inputs, random_visibility
from torch import Tensor

from attnctrl.act import Act
from attnctrl.content import States, changed
from attnctrl.errors import PlanError
from attnctrl.execute import plan, sdpa
from attnctrl.metrics.memory import peak_bytes
from attnctrl.variants import RowSet, row_set
from attnctrl.visibility import Visibility

TOKENS = 40


def visibilities() -> list[Visibility]:
    return [random_visibility(TOKENS, TOKENS, 4, 4, seed, soft=True, joint=True) for seed in (0, 1)]


def act() -> Act:
    """Rows 2 and 0 have plans, row 1 has none."""
    first, second = (plan(one, executor=name) for one, name in zip(visibilities(), ("grouped", "varlen"), strict=True))
    return Act([(torch.tensor([2]), first), (torch.tensor([1]), None), (torch.tensor([0]), second)], (TOKENS, TOKENS))


def expected(q: Tensor, k: Tensor, v: Tensor, bias: Tensor) -> Tensor:
    first, second = (one.dense(torch.float64) for one in visibilities())
    tables = torch.stack([second, torch.zeros_like(first), first])[:, None]
    return (q @ k.mT * q.shape[-1] ** -0.5 + tables + bias).softmax(-1) @ v


def test_rows_have_plans_of_their_own() -> None:
    q, k, v = inputs(TOKENS, batch=3)
    out = act().run(q, k, v, None, sdpa, None)
    assert (out - expected(q, k, v, torch.zeros(()))).abs().max() < 1e-12
    assert (out[2:] - formula(visibilities()[0], q[2:], k[2:], v[2:])).abs().max() < 1e-12


def test_rows_that_follow_each_other_are_views_and_contents_see_one_set_at_a_time() -> None:
    spy, met = Spy(), []
    q, k, v = inputs(TOKENS, batch=4)

    class Twice:
        def __call__(self, own: States, batch: States, rows: Tensor) -> States:
            met.append(rows.tolist())
            assert [torch.equal(mine, whole[rows]) for mine, whole in zip(own, batch, strict=True)] == [True] * 3
            return own._replace(key=own.key * 2)

    parts: list[RowSet] = [row_set([1, 2], q.device), row_set([0, 3], q.device)]
    out = Act(
        [(rows, None) for rows in parts], (TOKENS, TOKENS), contents=[(parts[0], (Twice(),)), (parts[1], ())]
    ).run(q, k, v, None, spy, None)
    assert met == [[1, 2]]
    (first_q, first_k, first_v, *_), (second_q, *_) = spy.calls
    assert first_q.untyped_storage().data_ptr() == q.untyped_storage().data_ptr()
    assert second_q.untyped_storage().data_ptr() != q.untyped_storage().data_ptr()
    assert first_v.untyped_storage().data_ptr() == v.untyped_storage().data_ptr()
    assert torch.equal(first_k, k[1:3] * 2)
    doubled = k * torch.tensor([1.0, 2, 2, 1], dtype=k.dtype).view(4, 1, 1, 1)
    assert torch.equal(out, sdpa(q, doubled, v))


def test_states_of_many_sets_of_rows_are_copied_once_and_nothing_given_is_written_to() -> None:
    given = States(*inputs(TOKENS, batch=8))
    before = [one.clone() for one in given]

    class Twice:
        def __call__(self, own: States, batch: States, rows: Tensor) -> States:
            return own._replace(key=own.key * 2)

    contents = [(row_set(rows, given.key.device), (Twice(),)) for rows in ([0], [1], [2, 3], [4, 5], [6])]
    found = changed(contents, given)
    assert found.query is given.query
    assert found.value is given.value
    assert torch.equal(found.key[:7], given.key[:7] * 2)
    assert torch.equal(found.key[7], given.key[7])
    assert all(torch.equal(one, old) for one, old in zip(given, before, strict=True))
    assert peak_bytes(lambda: changed(contents, given)) < 1.6 * given.key.nbytes


@pytest.mark.parametrize("shape", [(3, 1, 1, TOKENS), (1, 2, TOKENS, TOKENS), (3, TOKENS), (TOKENS, TOKENS)])
@pytest.mark.parametrize("kind", ["bool", "additive"])
def test_masks_of_the_model_follow_their_rows(shape: tuple[int, ...], kind: str) -> None:
    """[B, Tk] is key padding, as Diffusers' backends read it."""
    mask = torch.randn(shape, generator=torch.Generator().manual_seed(0))
    bias = mask.double()
    if kind == "bool":
        mask = mask > -1
        # every query of these layouts keeps a key
        mask[..., [int(one.log_weight.isfinite().all(0)[one.key_atom].nonzero()[0]) for one in visibilities()]] = True
        bias = torch.zeros(shape, dtype=torch.float64).masked_fill(~mask, -INF)
    if shape == (3, TOKENS):
        bias = bias[:, None, None]
    q, k, v = inputs(TOKENS, batch=3)
    out = act().run(q, k, v, mask, sdpa, None)
    assert (out - expected(q, k, v, bias)).abs().max() < 1e-12


def test_rows_without_a_plan_get_the_mask_as_a_bias() -> None:
    """Backends read boolean masks in different ways."""
    spy = Spy()
    q, k, v = inputs(TOKENS, batch=3, dtype=torch.float32)
    act().run(q, k, v, torch.ones(TOKENS, TOKENS, dtype=torch.bool), spy, None)
    assert all(mask is not None and mask.dtype == torch.float32 and mask.ndim == 4 for *_, mask, _ in spy.calls)


@pytest.mark.parametrize("shape", [(2, 1, 1, TOKENS), (3, 1, TOKENS - 1, TOKENS), (3, 1, 1, TOKENS - 1)])
def test_masks_of_other_tokens_are_refused(shape: tuple[int, ...]) -> None:
    q, k, v = inputs(TOKENS, batch=3)
    with pytest.raises(PlanError, match=r"3 rows, 40 queries and 40 keys.*appended texts"):
        act().run(q, k, v, torch.zeros(shape), sdpa, None)


def test_a_batch_that_was_split_is_refused() -> None:
    q, k, v = inputs(TOKENS, batch=2)
    with pytest.raises(PlanError, match=r"tells 3 rows.*got 2.*Leave this layer out"):
        act().run(q, k, v, None, sdpa, None)


def test_acts_say_which_executors_they_use_and_whether_a_mask_is_needed() -> None:
    assert act().executors == ("grouped", "varlen")
    assert act().needs_mask
    hard = random_visibility(TOKENS, TOKENS, 2, 2, 0, soft=False, joint=True)
    assert not Act([(None, plan(hard, executor="varlen"))], (TOKENS, TOKENS)).needs_mask
    assert Act([(None, plan(hard, executor="dense"))], (TOKENS, TOKENS)).needs_mask
