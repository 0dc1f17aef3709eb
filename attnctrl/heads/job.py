"""A whole search as it is asked for: a model by name, pairs, the search, its confirmation, its pictures."""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from ..errors import ControlError
from ..files import write_png
from ..headset import HeadSet, Kind
from ..scenefile import FileRefused, read_bounded
from ..select import Selector
from .atlas import atlas, atlas_price
from .confirm import LAYER_SHARES, best_layer, confirm
from .sampler import Pair, PipelineSampler
from .scores import Advance, Objective, Scorer
from .search import Plan, estimate, found_by

__all__ = ["Job", "gains_of", "load_sampler", "read_prompts", "scores_of"]

MAX_PROMPT_BYTES = 1024 * 1024


def load_sampler(
    model: str,
    *,
    layers: Selector = None,
    kind: Kind = "identity",
    steps: int | None = None,
    size: tuple[int, int] | None = None,
    guidance: float = 1.0,
    batch: int = 16,
) -> PipelineSampler:
    """The model called `model`, as `attnctrl eval` runs it but for what is given.

    Args:
        layers, kind: see `PipelineSampler`.
        steps, size: else the model's own.
        guidance: classifier-free; 1 is none, as published. The embedded guidance of distilled models is the model's.
        batch: candidates that are drawn at once.

    Raises:
        AssetError: There is no such model.
        SelectionError, ControlError: for layers.
    """
    from attnctrl.pipelines.base import canvas_of
    from attnctrl.pipelines.models import find_model
    from attnctrl.pipelines.runner import Runner

    runner = Runner.load(model)
    own = canvas_of(runner.pipe).own
    if size is None and "size" not in find_model(model).defaults:
        size = (own, own)
    runner = replace(runner.with_guidance(guidance), batch=batch, size=size or runner.size, steps=steps or runner.steps)
    return PipelineSampler(runner, layers, kind)


def read_prompts(path: Path) -> list[str]:
    """The prompts of a text file, one a line; empty lines and those that begin with # are none.

    Raises:
        ControlError: there are none, or one comes twice.
    """
    try:
        text = read_bounded(path, MAX_PROMPT_BYTES).decode("utf-8-sig")
    except (FileRefused, UnicodeDecodeError) as error:
        raise ControlError(f"{path} is no text file of prompts: {error}.") from error
    found = [line.strip() for line in text.splitlines() if line.strip() and not line.lstrip().startswith("#")]
    if not found or len(set(found)) < len(found):
        raise ControlError(f"{path} holds prompts, one a line, each once; found {len(found)} of {len(set(found))}.")
    return found


@dataclass(frozen=True)
class Job:
    """What `attnctrl heads search` does.

    Attributes:
        held: pairs of the confirmation; () does without.
        output: of the set; `scores` of what is known, so that the same job goes on where it stopped.
        report: folder of pictures; None draws none.
        budget: rows of the denoiser's forwards in all; the pictures of the report are not part of it.
    """

    sampler: PipelineSampler
    objectives: Sequence[Objective]
    plan: Plan
    output: Path
    scores: Path
    held: Sequence[Pair] = ()
    report: Path | None = None
    budget: int | None = None

    def __post_init__(self) -> None:
        both = sorted({pair for pair in self.held if pair in set(self.plan.pairs)})
        if both:
            raise ControlError(f"Held-out pairs are other ones than those of the search; found {both[0]} in both.")

    def estimate(self) -> dict[str, int]:
        """What it takes from the beginning, see `estimate`; "confirm" and "report": rows of these parts at most."""
        found, plan, sampler = estimate(self.sampler, self.plan), self.plan, self.sampler
        heads = sampler.heads
        layers = len(dict.fromkeys(layer for layer, _ in heads))
        weak = plan.weak(heads[:1])
        wanted = min(plan.k * plan.rounds, len(plan.pool(sampler)))
        whole = _price(sampler, [weak] * layers * len(LAYER_SHARES)) * len(plan.pairs)
        held = _price(sampler, [plan.weak(()), *[weak] * (wanted + 1)]) * len(self.held)
        confirming = whole + held if self.held else 0
        report = atlas_price(sampler, plan.weak) if self.report is not None else 0
        return {**found, "candidates": len(plan.pool(sampler)), "confirm": confirming, "report": report}

    def run(self, advance: Advance | None = None) -> dict[str, Any]:
        """Search, write the set, confirm it, draw; returns what is told of it.

        Raises:
            BudgetSpentError: and then what was scored is kept.
            ControlError: see `search`.
        """
        scorer = Scorer(self.sampler, self.objectives, self.scores, self.budget, advance)
        found = found_by(scorer, self.plan)
        told: dict[str, Any] = {
            "heads": scores_of(found),
            "rows": gains_of(found),
            "output": str(found.save(self.output)),
        }
        if self.held:
            layer = best_layer(scorer, found, self.plan.pairs)
            name = f"all of {layer.heads[0][0]}, u = {layer.strongest:g}"
            told["confirm"] = confirm(scorer, found, self.held, {name: layer})
        if self.report is not None and found.search is not None:
            deltas = {one.head: one.delta for one in found.search.rounds[0].scores}
            sheet = atlas(self.sampler, self.plan.pairs[0], self.plan.weak, deltas, found.heads)
            told["atlas"] = str(write_png(self.report / "atlas.png", sheet))
        cost = self.sampler.cost
        own = len(self.sampler.meter.layers)
        told["cost"] = {"forwards": cost.rows, "block_forwards": cost.layers / own, "in_all": scorer.spent}
        return told


def scores_of(heads: HeadSet) -> list[dict[str, Any]]:
    """Each head of a set with its strength, and what it came to in the round in which it was taken."""
    rounds = heads.search.rounds if heads.search is not None else ()
    known = {score.head: (n, score) for n, one in enumerate(rounds, 1) for score in one.scores[: one.taken]}
    rows = []
    for layer, head in heads.heads:
        row: dict[str, Any] = {"layer": layer, "head": head, "strength": heads.shares[layer][head]}
        if (layer, head) in known:
            number, score = known[layer, head]
            row |= {"round": number, "mean": score.mean, "delta": score.delta, "error": score.error}
        rows.append(row)
    return rows


def gains_of(heads: HeadSet) -> list[dict[str, Any]]:
    """By layer, what each of its heads alone came to in the first round; null for those that were no candidates."""
    rounds = heads.search.rounds if heads.search is not None else ()
    known = {score.head: score.delta for score in rounds[0].scores} if rounds else {}
    layers: dict[str, int] = {}
    for layer, head in sorted(known, key=lambda one: (re.sub(r"\d+", lambda n: n[0].zfill(6), one[0]), one[1])):
        layers[layer] = head + 1
    return [{"layer": layer, "gains": [known.get((layer, n)) for n in range(count)]} for layer, count in layers.items()]


def _price(sampler: PipelineSampler, sets: Sequence[HeadSet]) -> int:
    parts = [sets[at : at + sampler.batch] for at in range(0, len(sets), sampler.batch)]
    return sum(sampler.price(part, number == 0) for number, part in enumerate(parts))
