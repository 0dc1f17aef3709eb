"""toy-flux: a small FLUX that also follows one reference picture, as FLUX Kontext does."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

import torch
from diffusers import AutoencoderKL, FlowMatchEulerDiscreteScheduler, FluxPipeline, FluxTransformer2DModel
from torch import Tensor

from .. import text
from ..data import REFERENCE_SIZE, TOKEN_PIXELS
from ..vae import CONFIG as VAE_CONFIG
from .base import SETTINGS, Conditions, Hear, Recipe, rectified_flow, second


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


def flow_scheduler() -> FlowMatchEulerDiscreteScheduler:
    """The rectified-flow scheduler of the toy models, with a constant shift for their few tokens."""
    return FlowMatchEulerDiscreteScheduler(num_train_timesteps=1000, shift=1.5, use_dynamic_shifting=False)


def flux_pipeline(sizes: FluxSizes = TOY_FLUX, vae: AutoencoderKL | None = None) -> FluxPipeline:
    """A whole pipeline, all parts random but for the VAE that is handed in (global RNG: seed it before)."""
    clip, t5 = text.clip_tokenizer(), text.t5_tokenizer()
    return FluxPipeline(
        scheduler=flow_scheduler(), vae=vae if vae is not None else AutoencoderKL(**sizes.vae),
        text_encoder=text.clip_encoder(clip, sizes.text_width, sizes.text_layers), tokenizer=clip,
        text_encoder_2=text.t5_encoder(t5, sizes.text_width, sizes.text_layers), tokenizer_2=t5,
        transformer=flux_transformer(sizes),
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


def position_ids(rows: int, columns: int, picture: int = 0) -> Tensor:
    """FLUX's ids (picture, y, x) of a token grid, float32 [rows * columns, 3]; references carry picture = 1."""
    ids = torch.zeros(rows, columns, 3)
    ids[..., 0] = picture
    ids[..., 1] = torch.arange(rows)[:, None]
    ids[..., 2] = torch.arange(columns)[None]
    return ids.reshape(-1, 3)


def _predict(pipe: FluxPipeline, noisy: Tensor, sigma: Tensor, told: Conditions) -> Tensor:
    prompt, pooled, text_ids = pipe.encode_prompt(told.captions, None, max_sequence_length=told.length)
    hidden, ids = noisy, position_ids(*told.grid)
    if told.reference is not None:
        side = REFERENCE_SIZE // TOKEN_PIXELS
        hidden = torch.cat([hidden, told.reference], 1)
        ids = torch.cat([ids, position_ids(side, side, 1)])
    answer: Tensor = pipe.transformer(
        hidden_states=hidden, timestep=sigma, encoder_hidden_states=prompt, pooled_projections=pooled,
        txt_ids=text_ids, img_ids=ids, return_dict=False,
    )[0]  # fmt: skip
    return answer[:, : noisy.shape[1]]


def _hear(pipe: FluxPipeline) -> list[tuple[Hear, int]]:
    model = pipe.transformer
    width = model.config.num_attention_heads * model.config.attention_head_dim
    blocks = (model.transformer_blocks[-1], model.single_transformer_blocks[1])
    return [((block, second), width) for block in blocks]


RECIPE = Recipe(
    name="toy-flux",
    pipeline=lambda vae: flux_pipeline(vae=vae),
    trained=("transformer", "text_encoder", "text_encoder_2"),
    noise=rectified_flow,
    predict=_predict,
    hear=_hear,
    silent=lambda name: ("norm" in name and "linear" in name) or name.startswith("proj_out"),
    references=True,
    settings={
        **SETTINGS, "guidance_scale": 1.0, "true_cfg_scale": 5.0, "max_sequence_length": text.MAX_LENGTH,
        "reference_size": [REFERENCE_SIZE, REFERENCE_SIZE],
    },
)  # fmt: skip
