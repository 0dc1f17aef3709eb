"""HunyuanVideo, text to video and image to video: joint attention over [film, text].

Film tokens stand in the order (frame, row, column) and a region is the same in every frame. Rotary positions are the
film's alone. The text is padded, and the model hides what stands behind as many tokens as its mask has ones; so the
texts of regions stand between each row's real tokens and its padding. A refiner mixes and pools the whole text before
the first block: each appended text is refined by itself. True CFG runs one forward per branch, the prompt's first; the
released model is guided by an embedding in one forward.
"""

from __future__ import annotations

from collections.abc import Callable
from inspect import signature
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.nn.functional import pad

from ..errors import ControlError
from ..layout import Frame, Frames, Layout, Measures, Slots
from . import IMAGE_TEXT, Arguments, Family, insert, stacks, text_limit


class Segments(NamedTuple):
    """`encoder_hidden_states` on their way to the refiner: prompt and further texts, each [B, tokens, channels].

    `mask` [B, tokens] holds ones for the real tokens of the prompt, `real` for those of the further texts.
    """

    prompt: Tensor
    mask: Tensor
    texts: Tensor
    real: Tensor
    sizes: tuple[int, ...]


def measure(model: Any, arguments: Arguments) -> list[Measures]:
    """Sizes of each row from the latents [B, C, frames, H, W], the model's patch sizes and `encoder_attention_mask`."""
    frames, height, width = arguments["hidden_states"].shape[-3:]
    patch: Any = model.config.patch_size
    grid = (frames // model.config.patch_size_t, height // patch, width // patch)
    mask = arguments["encoder_attention_mask"]
    return [Measures(text, grid, padding=mask.shape[1] - text) for text in mask.sum(1, dtype=torch.int64).tolist()]


def arrange(model: Any, measures: Measures) -> Frames:
    """One frame, "joint"."""
    parts = (("image", measures.image), ("text.global", measures.text), ("padding", measures.padding))
    return Frames.of(joint=Frame.joint(Layout.in_order(*parts)))


def position(arguments: Arguments, slots: Slots) -> Arguments:
    """The prompt as segments, which know how long the further texts of each row are."""
    prompt, mask = arguments["encoder_hidden_states"], arguments["encoder_attention_mask"]
    # nobody sees a slot without a text, but the refiner divides by its number of real tokens
    real = [
        torch.cat([torch.arange(size) < max(length, 1) for size, length in zip(slots.sizes, row, strict=True)])
        for row in slots.lengths
    ]
    segments = Segments(prompt, mask, prompt[:, :0], torch.stack(real).to(mask), slots.sizes)
    return {**arguments, "encoder_hidden_states": segments}


def append_text(arguments: Arguments, texts: Tensor) -> Arguments:
    """The arguments with segments, made by `position`, that hold `texts` as well, and a mask that shows them."""
    segments = arguments["encoder_hidden_states"]
    texts, mask = texts.to(segments.prompt), segments.mask
    return {
        **arguments,
        "encoder_hidden_states": segments._replace(texts=texts),
        "encoder_attention_mask": insert(mask, mask.new_ones(texts.shape[:2]), mask),
    }


def refine(original: Callable[..., Tensor], hidden_states: Any, timestep: Tensor, attention_mask: Tensor) -> Tensor:
    """The model's refiner, in one batch for the prompt and each further text by itself."""
    if not isinstance(hidden_states, Segments):
        return original(hidden_states, timestep, attention_mask)
    prompt, mask, texts, real, sizes = hidden_states
    parts = [prompt, *texts.split(sizes, dim=1)]
    masks = [part.to(attention_mask.dtype) for part in (mask, *real.split(sizes, dim=1))]
    longest = max(part.shape[1] for part in parts)
    refined = original(
        torch.cat([pad(part, (0, 0, 0, longest - part.shape[1])) for part in parts]),
        timestep.repeat(len(parts)),
        torch.cat([pad(each, (0, longest - each.shape[1])) for each in masks]),
    ).chunk(len(parts))
    first, *further = [out[:, : part.shape[1]] for out, part in zip(refined, parts, strict=True)]
    return insert(first, torch.cat(further, dim=1), mask)


def _template(pipe: Any) -> dict[str, Any]:
    """What the pipeline's call puts around each prompt unless it is told otherwise."""
    return signature(type(pipe).__call__).parameters["prompt_template"].default


def count_tokens(pipe: Any, prompt: str) -> int:
    """Llama tokens of a prompt in the pipeline's template without the template's head, at most 256."""
    template = _template(pipe)
    tokens = len(pipe.tokenizer(template["template"].format(prompt)).input_ids)
    return min(text_limit(pipe), tokens - template["crop_start"])


@torch.no_grad()
def encode_prompt(pipe: Any, prompt: str) -> Tensor:
    """Llama embedding of one prompt by itself: [tokens, channels], its real tokens.

    Raises:
        ControlError: for a pipeline that encodes prompts together with a picture.
    """
    if "image" in signature(pipe.encode_prompt).parameters:
        raise ControlError(
            f"{type(pipe).__name__} encodes a prompt together with its picture, so the region text '{prompt}' cannot "
            "be encoded by itself. Give the region prompt_embeds [tokens, channels], made by HunyuanVideoPipeline."
        )
    length = count_tokens(pipe, prompt)
    options = {"device": pipe._execution_device, "max_sequence_length": length}
    return pipe._get_llama_prompt_embeds(prompt, _template(pipe), **options)[0][0]


HUNYUAN_VIDEO = Family(
    name="hunyuan-video",
    models=("HunyuanVideoTransformer3DModel",),
    layers=stacks(
        ("double", "transformer_blocks", "attn", "joint"), ("single", "single_transformer_blocks", "attn", "joint")
    ),
    measure=measure,
    arrange=arrange,
    watch=("encoder_attention_mask",),
    pixels_per_token=16,
    timestep=lambda arguments: arguments["timestep"],
    sigma=lambda timestep: timestep / 1000,
    append_text=append_text,
    position=position,
    shadows={"context_embedder.forward": refine},
    encode=encode_prompt,
    count=count_tokens,
    returns={"double": IMAGE_TEXT, "single": IMAGE_TEXT},
)
