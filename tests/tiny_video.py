"""Tiny random models of the real classes whose image attends to itself and reads the text, and of films."""

from __future__ import annotations

from typing import Any

import torch
from diffusers import PixArtTransformer2DModel
from tiny import TEXT_DIM, _made


def pixart(seed: int = 0, *, dtype: torch.dtype = torch.float32) -> PixArtTransformer2DModel:
    """Two blocks of self and cross attention over patches of 2 x 2."""
    model = _made(
        PixArtTransformer2DModel,
        seed,
        torch.float32,
        sample_size=8,
        patch_size=2,
        in_channels=4,
        out_channels=8,
        num_layers=2,
        num_attention_heads=2,
        attention_head_dim=16,
        cross_attention_dim=32,
        caption_channels=TEXT_DIM,
        use_additional_conditions=False,
    )
    # without a norm of queries and keys, scores would be so large that float32 rounds them away
    for name, parameter in model.named_parameters():
        if name.endswith(("to_q.weight", "to_k.weight")):
            parameter.mul_(0.4)
    return model.to(dtype)


def inputs(
    *latents: int, seed: int = 0, text: int = 5, dtype: torch.dtype = torch.float32, **more: Any
) -> dict[str, Any]:
    """Keyword arguments of one forward: latents of this shape, batch first, a text, and what else the model wants."""
    generator = torch.Generator().manual_seed(seed)
    return {
        "hidden_states": torch.randn(*latents, generator=generator).to(dtype),
        "encoder_hidden_states": torch.randn(latents[0], text, TEXT_DIM, generator=generator).to(dtype),
        "timestep": torch.full((latents[0],), 500.0),
        "return_dict": False,
        **more,
    }
