"""FLUX.2 (dev, klein): joint attention over [text, image, references].

Image ids are (0, y, x, 0), those of reference k (10 * (k + 1), y, x, 0), text ids (0, 0, 0, index). klein runs guidance
in two forwards, the prompt's first; dev has none. A region's text counts its index from the prompt's first one.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from ..errors import UnsupportedModelError
from ..layout import Measures, Slots
from ..rotary import Rotary
from . import TEXT_IMAGE, Arguments, Family, append_to, as_given, flux, joint, stacks
from .reader import Reader

_MOST = 512


def measure(model: Any, arguments: Arguments) -> Measures:
    """Sizes from `img_ids`, `hidden_states` and `encoder_hidden_states`.

    Raises:
        LayoutError: as for FLUX.1.
        UnsupportedModelError: where keys of references are kept between steps.
    """
    if arguments.get("kv_cache_mode") is not None:
        raise UnsupportedModelError(
            f"FLUX.2 runs with kv_cache_mode='{arguments['kv_cache_mode']}': references come first and leave the "
            "sequence after the first step. Use Flux2KleinPipeline, which keeps them in it."
        )
    return flux.measure(model, arguments)


def position(arguments: Arguments, slots: Slots) -> Arguments:
    """Ids for further texts: the prompt's first one, counted on from there in each text."""
    ids = arguments["txt_ids"]
    step = ids.new_tensor([0, 0, 0, 1])
    more = [ids[..., :1, :] + step * torch.arange(count, device=ids.device)[:, None] for count in slots.sizes]
    return {**arguments, "txt_ids": torch.cat([ids, *more], dim=-2)}


def _written(pipe: Any, prompt: str) -> str:
    """What the pipeline gives to its tokenizer."""
    if hasattr(pipe, "system_message"):
        options = {"tokenize": False, "add_generation_prompt": False}
        return pipe.tokenizer.apply_chat_template(_messages(pipe, prompt), **options)[0]
    messages = [{"role": "user", "content": prompt}]
    options = {"tokenize": False, "add_generation_prompt": True, "enable_thinking": False}
    return pipe.tokenizer.apply_chat_template(messages, **options)


def _messages(pipe: Any, prompt: str) -> list[Any]:
    """What dev gives to its processor."""
    from diffusers.pipelines.flux2.pipeline_flux2 import format_input

    return format_input([prompt], pipe.system_message)


def count_tokens(pipe: Any, prompt: str) -> int:
    """Tokens of a prompt in the chat template of the pipeline's language model, at most 512."""
    if not hasattr(pipe, "system_message"):
        return len(pipe.tokenizer(_written(pipe, prompt), truncation=True, max_length=_MOST).input_ids)
    encoded = pipe.tokenizer.apply_chat_template(
        _messages(pipe, prompt), add_generation_prompt=False, tokenize=True, return_dict=True
    )
    return min(_MOST, len(encoded["input_ids"][0]))


@torch.no_grad()
def encode_prompt(pipe: Any, prompt: str) -> Tensor:
    """Embedding of one prompt by itself: [tokens, channels], exactly its real tokens, no padding."""
    length = count_tokens(pipe, prompt)
    return pipe.encode_prompt(prompt, device=pipe._execution_device, max_sequence_length=length)[0][0]


FLUX2 = Family(
    name="flux2",
    models=("Flux2Transformer2DModel",),
    layers=stacks(
        ("double", "transformer_blocks", "attn", "joint"), ("single", "single_transformer_blocks", "attn", "joint")
    ),
    measure=measure,
    arrange=joint("text", "image", "references"),
    watch=("img_ids", "kv_cache_mode"),
    presets={"style": lambda counts: "single"},
    pixels_per_token=16,
    timestep=lambda arguments: 1000 * arguments["timestep"],
    sigma=lambda timestep: timestep / 1000,
    append_text=append_to(),
    position=position,
    encode=encode_prompt,
    count=count_tokens,
    readers=(Reader(written=_written, filled={"padding": "max_length"}),),
    rotary=lambda model: Rotary(
        ("picture", "y", "x", "text"), tuple(model.config.axes_dims_rope), model.config.rope_theta
    ),
    corner=as_given,
    returns={"double": TEXT_IMAGE},
    fused=("single",),
)
