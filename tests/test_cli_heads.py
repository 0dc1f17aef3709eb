"""`attnctrl heads`: a search from the command line, its files, what it prints; objectives by name; the head atlas."""

from __future__ import annotations

import json
import sys
import types
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from shell import save_tiny
from test_heads_search import EVERY, Fake
from torch import Tensor

import attnctrl as ac
from attnctrl.heads import HeadSet, Pair, Plan
from attnctrl.heads.atlas import atlas, atlas_price
from attnctrl.heads.objectives import objective_of, pairs_of_prompts, toybox_pairs


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_tiny(tmp_path_factory.mktemp("heads"))


@pytest.fixture
def bright(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """A module to import, and how many pictures it was shown."""
    seen: list[int] = []

    def score(images: Tensor, prompts: Sequence[str]) -> Tensor:
        seen.append(len(images))
        return images.mean((1, 2, 3))

    monkeypatch.setitem(sys.modules, "scores_of_mine", types.SimpleNamespace(bright=score, number=3))
    return seen


def test_a_search_writes_a_set_that_works(folder: Path, bright: list[int], call: Any, tmp_path: Path) -> None:
    prompts = tmp_path / "prompts.txt"
    prompts.write_text("# of the toy world\na red circle\n\na blue square\n")
    out = tmp_path / "heads.json"
    line = [
        "heads",
        "search",
        "-m",
        folder / "tiny",
        "--objective",
        "scores_of_mine:bright",
        "--prompts",
        prompts,
        "--seeds",
        1,
        "--layers",
        "single:0",
        "--layers",
        "double:0",
        "--topk",
        2,
        "--window",
        0.5,
        1.0,
        "--batch",
        3,
        "-o",
        out,
    ]
    more = ["--confirm", 2, "--report", tmp_path / "report", "--format", "json"]
    code, told, _ = call(*line, *more, "--estimate")
    assert code == 0
    asked = json.loads(told)
    assert not out.exists()
    assert bright == []
    code, told, err = call(*line, *more)
    assert code == 0, err
    result = json.loads(told)
    heads = HeadSet.load(out)
    assert [(one["layer"], one["head"]) for one in result["heads"]] == list(heads.heads)
    assert len(heads.heads) == 2
    gains = {one["layer"]: one["gains"] for one in result["rows"]}
    best = max((gain, layer, head) for layer, row in gains.items() for head, gain in enumerate(row))
    assert best[1:] == heads.heads[0]
    assert best[0] == result["heads"][0]["delta"]
    assert heads.search.objectives == {"scores_of_mine:bright": 1.0}
    assert (heads.search.pairs, heads.search.settings["steps"], heads.window) == (2, 2, (0.5, 1.0))
    assert [row["name"] for row in result["confirm"]["rows"]][:3] == ["none", "first 1", "first 2"]
    assert result["confirm"]["pairs"] == 4
    assert result["cost"]["in_all"] + asked["report"] == result["cost"]["forwards"]
    assert heads.search.forwards == asked["forwards"]
    assert result["cost"]["forwards"] == asked["forwards"] + asked["confirm"] + asked["report"]
    # two layers at three strengths on two pairs; nothing, two prefixes and the best layer on four
    assert sum(bright) == asked["pictures"] + 2 * 3 * 2 + 4 * 4
    with Image.open(result["atlas"]) as sheet:
        assert sheet.width > 3 * 96
    # what is known costs nothing
    pictures = sum(bright)
    code, again, _ = call(*line, "--format", "json")
    assert (code, json.loads(again)["heads"], sum(bright)) == (0, result["heads"], pictures)
    code, told, _ = call("heads", "show", out, "--format", "json")
    assert (code, json.loads(told)) == (0, heads.model_dump(mode="json"))
    code, told, _ = call("heads", "show", out)
    assert "2 heads, identity, scale 3, window [0.5, 1.0], of FluxTransformer2DModel" in told
    assert call("heads", "show", out, "--format", "quiet")[1] == "".join(
        f"{layer}\t{head}\n" for layer, head in heads.heads
    )


def test_a_budget_that_is_spent_fails_and_says_how_to_go_on(
    folder: Path, bright: list[int], call: Any, tmp_path: Path
) -> None:
    out = tmp_path / "heads.json"
    line = [
        "heads",
        "search",
        "-m",
        folder / "tiny",
        "--objective",
        "scores_of_mine:bright",
        "--seeds",
        1,
        "--layers",
        "single:0",
        "--topk",
        1,
        "-o",
        out,
    ]
    code, _, err = call(*line, "--budget", 3)
    assert (code, out.exists()) == (1, False)
    assert "error: The budget of 3 forwards is spent" in err
    assert call(*line)[0] == 0


def test_wrong_lines_are_told(folder: Path, bright: list[int], call: Any, tmp_path: Path) -> None:
    model = ["heads", "search", "-m", folder / "tiny", "--layers", "single:0", "--topk", 1, "-o", tmp_path / "h.json"]
    wrong = {
        ("--objective", "warmth"): "no objective 'warmth'; there are toybox, toybox-fidelity, clip, unclipped",
        ("--objective", "toybox=much"): "whose weight is no number",
        ("--objective", "scores_of_mine:dark"): "cannot be imported",
        ("--objective", "scores_of_mine:number"): "is no function; found int",
        ("--objective", "toybox", "--prompts", tmp_path / "none.txt"): "no text file of prompts",
        ("--kind", "blurr"): "did you mean 'blur'?",
        ("--strength", "0"): "strength or scale 0",
        ("--layers", "single:9"): "there is no single block 9",
    }
    for options, message in wrong.items():
        code, _, err = call(*model, *options)
        assert (code, message in err) == (2, True), err
    assert call("heads", "show", tmp_path / "none.json")[0] == 1


def test_objectives_of_the_toy_world_read_what_is_told() -> None:
    from attnctrl.toybox import world
    from attnctrl.toybox.suites_guidance import GUIDANCE

    pairs = toybox_pairs(3)
    assert len({*pairs, *toybox_pairs(3, "test")}) == 6
    tasks = [GUIDANCE.task("tune", n)[0] for n in range(3)]
    assert [pair.prompt for pair in pairs] == [task.prompt for task in tasks]
    renders = np.stack([world.render(task.scene, 64, 64).image for task in tasks])
    images = torch.from_numpy(renders).movedim(-1, 1).float() / 255
    blank = torch.full_like(images, 0.5)
    for name in ("toybox", "toybox-fidelity"):
        score = objective_of(name).score
        assert list(score(images, [task.prompt for task in tasks])) == [1.0, 1.0, 1.0]
        assert max(score(blank, [task.prompt for task in tasks])) < 0.5
        assert score(images[:1], [toybox_pairs(1, "test")[0].prompt])[0] < 1
    with pytest.raises(ac.ControlError, match="'a cat' is none of them"):
        objective_of("toybox").score(images[:1], ["a cat"])


def test_other_objectives(monkeypatch: pytest.MonkeyPatch) -> None:
    images = torch.tensor([0.0, 0.5, 1.0, 0.25]).expand(2, 3, 1, 4)
    guard = objective_of("unclipped=0.25")
    assert (guard.score(images, ["", ""]).tolist(), guard.weight) == ([0.5, 0.5], 0.25)
    monkeypatch.setitem(sys.modules, "torchmetrics.multimodal.clip_score", None)
    with pytest.raises(ac.ControlError, match=r"pip install 'attnctrl\[heads\]'"):
        objective_of("clip")

    class CLIPScore:
        """Its call gives the value of this batch alone."""

        def __init__(self, model_name_or_path: str) -> None:
            assert model_name_or_path == "openai/clip-vit-base-patch16"
            self.asked: list[Any] = []

        def reset(self) -> None:
            self.asked.clear()

        def __call__(self, image: Tensor, prompt: str) -> Tensor:
            self.asked.append(prompt)
            assert (len(self.asked), image.dtype, tuple(image.shape)) == (1, torch.uint8, (3, 1, 4))
            return torch.tensor(float(len(prompt)))

    monkeypatch.setitem(sys.modules, "torchmetrics.multimodal.clip_score", types.SimpleNamespace(CLIPScore=CLIPScore))
    assert objective_of("clip").score(images, ["a", "abc"]) == [1.0, 3.0]


def test_pairs_of_prompts_have_seeds_of_their_own() -> None:
    assert pairs_of_prompts(["a", "b"], 2, 5) == [Pair("a", 5), Pair("b", 6), Pair("a", 7), Pair("b", 8)]


def test_the_atlas_shows_every_head_in_its_place() -> None:
    """The fake sampler lights a head's own pixel, so that each picture says which head it is."""
    sampler, side = Fake(), 60
    weak = Plan([Pair("a", 0)]).weak
    scores = {EVERY[0]: 1.25}
    done: list[tuple[int, int]] = []
    sheet = atlas(sampler, Pair("a", 0), weak, {}, (), side, lambda *told: done.append(told))
    assert sampler.cost.rows == atlas_price(sampler, weak)
    assert done[-1] == (25, 25)
    pixels = np.asarray(sheet)
    lit = (pixels[..., 0] == 255) & (pixels[..., 1] == 255) & (pixels[..., 2] == 0)
    # 6 x 4 pictures of 6 x 4 pixels: one pixel each, ten sheet pixels wide and high
    assert lit.sum() == 24 * 100
    rows, columns = (np.flatnonzero(lit.any(axis))[::10] for axis in (1, 0))
    # the next layer's picture stands 8 below the 60 of this one, and its pixel is one further down; so do columns
    assert set(np.diff(rows)) == {60 + 8 + 10}
    assert set(np.diff(columns)) == {40 + 8 + 10}
    assert all(lit[y : y + 10, x : x + 10].all() for y in rows for x in columns)
    marked = np.asarray(atlas(sampler, Pair("a", 0), weak, scores, EVERY[:1], side))
    changed = (marked != pixels).any(-1)
    ys, xs = np.nonzero(changed)
    # only the first picture has a plate and a frame
    assert (ys.max() - ys.min(), xs.max() - xs.min()) == (59, 39)
