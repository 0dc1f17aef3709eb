"""Visibility: the mask as atoms and a table, its composition, its validation and its reachability report."""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor

from attnctrl.errors import PlanError
from attnctrl.visibility import Visibility, combine_atoms, compose

INF = float("inf")


def two_regions() -> Visibility:
    """text reads all; region 1 and region 2 read themselves and the text; nobody else reads region 2 directly."""
    table = torch.tensor([[0, 0, 0], [0, 0, -INF], [0, -INF, 0]])
    return Visibility.joint(torch.tensor([0, 1, 1, 2]), table, ("text", "region 1", "region 2"))


def test_dense_looks_every_pair_up_in_the_table() -> None:
    table = torch.tensor([[0.0, -INF], [math.log(2), -1.0]])
    v = Visibility.joint(torch.tensor([1, 0, 1]), table, ("a", "b"))
    log2 = float(torch.tensor(math.log(2)))
    expected = torch.tensor([[-1.0, log2, -1.0], [-INF, 0.0, -INF], [-1.0, log2, -1.0]], dtype=torch.float64)
    assert torch.equal(v.dense(torch.float64), expected)
    assert v.dense(torch.float64).dtype == torch.float64


def test_cross_attention_has_its_own_key_atoms() -> None:
    v = Visibility(
        torch.tensor([0, 1]), torch.tensor([1, 0, 1]), torch.tensor([[0, -INF], [-INF, 0]]), ("q", "r"), ("k", "l")
    )
    assert not v.is_joint
    assert torch.equal(v.dense(), torch.tensor([[-INF, 0, -INF], [0, -INF, 0]]))
    assert v.density() == 3 / 6
    assert v.nbytes == 8 * 2 + 8 * 3 + 4 * 4


def test_joint_visibility_counts_its_atoms_once_in_nbytes() -> None:
    v = two_regions()
    assert v.is_joint
    assert v.nbytes == 8 * 4 + 4 * 9
    moved = v.to("cpu")
    assert moved.is_joint
    assert torch.equal(moved.dense(), v.dense())


def test_density_counts_token_pairs_not_atoms() -> None:
    assert two_regions().density() == (16 - 2 * 2 * 1) / 16


def test_open_sees_everything() -> None:
    v = Visibility.open(3)
    assert torch.equal(v.dense(), torch.zeros(3, 3))
    assert v.is_open
    assert v.density() == 1.0


def test_is_open_looks_at_occurring_atoms_only() -> None:
    table = torch.tensor([[0.5, 0.5, -INF], [-2.0, -2.0, 0], [0, -INF, -INF]])
    assert Visibility.joint(torch.tensor([0, 1]), table, ("a", "b", "empty")).is_open
    assert not Visibility.joint(torch.tensor([0, 1, 2]), table, ("a", "b", "c")).is_open
    unequal = torch.tensor([[0.0, 1.0], [0.0, 0.0]])
    assert not Visibility.joint(torch.tensor([0, 1]), unequal, ("a", "b")).is_open
    blind = torch.full((1, 1), -INF)
    assert not Visibility.joint(torch.tensor([0]), blind, ("a",)).is_open


@pytest.mark.parametrize(
    ("atom", "table", "names", "said"),
    [
        (torch.tensor([0, 2]), torch.zeros(2, 2), ("a", "b"), r"\[0, 2\).*0\.\.2"),
        (torch.tensor([0, -1]), torch.zeros(2, 2), ("a", "b"), r"-1\.\.0"),
        (torch.tensor([0.0]), torch.zeros(1, 1), ("a",), "int64"),
        (torch.tensor([[0]]), torch.zeros(1, 1), ("a",), "int64"),
        (torch.tensor([0]), torch.zeros(2, 1), ("a",), r"\(2, 1\)"),
        (torch.tensor([0]), torch.full((1, 1), INF), ("a",), r"\+inf"),
        (torch.tensor([0]), torch.full((1, 1), float("nan")), ("a",), "NaN"),
    ],
)
def test_malformed_visibilities_are_refused(atom: Tensor, table: Tensor, names: tuple[str, ...], said: str) -> None:
    with pytest.raises(PlanError, match=said):
        Visibility.joint(atom, table, names)


def test_wrong_key_atoms_are_refused() -> None:
    with pytest.raises(PlanError, match="key_atom"):
        Visibility(torch.tensor([0]), torch.tensor([1]), torch.zeros(1, 1), ("q",), ("k",))
    with pytest.raises(PlanError, match="float64"):
        Visibility(torch.tensor([0]), torch.tensor([0]), torch.zeros(1, 1).double(), ("q",), ("k",))


def test_compose_adds_log_weights_of_the_dense_masks() -> None:
    generator = torch.Generator().manual_seed(0)
    parts = []
    for groups in (2, 3, 4):
        table = torch.randn(groups, groups, generator=generator)
        table[torch.rand(groups, groups, generator=generator) < 0.3] = -INF
        atom = torch.randint(groups, (20,), generator=generator)
        parts.append(Visibility.joint(atom, table, [f"{groups}.{g}" for g in range(groups)]))
    together = compose(*parts)
    expected = sum(part.dense() for part in parts)
    assert together.is_joint
    torch.testing.assert_close(together.dense(), expected, rtol=1e-6, atol=1e-6)
    assert torch.equal(together.dense().isneginf(), expected.isneginf())


def test_compose_keeps_only_occurring_combinations_and_names_them() -> None:
    a = Visibility.joint(torch.tensor([0, 0, 1]), torch.zeros(2, 2), ("text", "image"))
    b = Visibility.joint(torch.tensor([0, 1, 1]), torch.zeros(2, 2), ("left", "right"))
    together = compose(a, b, Visibility.open(3))
    assert together.query_names == ("text & left", "text & right", "image & right")
    assert together.query_atom.tolist() == [0, 1, 2]
    assert compose(Visibility.open(3), a).query_names == ("text", "image")
    assert compose(a, a).query_names == ("text", "image")
    assert compose(a) is a


