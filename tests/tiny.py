"""Tiny random models of the real classes, and inputs for them."""

from __future__ import annotations

from typing import Any

import torch
from diffusers import FluxTransformer2DModel

CHANNELS = 8
TEXT_DIM = 12


def flux(
    seed: int = 0, *, double: int = 2, single: int = 2, dtype: torch.dtype = torch.float32
) -> FluxTransformer2DModel:
    """A FLUX transformer of 2 heads of 16, axes (4, 6, 6), with weights large enough for attention to matter."""
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        model = FluxTransformer2DModel(
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
        for parameter in model.parameters():
            if parameter.ndim > 1:
                torch.nn.init.normal_(parameter, std=1.5 / parameter.shape[1] ** 0.5)
    model.eval().requires_grad_(False)
    return model if dtype == torch.float32 else model.to(dtype)


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
