"""The search for heads, on a sampler whose pictures say which heads were perturbed, and objectives that reward some."""

from __future__ import annotations

import json
import random
from collections.abc import Sequence
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

import attnctrl as ac
from attnctrl.heads import (
    BudgetSpentError,
    Cost,
    HeadSet,
    Objective,
    Pair,
    Plan,
    Scorer,
    best_layer,
    confirm,
    estimate,
    prefixes,
    rungs,
    search,
)

LAYERS, HEADS = 6, 4
EVERY = [(f"joint:{layer}", head) for layer in range(LAYERS) for head in range(HEADS)]
PLANTED = [("joint:4", 1), ("joint:0", 3), ("joint:2", 2)]
PAIRS = [Pair(f"prompt {n}", n) for n in range(8)]


class Fake:
    """One pixel for each head, bright where it is perturbed; four rows a picture, one more where something acts."""

    batch = 5
    heads = tuple(EVERY)

    def __init__(self) -> None:
        self.identity, self.cost = {"model": {"class": "Fake"}, "steps": 4}, Cost()
        self.drawn: list[tuple[Pair, HeadSet]] = []

    def price(self, sets: Sequence[HeadSet], first: bool) -> int:
        return sum(4 + bool(one.heads) for one in sets)

    def draw(self, pair: Pair, sets: Sequence[HeadSet]) -> Tensor:
        self.cost.rows += self.price(sets, False)
        self.drawn += [(pair, one) for one in sets]
        images = torch.zeros(len(sets), 3, LAYERS, HEADS)
        for n, one in enumerate(sets):
            for layer, head in one.heads:
                images[n, :2, int(layer[6:]), head] = 1
            images[n, 2] += (pair.seed % 5) / 100
        return images


def value(images: Tensor, prompts: Sequence[str]) -> Tensor:
    """3, 2, 1 for the planted heads, a loss for others, and what the pair adds for all."""
    weights = torch.full((LAYERS, HEADS), -0.5)
    for n, (layer, head) in enumerate(PLANTED):
        weights[int(layer[6:]), head] = 3.0 - n
    return (images[:, 0] * weights).sum((1, 2)) + images[:, 2].mean((1, 2))


def plan(**more: Any) -> Plan:
    return Plan(**{"pairs": PAIRS, "k": 1, "rounds": 3, "strength": 0.5, "scale": 2.0, **more})


@pytest.mark.parametrize("mode", ["halving", "exhaustive"])
@pytest.mark.parametrize(("k", "rounds"), [(1, 3), (3, 1), (2, 2)])
def test_planted_heads_are_found(mode: Any, k: int, rounds: int) -> None:
    found = search(Fake(), Objective("value", value), plan(mode=mode, k=k, rounds=rounds))
    assert list(found.heads[:3]) == PLANTED
    assert len(set(found.heads)) == len(found.heads) == k * rounds
    assert (found.strength, found.scale, found.kind, found.window) == (0.5, 2.0, "identity", (0.0, 1.0))
    assert found.model == {"class": "Fake"}
    best = found.search.rounds[0].scores[0]
    assert (best.head, best.pairs, best.error) == (PLANTED[0], 8, pytest.approx(0, abs=1e-6))
    assert best.delta == pytest.approx(3, abs=1e-6)
    # what stood before the second round is what the first one took
    for n, (one, other) in enumerate(pairwise(found.search.rounds)):
        taken = sum(3.0 - PLANTED.index(h) if h in PLANTED else -0.5 for h in found.heads[n * k : (n + 1) * k])
        assert other.base - one.base == pytest.approx(taken, abs=1e-5)


