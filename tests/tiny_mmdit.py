"""Tiny random models of FLUX.2, Qwen-Image, Chroma, Z-Image, AuraFlow, CogView4, Lumina2 and HunyuanImage, and their inputs."""

from __future__ import annotations

from typing import Any

import torch
from diffusers import (
    AuraFlowTransformer2DModel,
    ChromaTransformer2DModel,
    CogView4Transformer2DModel,
    Flux2Transformer2DModel,
    HunyuanImageTransformer2DModel,
    Lumina2Transformer2DModel,
    QwenImageTransformer2DModel,
    ZImageTransformer2DModel,
)
from tiny import CHANNELS, TEXT_DIM, _made, flux_inputs, sd_inputs

Grids = tuple[tuple[int, int], ...]
_HEADS = {"attention_head_dim": 16, "num_attention_heads": 2, "joint_attention_dim": TEXT_DIM}


def flux2(seed: int = 0, *, dtype: torch.dtype = torch.float32) -> Flux2Transformer2DModel:
    """One double and two single blocks of 2 heads of 16."""
    sizes = {
        "patch_size": 1,
        "in_channels": CHANNELS,
        "num_layers": 1,
        "num_single_layers": 2,
        "guidance_embeds": False,
    }
    return _made(
        Flux2Transformer2DModel, seed, dtype, axes_dims_rope=(4, 4, 4, 4), timestep_guidance_channels=16, **sizes, **_HEADS
    )  # fmt: skip


def flux2_inputs(seed: int = 0, *, references: Grids = (), text: int = 5, **options: Any) -> dict[str, Any]:
    """Keyword arguments of one forward; reference k stands at t = 10 * (k + 1)."""
    inputs = flux_inputs(seed, references=references, text=text, **options)
    inputs.pop("pooled_projections")
    grid = options.get("grid", (4, 6))
    times = [0, *(10 * (k + 1) for k in range(len(references)))]
    one, zero = torch.ones(1, dtype=torch.int64), torch.zeros(1, dtype=torch.int64)
    ids = [
        torch.cartesian_prod(t * one, torch.arange(h), torch.arange(w), zero)
        for t, (h, w) in zip(times, (grid, *references), strict=True)
    ]
    batch = inputs["hidden_states"].shape[0]
    index = torch.cartesian_prod(zero, zero, zero, torch.arange(text))
    more = {"img_ids": torch.cat(ids).expand(batch, -1, -1), "txt_ids": index.expand(batch, -1, -1)}
    return {**inputs, **more}


def qwen(seed: int = 0, *, dtype: torch.dtype = torch.float32) -> QwenImageTransformer2DModel:
    """Two blocks of 2 heads of 16."""
    sizes = {"patch_size": 1, "in_channels": CHANNELS, "out_channels": CHANNELS, "num_layers": 3}
    return _made(QwenImageTransformer2DModel, seed, dtype, axes_dims_rope=(4, 6, 6), **sizes, **_HEADS)


def qwen_inputs(seed: int = 0, *, references: Grids = (), **options: Any) -> dict[str, Any]:
    """Keyword arguments of one forward; no mask, as the pipeline gives none where no prompt is padded."""
    inputs = flux_inputs(seed, references=references, **options)
    batch, grid = inputs["hidden_states"].shape[0], options.get("grid", (4, 6))
    kept = {key: inputs[key] for key in ("hidden_states", "encoder_hidden_states", "timestep", "return_dict")}
    return {**kept, "img_shapes": [[(1, *size) for size in (grid, *references)]] * batch}


def chroma(seed: int = 0, *, dtype: torch.dtype = torch.float32) -> ChromaTransformer2DModel:
    """Two double and two single blocks of 2 heads of 16."""
    sizes = {"patch_size": 1, "in_channels": CHANNELS, "num_layers": 2, "num_single_layers": 2}
    approximator = {"approximator_num_channels": 64, "approximator_hidden_dim": 16, "approximator_layers": 1}
    return _made(ChromaTransformer2DModel, seed, dtype, axes_dims_rope=(4, 6, 6), **sizes, **approximator, **_HEADS)


def chroma_inputs(seed: int = 0, **options: Any) -> dict[str, Any]:
    """Keyword arguments of one forward, without a mask."""
    inputs = flux_inputs(seed, **options)
    inputs.pop("pooled_projections")
    return inputs


def zimage(
    seed: int = 0, *, dtype: torch.dtype = torch.float32, all_patch_size: tuple[int, ...] = (1,)
) -> ZImageTransformer2DModel:
    """A refiner layer for the image and one for the caption, and two main layers of 2 heads of 16."""
    sizes = {"in_channels": 4, "dim": 32, "n_layers": 2, "n_refiner_layers": 1, "n_heads": 2, "n_kv_heads": 2}
    axes = {"axes_dims": [4, 6, 6], "axes_lens": [128, 16, 16]}
    more = {"all_patch_size": all_patch_size, "cap_feat_dim": TEXT_DIM}
    return _made(ZImageTransformer2DModel, seed, dtype, **sizes, **axes, **more)


