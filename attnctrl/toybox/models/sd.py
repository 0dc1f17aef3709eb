"""toy-sd: a small Stable Diffusion, a UNet with self- and cross-attention at three levels and a CLIP."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

from diffusers import AutoencoderKL, DDIMScheduler, StableDiffusionPipeline, UNet2DConditionModel
from torch import Tensor

from .. import text
from ..vae import CONFIG as VAE_CONFIG
from .base import SETTINGS, Conditions, Hear, Recipe, flat, on_latents, v_prediction


@dataclass(frozen=True)
class SDSizes:
    """The parts of a toy Stable Diffusion that may vary; `head_dim` channels a head at every level."""

    channels: tuple[int, int, int] = (64, 96, 128)
    layers: int = 1
    head_dim: int = 32
    text_width: int = 128
    text_layers: int = 3
    vae: dict[str, Any] = field(default_factory=lambda: dict(VAE_CONFIG))


TOY_SD = SDSizes()


def ddim_scheduler() -> DDIMScheduler:
    """Velocity prediction on Stable Diffusion's levels, the last of which is pure noise (Lin et al., 2024)."""
    return DDIMScheduler(
        beta_start=0.00085, beta_end=0.012, beta_schedule="scaled_linear", clip_sample=False, set_alpha_to_one=True,
        prediction_type="v_prediction", timestep_spacing="trailing", rescale_betas_zero_snr=True, steps_offset=1,
    )  # fmt: skip


def sd_pipeline(sizes: SDSizes = TOY_SD, vae: AutoencoderKL | None = None) -> StableDiffusionPipeline:
    """A whole pipeline, all parts random but for the VAE that is handed in (global RNG: seed it before)."""
    clip = text.clip_tokenizer()
    unet = UNet2DConditionModel(
        sample_size=16, in_channels=sizes.vae["latent_channels"], out_channels=sizes.vae["latent_channels"],
        block_out_channels=sizes.channels, layers_per_block=sizes.layers, cross_attention_dim=sizes.text_width,
        down_block_types=("CrossAttnDownBlock2D",) * 3, up_block_types=("CrossAttnUpBlock2D",) * 3,
        attention_head_dim=tuple(c // sizes.head_dim for c in sizes.channels), use_linear_projection=True,
    )  # fmt: skip
    return StableDiffusionPipeline(
        unet=unet, scheduler=ddim_scheduler(), vae=vae if vae is not None else AutoencoderKL(**sizes.vae),
        text_encoder=text.clip_encoder(clip, sizes.text_width, sizes.text_layers), tokenizer=clip,
        safety_checker=None, feature_extractor=None, requires_safety_checker=False,
    )  # fmt: skip


def _predict(pipe: StableDiffusionPipeline, noisy: Tensor, times: Tensor, told: Conditions) -> Tensor:
    prompt, _ = pipe.encode_prompt(told.captions, noisy.device, 1, False)
    return on_latents(
        lambda latents: pipe.unet(latents, times, encoder_hidden_states=prompt, return_dict=False)[0], noisy, told.grid
    )


def _hear(pipe: StableDiffusionPipeline) -> list[tuple[Hear, int]]:
    """The middle level, whose positions are the tokens of the truth, on the way down and up."""
    layers = (pipe.unet.down_blocks[1].attentions[-1], pipe.unet.up_blocks[1].attentions[-1])
    return [((layer, flat), pipe.unet.config.block_out_channels[1]) for layer in layers]


RECIPE = Recipe(
    name="toy-sd",
    pipeline=lambda vae: sd_pipeline(vae=vae),
    trained=("unet", "text_encoder"),
    noise=v_prediction,
    predict=_predict,
    hear=_hear,
    silent=lambda name: name.startswith("conv_out") or ".conv2." in name or name.endswith("proj_out.weight"),
    settings={**SETTINGS, "guidance_scale": 3.0},
)
