"""Sets of tokens and biases made from rows."""

from __future__ import annotations

import pytest
import torch
from execute_tools import INF, hard, inputs

from attnctrl.execute import Pass
from attnctrl.execute.grouped import sort_keys
from attnctrl.execute.terms import build_terms
from attnctrl.execute.tokens import find_runs, row_bias, token_set


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