def zimage_inputs(
    seed: int = 0, *, batch: int = 1, grid: tuple[int, int] = (4, 6), text: int = 5, dtype: torch.dtype = torch.float32
) -> dict[str, Any]:
    """Keyword arguments of one forward."""
    inputs = sd_inputs(seed, batch=batch, grid=grid, text=text, dtype=dtype)
    return {
        "x": list(inputs["sample"].unsqueeze(2)),
        "t": torch.full((batch,), 0.5),
        "cap_feats": list(inputs["encoder_hidden_states"]),
        "patch_size": 1,
        "return_dict": False,
    }


def auraflow(seed: int = 0, *, dtype: torch.dtype = torch.float32) -> AuraFlowTransformer2DModel:
    """A joint and two single blocks of 2 heads of 16."""
    sizes = {"sample_size": 8, "patch_size": 1, "in_channels": 4, "num_mmdit_layers": 1, "num_single_dit_layers": 2}
    model = _made(
        AuraFlowTransformer2DModel, seed, dtype, caption_projection_dim=32, pos_embed_max_size=64, **sizes, **_HEADS
    )  # fmt: skip
    # outputs of the size of other families', so that rounding errors are as well
    model.proj_out.weight.mul_(0.2)
    return model


def auraflow_inputs(seed: int = 0, **options: Any) -> dict[str, Any]:
    """Keyword arguments of one forward."""
    inputs = sd_inputs(seed, pooled=True, **options)
    inputs.pop("pooled_projections")
    return {**inputs, "timestep": inputs["timestep"] / 1000}


def cogview4(seed: int = 0, *, dtype: torch.dtype = torch.float32) -> CogView4Transformer2DModel:
    """Two blocks of 2 heads of 16."""
    sizes = {"patch_size": 1, "in_channels": 4, "out_channels": 4, "num_layers": 2, "text_embed_dim": TEXT_DIM}
    return _made(
        CogView4Transformer2DModel, seed, dtype, attention_head_dim=16, num_attention_heads=2, time_embed_dim=16,
        condition_dim=8, pos_embed_max_size=64, sample_size=8, **sizes,
    )  # fmt: skip


def cogview4_inputs(seed: int = 0, **options: Any) -> dict[str, Any]:
    """Keyword arguments of one forward."""
    inputs = sd_inputs(seed, pooled=True, **options)
    batch = len(inputs.pop("pooled_projections"))
    sizes = {name: torch.full((batch, 2), 64.0) for name in ("original_size", "target_size")}
    return {**inputs, **sizes, "crop_coords": torch.zeros(batch, 2)}


def lumina2(seed: int = 0, *, dtype: torch.dtype = torch.float32) -> Lumina2Transformer2DModel:
    """A refiner layer for the caption and one for the image, and two main layers of 2 heads of 16 that share keys."""
    sizes = {"sample_size": 8, "in_channels": 4, "hidden_size": 32, "num_layers": 2, "num_refiner_layers": 1}
    heads = {"num_attention_heads": 2, "num_kv_heads": 1, "multiple_of": 8, "cap_feat_dim": TEXT_DIM}
    axes = {"axes_dim_rope": (4, 6, 6), "axes_lens": (64, 16, 16)}
    return _made(Lumina2Transformer2DModel, seed, dtype, patch_size=1, **sizes, **heads, **axes)


def lumina2_inputs(seed: int = 0, **options: Any) -> dict[str, Any]:
    """Keyword arguments of one forward."""
    inputs = sd_inputs(seed, pooled=True, **options)
    batch = len(inputs.pop("pooled_projections"))
    mask = torch.ones(batch, inputs["encoder_hidden_states"].shape[1], dtype=torch.int64)
    return {**inputs, "timestep": torch.full((batch,), 0.5), "encoder_attention_mask": mask}


def hunyuan_image(
    seed: int = 0, *, glyphs: bool = True, dtype: torch.dtype = torch.float32
) -> HunyuanImageTransformer2DModel:
    """A refiner block, a double and two single blocks of 2 heads of 16."""
    sizes = {"num_layers": 1, "num_single_layers": 2, "num_refiner_layers": 1, "rope_axes_dim": (8, 8)}
    channels = {"in_channels": 4, "out_channels": 4, "text_embed_dim": TEXT_DIM, "patch_size": (1, 1)}
    heads = {"num_attention_heads": 2, "attention_head_dim": 16, "text_embed_2_dim": 6 if glyphs else None}
    return _made(HunyuanImageTransformer2DModel, seed, dtype, **sizes, **channels, **heads)


def hunyuan_image_inputs(seed: int = 0, *, glyphs: int = 3, **options: Any) -> dict[str, Any]:
    """Keyword arguments of one forward."""
    inputs = sd_inputs(seed, pooled=True, **options)
    batch, text = len(inputs.pop("pooled_projections")), inputs["encoder_hidden_states"]
    drawn = torch.randn(batch, glyphs, 6, generator=torch.Generator().manual_seed(seed + 1)).to(text.dtype)
    masks = {"encoder_attention_mask": torch.ones(text.shape[:2], dtype=torch.int64)}
    masks["encoder_attention_mask_2"] = torch.ones(batch, glyphs, dtype=torch.int64)
    # the model computes its time embedding in the timestep's precision
    timestep = inputs["timestep"].to(text.dtype)
    return {**inputs, **masks, "encoder_hidden_states_2": drawn, "timestep": timestep}
