"""toy-sd3: a small Stable Diffusion 3 with query and key norms and one dual-attention block, as SD3.5 medium has."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

from diffusers import AutoencoderKL, SD3Transformer2DModel, StableDiffusion3Pipeline
from torch import Tensor

from .. import text
from ..vae import CONFIG as VAE_CONFIG
from .base import SETTINGS, Conditions, Hear, Recipe, on_latents, rectified_flow, second
from .flux import flow_scheduler


@dataclass(frozen=True)
class SD3Sizes:
    """The parts of a toy SD3 that may vary; each CLIP has half of the width of the T5."""

    heads: int = 5
    head_dim: int = 32
    blocks: int = 6
    dual: tuple[int, ...] = (0,)
    text_width: int = 128
    text_layers: int = 2
    vae: dict[str, Any] = field(default_factory=lambda: dict(VAE_CONFIG))


TOY_SD3 = SD3Sizes()


def sd3_pipeline(sizes: SD3Sizes = TOY_SD3, vae: AutoencoderKL | None = None) -> StableDiffusion3Pipeline:
    """A whole pipeline, all parts random but for the VAE that is handed in (global RNG: seed it before)."""
    clip, t5 = text.clip_tokenizer(), text.t5_tokenizer()
    half = sizes.text_width // 2
    transformer = SD3Transformer2DModel(
        sample_size=16, patch_size=2, in_channels=sizes.vae["latent_channels"], num_layers=sizes.blocks,
        attention_head_dim=sizes.head_dim, num_attention_heads=sizes.heads, joint_attention_dim=sizes.text_width,
        caption_projection_dim=sizes.heads * sizes.head_dim, pooled_projection_dim=sizes.text_width,
        out_channels=sizes.vae["latent_channels"], pos_embed_max_size=24, dual_attention_layers=sizes.dual,
        qk_norm="rms_norm",
    )  # fmt: skip
    return StableDiffusion3Pipeline(
        transformer=transformer, scheduler=flow_scheduler(),
        vae=vae if vae is not None else AutoencoderKL(**sizes.vae),
        text_encoder=text.clip_encoder(clip, half, sizes.text_layers, projection=True), tokenizer=clip,
        text_encoder_2=text.clip_encoder(clip, half, sizes.text_layers, projection=True), tokenizer_2=clip,
        text_encoder_3=text.t5_encoder(t5, sizes.text_width, sizes.text_layers), tokenizer_3=t5,
    )  # fmt: skip


def _predict(pipe: StableDiffusion3Pipeline, noisy: Tensor, sigma: Tensor, told: Conditions) -> Tensor:
    prompt, _, pooled, _ = pipe.encode_prompt(
        told.captions, None, None, do_classifier_free_guidance=False, max_sequence_length=told.length
    )
    return on_latents(
        lambda latents: pipe.transformer(
            hidden_states=latents, timestep=sigma * 1000, encoder_hidden_states=prompt, pooled_projections=pooled,
            return_dict=False,
        )[0],
        noisy,
        told.grid,
    )  # fmt: skip


def _hear(pipe: StableDiffusion3Pipeline) -> list[tuple[Hear, int]]:
    blocks = pipe.transformer.transformer_blocks
    third = max(1, len(blocks) // 3)
    return [((block, second), pipe.transformer.inner_dim) for block in (blocks[third - 1], blocks[2 * third - 1])]


RECIPE = Recipe(
    name="toy-sd3",
    pipeline=lambda vae: sd3_pipeline(vae=vae),
    trained=("transformer", "text_encoder", "text_encoder_2", "text_encoder_3"),
    noise=rectified_flow,
    predict=_predict,
    hear=_hear,
    silent=lambda name: ("norm" in name and "linear" in name) or name.startswith("proj_out"),
    settings={**SETTINGS, "guidance_scale": 5.0, "max_sequence_length": text.MAX_LENGTH},
)
