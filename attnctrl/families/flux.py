"""FLUX.1 (dev, schnell, Kontext): joint attention over [text, image, references].

Text ids are all zero, image ids (0, y, x), reference ids (1, y, x). True CFG runs one forward per branch, the prompt's
first.
"""

from __future__ import annotations

from collections.abc import Mapping
from itertools import pairwise
from typing import Any

import torch
from torch import Tensor

from ..errors import LayoutError
from ..layout import Measures
from ..region import Grid
from ..rotary import Rotary
from . import Arguments, Family, joint, stacks
from .reader import Reader


def measure(model: Any, arguments: Arguments) -> Measures:
    """Sizes from `img_ids`, `hidden_states` and `encoder_hidden_states`.

    Raises:
        LayoutError: when ids and tokens differ in number, or the ids of a picture are no raster.
    """
    ids = arguments["img_ids"]
    ids = ids[0] if ids.ndim == 3 else ids
    tokens = arguments["hidden_states"].shape[1]
    if len(ids) != tokens:
        raise LayoutError(f"FLUX got {tokens} image tokens but img_ids for {len(ids)}.")
    segments = _segments(ids.to(device="cpu", dtype=torch.int64))
    if not segments or segments[0][0] != 0:
        raise LayoutError("FLUX image ids begin with axis 0 = 0 for the latents; these img_ids do not.")
    text = arguments["encoder_hidden_states"].shape[1]
    return Measures(text, segments[0][1], tuple(grid for _, grid in segments[1:]))


def _segments(ids: Tensor) -> list[tuple[int, Grid]]:
    """(axis 0, grid) of each picture: a new one starts where axis 0 changes or the raster order restarts."""
    axis, row, column = ids[:, :3].unbind(-1)
    later = (row[1:] > row[:-1]) | ((row[1:] == row[:-1]) & (column[1:] > column[:-1]))
    cuts = (~later | (axis[1:] != axis[:-1])).nonzero().flatten() + 1
    bounds = [0, *cuts.tolist(), len(ids)]
    return [(int(axis[a]), _raster(row[a:b], column[a:b])) for a, b in pairwise(bounds)]


def _raster(row: Tensor, column: Tensor) -> Grid:
    height, width = int(row[-1] - row[0]) + 1, int(column[-1] - column[0]) + 1
    expected = torch.cartesian_prod(torch.arange(height) + row[0], torch.arange(width) + column[0])
    if height * width != len(row) or not torch.equal(expected, torch.stack([row, column], dim=-1)):
        raise LayoutError(
            f"The img_ids of {len(row)} tokens are no raster of rows and columns ({height} x {width}); regions need a "
            "grid."
        )
    return height, width


def append_text(arguments: Arguments, texts: Tensor) -> Arguments:
    """The arguments with `texts` [B, t, channels] at the end of the text sequence and zero ids for them."""
    prompt, ids = arguments["encoder_hidden_states"], arguments["txt_ids"]
    # text ids carry no order in FLUX.1, so further texts need no positions of their own
    zeros = ids.new_zeros(*ids.shape[:-2], texts.shape[1], ids.shape[-1])
    return {
        **arguments,
        "encoder_hidden_states": torch.cat([prompt, texts.to(device=prompt.device, dtype=prompt.dtype)], dim=1),
        "txt_ids": torch.cat([ids, zeros], dim=-2),
    }


def count_tokens(pipe: Any, prompt: str) -> int:
    """T5 tokens of a prompt, its end token included, at most 512."""
    if hasattr(pipe, "maybe_convert_prompt"):
        prompt = pipe.maybe_convert_prompt(prompt, pipe.tokenizer_2)
    return len(pipe.tokenizer_2(prompt, truncation=True, max_length=512).input_ids)


@torch.no_grad()
def encode_prompt(pipe: Any, prompt: str) -> Tensor:
    """T5 embedding of one prompt by itself: [tokens, channels], exactly its real tokens, no padding.

    FLUX runs T5 without an attention mask, so padding would carry the prompt as well and blur where a text ends.
    """
    length = count_tokens(pipe, prompt)
    return pipe._get_t5_prompt_embeds([prompt], max_sequence_length=length, device=pipe._execution_device)[0]


def _early(counts: Mapping[str, int]) -> str:
    return f"single:0-{max(0, (counts['single'] + 1) // 2 - 1)}"


FLUX = Family(
    name="flux",
    models=("FluxTransformer2DModel",),
    layers=stacks(
        ("double", "transformer_blocks", "attn", "joint"), ("single", "single_transformer_blocks", "attn", "joint")
    ),
    measure=measure,
    arrange=joint("text", "image", "references"),
    watch=("img_ids",),
    pixels_per_token=16,
    timestep=lambda arguments: 1000 * arguments["timestep"],
    sigma=lambda timestep: timestep / 1000,
    # Seg2Any isolates regions in single blocks 0..18 of 38
    presets={"single-early": _early},
    append_text=append_text,
    encode=encode_prompt,
    count=count_tokens,
    readers=(Reader("tokenizer_2"),),
    rotary=lambda model: Rotary(("picture", "y", "x"), tuple(model.config.axes_dims_rope)),
)
