"""LTX-Video: self-attention of the film, cross attention to the text.

Film tokens stand in the order (frame, row, column) and a region is the same in every frame. Texts have no positions.
Guidance runs as one batch, the negative prompt's rows first. The prompt is padded, and a mask in cross attention hides
its padding.
"""

from __future__ import annotations

from math import prod
from typing import Any

from ..errors import LayoutError
from ..layout import Measures
from . import Arguments, Family, append_to, crossed, encode_alone, noisiest, stacks, text_limit


def measure(model: Any, arguments: Arguments) -> Measures:
    """Sizes from `num_frames`, `height` and `width` of the latents and `encoder_hidden_states`.

    Raises:
        LayoutError: when the film's tokens are not these, as with conditioning frames in front of it.
    """
    grid: Any = tuple(arguments.get(name) for name in _SIZES)
    tokens = arguments["hidden_states"].shape[1]
    if None in grid or prod(grid) != tokens:
        raise LayoutError(
            f"LTX got {tokens} film tokens, but num_frames, height and width of the latents are {grid}. Regions need a "
            "raster of the film alone: use LTXPipeline or LTXImageToVideoPipeline, which pass its sizes."
        )
    return Measures(arguments["encoder_hidden_states"].shape[1], grid)


def count_tokens(pipe: Any, prompt: str) -> int:
    """T5 tokens of a prompt, its end token included, at most 128."""
    return len(pipe.tokenizer(prompt, truncation=True, max_length=text_limit(pipe)).input_ids)


_SIZES = ("num_frames", "height", "width")

LTX = Family(
    name="ltx",
    models=("LTXVideoTransformer3DModel",),
    layers=stacks(("self", "transformer_blocks", "attn1", "self"), ("cross", "transformer_blocks", "attn2", "cross")),
    measure=measure,
    arrange=crossed,
    watch=_SIZES,
    batch=("uncond", "cond"),
    pixels_per_token=32,
    timestep=noisiest,
    sigma=lambda timestep: timestep / 1000,
    append_text=append_to("encoder_attention_mask"),
    encode=encode_alone(count_tokens),
    count=count_tokens,
)
