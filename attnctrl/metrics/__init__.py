"""What can be measured on pictures, and how results are compared: pure functions on arrays."""

from __future__ import annotations

from .layout import background_similarity, fill_ratio, inclusion_ratio, pixel_box, seam
from .stats import Interval, Metric, bootstrap_interval, metric, paired_interval, result

__all__ = [
    "Interval",
    "Metric",
    "background_similarity",
    "bootstrap_interval",
    "fill_ratio",
    "inclusion_ratio",
    "metric",
    "paired_interval",
    "pixel_box",
    "result",
    "seam",
]
