"""What a set of heads is worth on prompts and seeds that the search has not seen.

The best of many candidates looks better on the pairs that it was chosen on than it is. So each prefix of the set, in
the order in which heads were found, is scored on other pairs, beside the layer that is best as a whole. A whole layer
moves more than a few heads do, so it may also be perturbed less than they are.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any

from ..errors import ControlError
from ..headset import HeadSet
from ..metrics.stats import metric
from .sampler import Head, Pair
from .scores import Scorer

__all__ = ["best_layer", "confirm", "prefixes"]


def prefixes(heads: HeadSet, sizes: Sequence[int] | None = None) -> list[HeadSet]:
    """The first heads of a set: of each number, or of these.

    Raises:
        ControlError: for numbers that it does not have.
    """
    count = len(heads.heads)
    wanted = range(1, count + 1) if sizes is None else sorted(set(sizes))
    if any(not 1 <= size <= count for size in wanted):
        raise ControlError(f"Prefixes of a set of {count} heads have 1 to {count}; found {list(wanted)}.")
    return [heads.first(size) for size in wanted]


LAYER_SHARES = (1.0, 0.5, 0.25)
"""Of the set's strength, at which a whole layer is tried."""


def best_layer(
    scorer: Scorer, heads: HeadSet, pairs: Sequence[Pair], shares: Sequence[float] = LAYER_SHARES
) -> HeadSet:
    """All heads of the layer that scores best on these pairs, at the best of `shares` of the set's strength.

    Of equal ones it is the first.
    """
    layers: dict[str, list[Head]] = {}
    for layer, head in scorer.sampler.heads:
        layers.setdefault(layer, []).append((layer, head))
    strength = heads.strongest if isinstance(heads.strength, tuple) else heads.strength
    sets = [
        heads.changed(heads=tuple(one), strength=share * strength, search=None)
        for share in shares
        for one in layers.values()
    ]
    scorer.total += len(sets) * len(pairs)
    table = [scorer.scores(sets, pair) for pair in pairs]
    means = [math.fsum(column) for column in zip(*table, strict=True)]
    return sets[means.index(max(means))]


def confirm(
    scorer: Scorer,
    heads: HeadSet,
    pairs: Sequence[Pair],
    others: Mapping[str, HeadSet] | None = None,
    sizes: Sequence[int] | None = None,
) -> dict[str, Any]:
    """Scores on held-out pairs.

    Args:
        scorer: with the objectives of the search, or others.
        heads: the set that was found.
        pairs: other ones than those of the search.
        others: further sets by name, such as that of `best_layer`.
        sizes: of the prefixes; None for each number of heads.

    Returns:
        "rows": name, number of heads, and mean, difference to no perturbation and its 95 % interval over the pairs, as
        `attnctrl.metrics.stats.metric` gives them; "over": the same difference and interval to each of `others`.
        "best", the number of heads of the best prefix, the smaller of equal ones; "pairs".

    Raises:
        ControlError: without pairs.
    """
    if not pairs:
        raise ControlError("A confirmation needs pairs that the search has not seen; found none.")
    first = {f"first {len(one.heads)}": one for one in prefixes(heads, sizes)}
    sets = {"none": heads.first(0), **first, **(others or {})}
    scorer.total += len(sets) * len(pairs)
    table = [scorer.scores(list(sets.values()), pair) for pair in pairs]
    columns = dict(zip(sets, zip(*table, strict=True), strict=True))
    rows = [
        {
            "name": name,
            "heads": len(one.heads),
            **metric(columns["none"], columns[name]),
            "over": {other: _over(columns[other], columns[name]) for other in others or {}},
        }
        for name, one in sets.items()
    ]
    means = {len(one.heads): math.fsum(columns[name]) for name, one in first.items()}
    best = max(means, key=lambda size: (means[size], -size))
    return {"pairs": len(pairs), "best": best, "rows": rows}


def _over(other: Sequence[float], own: Sequence[float]) -> dict[str, Any]:
    found = metric(other, own)
    return {name: found[name] for name in ("delta", "ci95")}
