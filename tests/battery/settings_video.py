"""Settings of models with cross attention, and of films."""

from __future__ import annotations

from collections.abc import Callable

import tiny_video as tiny
import torch
from setting import Kinds, Setting


def pixart(seed: int = 0, *, batch: int = 1, dtype: torch.dtype = torch.float32) -> Setting:
    inputs = tiny.inputs(batch, 4, 8, 12, seed=seed, dtype=dtype)
    return Setting(tiny.pixart(dtype=dtype), inputs, [Kinds("image", "image"), Kinds("image", "text")] * 2)


FAMILIES: dict[str, Callable[..., Setting]] = {"pixart": pixart}
BRANCHES = {"PixArtTransformer2DModel": ("cond",)}
