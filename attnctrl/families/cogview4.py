"""CogView4: joint attention over [text, image].

Rotary positions are the image's alone; texts have none. Guidance runs one forward per branch, the prompt's first. The
pipeline fills a prompt up to a multiple of 16 tokens from the left and reads them all.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from . import IMAGE_TEXT, Family, append_to, joint, stacks
from .reader import Reader
from .sd3 import measure

_MULTIPLE, _MOST = 16, 1024


def count_tokens(pipe: Any, prompt: str) -> int:
    """Tokens of a prompt, at most 1024, filled up to a multiple of 16."""
    own = len(pipe.tokenizer(prompt, truncation=True, max_length=_MOST).input_ids)
    return -(-own // _MULTIPLE) * _MULTIPLE


@torch.no_grad()
def encode_prompt(pipe: Any, prompt: str) -> Tensor:
    """GLM embedding of one prompt by itself: [tokens, channels], filled up as the pipeline does."""
    return pipe.encode_prompt(prompt, do_classifier_free_guidance=False, device=pipe._execution_device)[0][0]


COGVIEW4 = Family(
    name="cogview4",
    models=("CogView4Transformer2DModel",),
    layers=stacks(("joint", "transformer_blocks", "attn1", "joint")),
    measure=measure,
    arrange=joint("text", "image"),
    pixels_per_token=16,
    timestep=lambda arguments: arguments["timestep"],
    sigma=lambda timestep: timestep / 1000,
    append_text=append_to(),
    encode=encode_prompt,
    count=count_tokens,
    readers=(Reader(filled={"padding": True, "pad_to_multiple_of": _MULTIPLE, "padding_side": "left"}),),
    returns={"joint": IMAGE_TEXT},
)