def test_a_head_that_only_helps_with_another_needs_a_second_round() -> None:
    def together(images: Tensor, prompts: Sequence[str]) -> Tensor:
        on = images[:, 0]
        return on[:, 1, 0] + on[:, 1, 0] * on[:, 5, 3] * 4 - on[:, 5, 3] + 0.1 * on[:, 3, 1]

    one = search(Fake(), Objective("together", together), plan(k=2, rounds=1))
    two = search(Fake(), Objective("together", together), plan(k=1, rounds=2))
    assert one.heads == (("joint:1", 0), ("joint:3", 1))
    assert two.heads == (("joint:1", 0), ("joint:5", 3))


def test_all_heads_come_back_where_k_is_their_number_and_ties_go_by_place() -> None:
    flat = Objective("flat", lambda images, prompts: [0.0] * len(images))
    assert list(search(Fake(), flat, plan(k=24, rounds=1)).heads) == EVERY
    assert list(search(Fake(), flat, plan(k=20, rounds=3)).heads) == EVERY
    assert list(search(Fake(), flat, plan(k=2, rounds=2)).heads) == EVERY[:4]
    with pytest.raises(ac.ControlError, match="24 candidates, fewer than k = 25"):
        search(Fake(), flat, plan(k=25))


def test_the_order_of_candidates_does_not_matter() -> None:
    shuffled = random.Random(0).sample(EVERY, len(EVERY))
    one, other = Fake(), Fake()
    first = search(one, Objective("value", value), plan())
    second = search(other, Objective("value", value), plan(candidates=shuffled))
    assert first == second
    assert one.drawn == other.drawn
    few = search(Fake(), Objective("value", value), plan(k=2, rounds=1, candidates=[EVERY[9], EVERY[3], EVERY[8]]))
    assert list(few.heads) == [EVERY[3], EVERY[8]]
    with pytest.raises(ac.ControlError, match="head 9 of joint:0 is not among 24 heads"):
        search(Fake(), Objective("value", value), plan(candidates=[("joint:0", 9)]))


@pytest.mark.parametrize(("pool", "pairs", "k"), [(576, 5, 3), (576, 20, 24), (35, 8, 3), (9, 5, 3), (24, 1, 1)])
def test_rungs(pool: int, pairs: int, k: int) -> None:
    found = rungs(pool, pairs, k)
    assert found[0][0] == pool
    assert found[-1][1] == pairs
    assert all(later[0] < before[0] and later[1] > before[1] for before, later in pairwise(found))
    assert found[-1][0] == (min(pool, 2 * k) if pairs > 1 else pool)
    shares = [later[0] / before[0] for before, later in pairwise(found)]
    assert max(shares, default=0) - min(shares, default=0) < 0.15


def test_rungs_by_number() -> None:
    assert rungs(576, 5, 3) == [(576, 1), (126, 2), (27, 3), (6, 5)]
    assert rungs(576, 20, 24) == [(576, 2), (309, 3), (166, 5), (89, 10), (48, 20)]
    assert rungs(35, 48, 3) == [(35, 3), (23, 6), (14, 12), (9, 24), (6, 48)]
    # three of three would choose nothing
    assert rungs(35, 48, 3, keep=1) == [(35, 3), (19, 6), (10, 12), (6, 24)]
    assert (rungs(6, 5, 3), rungs(24, 1, 1)) == ([(6, 5)], [(24, 1)])
    # candidates that cannot be parted so often
    assert rungs(7, 48, 3) == [(7, 6), (6, 48)]


def test_halving_without_elimination_is_exhaustive() -> None:
    one, other = Fake(), Fake()
    first = search(one, Objective("value", value), plan(k=8, rounds=1, keep=3))
    second = search(other, Objective("value", value), plan(k=8, rounds=1, mode="exhaustive"))
    assert first.search.rounds == second.search.rounds
    assert one.drawn == other.drawn


def test_halving_draws_fewer_and_compares_on_equal_pairs() -> None:
    sampler = Fake()
    found = search(sampler, Objective("value", value), plan(rounds=1))
    assert rungs(24, 8, 1) == [(24, 1), (10, 2), (5, 4), (2, 8)]
    assert len(sampler.drawn) == 25 * 1 + 11 * 1 + 6 * 2 + 3 * 4
    assert [one.pairs for one in found.search.rounds[0].scores] == [8] * 2 + [4] * 3 + [2] * 5 + [1] * 14


