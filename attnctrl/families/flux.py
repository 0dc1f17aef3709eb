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
from ..region import Grid, by
from ..rotary import Rotary
from . import TEXT_IMAGE, Arguments, Family, as_given, joint, spread, stacks
from .reader import Reader

_SAME = 1e-3
"""Positions nearer to each other than this, in tokens, are the same."""


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
    pictures = rasters(ids)
    if not pictures or pictures[0][0] != 0:
        raise LayoutError("FLUX image ids begin with axis 0 = 0 for the latents; these img_ids do not.")
    text = arguments["encoder_hidden_states"].shape[1]
    references = tuple(grid for _, grid in pictures[1:])
    return Measures(text, pictures[0][1], references, corner=tuple(ids[0].double().tolist()))


def rasters(ids: Tensor) -> list[tuple[float, Grid]]:
    """(axis 0, grid) of each picture in a sequence of ids [tokens, 3 or more], of which a row is (axis 0, row, column).

    A picture is lines of one width, each a step below the last and beginning at its column; whatever goes on in another
    way begins a new picture. Positions may be fractions. Two pictures that lie edge to edge as one would, in order, are
    one.

    Raises:
        LayoutError: when latents (axis 0 = 0) are followed by more of their kind that no restart parts from them.
    """
    ids = ids[:, :3].to(device="cpu", dtype=torch.float64)
    ahead = (ids[1:] - ids[:-1] - ids.new_tensor([0, 0, 1])).abs().amax(1) < _SAME
    bounds = [0, *((~ahead).nonzero().flatten() + 1).tolist(), len(ids)]
    pictures: list[tuple[list[float], Grid]] = []
    for start, stop in pairwise(bounds):
        first, width = ids[start].tolist(), stop - start
        if pictures and _goes_on(*pictures[-1], first, width):
            corner, (height, _) = pictures[-1]
            pictures[-1] = corner, (height + 1, width)
            continue
        if pictures and first[0] == pictures[-1][0][0] == 0 and first > ids[start - 1].tolist():
            raise LayoutError(
                f"The img_ids of {len(ids)} tokens are no raster of rows and columns (a line of {width} follows "
                f"{by(pictures[-1][1])} tokens); regions need a grid."
            )
        pictures.append((first, (1, width)))
    return [(corner[0], grid) for corner, grid in pictures]


def _goes_on(corner: list[float], grid: Grid, first: list[float], width: int) -> bool:
    """Whether a line of `width` tokens that begins at `first` is the next one of the picture `grid` at `corner`."""
    below = (corner[0], corner[1] + grid[0], corner[2])
    return width == grid[1] and all(abs(a - b) < _SAME for a, b in zip(below, first, strict=True))


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


def _late(counts: Mapping[str, int]) -> str:
    count = counts["single"]
    return f"single:{min(count - 1, count // 2 + 1)}-{count - 1}"


def _middle(counts: Mapping[str, int]) -> str:
    index = (counts["double"] + counts["single"]) // 2
    return f"double:{index}" if index < counts["double"] else f"single:{index - counts['double']}"


# the blocks without which pictures change most (Stable Flow, arXiv 2411.14430), in which FreeCus shares
_VITAL = (0, 1, 2, 17, 18, 25, 28, 53, 54, 56)


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
    # of 38 single blocks: Seg2Any isolates regions in 0..18, AlignedGen shares in all, RF-Edit injects in 20..37
    presets={
        "single-early": _early,
        "middle": _middle,
        "style": lambda counts: "single",
        "edit": _late,
        "vital": lambda counts: spread(_VITAL, 57, counts, "double", "single"),
    },
    append_text=append_text,
    encode=encode_prompt,
    count=count_tokens,
    readers=(Reader("tokenizer_2"),),
    rotary=lambda model: Rotary(("picture", "y", "x"), tuple(model.config.axes_dims_rope)),
    corner=as_given,
    returns={"double": TEXT_IMAGE, "single": TEXT_IMAGE},
)
