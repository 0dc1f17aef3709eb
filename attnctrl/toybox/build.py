"""Making the toy pipelines from the real Diffusers classes: sizes, assembly, and tiny random ones for tests."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

import torch
from diffusers import AutoencoderKL, FlowMatchEulerDiscreteScheduler, FluxPipeline, FluxTransformer2DModel

from . import text
from .vae import CONFIG as VAE_CONFIG


@dataclass(frozen=True)
class FluxSizes:
    """The parts of a toy FLUX that may vary. `axes`: channels of head_dim given to each RoPE axis (reference, y, x)."""

    heads: int = 5
    head_dim: int = 32
    axes: tuple[int, int, int] = (8, 12, 12)
    double_blocks: int = 2
    single_blocks: int = 4
    text_width: int = 128
    text_layers: int = 2
    vae: dict[str, Any] = field(default_factory=lambda: dict(VAE_CONFIG))


TOY_FLUX = FluxSizes()
TINY_FLUX = FluxSizes(
    heads=2, head_dim=16, axes=(4, 6, 6), double_blocks=2, single_blocks=2, text_width=32, text_layers=1,
    vae={**VAE_CONFIG, "block_out_channels": (8, 8, 8), "norm_num_groups": 4},
)  # fmt: skip


def flux_transformer(sizes: FluxSizes = TOY_FLUX) -> FluxTransformer2DModel:
    """A randomly initialised transformer (global RNG: seed it before)."""
    return FluxTransformer2DModel(
        patch_size=1, in_channels=4 * sizes.vae["latent_channels"], num_layers=sizes.double_blocks,
        num_single_layers=sizes.single_blocks, attention_head_dim=sizes.head_dim, num_attention_heads=sizes.heads,
        joint_attention_dim=sizes.text_width, pooled_projection_dim=sizes.text_width, guidance_embeds=False,
        axes_dims_rope=sizes.axes,
    )  # fmt: skip


def flux_scheduler() -> FlowMatchEulerDiscreteScheduler:
    """The rectified-flow scheduler of the toy models, with a constant shift for their few tokens."""
    return FlowMatchEulerDiscreteScheduler(num_train_timesteps=1000, shift=1.5, use_dynamic_shifting=False)


def flux_pipeline(sizes: FluxSizes = TOY_FLUX, vae: AutoencoderKL | None = None) -> FluxPipeline:
    """A whole pipeline, all parts random but for the VAE that is handed in (global RNG: seed it before)."""
    clip, t5 = text.clip_tokenizer(), text.t5_tokenizer()
    clip_model, t5_model = text.text_encoders(clip, t5, width=sizes.text_width, layers=sizes.text_layers)
    return FluxPipeline(
        scheduler=flux_scheduler(), vae=vae if vae is not None else AutoencoderKL(**sizes.vae), text_encoder=clip_model,
        tokenizer=clip, text_encoder_2=t5_model, tokenizer_2=t5, transformer=flux_transformer(sizes),
    )  # fmt: skip


def tiny_pipeline(seed: int = 0) -> FluxPipeline:
    """A random `FluxPipeline` of a few thousand weights for tests; the global RNG is left as it was."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        pipeline = flux_pipeline(TINY_FLUX)
    for module in (pipeline.transformer, pipeline.vae, pipeline.text_encoder, pipeline.text_encoder_2):
        module.eval().requires_grad_(False)
    pipeline.set_progress_bar_config(disable=True)
    return pipeline
