"""Qwen-Image and Qwen-Image-Edit: joint attention over [text, image, references].

The model centres rows and columns of a picture at 0, gives picture k the frame k, and counts text on the diagonal from
the largest half side, one position for each token of the text sequence. A region's text begins where the prompt begins.
True CFG runs one forward per branch, the prompt's first.
"""

from __future__ import annotations

from collections.abc import Callable
from math import prod
from typing import Any

import torch
from torch import Tensor

from ..errors import LayoutError, UnsupportedModelError
from ..layout import Frames, Measures, Slots
from ..region import by
from ..rotary import Rotary
from . import TEXT_IMAGE, Arguments, Carrier, Family, append_to, joint, stacks
from .reader import Reader


class _Shapes(Carrier):
    """`img_shapes`, with the slots of appended texts on their way to the model's position table."""

    slots: tuple[int, ...] = ()


def measure(model: Any, arguments: Arguments) -> Measures:
    """Sizes from `img_shapes` and `encoder_hidden_states`.

    Raises:
        LayoutError: when tokens and shapes differ, or pictures are films.
    """
    first = arguments["img_shapes"][0]
    shapes = [first] if isinstance(first[0], int) else first
    tokens, given = arguments["hidden_states"].shape[1], sum(map(prod, shapes))
    if tokens != given:
        raise LayoutError(f"Qwen-Image got {tokens} image tokens but img_shapes {shapes}, which hold {given}.")
    if any(shape[0] != 1 for shape in shapes):
        raise LayoutError(f"Qwen-Image pictures have one frame; found {', '.join(by(shape) for shape in shapes)}.")
    image, *references = [(rows, columns) for _, rows, columns in shapes]
    return Measures(arguments["encoder_hidden_states"].shape[1], image, tuple(references))


def position(arguments: Arguments, slots: Slots) -> Arguments:
    """`img_shapes` that carry the slots of appended texts."""
    shapes = _Shapes(arguments["img_shapes"])
    shapes.slots = slots.sizes
    return {**arguments, "img_shapes": shapes}


def restart(original: Callable[..., Any], video_fhw: Any, *args: Any, **kwargs: Any) -> tuple[Tensor, Tensor]:
    """The model's rotary tables of image and text, each appended text beginning where the prompt begins."""
    image, text = original(video_fhw, *args, **kwargs)
    slots = getattr(video_fhw, "slots", ())
    return image, torch.cat([text[: len(text) - sum(slots)], *(text[:count] for count in slots)])


def _written(pipe: Any, prompt: str) -> str:
    """What the pipeline gives to its tokenizer.

    Raises:
        UnsupportedModelError: for pipelines of editing, whose language model reads pictures between the words.
    """
    if getattr(pipe, "processor", None) is not None:
        raise UnsupportedModelError(
            f"{type(pipe).__name__} reads pictures together with the prompt, so where its words stand depends on them. "
            "Give regions texts of their own (text_encoding='separate')."
        )
    return pipe.prompt_template_encode.format(prompt)


def count_tokens(pipe: Any, prompt: str) -> int:
    """Tokens of a prompt in the pipeline's template without the template's head."""
    written = pipe.prompt_template_encode.format(prompt)
    tokens = len(pipe.tokenizer(written).input_ids) - pipe.prompt_template_encode_start_idx
    return min(tokens, pipe.tokenizer_max_length)


@torch.no_grad()
def encode_prompt(pipe: Any, prompt: str) -> Tensor:
    """Embedding of one prompt by itself: [tokens, channels]; in editing without the picture."""
    return pipe.encode_prompt(prompt, device=pipe._execution_device)[0][0]


def corner(model: Any, frames: Frames) -> tuple[float, ...]:
    """The picture stands around the middle of the plane."""
    height, width = frames.main.queries.grid
    # of an odd side one more stands before the middle
    return (0.0, float(height // 2 - height), float(width // 2 - width))


QWEN = Family(
    name="qwen",
    models=("QwenImageTransformer2DModel",),
    layers=stacks(("double", "transformer_blocks", "attn", "joint")),
    measure=measure,
    arrange=joint("text", "image", "references"),
    watch=("img_shapes",),
    pixels_per_token=16,
    timestep=lambda arguments: 1000 * arguments["timestep"],
    sigma=lambda timestep: timestep / 1000,
    append_text=append_to("encoder_hidden_states_mask"),
    position=position,
    shadows={"pos_embed.forward": restart},
    encode=encode_prompt,
    count=count_tokens,
    readers=(Reader(written=_written, begin=lambda pipe: -pipe.prompt_template_encode_start_idx),),
    rotary=lambda model: Rotary(("picture", "y", "x"), tuple(model.config.axes_dims_rope)),
    corner=corner,
    returns={"double": TEXT_IMAGE},
)
