"""A reference without inversion: the picture and one fixed noise, mixed anew at every level.

A map g says how noisy the reference is where the target has the level sigma: the same, or cleaner so that its detail is
read early, as in FreeCus (Zhang et al., arXiv 2507.15249), whose reference runs with the resolution shift turned round.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable
from math import hypot, sqrt

import torch
from torch import Tensor

__all__ = ["Map", "diffusion_shares", "flow_shares", "noised", "odds_map"]

Map = Callable[[float], float]
"""sigma of the target -> sigma of the reference, both in [0, 1]."""


def odds_map(mu: float) -> Map:
    """odds(g) = exp(-2 mu) odds(sigma) with odds(x) = x / (1 - x): the shift +mu of the target, -mu in the reference.

    0 and 1 stay; mu = 0 is the identity; the larger mu, the cleaner the reference.
    """
    factor = math.exp(-2 * mu)
    return lambda sigma: factor * sigma / (factor * sigma + (1 - sigma))


def flow_shares(sigmas: Iterable[float], g: Map = lambda sigma: sigma) -> list[tuple[float, float]]:
    """(picture, noise) shares of flow models: (1 - g, g) at each sigma."""
    return [(1 - level, level) for level in map(g, sigmas)]


def diffusion_shares(kept: Iterable[float], g: Map = lambda sigma: sigma) -> list[tuple[float, float]]:
    """(picture, noise) shares of diffusion models: (sqrt(kept), sqrt(1 - kept)) at each of their alphas_cumprod.

    g maps the flow level of the same odds of noise to picture, sqrt((1 - kept) / kept) = sigma / (1 - sigma).
    """
    levels = [g(sqrt(1 - level) / (sqrt(level) + sqrt(1 - level))) for level in kept]
    return [((1 - level) / hypot(1 - level, level), level / hypot(1 - level, level)) for level in levels]


def noised(clean: Tensor, noise: Tensor, shares: Iterable[tuple[float, float]]) -> Tensor:
    """Trajectory [levels, *shape of clean] of picture and noise in these shares.

    Args:
        clean, noise: latents of one shape; the noise is drawn once, by the caller's generator.
        shares: of picture and noise, from `flow_shares` or `diffusion_shares`.
    """
    return torch.stack([picture * clean + share * noise for picture, share in shares])
