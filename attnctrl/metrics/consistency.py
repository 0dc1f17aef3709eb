"""Are things the same as they were: similarity of embeddings, and how well an embedding tells same from different.

Embeddings are float [D] of unit length, so that similarities are cosines in [-1, 1].
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from .stats import DRAWS, Metric

_SEED = 20241


def identity_similarity(embedding: np.ndarray, other: np.ndarray) -> float:
    """Cosine of two embeddings, in [-1, 1].

    Raises:
        ValueError: One of them is zero, or they differ in length.
    """
    if embedding.shape != other.shape or embedding.ndim != 1:
        raise ValueError(f"embeddings of one length are compared; found {embedding.shape} and {other.shape}.")
    lengths = float(np.linalg.norm(embedding) * np.linalg.norm(other))
    if lengths == 0:
        raise ValueError("an embedding of zeros has no direction to compare.")
    return float(np.clip(embedding @ other / lengths, -1, 1))


def set_consistency(embeddings: Sequence[np.ndarray]) -> float:
    """Mean cosine over all pairs of a set, in [-1, 1].

    Raises:
        ValueError: There are fewer than two, or they cannot be compared; see `identity_similarity`.
    """
    if len(embeddings) < 2:
        raise ValueError(f"a set is consistent from two on; found {len(embeddings)}.")
    pairs = [(i, j) for i in range(len(embeddings)) for j in range(i)]
    return float(np.mean([identity_similarity(embeddings[i], embeddings[j]) for i, j in pairs]))


def auc(same: Sequence[float], other: Sequence[float]) -> float:
    """Probability that a similarity of a same pair exceeds that of a different one, ties half: the area under the ROC.

    Raises:
        ValueError: One of them is empty.
    """
    return float(_wins(same, other).mean())


def auc_metric(same: Sequence[float], other: Sequence[float]) -> Metric:
    """`auc` as one entry of a result. The interval is of a bootstrap over anchors: `same[i]` and `other[i]` are of one
    thing and are drawn together.

    Raises:
        ValueError: The two are not equally many, or none.
    """
    if len(same) != len(other):
        raise ValueError(f"each anchor has one pair of both kinds; found {len(same)} same and {len(other)} different.")
    wins = _wins(same, other)
    count = len(wins)
    chosen = np.random.default_rng(_SEED).multinomial(count, np.full(count, 1 / count), size=DRAWS)
    drawn = ((chosen @ wins) * chosen).sum(1) / count**2
    ci95 = [float(bound) for bound in np.quantile(drawn, (0.025, 0.975))]
    return {"vanilla": float(wins.mean()), "controlled": None, "delta": None, "ci95": ci95, "better": "higher"}


def _wins(same: Sequence[float], other: Sequence[float]) -> np.ndarray:
    """1 where same[i] > other[j], half where they are equal, float64 [S, O]."""
    if not len(same) or not len(other):
        raise ValueError(f"same and different pairs are compared; found {len(same)} and {len(other)}.")
    a, b = np.asarray(same, dtype=float)[:, None], np.asarray(other, dtype=float)[None]
    return (a > b) + 0.5 * (a == b)
