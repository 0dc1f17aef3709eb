"""HunyuanImage 2.1: joint attention over [image, glyphs, text].

Glyphs are the quoted words of a prompt, by a text encoder of their own, and a part of the prompt to controls. Each row
has its real glyphs and its real text before the padding of both, and a mask hides that padding; the texts of regions
stand between. Rotary positions are the image's alone. A refiner mixes and pools the whole text before the first block:
each appended text is refined by itself. Guidance runs one forward per branch, the prompt's first; distilled models have
none.
"""

from __future__ import annotations

import warnings
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from ..errors import LayoutError
from ..layout import Frame, Frames, Layout, Measures
from . import IMAGE_TEXT, Arguments, Family, stacks
from .hunyuan_video import append_text, position, refine
from .reader import Reader


@dataclass(frozen=True)
class _Row(Measures):
    """`glyphs` are real tokens of the second text encoder."""

    glyphs: int = 0


def measure(model: Any, arguments: Arguments) -> list[Measures]:
    """Sizes of each row from the latents [B, C, (frames,) H, W], the model's patch sizes and both masks of the text.

    Raises:
        LayoutError: when padding comes before real tokens.
    """
    patch: Any = model.config.patch_size
    sizes = arguments["hidden_states"].shape[2:]
    grid = tuple(size // step for size, step in zip(sizes, patch, strict=True))
    mask = arguments["encoder_attention_mask"].bool()
    if (mask[:, 1:] & ~mask[:, :-1]).any():
        raise LayoutError(
            "HunyuanImage got an encoder_attention_mask with ones behind zeros, but texts of regions follow a prompt's "
            "real tokens. Pad prompts on the right (tokenizer.padding_side = 'right')."
        )
    whole, lengths = mask.shape[1], mask.sum(1).tolist()
    glyphs = [0] * len(lengths)
    if model.context_embedder_2 is not None and arguments.get("encoder_hidden_states_2") is not None:
        second = arguments["encoder_attention_mask_2"].bool()
        whole, glyphs = whole + second.shape[1], second.sum(1).tolist()
    return [
        _Row(text, grid, padding=whole - text - drawn, glyphs=drawn)
        for text, drawn in zip(lengths, glyphs, strict=True)
    ]


def arrange(model: Any, measures: Any) -> Frames:
    """One frame, "joint"."""
    text = (("text.glyphs", measures.glyphs), ("text.global", measures.text))
    parts = (("image", measures.image), *text, ("padding", measures.padding))
    return Frames.of(joint=Frame.joint(Layout.in_order(*parts)))


def _written(pipe: Any, prompt: str) -> str:
    return pipe.prompt_template_encode.format(prompt)


def count_tokens(pipe: Any, prompt: str) -> int:
    """Tokens of a prompt in the pipeline's template without the template's head, at most 1000."""
    tokens = len(pipe.tokenizer(_written(pipe, prompt)).input_ids)
    return min(pipe.tokenizer_max_length, tokens - pipe.prompt_template_encode_start_idx)


@torch.no_grad()
def encode_prompt(pipe: Any, prompt: str) -> Tensor:
    """Embedding of one prompt by itself: [tokens, channels], its real tokens; quoted words get no glyphs."""
    from diffusers.pipelines.hunyuan_image.pipeline_hunyuanimage import extract_glyph_text

    if extract_glyph_text(prompt) is not None:
        warnings.warn(
            f"The region text '{prompt}' quotes words to be drawn, but only the pipeline's prompt has glyphs. Quote "
            "them there as well, and let regions read it: Regions(..., global_text='open').",
            stacklevel=2,
        )
    return pipe._get_qwen_prompt_embeds(
        pipe.tokenizer,
        pipe.text_encoder,
        prompt,
        device=pipe._execution_device,
        tokenizer_max_length=count_tokens(pipe, prompt),
        template=pipe.prompt_template_encode,
        drop_idx=pipe.prompt_template_encode_start_idx,
    )[0][0]


HUNYUAN_IMAGE = Family(
    name="hunyuan-image",
    models=("HunyuanImageTransformer2DModel",),
    layers=stacks(
        ("double", "transformer_blocks", "attn", "joint"), ("single", "single_transformer_blocks", "attn", "joint")
    ),
    measure=measure,
    arrange=arrange,
    watch=("encoder_attention_mask", "encoder_hidden_states_2", "encoder_attention_mask_2"),
    pixels_per_token=32,
    timestep=lambda arguments: arguments["timestep"],
    sigma=lambda timestep: timestep / 1000,
    append_text=append_text,
    position=position,
    shadows={"context_embedder.forward": refine},
    encode=encode_prompt,
    count=count_tokens,
    readers=(
        Reader(
            written=_written,
            begin=lambda pipe: -pipe.prompt_template_encode_start_idx,
            limit=lambda pipe: pipe.tokenizer_max_length,
        ),
    ),
    returns={"double": IMAGE_TEXT, "single": IMAGE_TEXT},
)
