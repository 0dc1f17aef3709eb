"""What can be measured on pictures, and how results are compared: functions on arrays and on what detectors find."""

from __future__ import annotations

from .consistency import auc, auc_metric, identity_similarity, set_consistency
from .detections import Detector, Embed, Wanted, assign, measure_layout
from .layout import Detection, background_similarity, fill_ratio, inclusion_ratio, pixel_box, seam
from .stats import Interval, Metric, bootstrap_interval, metric, paired_interval, result, set_metric

__all__ = [
    "Detection",
    "Detector",
    "Embed",
    "Interval",
    "Metric",
    "Wanted",
    "assign",
    "auc",
    "auc_metric",
    "background_similarity",
    "bootstrap_interval",
    "fill_ratio",
    "identity_similarity",
    "inclusion_ratio",
    "measure_layout",
    "metric",
    "paired_interval",
    "pixel_box",
    "result",
    "seam",
    "set_consistency",
    "set_metric",
]
