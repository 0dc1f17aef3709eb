"""Controls: one short file a method family."""

from __future__ import annotations

from .base import CONTROLS, Control
from .harmony import Harmonize
from .isolation import Isolate
from .lamic import GroupIsolation, RegionModulation
from .perturb import Perturb
from .region import OpenTexts, Regions
from .sharing import Share

__all__ = [
    "CONTROLS",
    "Control",
    "GroupIsolation",
    "Harmonize",
    "Isolate",
    "OpenTexts",
    "Perturb",
    "RegionModulation",
    "Regions",
    "Share",
]
