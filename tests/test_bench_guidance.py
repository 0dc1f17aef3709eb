"""The benchmark of guidance counts what its bound says, and computes what diffusers' processors compute."""

from __future__ import annotations

import dataclasses
import json
import time
from typing import Any

import pytest
import tiny
import torch
from torch import nn

from attnctrl import bench_guidance as bench
from attnctrl.cli.bench import guidance_table
from attnctrl.families import family_of

CFG = ("none", "batched")


class Attention(nn.Module):
    """One head; the product of attention costs 4 n^2 d, each projection 2 n d^2."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.to_qkv = nn.Linear(width, 3 * width)
        self.to_out = nn.ModuleList([nn.Linear(width, width)])

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        q, k, v = self.to_qkv(x).chunk(3, -1)
        return self.to_out[0](nn.functional.scaled_dot_product_attention(q, k, v))


class Deep(nn.Module):
    def __init__(self, width: int, blocks: int) -> None:
        super().__init__()
        self.attention = nn.ModuleList(Attention(width) for _ in range(blocks))
        self.ff = nn.ModuleList(nn.Linear(width, 8 * width) for _ in range(blocks))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        for attention, ff in zip(self.attention, self.ff, strict=True):
            x = x + attention(x)
            x = x + ff(x)[..., : x.shape[-1]]
        return x


@pytest.mark.parametrize("number", [0, 2, 4])
def test_rho_is_the_closed_form(number: int) -> None:
    """rho = (sum_{j > l} c_j + phi c_l) / sum_j c_j with c = 24 n d^2 + 4 n^2 d and phi c = 18 n d^2."""
    n, d, blocks = 24, 16, 5
    model = Deep(d, blocks)
    layer = bench.Layer(f"attention.{number}", "", number, model.attention[number])
    found = bench.rho(model, layer, {"x": torch.randn(1, n, d)})
    block = 24 * n * d * d + 4 * n * n * d
    expected = ((blocks - 1 - number) * block + 18 * n * d * d) / (blocks * block)
    assert found == pytest.approx(expected, rel=1e-12)


@pytest.fixture(scope="module")
def result() -> dict[str, Any]:
    return bench.bench_guidance(repeats=1, side=8, width=64, cases=["sd3"])


def test_steps_cost_little_more_than_their_bound(result: dict[str, Any]) -> None:
    """Operations are counted: times of so small steps tell nothing."""
    assert [(row["cfg"], row["layer"]) for row in result["rows"]] == [
        (cfg, layer) for cfg in ("none", "batched") for layer in ("early", "middle", "late")
    ]
    for row in result["rows"]:
        rows = {"none": 1, "batched": 2}[row["cfg"]]
        assert row["bound"] == pytest.approx((rows + row["rho"]) / rows)
        assert row["bound"] - 1e-9 < row["flop_ratio"] < 1.05 * row["bound"]
        assert min(row["step_ratio"], row["full_ratio"], row["vanilla_s"]) > 0
        assert row["max_err"] == 0 if rows == 1 else row["max_err"] < 1e-5
    shares = [row["rho"] for row in result["rows"]]
    assert 0.95 > shares[0] > 0.6 > shares[1] > 0.4 > 0.2 > shares[2] > 0
    assert shares[:3] == shares[3:]
    # of one and the same forward less is left behind a later layer
    bounds = [row["bound_s"] for row in result["rows"]]
    assert bounds[0] > bounds[1] > bounds[2] > 1
    assert bounds[3] > bounds[4] > bounds[5] > 1


def test_the_bound_in_seconds_is_what_comes_behind_the_product() -> None:
    """A layer that sleeps behind its product, and one that sleeps before it."""
    model = Deep(16, 3)
    model.ff[1].register_forward_hook(lambda *_: time.sleep(0.02))
    layers = [bench.Layer(f"attention.{number}", "", number, model.attention[number]) for number in (1, 2)]
    timed = bench._Timed(model, dict(zip(("before", "behind"), layers, strict=True)), {"x": torch.randn(1, 8, 16)})
    for _ in range(3):
        timed()
    assert all(taken > 0.02 for taken in timed.behind["before"])
    assert min(timed.behind["behind"]) < 0.01
    assert [len(taken) for taken in timed.behind.values()] == [3, 3]


def test_diffusers_processors_give_the_same(result: dict[str, Any]) -> None:
    sizes = {**tiny.UNET_SIZES, "cross_attention_dim": 16, "norm_num_groups": 4}
    unet = dataclasses.replace(bench._cases(64)["unet"], config=sizes)
    found = [bench._theirs(unet, bench._random(unet), cfg, unet.inputs(n, 4, 16), 1) for n, cfg in enumerate(CFG, 1)]
    assert [row["cfg"] for row in result["theirs"]] == list(CFG)
    for row in [*found, *result["theirs"]]:
        assert row["max_err"] < 1e-5
        assert row["moved"] > 10 * row["max_err"]


def test_the_command_prints_the_rows(result: dict[str, Any], call: Any, monkeypatch: Any) -> None:
    monkeypatch.setattr(bench, "bench_guidance", lambda repeats: result)
    code, out, _ = call("bench", "guidance", "--format", "json")
    assert (code, json.loads(out)["rows"]) == (0, result["rows"])
    first = result["rows"][0]
    quiet = call("bench", "guidance", "--format", "quiet")[1].splitlines()
    assert (len(quiet), quiet[0]) == (6, f"sd3\tearly\tnone\t{first['step_ratio']:.3f}")
    assert guidance_table(result).row_count == 6 + 2


def test_a_twin_has_the_same_weights_and_hooks_of_its_own() -> None:
    model = bench._random(bench._cases(64)["sd3"])
    twin = bench._twin(model)
    assert all(a is b for a, b in zip(model.parameters(), twin.parameters(), strict=True))
    first, second = (family_of(one).layers(one)[0].module for one in (model, twin))
    assert first is not second
