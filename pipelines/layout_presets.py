"""Named stacks of controls for layouts: from the regions of each sample to what acts on them."""

from __future__ import annotations

from collections.abc import Callable, Sequence

from attnctrl.controls import Control, Isolate, Regions
from attnctrl.region import Overlap, Region

__all__ = ["PRESETS", "Preset"]

Preset = Callable[[Sequence[Sequence[Region]], Overlap], list[Control]]
"""(regions of each sample, what becomes of tokens in several of them) -> controls."""


def _default(regions: Sequence[Sequence[Region]], overlap: Overlap) -> list[Control]:
    """Each region reads its own text and reference, and regions are parted while the picture takes shape."""
    return [Regions(regions, overlap=overlap), Isolate(window=(0.0, 0.5), background="shared")]


PRESETS: dict[str, Preset] = {"default": _default}
"""Stacks by name; each gets one list of regions per sample."""
