"""Between pictures and the latents of a pipeline: sizes, the VAE's mean, packing; what differs is one table."""

from __future__ import annotations

import copy
import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from types import MappingProxyType
from typing import Any

import torch
from attnctrl.pipelines.base import canvas_of
from attnctrl.pipelines.references import load_reference
from torch import Tensor

from attnctrl.errors import LayoutError, UnsupportedModelError

__all__ = ["ADAPTERS", "Adapter", "Size", "decibels", "decode", "encode", "size_of", "squared_error"]

Size = tuple[int, int]
"""(width, height) in pixels."""


@dataclass(frozen=True)
class Adapter:
    """How a pipeline differs from the others, as far as inversion is concerned.

    Attributes:
        flow: it follows dz/dsigma = v; otherwise it is a diffusion model with alphas_cumprod.
        scheduler: the pipeline's own to one that lists the noise levels; never the same object.
        label: timesteps in the scheduler's unit to what the denoiser is told, of the same dtype.
        pack: (pipeline, latents [B, C, h, w]) to the form in which the denoiser gets them.
        unpack: (pipeline, latents in that form, size) to [B, C, h, w].
    """

    flow: bool
    scheduler: Callable[[Any], Any]
    label: Callable[[Tensor], Tensor] = lambda timestep: timestep
    pack: Callable[[Any, Tensor], Tensor] = lambda _pipe, latents: latents
    unpack: Callable[[Any, Tensor, Size], Tensor] = lambda _pipe, latents, _size: latents


def _flow_scheduler(scheduler: Any) -> Any:
    if type(scheduler).__name__ != "FlowMatchEulerDiscreteScheduler":
        raise UnsupportedModelError(
            "Flow models are inverted over the sigmas of FlowMatchEulerDiscreteScheduler; found "
            f"{type(scheduler).__name__}; give the pipeline that one (from_config) for the inversion."
        )
    return copy.deepcopy(scheduler)


def _diffusion_scheduler(scheduler: Any) -> Any:
    from diffusers import DDIMScheduler

    if not hasattr(scheduler, "alphas_cumprod") or scheduler.config.get("use_flow_sigmas"):
        raise UnsupportedModelError(
            f"DDIM inversion needs a scheduler with alphas_cumprod; found {type(scheduler).__name__}; give the "
            "pipeline a DDIMScheduler with the model's betas."
        )
    return DDIMScheduler.from_config(scheduler.config)


_DIFFUSION = Adapter(flow=False, scheduler=_diffusion_scheduler)
ADAPTERS: Mapping[str, Adapter] = MappingProxyType(
    {
        "FluxPipeline": Adapter(
            flow=True,
            scheduler=_flow_scheduler,
            label=lambda timestep: timestep / 1000,
            pack=lambda pipe, latents: pipe._pack_latents(latents, *latents.shape),
            unpack=lambda pipe, latents, size: pipe._unpack_latents(latents, size[1], size[0], pipe.vae_scale_factor),
        ),
        "StableDiffusion3Pipeline": Adapter(flow=True, scheduler=_flow_scheduler),
        "StableDiffusionPipeline": _DIFFUSION,
        "StableDiffusionXLPipeline": _DIFFUSION,
    }
)
"""By the pipeline's class."""


def size_of(pipe: Any, pictures: Sequence[Any]) -> Size:
    """The size that all pictures have. Raises `LayoutError` if they differ or the model cannot draw it."""
    sizes = sorted({one.size for one in pictures})
    if len(sizes) != 1:
        raise LayoutError(f"Pictures of one batch have one size; found {sizes or 'none'}; invert them one by one.")
    multiple = canvas_of(pipe).multiple
    if any(side % multiple or not side for side in sizes[0]):
        width, height = (max(multiple, side // multiple * multiple) for side in sizes[0])
        raise LayoutError(
            f"Width and height must be multiples of {multiple} for {type(pipe).__name__}; found {sizes[0][0]} x "
            f"{sizes[0][1]}; crop or resize the picture to {width} x {height}."
        )
    return sizes[0]


def read_pictures(pictures: Any) -> list[Any]:
    """RGB pictures from PIL pictures or paths, one or a list. Raises `AssetError`."""
    listed = pictures if isinstance(pictures, (list, tuple)) else [pictures]
    return [load_reference(one, f"picture {number}") for number, one in enumerate(listed)]


def encode(pipe: Any, adapter: Adapter, pictures: Sequence[Any]) -> Tensor:
    """Latents float32 [B, ...] of RGB pictures of one size, in the denoiser's form: the VAE's mode, not a draw."""
    width, height = pictures[0].size
    mean, std = _moments(pipe.vae.config)
    with _in_float32(pipe.vae) as vae, torch.no_grad():
        pixels = pipe.image_processor.preprocess(list(pictures), height, width)
        found: Tensor = vae.encode(pixels.to(pipe._execution_device, torch.float32)).latent_dist.mode()
    return adapter.pack(pipe, (found - mean.to(found)) / std.to(found))


def decode(pipe: Any, adapter: Adapter, latents: Tensor, size: Size) -> Tensor:
    """Pixels float32 [B, 3, height, width] in [0, 1] of latents in the denoiser's form."""
    mean, std = _moments(pipe.vae.config)
    found = adapter.unpack(pipe, latents.to(pipe._execution_device, torch.float32), size)
    with _in_float32(pipe.vae) as vae, torch.no_grad():
        pixels: Tensor = vae.decode(found * std.to(found) + mean.to(found), return_dict=False)[0]
    return (pixels.float() / 2 + 0.5).clamp(0, 1).cpu()


def squared_error(pixels: Tensor, pictures: Sequence[Any]) -> list[float]:
    """Mean squared error of each of pixels [B, 3, height, width] in [0, 1] to its picture."""
    from diffusers.image_processor import VaeImageProcessor

    wanted = VaeImageProcessor.numpy_to_pt(VaeImageProcessor.pil_to_numpy(list(pictures)))
    found: list[float] = (pixels.double() - wanted.double()).square().mean(dim=(1, 2, 3)).tolist()
    return found


def decibels(error: float) -> float:
    """PSNR of a mean squared error over [0, 1]; 100 at most, which no VAE reaches."""
    return -10 * math.log10(max(error, 1e-10))


def _moments(config: Any) -> tuple[Tensor, Tensor]:
    """(mean, standard deviation) [1, C or 1, 1, 1] of the VAE's own latents, whose whitened form denoisers see."""
    mean, std = getattr(config, "latents_mean", None), getattr(config, "latents_std", None)
    if mean is None or std is None:
        mean, std = [getattr(config, "shift_factor", None) or 0.0], [1.0]
    shift, scale = (torch.tensor(values, dtype=torch.float32).view(1, -1, 1, 1) for values in (mean, std))
    return shift, scale / config.scaling_factor


@contextmanager
def _in_float32(vae: Any) -> Iterator[Any]:
    """Half precision overflows in some VAEs; widening and narrowing again changes no weight."""
    before = vae.dtype
    if before == torch.float32:
        yield vae
        return
    try:
        yield vae.to(torch.float32)
    finally:
        vae.to(before)