def test_compose_of_cross_attention_refines_both_sides() -> None:
    first = Visibility(torch.tensor([0, 1]), torch.tensor([0, 0, 0]), torch.tensor([[0.0], [1.0]]), ("a", "b"), ("k",))
    second = Visibility(torch.tensor([0, 0]), torch.tensor([0, 1, 1]), torch.tensor([[0.0, -INF]]), ("a",), ("k", "l"))
    together = compose(first, second)
    assert torch.equal(together.dense(), first.dense() + second.dense())
    assert together.key_names == ("k", "l")
    assert not together.is_joint


def test_compose_refuses_other_token_counts_and_nothing() -> None:
    with pytest.raises(PlanError, match="3 and 4"):
        compose(Visibility.open(3), Visibility.open(4))
    with pytest.raises(PlanError, match="at least one"):
        compose()


def test_combine_atoms_numbers_pairs_in_order() -> None:
    atom, pairs = combine_atoms(torch.tensor([1, 0, 1, 1]), torch.tensor([0, 2, 0, 1]))
    assert atom.tolist() == [1, 0, 1, 2]
    assert pairs.tolist() == [[0, 2], [1, 0], [1, 1]]


def test_validate_names_atoms_that_see_nothing() -> None:
    """lamic.md (a) 6 and regional.md (a) 10: every query has at least one key."""
    table = torch.tensor([[0, 0, 0], [-INF, -INF, 0], [0, 0, 0]])
    v = Visibility.joint(torch.tensor([0, 1, 1]), table, ("text", "region 1", "reference"))
    with pytest.raises(PlanError, match=r"'region 1' \(2 tokens\).*without tokens: reference"):
        v.validate()
    v.validate(torch.tensor([True, False, True]))
    Visibility.joint(torch.tensor([0, 0]), table, ("text", "region 1", "reference")).validate()
    Visibility.joint(torch.tensor([0, 1, 2]), table, ("text", "region 1", "reference")).validate()


def test_reachable_is_the_power_of_the_table() -> None:
    v = two_regions()
    one = torch.tensor([[1, 1, 1], [1, 1, 0], [1, 0, 1]]).bool()
    assert torch.equal(v.reachable(0), torch.eye(3).bool())
    assert torch.equal(v.reachable(1), one)
    assert torch.equal(v.reachable(2), torch.ones(3, 3).bool())


def test_reachable_grows_by_one_edge_a_block_and_stops_at_a_wall() -> None:
    chain = torch.full((4, 4), -INF).fill_diagonal_(0)
    chain[0, 1] = chain[1, 2] = 0
    v = Visibility.joint(torch.arange(4), chain, ("a", "b", "c", "d"))
    expected = [torch.eye(4), torch.eye(4) + torch.diag(torch.tensor([1.0, 1, 0]), 1)]
    expected.append(expected[1].clone())
    expected[2][0, 2] = 1
    for blocks in range(5):
        assert torch.equal(v.reachable(blocks), expected[min(blocks, 2)] > 0)


def test_residual_counts_as_reading_oneself() -> None:
    swap = torch.tensor([[-INF, 0], [0, -INF]])
    assert Visibility.joint(torch.tensor([0, 1]), swap, ("a", "b")).reachable(1).all()


def test_empty_atoms_relay_nothing() -> None:
    table = torch.tensor([[0, 0, -INF], [0, 0, 0], [-INF, 0, 0]])
    v = Visibility.joint(torch.tensor([0, 2]), table, ("a", "relay", "b"))
    assert torch.equal(v.reachable(5), torch.tensor([[1, 0, 0], [0, 0, 0], [0, 0, 1]]).bool())
    assert v.paths(5) == "a cannot read b in 5 blocks\nb cannot read a in 5 blocks"


def test_paths_reads_like_a_sentence() -> None:
    v = two_regions()
    assert v.paths(2).splitlines() == [
        "region 1 can read region 2 through text in 2 blocks",
        "region 2 can read region 1 through text in 2 blocks",
    ]
    assert "region 1 cannot read region 2 in 1 blocks" in v.paths(1)
    chain = torch.full((4, 4), -INF).fill_diagonal_(0)
    chain[0, 1] = chain[1, 2] = chain[2, 3] = 0
    long = Visibility.joint(torch.arange(4), chain, ("a", "b", "c", "d")).paths(57)
    assert "a can read d through b, then c in 3 blocks" in long
    assert "d cannot read a in 57 blocks" in long
    assert Visibility.open(3).paths(5) == "every atom reads every other directly"


def test_reachability_is_for_joint_attention() -> None:
    v = Visibility(torch.tensor([0]), torch.tensor([0, 0]), torch.zeros(1, 1), ("q",), ("k",))
    with pytest.raises(PlanError, match="1 queries over 2 keys"):
        v.reachable(1)
    with pytest.raises(PlanError, match="-1"):
        two_regions().reachable(-1)


def test_coverage_of_zero_and_one_is_the_hard_mask() -> None:
    """regional.md (a) 7: log coverage in {0, 1} is the hard mask."""
    coverage = torch.tensor([[1.0, 0.0], [1.0, 1.0]])
    hard = torch.where(coverage > 0, 0.0, -INF)
    assert torch.equal(coverage.log(), hard)
    atom = torch.tensor([0, 1, 1])
    names = ("a", "b")
    assert torch.equal(
        Visibility.joint(atom, coverage.log(), names).dense(), Visibility.joint(atom, hard, names).dense()
    )
