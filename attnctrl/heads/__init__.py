"""Searching the attention heads whose perturbation serves an aim, and sets of them.

from attnctrl.heads import HeadSet, Objective, Pair, PipelineSampler, Plan, search

heads = search(PipelineSampler(runner), Objective("warmth", warmth), Plan(pairs, k=3, rounds=5))
heads.save("warm.json")
with ac.attach(pipe, ac.Perturb(heads="warm.json")):
    pipe("a red circle")
"""

from __future__ import annotations

from ..headset import HeadSet, Round, Scored, SearchRecord
from .confirm import best_layer, confirm, prefixes
from .meter import Cost
from .sampler import Head, Pair, PipelineSampler, Sampler
from .scores import BudgetSpentError, Objective, Scorer
from .search import Plan, estimate, found_by, rungs, search

__all__ = [
    "BudgetSpentError",
    "Cost",
    "Head",
    "HeadSet",
    "Objective",
    "Pair",
    "PipelineSampler",
    "Plan",
    "Round",
    "Sampler",
    "Scored",
    "Scorer",
    "SearchRecord",
    "best_layer",
    "confirm",
    "estimate",
    "found_by",
    "prefixes",
    "rungs",
    "search",
]