@pytest.mark.parametrize("mode", ["halving", "exhaustive"])
@pytest.mark.parametrize("k", [1, 2])
def test_the_estimate_is_what_runs(mode: Any, k: int) -> None:
    sampler = Fake()
    asked = estimate(sampler, plan(mode=mode, k=k))
    seen: list[tuple[int, int]] = []
    found = search(sampler, Objective("value", value), plan(mode=mode, k=k), advance=lambda *done: seen.append(done))
    assert asked["forwards"] == sampler.cost.rows == found.search.forwards
    assert seen[-1] == (asked["pictures"], asked["pictures"])


@pytest.mark.parametrize("stop", [1, 7, 23, 40])
def test_an_interrupted_search_goes_on_to_the_same_end(stop: int, tmp_path: Path) -> None:
    """Stopped after any batch, with a torn line behind: nothing is drawn twice, and the set is the same to the digit."""

    class Stops(Fake):
        def draw(self, pair: Pair, sets: Sequence[HeadSet]) -> Tensor:
            self.calls = getattr(self, "calls", 0) + 1
            if self.calls > stop:
                raise KeyboardInterrupt
            return super().draw(pair, sets)

    store = tmp_path / "scores.jsonl"
    whole, first, second = Fake(), Stops(), Fake()
    expected = search(whole, Objective("value", value), plan())
    with pytest.raises(KeyboardInterrupt):
        search(first, Objective("value", value), plan(), store=store)
    with store.open("a") as file:
        file.write('{"prompt": "a')
    found = search(second, Objective("value", value), plan(), store=store)
    assert found == expected
    assert first.drawn + second.drawn == whole.drawn
    again = Fake()
    assert search(again, Objective("value", value), plan(), store=store) == expected
    assert again.drawn == []
    # the same scores under another weight draw nothing either
    search(again, Objective("value", value, weight=2.0), plan(), store=store)
    assert again.drawn == []
    # another strength is another picture; without perturbation there is none
    search(again, Objective("value", value), plan(strength=1.0, rounds=1), store=store)
    assert {bool(one.heads) for _, one in again.drawn} == {True}


def test_a_budget_stops_before_it_is_passed_and_a_larger_one_goes_on(tmp_path: Path) -> None:
    store = tmp_path / "scores.jsonl"
    expected, rows = search(Fake(), Objective("value", value), plan()), 0
    for budget in (100, 101, 300):
        sampler = Fake()
        with pytest.raises(BudgetSpentError, match=f"budget of {budget} forwards is spent"):
            search(sampler, Objective("value", value), plan(), store=store, budget=budget)
        rows += sampler.cost.rows
        assert budget - 5 * 5 < rows <= budget
    sampler = Fake()
    found = search(sampler, Objective("value", value), plan(), store=store, budget=10_000)
    assert found == expected
    assert rows + sampler.cost.rows == expected.search.forwards


def test_a_damaged_store_is_told(tmp_path: Path) -> None:
    store = tmp_path / "scores.jsonl"
    search(Fake(), Objective("value", value), plan(rounds=1), store=store)
    lines = store.read_text().splitlines()
    assert all(set(json.loads(line)) == {"prompt", "seed", "rows", "scores"} for line in lines)
    store.write_text("\n".join([lines[0], '{"rows": 3}', *lines[1:]]) + "\n")
    with pytest.raises(ac.AssetError, match="line 2 is no line of scores"):
        search(Fake(), Objective("value", value), plan(rounds=1), store=store)


