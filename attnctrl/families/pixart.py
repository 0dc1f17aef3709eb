"""PixArt-alpha and PixArt-Sigma: self-attention of the image, cross attention to the text.

Guidance runs as one batch, the negative prompt's rows first. The pipelines do not tell whether a run is guided, so a
batch needs `attach(..., branches=("uncond", "cond"))`, or ("cond",) without guidance. Positions are added to the image
once, before the first block; texts have none. The prompt is padded, and a mask in cross attention hides its padding.
"""

from __future__ import annotations

from typing import Any

from ..layout import Measures
from . import Arguments, Family, append_to, crossed, encode_alone, stacks, still, text_limit
from .reader import Reader


def measure(model: Any, arguments: Arguments) -> Measures:
    """Sizes from the latents [B, C, H, W], the model's patch size and `encoder_hidden_states`."""
    patch: Any = model.config.patch_size
    height, width = arguments["hidden_states"].shape[-2:]
    return Measures(arguments["encoder_hidden_states"].shape[1], (height // patch, width // patch))


def _cleaned(pipe: Any, prompt: str) -> str:
    return pipe._text_preprocessing(prompt, clean_caption=True)[0]


def count_tokens(pipe: Any, prompt: str) -> int:
    """T5 tokens of the cleaned prompt, its end token included, at most what the pipeline reads (120 or 300)."""
    return len(pipe.tokenizer(_cleaned(pipe, prompt), truncation=True, max_length=text_limit(pipe)).input_ids)


PIXART = Family(
    name="pixart",
    models=("PixArtTransformer2DModel",),
    layers=stacks(("self", "transformer_blocks", "attn1", "self"), ("cross", "transformer_blocks", "attn2", "cross")),
    measure=measure,
    arrange=crossed,
    batch=("uncond", "cond"),
    # PixArt-Sigma's perturbed-attention guidance takes block 14 of 28
    presets={"middle": lambda counts: f"self:{counts['self'] // 2}"},
    pixels_per_token=16,
    timestep=lambda arguments: arguments["timestep"],
    append_text=append_to("encoder_attention_mask"),
    encode=encode_alone(count_tokens, clean_caption=True),
    count=count_tokens,
    readers=(Reader(written=_cleaned),),
    corner=still,
    table="pos_embed",
)
