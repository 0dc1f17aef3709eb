"""Pictures of maps: heat over the image it belongs to, and a sheet of them."""

from __future__ import annotations

from collections.abc import Mapping

import numpy as np
from PIL import Image
from torch import Tensor

from ..errors import LayoutError
from ..pictures import grid
from .masks import minmax

__all__ = ["legend", "overlay"]

# dark violet over red to pale yellow: brightness alone tells the order
_SHADES = np.array([(13, 8, 60), (90, 18, 110), (187, 55, 84), (249, 142, 9), (252, 255, 164)], dtype=float)


def overlay(image: Image.Image, heat: Tensor, opacity: float = 0.65) -> Image.Image:
    """The image in gray under the colours of a map.

    Args:
        image: the picture that was drawn.
        heat: [h, w]; stretched to its own least and greatest value.
        opacity: of the colours, in [0, 1].

    Raises:
        LayoutError: when the map is not [h, w].
    """
    if heat.ndim != 2:
        raise LayoutError(f"overlay draws one map [h, w]; found {tuple(heat.shape)}. Take one row of found[name].")
    levels = minmax(heat).cpu().numpy()
    smooth = Image.fromarray(levels).resize(image.size, Image.Resampling.BILINEAR)
    colors = Image.fromarray(_colored(np.asarray(smooth)))
    return Image.blend(image.convert("L").convert("RGB"), colors, opacity)


def legend(image: Image.Image, heats: Mapping[str, Tensor], label: str = "", side: int = 256) -> Image.Image:
    """The image and, beside it, its overlays, each under its name with the greatest value of its map.

    Args:
        image: the picture that was drawn.
        heats: name -> [h, w].
        label: of the row.
        side: longer side of each picture in pixels.
    """
    names = [f"{name} (to {float(heat.max()):.3f})" for name, heat in heats.items()]
    return grid([[image, *(overlay(image, heat) for heat in heats.values())]], [label], ["picture", *names], side=side)


def _colored(levels: np.ndarray) -> np.ndarray:
    """uint8 [H, W, 3] of levels [H, W] in [0, 1]."""
    stops = np.linspace(0, 1, len(_SHADES))
    return np.stack([np.interp(levels, stops, _SHADES[:, c]) for c in range(3)], axis=-1).round().astype(np.uint8)
