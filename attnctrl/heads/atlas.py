"""The head atlas: one picture for each head, drawn from one noise and one prompt with that head alone perturbed."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np
from PIL import Image, ImageDraw
from torch import Tensor

from ..headset import HeadSet
from ..pictures import INK, PAPER, enlarge, grid, tag
from .sampler import Head, Pair, Sampler

__all__ = ["atlas", "atlas_price"]

_SIDE = 96


def atlas(
    sampler: Sampler,
    pair: Pair,
    weak: Callable[[Sequence[Head]], HeadSet],
    scores: Mapping[Head, float] | None = None,
    chosen: Sequence[Head] = (),
    side: int = _SIDE,
    advance: Callable[[int, int], None] | None = None,
) -> Image.Image:
    """Rows are layers, columns heads; the picture without perturbation stands in front of each row.

    Args:
        sampler: draws.
        pair: of all pictures.
        weak: heads -> the set that perturbs them.
        scores: of heads, written on their pictures.
        chosen: heads whose pictures have a frame.
        side: pixels of each picture's longer side.
        advance: told of pictures: (done, in all).
    """
    heads, images = list(sampler.heads), []
    sets = _sets(sampler, weak)
    for at in range(0, len(sets), sampler.batch):
        part = sets[at : at + sampler.batch]
        images += [_picture(one, side) for one in sampler.draw(pair, part)]
        if advance is not None:
            advance(at + len(part), len(sets))
    plain, shown = images[0], dict(zip(heads, images[1:], strict=True))
    layers = dict.fromkeys(layer for layer, _ in heads)
    width = 1 + max(head for _, head in heads)
    blank = Image.new("RGB", plain.size, PAPER)
    rows = [
        [plain, *(_marked((layer, n), shown, blank, scores or {}, chosen) for n in range(width))] for layer in layers
    ]
    return grid(rows, list(layers), ["none", *(f"head {n}" for n in range(width))], side=side)


def atlas_price(sampler: Sampler, weak: Callable[[Sequence[Head]], HeadSet]) -> int:
    """Rows of the denoiser that an atlas runs."""
    sets = _sets(sampler, weak)
    return sum(sampler.price(sets[at : at + sampler.batch], at == 0) for at in range(0, len(sets), sampler.batch))


def _sets(sampler: Sampler, weak: Callable[[Sequence[Head]], HeadSet]) -> list[HeadSet]:
    return [weak(()), *(weak([head]) for head in sampler.heads)]


def _picture(image: Tensor, side: int) -> Image.Image:
    pixels = (image.movedim(0, -1) * 255).round().byte().cpu().numpy()
    return enlarge(Image.fromarray(np.ascontiguousarray(pixels)), side)


def _marked(
    head: Head,
    shown: Mapping[Head, Image.Image],
    blank: Image.Image,
    scores: Mapping[Head, float],
    chosen: Sequence[Head],
) -> Image.Image:
    """The picture of a head with its score, and its rank where it was chosen."""
    picture = shown.get(head, blank).copy()
    pen: Any = ImageDraw.Draw(picture)
    size = max(9, max(picture.size) // 9)
    if head in scores:
        tag(pen, (0, picture.height), f"{scores[head]:+.3f}", PAPER, size, picture.size)
    if head in chosen:
        pen.rectangle((0, 0, picture.width - 1, picture.height - 1), outline=INK, width=max(2, size // 4))
        tag(pen, (0, 0), f"#{list(chosen).index(head) + 1}", INK, size, picture.size)
    return picture
