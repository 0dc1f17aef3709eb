"""Stable Diffusion 3 and 3.5: joint attention over [image, text]; dual layers have a second one over the image alone.

Guidance runs as one batch, the negative prompt's rows first. Positions are added to the image once, before the first
block, so texts have none and further ones may be appended.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from ..layout import Frame, Frames, Layout, Measures
from . import TEXT_IMAGE, Arguments, Family, append_to, spread, stacks, still
from .reader import Reader


def measure(model: Any, arguments: Arguments) -> Measures:
    """Sizes from the latents [B, C, H, W], the model's patch size and `encoder_hidden_states`."""
    patch: Any = model.config.patch_size
    height, width = arguments["hidden_states"].shape[-2:]
    return Measures(arguments["encoder_hidden_states"].shape[1], (height // patch, width // patch))


def arrange(model: Any, measures: Measures) -> Frames:
    """Frames "joint" and "self"."""
    return Frames.of(
        joint=Frame.joint(Layout.of(order=("image", "text"), **vars(measures))),
        self=Frame.joint(Layout.of(order=("image",), **vars(measures))),
    )


def _clip_tokens(pipe: Any) -> int:
    return int(pipe.tokenizer_max_length)


def count_tokens(pipe: Any, prompt: str) -> int:
    """The CLIP encoders' full length (77), then T5's own tokens, its end token included, at most 256."""
    return _clip_tokens(pipe) + _t5_tokens(pipe, prompt)


def _t5_tokens(pipe: Any, prompt: str) -> int:
    if pipe.text_encoder_3 is None:
        return 0  # the pipeline fills up with zeros
    return len(pipe.tokenizer_3(prompt, truncation=True, max_length=256).input_ids)


@torch.no_grad()
def encode_prompt(pipe: Any, prompt: str) -> Tensor:
    """Embedding of one prompt by itself: [tokens, channels]; T5's part at its real length, without padding."""
    options = {"device": pipe._execution_device, "do_classifier_free_guidance": False}
    # the pipeline asks for one token of T5 at least, also where T5 is left out
    length = max(1, _t5_tokens(pipe, prompt))
    encoded = pipe.encode_prompt(prompt, None, None, max_sequence_length=length, **options)[0][0]
    return encoded[: count_tokens(pipe, prompt)]


SD3 = Family(
    name="sd3",
    models=("SD3Transformer2DModel",),
    layers=stacks(("joint", "transformer_blocks", "attn", "joint"), ("dual", "transformer_blocks", "attn2", "self")),
    measure=measure,
    arrange=arrange,
    batch=("uncond", "cond"),
    # values of sources are injected in the later half
    presets={
        "middle": lambda counts: f"joint:{counts['joint'] // 2}",
        "edit": lambda counts: f"joint:{counts['joint'] // 2}-{counts['joint'] - 1}",
        # of 24; second-hand
        "vital": lambda counts: spread((0, 7, 8, 9), 24, counts, "joint"),
    },
    pixels_per_token=16,
    timestep=lambda arguments: arguments["timestep"],
    sigma=lambda timestep: timestep / 1000,
    append_text=append_to(),
    encode=encode_prompt,
    count=count_tokens,
    # both CLIP encoders see the same words; they stand side by side in channels
    readers=(Reader("tokenizer", limit=_clip_tokens), Reader("tokenizer_3", begin=_clip_tokens)),
    corner=still,
    table="pos_embed",
    returns={"joint": TEXT_IMAGE, "dual": TEXT_IMAGE},
)
