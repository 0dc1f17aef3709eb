"""Chroma: joint attention over [text, image], blocks and ids as in FLUX.1.

`attention_mask` covers text and image; it leaves each prompt its tokens and the first padding after them. Guidance runs
one forward per branch, the prompt's first.
"""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from . import TEXT_IMAGE, Arguments, flux
from .reader import Reader

_MOST = 512


def append_text(arguments: Arguments, texts: Tensor) -> Arguments:
    """As for FLUX.1; appended texts are open in `attention_mask`."""
    mask, prompt = arguments.get("attention_mask"), arguments["encoder_hidden_states"].shape[1]
    longer = flux.append_text(arguments, texts)
    if mask is None:
        return longer
    ones = mask.new_ones(mask.shape[0], texts.shape[1])
    return {**longer, "attention_mask": torch.cat([mask[:, :prompt], ones, mask[:, prompt:]], dim=1)}


def count_tokens(pipe: Any, prompt: str) -> int:
    """T5 tokens of a prompt, its end token and one of padding included, at most 512."""
    prompt = pipe.maybe_convert_prompt(prompt, pipe.tokenizer)
    return min(_MOST, 1 + len(pipe.tokenizer(prompt, truncation=True, max_length=_MOST).input_ids))


@torch.no_grad()
def encode_prompt(pipe: Any, prompt: str) -> Tensor:
    """T5 embedding of one prompt by itself: [tokens, channels], its real tokens and the padding it reads."""
    length = count_tokens(pipe, prompt)
    return pipe._get_t5_prompt_embeds([prompt], max_sequence_length=length, device=pipe._execution_device)[0][0]


CHROMA = replace(
    flux.FLUX,
    name="chroma",
    models=("ChromaTransformer2DModel",),
    append_text=append_text,
    encode=encode_prompt,
    count=count_tokens,
    readers=(Reader(),),
    returns={"double": TEXT_IMAGE},
)
