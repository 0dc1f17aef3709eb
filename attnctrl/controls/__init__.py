"""Controls: one short file a method family."""

from __future__ import annotations

from .base import CONTROLS, Control
from .isolation import Isolate
from .region import Regions

__all__ = ["CONTROLS", "Control", "Isolate", "Regions"]
