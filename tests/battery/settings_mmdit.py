"""FLUX.2, Qwen-Image, Chroma, Z-Image, AuraFlow, CogView4, Lumina2 and HunyuanImage for the battery."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import tiny_mmdit as tiny
from setting import Kinds, Setting

_ALL = Kinds("text image references", "text image references")


def flux2(seed: int = 0, *, references: int = 0, **options: Any) -> Setting:
    inputs = tiny.flux2_inputs(seed, references=((2, 3),) * references, **options)
    return Setting(tiny.flux2(dtype=inputs["hidden_states"].dtype), inputs, [_ALL] * 3, references=references)


def qwen(seed: int = 0, *, references: int = 0, **options: Any) -> Setting:
    inputs = tiny.qwen_inputs(seed, references=((2, 3),) * references, **options)
    return Setting(tiny.qwen(dtype=inputs["hidden_states"].dtype), inputs, [_ALL] * 3, references=references)


def chroma(seed: int = 0, **options: Any) -> Setting:
    inputs = tiny.chroma_inputs(seed, **options)
    return Setting(tiny.chroma(dtype=inputs["hidden_states"].dtype), inputs, [_ALL] * 4)


def zimage(seed: int = 0, **options: Any) -> Setting:
    inputs = tiny.zimage_inputs(seed, **options)
    calls = [Kinds(sequence, sequence) for sequence in ("image", "text", "image text", "image text")]
    fill = {"image": 32 - 24, "text": 32 - 5}
    return Setting(tiny.zimage(dtype=inputs["x"][0].dtype), inputs, calls, registers=fill, prompt="cap_feats")


def auraflow(seed: int = 0, **options: Any) -> Setting:
    inputs = tiny.auraflow_inputs(seed, **options)
    calls = [Kinds("registers text image", "registers text image")] * 3
    return Setting(tiny.auraflow(dtype=inputs["hidden_states"].dtype), inputs, calls, registers={"registers": 8})


def cogview4(seed: int = 0, **options: Any) -> Setting:
    inputs = tiny.cogview4_inputs(seed, **options)
    calls = [Kinds("text image", "text image")] * 2
    return Setting(tiny.cogview4(dtype=inputs["hidden_states"].dtype), inputs, calls)


def lumina2(seed: int = 0, **options: Any) -> Setting:
    inputs = tiny.lumina2_inputs(seed, **options)
    calls = [Kinds(sequence, sequence) for sequence in ("text", "image", "text image", "text image")]
    return Setting(tiny.lumina2(dtype=inputs["hidden_states"].dtype), inputs, calls)


def hunyuan_image(seed: int = 0, **options: Any) -> Setting:
    inputs = tiny.hunyuan_image_inputs(seed, **options)
    # the first kernel call is the text refiner's
    calls = [None, *[Kinds("image glyphs text", "image glyphs text")] * 3]
    return Setting(tiny.hunyuan_image(dtype=inputs["hidden_states"].dtype), inputs, calls, glyphs=3)


FAMILIES: dict[str, Callable[..., Setting]] = {
    "flux2": flux2,
    "qwen": qwen,
    "chroma": chroma,
    "zimage": zimage,
    "auraflow": auraflow,
    "cogview4": cogview4,
    "lumina2": lumina2,
    "hunyuan-image": hunyuan_image,
}
WITH_REFERENCES = ("flux2", "qwen")
BRANCHES = {"ZImageTransformer2DModel": ("cond",), "AuraFlowTransformer2DModel": ("cond",)}
