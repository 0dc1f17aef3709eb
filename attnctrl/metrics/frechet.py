"""Frechet distance of two sets of features (Heusel et al., 2017, eq. 6), which for Inception features is the FID."""

from __future__ import annotations

import numpy as np


def frechet_distance(features: np.ndarray, other: np.ndarray) -> float:
    """|m - m'|^2 + tr(C + C' - 2 (C C')^(1/2)) of two samples [N, D] and [M, D], at least two rows each; >= 0.

    With C = A^T A and C' = B^T B the trace of the root is the sum of the singular values of A B^T, so no matrix needs
    to be larger than the smaller of samples and features.

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
    first, second = _factor(features), _factor(other)
    cross = np.linalg.svd(first @ second.T, compute_uv=False).sum()
    shift = features.mean(0) - other.mean(0)
    return max(0.0, float(shift @ shift + (first**2).sum() + (second**2).sum() - 2 * cross))


def _factor(features: np.ndarray) -> np.ndarray:
    """A matrix [min(N, D), D] whose product with itself, A^T A, is the covariance of a sample [N, D]."""
    centred = (features - features.mean(0)) / np.sqrt(len(features) - 1)
    if len(centred) <= centred.shape[1]:
        return centred
    return np.asarray(np.linalg.qr(centred, mode="r"))
