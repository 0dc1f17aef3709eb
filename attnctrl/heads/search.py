"""HeadHunter (arXiv 2506.10978): which heads to perturb so that an objective rises, found greedily, k in each round.

    S = {};  pool = all heads
    each round:  score S + {h} for every h of the pool;  move the k best of the pool to S

Heads of one round are never tested together. mode="exhaustive" scores every head on every pair, as published;
"halving" scores all on few pairs, fewer of them on twice as many, and so on (successive halving), to the last keep x k
on all; with keep = 1 these would be the ones that are taken, so it ends before. All candidates of a round see the same
noises and prompts, so what they are compared by are differences of pairs.
"""

from __future__ import annotations

import json
import math
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from statistics import stdev
from typing import Literal

from ..errors import ControlError
from ..headset import HeadSet, Kind, Round, Scored, SearchRecord
from ..schedule import Window
from .sampler import Head, Pair, Sampler
from .scores import Advance, Objective, Scorer, digest

__all__ = ["Mode", "Plan", "estimate", "rungs", "search"]

Mode = Literal["halving", "exhaustive"]
KEEP = 2
"""Candidates that stay to the end of a round, for each that is taken."""
RUNGS = 5
"""Of a round at most: the first has a sixteenth of the pairs."""


@dataclass(frozen=True)
class Plan:
    """What is searched.

    Attributes:
        pairs: all candidates are compared on these.
        k: heads that a round takes; `rounds`, how many there are.
        strength, scale, window, kind: of the perturbation, see `Perturb`.
        mode: see the module's text.
        keep: of halving: candidates on all pairs for each head that is taken, >= 1. More find surely what is best on
            all pairs, fewer cost less; 1 ends with half of the pairs.
        candidates: heads that may be taken, in any order; None for all.

    Raises:
        ControlError: for numbers that cannot be.
    """

    pairs: Sequence[Pair]
    k: int = 3
    rounds: int = 1
    strength: float = 1.0
    scale: float = 3.0
    window: Window = (0.0, 1.0)
    kind: Kind = "identity"
    mode: Mode = "halving"
    candidates: Sequence[Head] | None = None
    keep: int = KEEP

    def __post_init__(self) -> None:
        if min(self.k, self.rounds, self.keep) < 1:
            found = f"found k {self.k}, rounds {self.rounds}, keep {self.keep}"
            raise ControlError(f"A search takes k >= 1 heads in each of rounds >= 1, and keeps >= 1 for each; {found}.")
        if not self.pairs or len(set(self.pairs)) < len(self.pairs):
            raise ControlError(f"A search has pairs, each once; found {len(self.pairs)} of {len(set(self.pairs))}.")
        if self.strength == 0 or self.scale == 0:
            raise ControlError("A search with strength or scale 0 would compare equal pictures; give other ones.")
        if self.mode not in Mode.__args__:  # type: ignore[attr-defined]
            raise ControlError(f"mode is one of {', '.join(Mode.__args__)}; found {self.mode!r}.")  # type: ignore[attr-defined]
        self.weak(())

    def weak(self, heads: Sequence[Head]) -> HeadSet:
        """The set of these heads."""
        how = {"kind": self.kind, "strength": self.strength, "scale": self.scale, "window": self.window}
        return HeadSet(heads=tuple(heads), **how)

    def pool(self, sampler: Sampler) -> list[Head]:
        """The candidates, in the order of the model.

        Raises:
            ControlError: when they are fewer than k, or not all there.
        """
        every = list(sampler.heads)
        asked = every if self.candidates is None else [(str(layer), int(head)) for layer, head in self.candidates]
        strangers = [head for head in asked if head not in every]
        if strangers:
            raise ControlError(
                f"Candidate head {strangers[0][1]} of {strangers[0][0]} is not among {len(every)} heads."
            )
        pool = [head for head in every if head in set(asked)]
        if len(pool) < self.k:
            raise ControlError(
                f"There are {len(pool)} candidates, fewer than k = {self.k}. Give more layers, or less k."
            )
        return pool

    def rungs(self, pool: int) -> list[tuple[int, int]]:
        """Of a round with so many candidates, see `rungs`."""
        exhaustive = self.mode == "exhaustive"
        return [(pool, len(self.pairs))] if exhaustive else rungs(pool, len(self.pairs), self.k, self.keep)


