"""Settings of models with cross attention, and of films."""

from __future__ import annotations

from collections.abc import Callable

import tiny_video as tiny
import torch
from diffusers.models.embeddings import get_3d_rotary_pos_embed
from setting import Kinds, Setting

FILM = (2, 4, 6)
SELF, CROSS = Kinds("image", "image", FILM), Kinds("image", "text", FILM)


def pixart(seed: int = 0, *, batch: int = 1, dtype: torch.dtype = torch.float32) -> Setting:
    inputs = tiny.inputs(batch, 4, 8, 12, seed=seed, dtype=dtype)
    return Setting(tiny.pixart(dtype=dtype), inputs, [Kinds("image", "image"), Kinds("image", "text")] * 2)


def wan(seed: int = 0, *, batch: int = 1, dtype: torch.dtype = torch.float32) -> Setting:
    inputs = tiny.inputs(batch, 4, 2, 8, 12, seed=seed, dtype=dtype)
    return Setting(tiny.wan(dtype=dtype), inputs, [SELF, CROSS] * 2, grid=FILM)


def wan_i2v(seed: int = 0, *, batch: int = 1, dtype: torch.dtype = torch.float32) -> Setting:
    """The prompt has 5 tokens of the 512 that the model counts on; pictures have 7."""
    inputs = tiny.inputs(batch, 4, 2, 8, 12, seed=seed, text=512, dtype=dtype)
    inputs["encoder_hidden_states"][:, 5:] = 0
    pictures = torch.randn(batch, 7, 6, generator=torch.Generator().manual_seed(seed))
    inputs["encoder_hidden_states_image"] = pictures.to(dtype)
    return Setting(tiny.wan(dtype=dtype, i2v=True), inputs, [SELF, None, CROSS], text=512, grid=FILM, fixed=True)


def ltx(seed: int = 0, *, batch: int = 1, dtype: torch.dtype = torch.float32) -> Setting:
    sizes = dict(zip(("num_frames", "height", "width"), FILM, strict=True))
    inputs = tiny.inputs(batch, 48, 4, seed=seed, dtype=dtype, encoder_attention_mask=None, **sizes)
    return Setting(tiny.ltx(dtype=dtype), inputs, [SELF, CROSS] * 2, grid=FILM)


def cogvideox(seed: int = 0, *, batch: int = 1, dtype: torch.dtype = torch.float32) -> Setting:
    rotary = get_3d_rotary_pos_embed(16, ((0, 0), FILM[1:]), FILM[1:], FILM[0])
    inputs = tiny.inputs(batch, 2, 4, 8, 12, seed=seed, dtype=dtype, image_rotary_emb=rotary)
    return Setting(tiny.cogvideox(dtype=dtype), inputs, [Kinds("text image", "text image", FILM)] * 2, grid=FILM)


def hunyuan_video(seed: int = 0, *, batch: int = 1, dtype: torch.dtype = torch.float32) -> Setting:
    pooled = torch.randn(batch, 8, generator=torch.Generator().manual_seed(seed)).to(dtype)
    more = {"encoder_attention_mask": torch.ones(batch, 5), "pooled_projections": pooled}
    inputs = tiny.inputs(batch, 4, 2, 8, 12, seed=seed, dtype=dtype, **more)
    # the first kernel call is the text refiner's
    calls = [None, *[Kinds("image text", "image text", FILM)] * 3]
    return Setting(tiny.hunyuan_video(dtype=dtype), inputs, calls, grid=FILM)


def sana(seed: int = 0, *, batch: int = 1, dtype: torch.dtype = torch.float32) -> Setting:
    """Its self-attention is linear and calls no kernel."""
    inputs = tiny.inputs(batch, 4, 4, 6, seed=seed, dtype=dtype)
    return Setting(tiny.sana(dtype=dtype), inputs, [Kinds("image", "text")] * 2, layers="cross")


FAMILIES: dict[str, Callable[..., Setting]] = {
    "pixart": pixart,
    "wan": wan,
    "wan-i2v": wan_i2v,
    "ltx": ltx,
    "cogvideox": cogvideox,
    "hunyuan-video": hunyuan_video,
}
BATCHED = (
    "PixArtTransformer2DModel",
    "LTXVideoTransformer3DModel",
    "CogVideoXTransformer3DModel",
    "SanaTransformer2DModel",
)
BRANCHES = dict.fromkeys(BATCHED, ("cond",))
