"""Lumina-Image 2.0: refiners of caption and image by themselves, then joint attention over [caption, image] per row.

Each row is packed without its caption's padding, and filled up behind the image to the longest row. The caption counts
(0.., 0, 0) and the image stands at (its length, y, x), so further texts must not move the image: they follow the
caption's real tokens and count from 0 again. Guidance runs one forward per branch, the prompt's first.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from ..layout import Frame, Frames, Layout, Measures, Slots
from . import Arguments, Family, encode_alone, insert, stacks, text_limit
from .reader import Reader


@dataclass(frozen=True)
class _Row(Measures):
    """`padding` fills up the packed row, `unread` its caption while that is refined."""

    unread: int = 0


def measure(model: Any, arguments: Arguments) -> list[Measures]:
    """Sizes of each row from the latents [B, C, H, W], the model's patch size and `encoder_attention_mask`."""
    patch: Any = model.config.patch_size
    height, width = arguments["hidden_states"].shape[-2:]
    mask = arguments["encoder_attention_mask"]
    lengths = mask.sum(1, dtype=torch.int64).tolist()
    image, longest, whole = (height // patch, width // patch), max(lengths), mask.shape[1]
    return [_Row(text, image, padding=longest - text, unread=whole - text) for text in lengths]


def arrange(model: Any, measures: Any) -> Frames:
    """Frames "joint", "image" and "text"; the latter two of the refiners."""
    caption, image = ("text.global", measures.text), ("image", measures.image)
    return Frames.of(
        joint=Frame.joint(Layout.in_order(caption, image, ("padding", measures.padding))),
        image=Frame.joint(Layout.in_order(image)),
        text=Frame.joint(Layout.in_order(caption, ("padding", measures.unread))),
    )


def position(arguments: Arguments, slots: Slots) -> Arguments:
    """A mask that tells texts apart: 1 for the prompt, 2 for the first slot of further texts, and so on; 0 hides.

    The model looks for zeros only. The type tells it from the pipeline's masks, also to compiled code.
    """
    mask = arguments["encoder_attention_mask"]
    numbers = torch.arange(2, 2 + len(slots.sizes)).repeat_interleave(torch.tensor(slots.sizes))
    further = numbers.to(device=mask.device, dtype=torch.uint8).expand(len(mask), -1)
    return {**arguments, "encoder_attention_mask": insert(mask.to(torch.uint8), further, mask)}


def append_text(arguments: Arguments, texts: Tensor) -> Arguments:
    """The arguments with `texts` where the mask, made by `position`, has room for them."""
    prompt, mask = arguments["encoder_hidden_states"], arguments["encoder_attention_mask"]
    return {**arguments, "encoder_hidden_states": insert(prompt, texts.to(prompt), mask == 1)}


def restart(original: Callable[..., Any], hidden_states: Tensor, attention_mask: Tensor) -> tuple[Any, ...]:
    """The model's rotary tables and lengths: the image behind the prompt alone, each further text as if it were one."""
    sizes = torch.bincount(attention_mask[0])[2:].tolist() if attention_mask.dtype == torch.uint8 else []
    if not sizes:
        return original(hidden_states, attention_mask)
    own = attention_mask == 1
    image, caption, image_table, whole, lengths, packed = original(hidden_states, own)
    count = torch.cat([torch.arange(size, device=own.device) for size in sizes])
    ids = torch.stack([count, torch.zeros_like(count), torch.zeros_like(count)], dim=-1)
    table = original.__self__._get_freqs_cis(ids[None]).expand(len(own), -1, -1)  # type: ignore[attr-defined]
    more = len(count)
    return (
        image,
        insert(caption[:, : own.shape[1] - more], table, own),
        image_table,
        insert(whole, table, own),
        [length + more for length in lengths],
        [length + more for length in packed],
    )


def _written(pipe: Any, prompt: str) -> str:
    return f"{pipe.system_prompt} <Prompt Start> {prompt}"


def count_tokens(pipe: Any, prompt: str) -> int:
    """Gemma tokens of a prompt after the pipeline's system prompt, at most 256."""
    return len(pipe.tokenizer(_written(pipe, prompt), truncation=True, max_length=text_limit(pipe)).input_ids)


LUMINA2 = Family(
    name="lumina2",
    models=("Lumina2Transformer2DModel",),
    layers=stacks(
        ("context", "context_refiner", "attn", "text"),
        ("noise", "noise_refiner", "attn", "image"),
        ("main", "layers", "attn", "joint"),
    ),
    measure=measure,
    arrange=arrange,
    watch=("encoder_attention_mask",),
    pixels_per_token=16,
    # the model is told how far a run has come, the scheduler how much noise is left
    timestep=lambda arguments: 1000 - 1000 * arguments["timestep"],
    sigma=lambda timestep: timestep / 1000,
    append_text=append_text,
    position=position,
    shadows={"rope_embedder.forward": restart},
    encode=encode_alone(count_tokens),
    count=count_tokens,
    readers=(Reader(written=_written),),
)
