"""Sana: linear self-attention of the image, cross attention to the text.

Self-attention is a ReLU-linear product without a softmax kernel, so nothing can part image tokens there. A control that
selects those layers, as all do by default, is refused; with layers="cross" it acts on what the image reads of texts.
Guidance runs as one batch, the negative prompt's rows first. Texts have no positions. The prompt is padded, and a mask
in cross attention hides its padding.
"""

from __future__ import annotations

from dataclasses import replace
from inspect import signature
from typing import Any

import torch
from torch import Tensor

from ..layout import Measures
from ..select import Layer
from . import Arguments, Family, append_to, crossed, stacks, still, text_limit
from .reader import Reader


def layers(model: Any) -> tuple[Layer, ...]:
    """Stacks "self", which is linear, and "cross"."""
    found = stacks(("self", "transformer_blocks", "attn1", "self"), ("cross", "transformer_blocks", "attn2", "cross"))
    return tuple(replace(layer, linear=layer.stack == "self") for layer in found(model))


def measure(model: Any, arguments: Arguments) -> Measures:
    """Sizes from the latents [B, C, H, W], the model's patch size and `encoder_hidden_states`."""
    patch: Any = model.config.patch_size
    height, width = arguments["hidden_states"].shape[-2:]
    return Measures(arguments["encoder_hidden_states"].shape[1], (height // patch, width // patch))


def _instruction(pipe: Any) -> list[str]:
    """What the pipeline puts before each prompt unless it is told otherwise."""
    return signature(type(pipe).__call__).parameters["complex_human_instruction"].default or []


def _written(pipe: Any, prompt: str) -> str:
    return "\n".join(_instruction(pipe)) + pipe._text_preprocessing(prompt)[0]


def _dropped(pipe: Any) -> int:
    """Tokens of the instruction that the pipeline leaves out behind the first one."""
    before = "\n".join(_instruction(pipe))
    return len(pipe.tokenizer.encode(before)) - 2 if before else 0


def count_tokens(pipe: Any, prompt: str) -> int:
    """Tokens of a prompt, at most 300: the first one, and those after the pipeline's instruction."""
    return min(text_limit(pipe), len(pipe.tokenizer(_written(pipe, prompt)).input_ids) - _dropped(pipe))


@torch.no_grad()
def encode_prompt(pipe: Any, prompt: str) -> Tensor:
    """Embedding of one prompt by itself, after the pipeline's instruction: [tokens, channels], without padding."""
    return pipe.encode_prompt(
        prompt,
        do_classifier_free_guidance=False,
        device=pipe._execution_device,
        max_sequence_length=count_tokens(pipe, prompt),
        complex_human_instruction=_instruction(pipe),
    )[0][0]


SANA = Family(
    name="sana",
    models=("SanaTransformer2DModel",),
    layers=layers,
    measure=measure,
    arrange=crossed,
    batch=("uncond", "cond"),
    pixels_per_token=32,
    timestep=lambda arguments: arguments["timestep"],
    append_text=append_to("encoder_attention_mask"),
    encode=encode_prompt,
    count=count_tokens,
    readers=(Reader(written=_written, begin=lambda pipe: -_dropped(pipe)),),
    corner=still,
)
