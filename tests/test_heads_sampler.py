"""Candidates drawn by stock pipelines: batched and with common steps they are what separate runs give, at the price told."""

from __future__ import annotations

import functools
from typing import Any

import pytest
import tiny_pipes
import torch
from attnctrl.pipelines.runner import Runner

import attnctrl as ac
from attnctrl.heads import HeadSet, Objective, Pair, PipelineSampler, Plan, estimate, search
from attnctrl.toybox.models.flux import tiny_pipeline

PAIR = Pair("a red circle", 3)
LAYERS = {"sd3": "joint:0", "flux": "single:0", "sd": "mid.self"}


@functools.cache
def pipeline(family: str) -> Any:
    return tiny_pipeline() if family == "flux" else getattr(tiny_pipes, family)()


def sampler(family: str, guidance: float = 1.0, share: bool = True, batch: int = 4, **more: Any) -> PipelineSampler:
    settings = {"guidance_scale": guidance, "true_cfg_scale": guidance, "max_sequence_length": 16}
    return PipelineSampler(Runner(pipeline(family), (48, 32), 4, batch=batch, **settings), share=share, **more)


def sets(one: PipelineSampler, window: tuple[float, float]) -> list[HeadSet]:
    first, *others = one.heads
    # in the middle of a tiny UNet a head is little of the whole
    scale = 60.0 if "mid" in first[0] else 5.0
    return [
        HeadSet(heads=heads, window=window, scale=scale) for heads in ((), (first,), (others[0],), (first, others[-1]))
    ]


@pytest.mark.parametrize("family", ["sd3", "flux", "sd"])
@pytest.mark.parametrize("guidance", [1.0, 3.0])
@pytest.mark.parametrize(("window", "common"), [((0.0, 1.0), 0), ((0.5, 1.0), 2), ((0.25, 0.5), 1)])
def test_a_batch_is_what_separate_runs_give_at_the_price_told(
    family: str, guidance: float, window: tuple[float, float], common: int
) -> None:
    more = {"layers": "mid.self"} if family == "sd" else {}
    shared, naive = sampler(family, guidance, **more), sampler(family, guidance, share=False, **more)
    wanted = sets(shared, window)
    images = shared.draw(PAIR, wanted)
    rows, branches, acting = shared.cost.rows, 2 if guidance > 1 else 1, round(4 * (window[1] - window[0]))
    assert rows == shared.price(wanted, True) == branches * (common + 4 * (4 - common)) + 3 * acting
    again = shared.draw(PAIR, wanted)
    assert torch.equal(again, images)
    assert shared.cost.rows - rows == shared.price(wanted, False) == rows - branches * common
    alone = torch.cat([naive.draw(PAIR, [one]) for one in wanted])
    assert naive.cost.rows == sum(naive.price([one], True) for one in wanted) == 4 * 4 * branches + 3 * acting
    assert (images - alone).abs().max() <= 1 / 255
    assert not torch.equal(images[0], images[1])
    assert not torch.equal(images[1], images[2])
    # another pair starts anew
    shared.draw(Pair("a blue square", 3), wanted)
    assert shared.cost.rows == 3 * rows - branches * common
    assert "forward" not in vars(pipeline(family).unet if family == "sd" else pipeline(family).transformer)


def test_a_window_over_sigma_costs_no_more_than_told() -> None:
    """Sigma falls from 1 past 0.9, 0.75 and 0.5: one step acts, two are common."""
    one = sampler("sd3")
    weak = [
        HeadSet(heads=one.heads[:1], window=ac.Sigma(0.8, 0.6)),
        HeadSet(heads=one.heads[1:2], window=ac.Sigma(0.8, 0.6)),
    ]
    images = one.draw(PAIR, weak)
    assert one.cost.rows == 2 + 2 * 2 + 2 < one.price(weak, True) == 16
    assert not torch.equal(images[0], images[1])


def test_layers_are_counted_with_the_rows() -> None:
    one = sampler("sd3")
    one.draw(PAIR, sets(one, (0.5, 1.0))[1:])
    plain, perturbed = 2 + 2 * 3, 2 * 3
    assert one.cost.rows == plain + perturbed
    # the perturbed pass may take over what comes before the first perturbed layer
    assert 3 * plain < one.cost.layers <= 3 * (plain + perturbed)


def test_heads_are_those_of_layers_in_which_the_kind_is_defined() -> None:
    assert sampler("sd3").heads == [
        (f"transformer_blocks.{name}", head) for name in ("0.attn", "0.attn2", "1.attn") for head in range(2)
    ]
    assert all(layer.endswith("attn1") for layer, _ in sampler("sd").heads)
    assert any(layer.endswith("attn2") for layer, _ in sampler("sd", kind="uniform").heads)
    with pytest.raises(ac.ControlError, match="kind 'identity' is not defined there"):
        sampler("sd", layers="mid.cross")
    with pytest.raises(ac.SelectionError):
        sampler("sd3", layers="joint:7")


def test_what_pictures_depend_on_is_told() -> None:
    one = sampler("sd3")
    assert one.identity["model"]["class"] == "SD3Transformer2DModel"
    assert one.identity["steps"] == 4
    assert sampler("sd3", 3.0).identity != one.identity
    assert sampler("sd3", batch=2).identity == one.identity


def test_a_search_on_a_real_model_finds_the_brightest_head() -> None:
    """By the naive loop over heads, one after the other, without any of the savings."""

    def bright(images: torch.Tensor, prompts: Any) -> torch.Tensor:
        return images.mean((1, 2, 3))

    plan = Plan([PAIR, Pair("a blue square", 4)], k=2, rounds=1, scale=5.0, window=(0.5, 1.0), mode="exhaustive")
    one, naive = sampler("sd3", batch=3), sampler("sd3", share=False, batch=1)
    found = search(one, Objective("bright", bright), plan)
    means = {
        head: torch.stack([bright(naive.draw(pair, [plan.weak([head])]), None) for pair in plan.pairs]).mean().item()
        for head in naive.heads
    }
    best = sorted(means, key=lambda head: -means[head])
    assert list(found.heads) == best[:2]
    for score in found.search.rounds[0].scores:
        assert score.mean == pytest.approx(means[score.head], abs=1e-4)
    assert one.cost.rows == estimate(one, plan)["forwards"] < estimate(naive, plan)["forwards"]
    assert found.model == one.identity["model"]
    ac.attach(pipeline("sd3"), ac.Perturb(heads=found)).detach()
