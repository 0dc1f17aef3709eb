"""Wan 2.1 and 2.2, text to video and image to video: self-attention of the film, cross attention to the text.

Film tokens stand in the order (frame, row, column) and a region is the same in every frame. Texts have no positions.
Guidance runs one forward per branch, the prompt's first.

Wan 2.1's image to video reads the encoded picture in the first kernel call of its cross attention and the text in the
second. It takes the last 512 tokens for the text, so there the texts of regions take the place of the prompt's padding,
which is zeros. The other models read any number of tokens.

Wan 2.2 has two transformers, one per half of the noise levels, `pipe.transformer` and `pipe.transformer_2`: `attach` on
the pipeline goes on both.
"""

from __future__ import annotations

from dataclasses import replace
from typing import Any

from torch import Tensor

from ..errors import LayoutError
from ..layout import Measures
from ..rotary import Rotary
from ..select import Layer
from . import Arguments, Family, append_to, at_zero, crossed, encode_alone, noisiest, stacks, text_limit


def layers(model: Any) -> tuple[Layer, ...]:
    """Stacks "self" and "cross"; of the latter the kernel call that reads the text."""
    reads_picture = model.config.added_kv_proj_dim is not None
    found = stacks(("self", "blocks", "attn1", "self"), ("cross", "blocks", "attn2", "cross"))(model)
    return tuple(replace(one, call=int(reads_picture)) if one.frame == "cross" else one for one in found)


def measure(model: Any, arguments: Arguments) -> Measures:
    """Sizes from latents [B, C, frames, H, W], the model's patch size and `encoder_hidden_states`."""
    latents, patch = arguments["hidden_states"].shape[-3:], model.config.patch_size
    grid = tuple(size // step for size, step in zip(latents, patch, strict=True))
    return Measures(arguments["encoder_hidden_states"].shape[1], grid, fixed=_is_fixed(arguments))


def _is_fixed(arguments: Arguments) -> bool:
    return arguments.get("encoder_hidden_states_image") is not None


def append_text(arguments: Arguments, texts: Tensor) -> Arguments:
    """The arguments with `texts` [B, t, channels] at the end of the text; where that is fixed, instead of padding.

    Raises:
        LayoutError: when the prompt leaves too little padding.
    """
    if not _is_fixed(arguments):
        return append_to()(arguments, texts)
    prompt = arguments["encoder_hidden_states"]
    kept = prompt.shape[1] - texts.shape[1]
    if prompt[:, kept:].any():
        raise LayoutError(
            f"Wan's image to video reads {prompt.shape[1]} tokens of text, and {texts.shape[1]} of them are wanted for "
            "regions, but the prompt reaches into those. Shorten the prompt or the texts of regions."
        )
    return append_to()({**arguments, "encoder_hidden_states": prompt[:, :kept]}, texts)


def count_tokens(pipe: Any, prompt: str) -> int:
    """UMT5 tokens of the cleaned prompt, its end token included, at most 512."""
    from diffusers.pipelines.wan.pipeline_wan import prompt_clean

    return len(pipe.tokenizer(prompt_clean(prompt), truncation=True, max_length=text_limit(pipe)).input_ids)


WAN = Family(
    name="wan",
    models=("WanTransformer3DModel",),
    layers=layers,
    measure=measure,
    arrange=crossed,
    watch=("encoder_hidden_states_image",),
    pixels_per_token=16,
    timestep=noisiest,
    sigma=lambda timestep: timestep / 1000,
    append_text=append_text,
    encode=encode_alone(count_tokens),
    count=count_tokens,
    rotary=lambda model: Rotary(("frame", "y", "x"), (model.rope.t_dim, model.rope.h_dim, model.rope.w_dim)),
    corner=at_zero,
)
