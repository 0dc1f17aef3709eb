"""Tiny random pipelines of the real classes: Stable Diffusion, XL and 3, with the toy world's tokenizers."""

from __future__ import annotations

from typing import Any

import torch
from diffusers import (
    AutoencoderKL,
    DDIMScheduler,
    FlowMatchEulerDiscreteScheduler,
    SD3Transformer2DModel,
    StableDiffusion3Pipeline,
    StableDiffusionPipeline,
    StableDiffusionXLPipeline,
    UNet2DConditionModel,
)
from tiny import UNET_SIZES

from attnctrl.toybox import text
from attnctrl.toybox.models.flux import TINY_FLUX

WIDTH = 32


def _vae() -> AutoencoderKL:
    return AutoencoderKL(**{**TINY_FLUX.vae, "latent_channels": 4})


def _ready(pipe: Any) -> Any:
    for module in pipe.components.values():
        if isinstance(module, torch.nn.Module):
            module.eval().requires_grad_(False)
    pipe.set_progress_bar_config(disable=True)
    return pipe


def _unet(width: int, **more: Any) -> UNet2DConditionModel:
    return UNet2DConditionModel(cross_attention_dim=width, **UNET_SIZES, **more)


def sd(seed: int = 0) -> StableDiffusionPipeline:
    """A UNet of two levels, the finer one with 4 x 6 latents for 16 x 24 pixels."""
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        clip = text.clip_tokenizer()
        encoder = text.clip_encoder(clip, width=WIDTH, layers=1)
        pipe = StableDiffusionPipeline(
            unet=_unet(WIDTH),
            vae=_vae(),
            text_encoder=encoder,
            tokenizer=clip,
            scheduler=DDIMScheduler(steps_offset=1, clip_sample=False),
            safety_checker=None,
            feature_extractor=None,
            requires_safety_checker=False,
        )
    return _ready(pipe)


def sdxl(seed: int = 0) -> StableDiffusionXLPipeline:
    """The same UNet with XL's added conditions, and two CLIP encoders side by side."""
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        clip = text.clip_tokenizer()
        added = {"addition_embed_type": "text_time", "addition_time_embed_dim": 8}
        unet = _unet(WIDTH, projection_class_embeddings_input_dim=6 * 8 + WIDTH // 2, **added)
        pipe = StableDiffusionXLPipeline(
            vae=_vae(),
            text_encoder=text.clip_encoder(clip, width=WIDTH // 2, layers=2),
            tokenizer=clip,
            text_encoder_2=text.clip_encoder(clip, width=WIDTH // 2, layers=2, projection=True),
            tokenizer_2=clip,
            unet=unet,
            scheduler=DDIMScheduler(steps_offset=1, clip_sample=False),
            add_watermarker=False,
        )
    return _ready(pipe)


def sd3(seed: int = 0, *, with_t5: bool = True) -> StableDiffusion3Pipeline:
    """Two joint blocks, the first one dual; two CLIP encoders and T5."""
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        clip, t5 = text.clip_tokenizer(), text.t5_tokenizer()
        transformer = SD3Transformer2DModel(
            sample_size=8,
            patch_size=2,
            in_channels=4,
            num_layers=2,
            attention_head_dim=16,
            num_attention_heads=2,
            joint_attention_dim=WIDTH,
            caption_projection_dim=32,
            pooled_projection_dim=32,
            out_channels=4,
            pos_embed_max_size=16,
            dual_attention_layers=(0,),
            qk_norm="rms_norm",
        )
        torch.nn.init.normal_(transformer.proj_out.weight, std=0.3)
        pipe = StableDiffusion3Pipeline(
            transformer=transformer,
            scheduler=FlowMatchEulerDiscreteScheduler(shift=3.0),
            vae=_vae(),
            text_encoder=text.clip_encoder(clip, width=16, layers=1, projection=True),
            tokenizer=clip,
            text_encoder_2=text.clip_encoder(clip, width=16, layers=1, projection=True),
            tokenizer_2=clip,
            text_encoder_3=text.t5_encoder(t5, width=WIDTH, layers=1) if with_t5 else None,
            tokenizer_3=t5 if with_t5 else None,
        )
    return _ready(pipe)
