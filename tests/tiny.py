"""Tiny random models of the real classes, and inputs for them."""

from __future__ import annotations

from typing import Any

import torch
from diffusers import FluxTransformer2DModel, SD3Transformer2DModel, UNet2DConditionModel

CHANNELS = 8
TEXT_DIM = 12


def flux(
    seed: int = 0, *, double: int = 2, single: int = 2, dtype: torch.dtype = torch.float32
) -> FluxTransformer2DModel:
    """A FLUX transformer of 2 heads of 16, axes (4, 6, 6), with weights large enough for attention to matter."""
    return _made(
        FluxTransformer2DModel,
        seed,
        dtype,
        patch_size=1,
        in_channels=CHANNELS,
        num_layers=double,
        num_single_layers=single,
        attention_head_dim=16,
        num_attention_heads=2,
        joint_attention_dim=TEXT_DIM,
        pooled_projection_dim=8,
        axes_dims_rope=(4, 6, 6),
    )


def _made(kind: type, seed: int, dtype: torch.dtype, **config: Any) -> Any:
    """A model with weights large enough for attention to matter."""
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        model = kind(**config)
        for parameter in model.parameters():
            if parameter.ndim > 1:
                torch.nn.init.normal_(parameter, std=1.5 / parameter[0].numel() ** 0.5)
    model.eval().requires_grad_(False)
    return model if dtype == torch.float32 else model.to(dtype)


def sd3(seed: int = 0, *, dtype: torch.dtype = torch.float32) -> SD3Transformer2DModel:
    """An SD3.5 transformer: two joint blocks, the first one dual, with qk-norm; the last one leaves the text out."""
    return _made(
        SD3Transformer2DModel,
        seed,
        dtype,
        sample_size=8,
        patch_size=1,
        in_channels=4,
        num_layers=2,
        attention_head_dim=16,
        num_attention_heads=2,
        joint_attention_dim=TEXT_DIM,
        caption_projection_dim=32,
        pooled_projection_dim=8,
        out_channels=4,
        pos_embed_max_size=8,
        dual_attention_layers=(0,),
        qk_norm="rms_norm",
    )


UNET_SIZES: dict[str, Any] = {
    "sample_size": 8,
    "in_channels": 4,
    "out_channels": 4,
    "block_out_channels": (16, 32),
    "layers_per_block": 1,
    "down_block_types": ("CrossAttnDownBlock2D", "CrossAttnDownBlock2D"),
    "up_block_types": ("CrossAttnUpBlock2D", "CrossAttnUpBlock2D"),
    "attention_head_dim": 2,
    "norm_num_groups": 4,
}


def unet(seed: int = 0, *, dtype: torch.dtype = torch.float32) -> UNet2DConditionModel:
    """A UNet of two levels with self and cross attention at both and in the middle."""
    return _made(
        UNet2DConditionModel,
        seed,
        dtype,
        **UNET_SIZES,
        cross_attention_dim=TEXT_DIM,
    )


def sd_inputs(
    seed: int = 0,
    *,
    batch: int = 1,
    grid: tuple[int, int] = (4, 6),
    text: int = 5,
    pooled: bool = False,
    dtype: torch.dtype = torch.float32,
) -> dict[str, Any]:
    """Keyword arguments of one forward of `sd3` (pooled) or `unet`."""
    generator = torch.Generator().manual_seed(seed)

    def normal(*shape: int) -> torch.Tensor:
        return torch.randn(*shape, generator=generator).to(dtype)

    latents = {"hidden_states" if pooled else "sample": normal(batch, 4, *grid)}
    more = {"pooled_projections": normal(batch, 8)} if pooled else {}
    return {
        **latents,
        "encoder_hidden_states": normal(batch, text, TEXT_DIM),
        **more,
        "timestep": torch.full((batch,), 500.0),
        "return_dict": False,
    }


def flux_ids(grid: tuple[int, int], axis: int = 0) -> torch.Tensor:
    """Position ids [h*w, 3] of a picture: (axis, row, column)."""
    rows, columns = torch.meshgrid(torch.arange(grid[0]), torch.arange(grid[1]), indexing="ij")
    return torch.stack([torch.full_like(rows, axis), rows, columns], dim=-1).reshape(-1, 3).float()


def flux_inputs(
    seed: int = 0,
    *,
    batch: int = 1,
    grid: tuple[int, int] = (4, 6),
    text: int = 5,
    references: tuple[tuple[int, int], ...] = (),
    sigma: float = 0.5,
    dtype: torch.dtype = torch.float32,
) -> dict[str, Any]:
    """Keyword arguments of one forward."""
    generator = torch.Generator().manual_seed(seed)
    ids = torch.cat([flux_ids(grid), *(flux_ids(size, 1) for size in references)])

    def normal(*shape: int) -> torch.Tensor:
        return torch.randn(*shape, generator=generator).to(dtype)

    return {
        "hidden_states": normal(batch, len(ids), CHANNELS),
        "encoder_hidden_states": normal(batch, text, TEXT_DIM),
        "pooled_projections": normal(batch, 8),
        "timestep": torch.full((batch,), sigma, dtype=dtype),
        "img_ids": ids,
        "txt_ids": torch.zeros(text, 3),
        "return_dict": False,
    }


def embeds(seed: int, tokens: int = 3) -> torch.Tensor:
    """An encoded region prompt [tokens, channels]."""
    return torch.randn(tokens, TEXT_DIM, generator=torch.Generator().manual_seed(seed))
