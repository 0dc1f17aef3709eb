"""What training and the suites need to know of a toy model: its parts, its noise, and one call of its denoiser."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from ..data import pack, unpack

Hear = tuple[nn.Module, Callable[[Any], Tensor]]
"""A layer whose output the teachers read, and how to take tokens [B, T, C] from it."""


@dataclass(frozen=True)
class Conditions:
    """What a denoiser is told: captions, tokens of the text encoder with free length, the grid of image tokens, and
    tokens of a reference picture [B, R, 64] or None.
    """

    captions: list[str]
    length: int
    grid: tuple[int, int]
    reference: Tensor | None = None


@dataclass(frozen=True)
class Noise:
    """How clean and noise are mixed and what the denoiser predicts; every argument has the shape [B, T, C], times [B].

    Attributes:
        times: (count, generator) to float times as `mix` and `target` want them.
        mix: (clean, noise, times) to what the denoiser sees.
        target: (clean, noise, times) to what it should answer.
    """

    times: Callable[[int, torch.Generator], Tensor]
    mix: Callable[[Tensor, Tensor, Tensor], Tensor]
    target: Callable[[Tensor, Tensor, Tensor], Tensor]


@dataclass(frozen=True)
class Recipe:
    """A toy model.

    Attributes:
        name: "toy-flux" and the like.
        pipeline: vae (or None for a random one) to a whole pipeline, randomly initialised from the global RNG.
        trained: names of the components that learn, the denoiser first.
        noise: pipeline to its noise.
        predict: (pipeline, noisy tokens [B, T, 64], times [B], conditions) to the prediction [B, T, 64].
        hear: pipeline to the layers that the teachers read, with the width of each.
        silent: which of the denoiser's weights start at zero, by name.
        references: it is also shown reference pictures.
        settings: contents of attnctrl.json: the values the pipeline wants to be called with.
    """

    name: str
    pipeline: Callable[[Any], Any]
    trained: tuple[str, ...]
    noise: Callable[[Any], Noise]
    predict: Callable[[Any, Tensor, Tensor, Conditions], Tensor]
    hear: Callable[[Any], list[tuple[Hear, int]]]
    silent: Callable[[str], bool]
    references: bool = False
    settings: dict[str, Any] = field(default_factory=dict)


SETTINGS: dict[str, Any] = {
    "size": [64, 64], "steps": 20, "negative_prompt": "", "auto_resize": False, "token_pixels": 8,
}  # fmt: skip
"""Settings that the toy models share."""


def rectified_flow(_pipeline: Any) -> Noise:
    """Straight paths: x = (1 - sigma) clean + sigma noise, velocity noise - clean; sigma is logistic-normal."""
    return Noise(
        times=lambda count, generator: torch.sigmoid(torch.randn(count, generator=generator) + 0.4),
        mix=lambda clean, noise, sigma: torch.lerp(clean, noise, sigma[:, None, None]),
        target=lambda clean, noise, _sigma: noise - clean,
    )


def v_prediction(pipeline: Any) -> Noise:
    """Diffusion with the scheduler's own levels, v = sqrt(a) noise - sqrt(1 - a) clean (Salimans and Ho, 2022)."""
    kept: Tensor = pipeline.scheduler.alphas_cumprod.float()

    def parts(times: Tensor) -> tuple[Tensor, Tensor]:
        level = kept[times.long()][:, None, None]
        return level.sqrt(), (1 - level).sqrt()

    def mix(clean: Tensor, noise: Tensor, times: Tensor) -> Tensor:
        signal, sigma = parts(times)
        return signal * clean + sigma * noise

    def target(clean: Tensor, noise: Tensor, times: Tensor) -> Tensor:
        signal, sigma = parts(times)
        return signal * noise - sigma * clean

    return Noise(lambda count, generator: torch.randint(len(kept), (count,), generator=generator).float(), mix, target)


def on_latents(denoise: Callable[[Tensor], Tensor], tokens: Tensor, grid: tuple[int, int]) -> Tensor:
    """Calls a denoiser of latents [B, C, H, W] on tokens [B, T, 4C]."""
    return pack(denoise(unpack(tokens, grid)))


def second(output: Any) -> Tensor:
    """The image stream of a joint block, which returns (text, image)."""
    return output[1]


def flat(output: Any) -> Tensor:
    """Tokens of a convolutional layer's output [B, C, H, W], as a tuple or a Diffusers output."""
    features: Tensor = output[0] if isinstance(output, tuple) else output.sample
    return features.flatten(2).mT
