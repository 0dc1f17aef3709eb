"""Comparing paired measurements: bootstrap intervals, and the one form in which all suites give their results."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any, Literal

import numpy as np

Interval = tuple[float, float]
Better = Literal["higher", "lower"]
Metric = dict[str, Any]

DRAWS = 2000
SET_DRAWS = 500
"""Of numbers that take longer."""
_SEED = 20240


def bootstrap_interval(values: Sequence[float], draws: int = DRAWS, seed: int = _SEED) -> Interval:
    """95 % percentile interval of the mean (Efron 1979): samples are drawn with replacement, `draws` times.

    Args:
        values: one for each independent sample; at least one.
        draws: resamples.
        seed: of the resampling, so that equal values give equal intervals.

    Raises:
        ValueError: There are no values.
    """
    data = np.asarray(values, dtype=float)
    if data.ndim != 1 or not data.size:
        raise ValueError(f"an interval needs a list of one value or more; found shape {data.shape}.")
    chosen = np.random.default_rng(seed).integers(0, data.size, size=(draws, data.size))
    low, high = np.quantile(data[chosen].mean(axis=1), (0.025, 0.975))
    return float(low), float(high)


def paired_interval(
    vanilla: Sequence[float], controlled: Sequence[float], draws: int = DRAWS, seed: int = _SEED
) -> Interval:
    """95 % bootstrap interval of the mean of controlled - vanilla; pairs are drawn whole.

    Raises:
        ValueError: The two are not equally many, or none.
    """
    if len(vanilla) != len(controlled):
        raise ValueError(f"pairs are compared; found {len(vanilla)} values without and {len(controlled)} with control.")
    return bootstrap_interval(np.subtract(controlled, vanilla, dtype=float).tolist(), draws, seed)


def metric(vanilla: Sequence[float], controlled: Sequence[float] | None = None, better: Better = "higher") -> Metric:
    """One entry of a result: means, difference and interval.

    Args:
        vanilla: a value for each sample.
        controlled: the same samples with control, in the same order. None where nothing is controlled: then
            `controlled` and `delta` are null and `ci95` is that of the vanilla mean.
        better: the direction of improvement.
    """
    plain = float(np.mean(vanilla))
    if controlled is None:
        ci95 = list(bootstrap_interval(vanilla))
        return {"vanilla": plain, "controlled": None, "delta": None, "ci95": ci95, "better": better}
    ci95 = list(paired_interval(vanilla, controlled))
    steered = float(np.mean(controlled))
    return {"vanilla": plain, "controlled": steered, "delta": steered - plain, "ci95": ci95, "better": better}


def set_metric(
    statistic: Callable[[Sequence[Any]], float],
    vanilla: Sequence[Any],
    controlled: Sequence[Any] | None = None,
    better: Better = "higher",
    draws: int = SET_DRAWS,
) -> Metric:
    """As `metric`, for a number that only a whole set of samples has.

    The interval is the percentile bootstrap of the number, or of its difference, over samples drawn with replacement;
    with and without control the same ones are drawn.

    Args:
        statistic: samples -> the number; a drawn sample may be there several times, as the same object.
        vanilla, controlled, better: as of `metric`, samples of any kind.
        draws: resamples.
    """
    plain = statistic(vanilla)
    steered = None if controlled is None else statistic(controlled)
    chosen = np.random.default_rng(_SEED).integers(0, len(vanilla), size=(draws, len(vanilla)))
    values = [
        statistic([vanilla[i] for i in one])
        if controlled is None
        else statistic([controlled[i] for i in one]) - statistic([vanilla[i] for i in one])
        for one in chosen
    ]
    low, high = np.quantile(values, (0.025, 0.975))
    delta = None if steered is None else steered - plain
    ci95 = [float(low), float(high)]
    return {"vanilla": plain, "controlled": steered, "delta": delta, "ci95": ci95, "better": better}


def result(suite: str, model: str, n: int, seconds: float, metrics: Mapping[str, Metric]) -> dict[str, Any]:
    """What a suite returns. `n`: samples or pairs behind each metric."""
    return {"suite": suite, "model": model, "n": n, "seconds": round(seconds, 3), "metrics": dict(metrics)}