def test_several_objectives_are_a_weighted_sum() -> None:
    def tail(images: Tensor, prompts: Sequence[str]) -> list[float]:
        return images[:, 0, 5, 0].tolist()

    both = [Objective("value", value), Objective("tail", tail, weight=10.0)]
    assert search(Fake(), both, plan(rounds=2)).heads == (("joint:5", 0), PLANTED[0])
    against = [Objective("value", value, weight=-1.0)]
    assert PLANTED[0] not in search(Fake(), against, plan(k=5, rounds=1)).heads
    with pytest.raises(ac.ControlError, match="each of another name"):
        search(Fake(), [Objective("value", value)] * 2, plan())


def test_bad_objectives_are_told_with_the_candidate() -> None:
    def undefined(images: Tensor, prompts: Sequence[str]) -> Tensor:
        return torch.where(images[:, 0, 3, 2] > 0, torch.nan, 0.0)

    with pytest.raises(ac.ControlError, match=r"gave nan for the picture of 'prompt 0' with head 2 of joint:3"):
        search(Fake(), Objective("undefined", undefined), plan())
    with pytest.raises(ac.ControlError, match="gave 1 scores for 5 pictures"):
        search(Fake(), Objective("short", lambda images, prompts: [1.0]), plan())
    for wrong in ({"k": 0}, {"rounds": 0}, {"pairs": []}, {"pairs": PAIRS[:1] * 2}, {"strength": 0.0}, {"mode": "x"}):
        with pytest.raises(ac.ControlError):
            plan(**wrong)


def test_a_whole_layer_is_tried_at_smaller_strengths_too() -> None:
    class Soft(Fake):
        def draw(self, pair: Pair, sets: Sequence[HeadSet]) -> Tensor:
            strengths = torch.tensor([one.strongest if one.heads else 0.0 for one in sets])
            return super().draw(pair, sets) * strengths[:, None, None, None]

    found = search(Fake(), Objective("value", value), plan(k=2, rounds=1))
    much = [Objective("little", lambda images, prompts: -(images[:, 0, 2].sum(-1) - 4 * 0.125).abs())]
    layer = best_layer(Scorer(Soft(), much), found, PAIRS)
    # strength 0.5 of the set, a quarter of it is just right
    assert (layer.heads[0][0], layer.strength, len(layer.heads)) == ("joint:2", 0.125, 4)
    assert best_layer(Scorer(Soft(), much), found, PAIRS, shares=(1.0,)).strength == 0.5


def test_confirmation_on_pairs_that_were_not_seen() -> None:
    """Every prefix against no perturbation, pair by pair; a whole layer beside them."""
    scorer = Scorer(Fake(), [Objective("value", value)])
    found = search(Fake(), Objective("value", value), plan(k=2, rounds=2))
    layer = best_layer(scorer, found, PAIRS)
    # 3 for the planted head, and three of a loss; the first of equal layers would be joint:0 with 2
    assert list(layer.heads) == [("joint:4", n) for n in range(4)]
    held = [Pair(f"held {n}", n) for n in range(6)]
    told = confirm(scorer, found, held, {"layer": layer})
    deltas = {row["name"]: row["delta"] for row in told["rows"]}
    expected = {"none": 0, "first 1": 3, "first 2": 5, "first 3": 6, "first 4": 5.5, "layer": 1.5}
    assert deltas == pytest.approx(expected, abs=1e-5)
    assert (told["best"], told["pairs"]) == (3, 6)
    over = {row["name"]: row["over"]["layer"]["delta"] for row in told["rows"]}
    assert over == pytest.approx({name: delta - expected["layer"] for name, delta in expected.items()}, abs=1e-5)
    low, high = next(row["ci95"] for row in told["rows"] if row["name"] == "first 2")
    assert low == pytest.approx(5, abs=1e-5) == high
    assert [len(one.heads) for one in prefixes(found, [4, 2])] == [2, 4]
    with pytest.raises(ac.ControlError, match="have 1 to 4"):
        prefixes(found, [5])
    with pytest.raises(ac.ControlError, match="not seen"):
        confirm(scorer, found, [])
