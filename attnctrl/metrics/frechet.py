"""Frechet distance of two sets of features (Heusel et al., 2017, eq. 6), which for Inception features is the FID."""

from __future__ import annotations

import numpy as np


def frechet_distance(features: np.ndarray, other: np.ndarray) -> float:
    """|m - m'|^2 + tr(C + C' - 2 (C C')^(1/2)) of two samples [N, D] and [M, D], at least two rows each; >= 0.

    The trace of the root is the sum of the square roots of the eigenvalues of C^(1/2) C' C^(1/2), which are real.

    Raises:
        ValueError: Features differ in number, or there are too few samples.
    """
    if (
        features.ndim != 2
        or other.ndim != 2
        or features.shape[1] != other.shape[1]
        or min(len(features), len(other)) < 2
    ):
        raise ValueError(
            f"two samples [N, D] of at least two rows are compared; found {features.shape}, {other.shape}."
        )
    first, second = np.cov(features, rowvar=False), np.cov(other, rowvar=False)
    first, second = np.atleast_2d(first), np.atleast_2d(second)
    root = _root(first)
    cross = np.sqrt(np.clip(np.linalg.eigvalsh(root @ second @ root), 0, None)).sum()
    shift = features.mean(0) - other.mean(0)
    return max(0.0, float(shift @ shift + np.trace(first) + np.trace(second) - 2 * cross))


def _root(matrix: np.ndarray) -> np.ndarray:
    values, vectors = np.linalg.eigh(matrix)
    return (vectors * np.sqrt(np.clip(values, 0, None))) @ vectors.T
