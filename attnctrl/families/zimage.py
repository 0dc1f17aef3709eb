"""Z-Image: refiners of image and caption by themselves, then joint attention over [image, caption], each row by itself.

Both parts are filled up to multiples of 32 with learned tokens that are attended. The caption stands at (1.., 0, 0),
the image behind it, so further texts must not move the image: they follow the filled caption and count from 1 again.
Guidance runs as one batch, the prompt's rows first.
"""

from __future__ import annotations

from collections.abc import Callable
from math import prod
from typing import Any

import torch
from torch import Tensor

from ..errors import LayoutError, UnsupportedModelError
from ..layout import Frame, Frames, Layout, Measures, Slots
from ..rotary import Rotary
from . import Arguments, Carrier, Family, stacks
from .reader import Reader

_MULTIPLE = 32
_MOST = 512


class _Captions(Carrier):
    """`cap_feats`, with further texts of the rows on their way to the model's packing."""

    texts: Tensor
    slots: tuple[int, ...]


def measure(model: Any, arguments: Arguments) -> list[Measures]:
    """Sizes of each row from its latents [C, F, H, W] and its caption.

    Raises:
        UnsupportedModelError: in omni mode, where rows are lists of pictures.
        LayoutError: when latents of one batch differ in size, or are films.
    """
    latents, patch = arguments["x"], arguments.get("patch_size", 2)
    if not isinstance(latents[0], Tensor):
        raise UnsupportedModelError(
            "Z-Image in omni mode packs several pictures and captions per row, whose order is not known here. Use "
            "ZImagePipeline, or detach the controls."
        )
    sizes = {tuple(row.shape[1:]) for row in latents}
    frames, rows, columns = next(iter(sizes))
    if len(sizes) > 1 or frames != 1:
        raise LayoutError(
            f"Latents of one batch are pictures of one size; found {sorted(sizes)} (frames, rows, columns)."
        )
    captions = [len(caption) for caption in arguments["cap_feats"]]
    longest = max(map(_filled, captions))
    image = (rows // patch, columns // patch)
    return [Measures(text, image, padding=longest - _filled(text)) for text in captions]


def _filled(tokens: int) -> int:
    return -(-tokens // _MULTIPLE) * _MULTIPLE


def arrange(model: Any, measures: Measures) -> Frames:
    """Frames "joint", "image" and "text"; the latter two of the refiners."""
    tokens, text, padding = prod(measures.image), measures.text, ("padding", measures.padding)
    image = (("image", measures.image), ("image.registers", _filled(tokens) - tokens))
    caption = (("text.global", text), ("text.registers", _filled(text) - text))
    return Frames.of(
        joint=Frame.joint(Layout.in_order(*image, *caption, padding)),
        image=Frame.joint(Layout.in_order(*image)),
        text=Frame.joint(Layout.in_order(*caption, padding)),
    )


def position(arguments: Arguments, slots: Slots) -> Arguments:
    """Captions that carry the slots of further texts."""
    captions = _Captions(arguments["cap_feats"])
    captions.slots = slots.sizes
    return {**arguments, "cap_feats": captions}


def append_text(arguments: Arguments, texts: Tensor) -> Arguments:
    """The arguments with captions, made by `position`, that carry the further texts as well."""
    captions = arguments["cap_feats"]
    captions.texts = texts.to(device=captions[0].device, dtype=captions[0].dtype)
    return arguments


def pack(original: Callable[..., Any], images: Any, captions: Any, *args: Any, **kwargs: Any) -> tuple[Any, ...]:
    """The model's packing, with further texts behind each filled caption."""
    packed = original(images, captions, *args, **kwargs)
    if not isinstance(captions, _Captions):
        return packed
    image, texts, sizes, image_ids, text_ids, image_fill, text_fill = packed
    count = torch.cat([torch.arange(1, 1 + slot) for slot in captions.slots])
    ids = torch.stack([count, torch.zeros_like(count), torch.zeros_like(count)], dim=-1).to(text_ids[0])
    longer = [torch.cat(pair) for pair in zip(texts, captions.texts, strict=True)]
    real = text_fill[0].new_zeros(len(count))
    return (
        image,
        longer,
        sizes,
        image_ids,
        [torch.cat([own, ids]) for own in text_ids],
        image_fill,
        [torch.cat([own, real]) for own in text_fill],
    )


def corner(model: Any, frames: Frames) -> tuple[float, ...]:
    """Captions count on the first axis from one, the picture follows the filled caption."""
    ranges = frames.ranges
    return (1.0 + _filled(len(ranges["text.global"])), 0.0, 0.0)


def _written(pipe: Any, prompt: str) -> str:
    messages = [{"role": "user", "content": prompt}]
    options = {"tokenize": False, "add_generation_prompt": True, "enable_thinking": True}
    return pipe.tokenizer.apply_chat_template(messages, **options)


def count_tokens(pipe: Any, prompt: str) -> int:
    """Tokens of a prompt in the chat template of the pipeline's language model, at most 512."""
    return len(pipe.tokenizer(_written(pipe, prompt), truncation=True, max_length=_MOST).input_ids)


@torch.no_grad()
def encode_prompt(pipe: Any, prompt: str) -> Tensor:
    """Embedding of one prompt by itself: [tokens, channels], its real tokens."""
    return pipe.encode_prompt(prompt, device=pipe._execution_device, do_classifier_free_guidance=False)[0][0]


ZIMAGE = Family(
    name="zimage",
    models=("ZImageTransformer2DModel",),
    layers=stacks(
        ("noise", "noise_refiner", "attention", "image"),
        ("context", "context_refiner", "attention", "text"),
        ("main", "layers", "attention", "joint"),
    ),
    measure=measure,
    arrange=arrange,
    batch=("cond", "uncond"),
    hidden="x",
    prompt="cap_feats",
    pixels_per_token=16,
    # the model is told how far a run has come, the scheduler how much noise is left
    timestep=lambda arguments: 1000 - 1000 * arguments["t"],
    sigma=lambda timestep: timestep / 1000,
    append_text=append_text,
    position=position,
    shadows={"patchify_and_embed": pack},
    encode=encode_prompt,
    count=count_tokens,
    readers=(Reader(written=_written),),
    rotary=lambda model: Rotary(("picture", "y", "x"), tuple(model.config.axes_dims), model.config.rope_theta),
    corner=corner,
    returns=dict.fromkeys(("noise", "context", "main"), ("x",)),
    # its pipeline takes c + guidance_scale (c - u)
    beyond=1.0,
)
