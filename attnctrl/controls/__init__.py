"""Controls: one short file a method family."""

from __future__ import annotations

from .base import CONTROLS, Control
from .harmony import Harmonize
from .inject import Inject
from .isolation import Isolate
from .keep import Keep
from .lamic import GroupIsolation, RegionModulation
from .nag import NAG
from .perturb import Perturb
from .queries import PlainQueries
from .region import OpenTexts, Regions
from .reposition import Reposition
from .reuse import Reuse
from .sharing import Share
from .skip import Skip
from .style import ShareStyle

__all__ = [
    "CONTROLS",
    "NAG",
    "Control",
    "GroupIsolation",
    "Harmonize",
    "Inject",
    "Isolate",
    "Keep",
    "OpenTexts",
    "Perturb",
    "PlainQueries",
    "RegionModulation",
    "Regions",
    "Reposition",
    "Reuse",
    "Share",
    "ShareStyle",
    "Skip",
]
