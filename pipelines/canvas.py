"""One picture in which subjects of others stand where they should, and rows of a batch that show such pictures.

The true reposition for models whose positions cannot be turned (UNets, SD3): the subject is moved in pixels, before the
model reads it, encoded once, and held in the batch as a row that others read.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from math import ceil, floor
from typing import Any

import numpy as np
import torch
from attnctrl.pipelines.base import stock_name
from attnctrl.pipelines.latents import ADAPTERS, Adapter, Size, encode, read_pictures, size_of
from PIL import Image
from torch import Tensor

from attnctrl.errors import ControlError, UnsupportedModelError
from attnctrl.fitting import Box, Fit, fitted
from attnctrl.inversion import Map
from attnctrl.pinned import Pins, pinned, still
from attnctrl.region import Region, coverage, extent

__all__ = ["Cutout", "canvas", "pinned_pictures"]


@dataclass(frozen=True)
class Cutout:
    """A subject and where it goes.

    Attributes:
        picture: PIL picture or path, of any size.
        subject: its region there; a mask cuts it out, of a box everything is taken.
        place: its region on the canvas.
        fit: of the subject's extent into that of the place; see `attnctrl.fitting.fitted`.
    """

    picture: Any
    subject: Region
    place: Region
    fit: Fit = "contain"


def canvas(cutouts: Sequence[Cutout], size: Size, background: Any = None) -> Image.Image:
    """The picture on which all subjects stand at their places, later ones on top.

    Args:
        cutouts: the subjects.
        size: (width, height) in pixels.
        background: PIL picture or path, resized to `size`; None for the mean colour of what is no subject in the
            pictures.

    Raises:
        AssetError: a picture cannot be read.
        ControlError: no background, and no picture shows any.
    """
    pictures = [read_pictures(one.picture)[0] for one in cutouts]
    if background is None:
        ground = Image.new("RGB", size, _mean_ground(cutouts, pictures))
    else:
        ground = read_pictures(background)[0].resize(size, Image.Resampling.LANCZOS)
    for one, picture in zip(cutouts, pictures, strict=True):
        _paste(ground, one, picture)
    return ground


@contextmanager
def pinned_pictures(
    pipe: Any,
    pictures: Mapping[int, Any],
    seeds: Mapping[int, int] | None = None,
    *,
    cleaner: Map = lambda sigma: sigma,
) -> Iterator[Pins]:
    """`attnctrl.pinned` with pictures and fixed noise: the row of each shows its picture at every noise level.

    Args:
        pipe: a pipeline of `attnctrl.pipelines.latents.ADAPTERS`.
        pictures: PIL picture or path of each row, of the size that is drawn.
        seeds: of each row, of its noise, 0 if left out: the very noise that the pipeline draws from a generator of this
            seed.
        cleaner: level of the run -> level of the pictures, see `attnctrl.inversion.odds_map`.

    Raises:
        UnsupportedModelError: another pipeline.
        AssetError, LayoutError: a picture cannot be read, or does not suit the model.
    """
    name = stock_name(pipe, tuple(ADAPTERS))
    if name is None:
        raise UnsupportedModelError(
            f"Pictures can be pinned in {', '.join(ADAPTERS)}; found {type(pipe).__name__}. Encode them yourself and "
            "use attnctrl.pinned."
        )
    adapter = ADAPTERS[name]
    read = dict(zip(pictures, read_pictures(list(pictures.values())), strict=True))
    size = size_of(pipe, list(read.values()))
    clean = encode(pipe, adapter, list(read.values()))
    noises = [_noise(pipe, adapter, size, (seeds or {}).get(row, 0)).to(clean) for row in read]
    rows = {
        row: still(latents, noise, flow=adapter.flow, cleaner=cleaner)
        for row, latents, noise in zip(read, clean, noises, strict=True)
    }
    with pinned(pipe, rows) as pins:
        yield pins


def _noise(pipe: Any, adapter: Adapter, size: Size, seed: int) -> Tensor:
    """Noise float32 [...] of one row in the denoiser's form."""
    factor = pipe.vae_scale_factor
    shape = (1, pipe.vae.config.latent_channels, size[1] // factor, size[0] // factor)
    return adapter.pack(pipe, torch.randn(shape, generator=torch.Generator("cpu").manual_seed(seed)))[0]


def _mean_ground(cutouts: Sequence[Cutout], pictures: Sequence[Image.Image]) -> tuple[int, int, int]:
    """The mean colour, over all pictures, of the pixels of no subject."""
    left = [
        np.asarray(picture)[(coverage(one.subject, (picture.height, picture.width)) == 0).numpy()]
        for one, picture in zip(cutouts, pictures, strict=True)
    ]
    pixels = np.concatenate([np.empty((0, 3)), *left])
    if not len(pixels):
        raise ControlError("Subjects fill their pictures, so nothing tells the canvas its ground; give `background`.")
    red, green, blue = (round(value) for value in pixels.mean(axis=0).tolist())
    return red, green, blue


def _paste(ground: Image.Image, one: Cutout, picture: Image.Image) -> None:
    """Put a subject on the ground, in place, at whole pixels."""
    source = _pixels(extent(one.subject), picture.size)
    how = fitted(source, _pixels(extent(one.place), ground.size), one.fit)
    tall, wide = (
        max(1, round(side * scale))
        for side, scale in zip((source[3] - source[1], source[2] - source[0]), how.scale, strict=True)
    )
    cut = picture.copy()
    share = coverage(one.subject, (picture.height, picture.width)).numpy()
    cut.putalpha(Image.fromarray(np.rint(255 * share).astype(np.uint8)))
    # what lies beyond the extent must not blur into it
    x0, y0, x1, y1 = source
    left, top = floor(x0), floor(y0)
    whole = cut.crop((left, top, ceil(x1), ceil(y1)))
    inside = (x0 - left, y0 - top, x1 - left, y1 - top)
    moved = whole.resize((wide, tall), Image.Resampling.LANCZOS, box=inside)
    ground.paste(moved, (round(how.target[1] - wide / 2), round(how.target[0] - tall / 2)), moved)


def _pixels(box: Box, size: Size) -> Box:
    (x0, y0, x1, y1), (width, height) = box, size
    return x0 * width, y0 * height, x1 * width, y1 * height
