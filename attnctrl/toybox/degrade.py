"""What generation does to a picture, done to renders: blur, the VAE's round trip, a colour shift, noise.

A scorer that is exact on renders may still fail on generated pictures; on renders that are spoilt like these the truth
is known.
"""

from __future__ import annotations

from typing import Any

import numpy as np
from scipy import ndimage

KINDS = ("blur", "vae", "shift", "noise")
"""In the order in which they are applied together: noise comes last, so that nothing smooths it."""
ALL = "degraded"
"""Name of all `KINDS` together."""
BLUR_SIGMA = 0.7
"""Pixels."""
SHIFT = 8.0
"""Most levels of 255 by which a channel of a whole picture is moved, up or down."""
NOISE_SIGMA = 6.0
"""Levels of 255, independent for every pixel and channel."""
_BATCH = 32


def blur(images: np.ndarray) -> np.ndarray:
    """Gaussian blur by `BLUR_SIGMA` within each picture uint8 [N, H, W, 3]."""
    return _to_bytes(ndimage.gaussian_filter(images.astype(np.float32), (0, BLUR_SIGMA, BLUR_SIGMA, 0)))


def shift(images: np.ndarray, rng: np.random.Generator) -> np.ndarray:
    """Every channel of every picture uint8 [N, H, W, 3] moved by its own step, uniform within +-`SHIFT`."""
    return _to_bytes(images + rng.uniform(-SHIFT, SHIFT, (len(images), 1, 1, 3)))


def noise(images: np.ndarray, rng: np.random.Generator) -> np.ndarray:
    """Normal noise of `NOISE_SIGMA` on pictures uint8 [N, H, W, 3]."""
    return _to_bytes(images + rng.normal(0, NOISE_SIGMA, images.shape))


def round_trip(images: np.ndarray, vae: Any) -> np.ndarray:
    """Pictures uint8 [N, H, W, 3] encoded and decoded by an `AutoencoderKL`, by the posterior's mode."""
    import torch

    from .vae import images_to_tensor

    out = []
    with torch.no_grad():
        for start in range(0, len(images), _BATCH):
            x = images_to_tensor(images[start : start + _BATCH]).to(vae.device, vae.dtype)
            y = vae.decode(vae.encode(x).latent_dist.mode()).sample
            out.append(y.float().add(1).mul(127.5).permute(0, 2, 3, 1).cpu().numpy())
    return _to_bytes(np.concatenate(out))


def degrade(images: np.ndarray, kind: str, rng: np.random.Generator, vae: Any) -> np.ndarray:
    """Spoil pictures.

    Args:
        images: uint8 [N, H, W, 3], N at least 1; sides that the VAE can halve.
        kind: one of `KINDS`, or `ALL`.
        rng: equal generators give equal pictures.
        vae: the model's `AutoencoderKL`; used by "vae" and `ALL` only.

    Returns:
        uint8 [N, H, W, 3], new.

    Raises:
        ValueError: `kind` is unknown.
    """
    if kind not in (*KINDS, ALL):
        raise ValueError(f"pictures are spoilt by one of {', '.join((*KINDS, ALL))}; asked for '{kind}'.")
    for step in KINDS if kind == ALL else (kind,):
        if step == "blur":
            images = blur(images)
        elif step == "vae":
            images = round_trip(images, vae)
        elif step == "shift":
            images = shift(images, rng)
        else:
            images = noise(images, rng)
    return images


def _to_bytes(values: np.ndarray) -> np.ndarray:
    return np.clip(np.rint(values), 0, 255).astype(np.uint8)