def rungs(pool: int, pairs: int, k: int, keep: int = KEEP) -> list[tuple[int, int]]:
    """(candidates, pairs from the first on) of each rung: each has about twice the pairs of the one before it, and
    fewer candidates by one and the same factor, from all of them on few pairs to keep x k on all pairs. A last rung of
    no more than the k that are taken is left out: it chooses nothing."""
    counts = sorted({-(-pairs // 2**half) for half in range(RUNGS)})
    last = min(pool, keep * k)
    share = (last / pool) ** (1 / max(1, len(counts) - 1))
    ladder: dict[int, int] = {}
    for number, count in enumerate(counts):
        # of rungs of equally many candidates the one with most pairs knows all that the others do
        ladder[max(last, round(pool * share**number))] = count
    found = list(ladder.items()) if len(counts) > 1 else [(pool, pairs)]
    return found[:-1] if len(found) > 1 and found[-1][0] <= k else found


def search(
    sampler: Sampler,
    objectives: Objective | Sequence[Objective],
    plan: Plan,
    *,
    store: str | Path | None = None,
    budget: int | None = None,
    advance: Advance | None = None,
) -> HeadSet:
    """The heads that raise the objectives most, with the record of the search.

    Args:
        sampler: draws, and knows the candidates.
        objectives: one, or several whose weighted sum counts.
        plan: what is searched.
        store: a file of scores: those that are in it are not drawn again, and all others are added.
        budget: rows of the denoiser's forwards that may run in all, earlier parts of the search in `store` included.
        advance: told of pictures as they are scored: (done, in all).

    Raises:
        BudgetSpentError: the budget is not enough; with `store` the same call and a larger one goes on.
        ControlError: for objectives that give no numbers, and fewer candidates than k.
    """
    listed = [objectives] if isinstance(objectives, Objective) else list(objectives)
    scorer = Scorer(sampler, listed, None if store is None else Path(store), budget, advance)
    return found_by(scorer, plan)


def found_by(scorer: Scorer, plan: Plan) -> HeadSet:
    """As `search`, with a scorer that is there."""
    pool = plan.pool(scorer.sampler)
    scorer.total += _pictures(len(pool), plan)
    chosen: list[Head] = []
    rounds: list[Round] = []
    for _ in range(plan.rounds):
        if not pool:
            break
        one = _round(scorer, plan, chosen, pool)
        chosen += [score.head for score in one.scores[: one.taken]]
        pool = [head for head in pool if head not in chosen]
        rounds.append(one)
    identity = json.loads(json.dumps(dict(scorer.sampler.identity), default=str))
    record = SearchRecord(
        objectives={one.name: one.weight for one in scorer.objectives},
        prompts=digest([[pair.prompt, pair.seed] for pair in plan.pairs]),
        pairs=len(plan.pairs),
        settings={name: value for name, value in identity.items() if name != "model"},
        mode=plan.mode,
        forwards=scorer.spent,
        rounds=tuple(rounds),
    )
    return plan.weak(chosen).changed(model=identity.get("model"), search=record)


def _round(scorer: Scorer, plan: Plan, chosen: Sequence[Head], pool: Sequence[Head]) -> Round:
    """Scores of all candidates, the best first."""
    place = {head: number for number, head in enumerate(scorer.sampler.heads)}
    table: dict[Head, list[float]] = {head: [] for head in pool}
    base: list[float] = []
    alive = list(pool)

    def rank(head: Head) -> tuple[float, ...]:
        # who went further is better known; equal scores go by the order of the model
        return -len(table[head]), -math.fsum(table[head]) / max(1, len(table[head])), place[head]

    for size, pairs in plan.rungs(len(pool)):
        alive = sorted(sorted(alive, key=rank)[:size], key=place.__getitem__)
        for pair in plan.pairs[len(base) : pairs]:
            first, *others = scorer.scores([plan.weak(one) for one in [chosen, *([*chosen, h] for h in alive)]], pair)
            base.append(first)
            for head, score in zip(alive, others, strict=True):
                table[head].append(score)
    scores = tuple(_scored(head, table[head], base) for head in sorted(pool, key=rank))
    return Round(base=math.fsum(base) / len(base), taken=min(plan.k, len(pool)), scores=scores)


def _scored(head: Head, values: Sequence[float], base: Sequence[float]) -> Scored:
    deltas = [one - other for one, other in zip(values, base, strict=False)]
    error = stdev(deltas) / math.sqrt(len(deltas)) if len(deltas) > 1 else None
    mean, delta = math.fsum(values) / len(values), math.fsum(deltas) / len(deltas)
    return Scored(head=head, pairs=len(values), mean=mean, delta=delta, error=error)


def _steps(pool: int, plan: Plan) -> list[tuple[int, int, range]]:
    """(round, candidates, numbers of the pairs that are new) of each rung of a search from so many candidates."""
    found = []
    for number in range(plan.rounds):
        left, done = pool - number * plan.k, 0
        for size, pairs in plan.rungs(left) if left > 0 else []:
            found.append((number, size, range(done, pairs)))
            done = pairs
    return found


def _pictures(pool: int, plan: Plan) -> int:
    return sum((size + 1) * len(pairs) for _, size, pairs in _steps(pool, plan))


def estimate(sampler: Sampler, plan: Plan) -> dict[str, int]:
    """What a search from the beginning takes: "pictures" that are scored, and "forwards", rows of the denoiser.

    Exact where steps tell the window; one over sigma is counted as if it were always open.
    """
    heads = plan.pool(sampler)
    forwards, last = 0, -1
    for number, size, pairs in _steps(len(heads), plan):
        before = heads[: number * plan.k]
        sets = [plan.weak(before), *[plan.weak([*before, heads[-1]])] * size]
        # of the best candidate of the last round the scores are there
        sets = sets[1:] if number and plan.k == 1 else sets
        for pair in pairs:
            for at in range(0, len(sets), sampler.batch):
                forwards += sampler.price(sets[at : at + sampler.batch], pair != last)
                last = pair
    return {"pictures": _pictures(len(heads), plan), "forwards": forwards}
