"""Tiny random models of the real classes whose image attends to itself and reads the text, and of films."""

from __future__ import annotations

from typing import Any

import torch
from diffusers import (
    CogVideoXTransformer3DModel,
    HunyuanVideoTransformer3DModel,
    LTXVideoTransformer3DModel,
    PixArtTransformer2DModel,
    SanaTransformer2DModel,
    WanTransformer3DModel,
)
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


def wan(seed: int = 0, *, i2v: bool = False, dtype: torch.dtype = torch.float32) -> WanTransformer3DModel:
    """Two blocks over patches of 1 x 2 x 2; one block that also reads a picture when `i2v`."""
    return _made(
        WanTransformer3DModel,
        seed,
        dtype,
        num_attention_heads=2,
        attention_head_dim=16,
        in_channels=4,
        out_channels=4,
        text_dim=TEXT_DIM,
        freq_dim=16,
        ffn_dim=32,
        num_layers=1 if i2v else 2,
        **({"image_dim": 6, "added_kv_proj_dim": 32} if i2v else {}),
    )


def ltx(seed: int = 0, *, dtype: torch.dtype = torch.float32) -> LTXVideoTransformer3DModel:
    """Two blocks; its latents come in tokens."""
    return _made(
        LTXVideoTransformer3DModel,
        seed,
        dtype,
        in_channels=4,
        out_channels=4,
        num_attention_heads=2,
        attention_head_dim=16,
        cross_attention_dim=32,
        num_layers=2,
        caption_channels=TEXT_DIM,
    )


def cogvideox(seed: int = 0, *, rotary: bool = True, dtype: torch.dtype = torch.float32) -> CogVideoXTransformer3DModel:
    """Two blocks over patches of 2 x 2; with rotary positions as the 5B model, without as the 2B model."""
    return _made(
        CogVideoXTransformer3DModel,
        seed,
        dtype,
        num_attention_heads=2,
        attention_head_dim=16,
        in_channels=4,
        out_channels=4,
        time_embed_dim=16,
        text_embed_dim=TEXT_DIM,
        num_layers=2,
        sample_width=12,
        sample_height=8,
        sample_frames=5,
        max_text_seq_length=5,
        use_rotary_positional_embeddings=rotary,
    )


def sana(seed: int = 0, *, dtype: torch.dtype = torch.float32) -> SanaTransformer2DModel:
    """Two blocks, one token per latent."""
    return _made(
        SanaTransformer2DModel,
        seed,
        dtype,
        in_channels=4,
        out_channels=4,
        num_attention_heads=2,
        attention_head_dim=16,
        num_layers=2,
        num_cross_attention_heads=2,
        cross_attention_head_dim=16,
        cross_attention_dim=32,
        caption_channels=TEXT_DIM,
        sample_size=8,
    )


def hunyuan_video(
    seed: int = 0, *, dtype: torch.dtype = torch.float32, **config: Any
) -> HunyuanVideoTransformer3DModel:
    """A refiner block, a double and two single blocks over patches of 1 x 2 x 2."""
    sizes = {"num_layers": 1, "num_single_layers": 2, "num_refiner_layers": 1, "rope_axes_dim": (4, 6, 6)}
    channels = {"in_channels": 4, "out_channels": 4, "text_embed_dim": TEXT_DIM, "pooled_projection_dim": 8}
    heads = {"num_attention_heads": 2, "attention_head_dim": 16, "guidance_embeds": False}
    return _made(HunyuanVideoTransformer3DModel, seed, dtype, **{**sizes, **channels, **heads, **config})
