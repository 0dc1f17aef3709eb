"""What can be measured on pictures, and how results are compared: pure functions on arrays."""

from __future__ import annotations

from .consistency import auc, auc_metric, identity_similarity, set_consistency
from .layout import background_similarity, fill_ratio, inclusion_ratio, pixel_box, seam
from .stats import Interval, Metric, bootstrap_interval, metric, paired_interval, result

__all__ = [
    "Interval",
    "Metric",
    "auc",
    "auc_metric",
    "background_similarity",
    "bootstrap_interval",
    "fill_ratio",
    "identity_similarity",
    "inclusion_ratio",
    "metric",
    "paired_interval",
    "pixel_box",
    "result",
    "seam",
    "set_consistency",
]
