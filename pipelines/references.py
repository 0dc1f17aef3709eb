"""Several reference pictures for FLUX, whose stock Kontext pipeline takes one.

pipe = with_references(FluxKontextPipeline.from_pretrained(...), [cat, dog])
regions = [Region("a cat", box=(0, 0, 0.5, 1), reference=0), Region("a dog", box=(0.5, 0, 1, 1), reference=1)]
with attach(pipe, Regions(regions)):
    image = pipe(prompt="a cat and a dog").images[0]
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, get_args

import torch
from torch import Tensor

from attnctrl.errors import AssetError, ControlError, LayoutError, UnsupportedModelError
from attnctrl.families.flux import rasters
from attnctrl.region import Grid, Region, centre
from attnctrl.scenefile import MAX_PICTURE_BYTES, FileRefused, as_rgb, decode_picture, read_bounded

if TYPE_CHECKING:
    from attnctrl.pipelines.kontext import FluxKontextReferences
    from PIL import Image

__all__ = ["MAX_PIXELS", "Picture", "Positions", "References", "load_reference", "reference_size", "with_references"]

Picture = Any
"""A PIL picture, or the path of a PNG, JPEG or WebP."""
Positions = Literal["corner", "region", "apart"]
Corner = tuple[float, float, float]
"""Position (axis 0, row, column) of a reference's first token."""

MAX_PIXELS = 1024 * 1024
"""The area of Kontext's own resolutions."""
_MAX_SIDE = 4096
# far more than what tells two positions apart in float32, far less than what a model tells apart
_NUDGE = 1 / 64


def with_references(
    pipe: Any,
    pictures: Sequence[Picture] | Sequence[Sequence[Picture]],
    *,
    positions: Positions = "corner",
    regions: Sequence[Region] | Sequence[Sequence[Region]] = (),
    max_pixels: int = MAX_PIXELS,
    auto_resize: bool = False,
) -> FluxKontextReferences:
    """A Kontext pipeline on the modules of `pipe`, whose every call follows these reference pictures in this order.

    It is called as FluxKontextPipeline is, without `image`. `pipe` stays what it is; LoRA, offload and quantisation are
    those of its modules.

    Args:
        pipe: FluxPipeline or FluxKontextPipeline.
        pictures: PIL pictures or paths: a list for all samples, or one list per sample (prompt) of the batch.
        positions: where the model finds the references. "corner", as Kontext was trained: each at (1, row, column) from
            the top left corner, so that masks alone tell them apart. "region": moved so that the middle of reference k
            lies on the middle of the region that names it, by fractions of tokens where need be, and on the middle of
            the picture where no region does. "apart": at (1, ...), (2, ...), (3, ...) from the corner.
        regions: for "region", those whose `reference` is looked at: a list, or one per sample.
        max_pixels: larger references are made smaller, keeping their proportions.
        auto_resize: bring each first to the one of Kontext's own resolutions that is nearest in proportions.

    Raises:
        UnsupportedModelError: `pipe` is another pipeline.
        AssetError: a picture cannot be read.
        LayoutError: a picture is too small or too large, or samples differ in number, sizes or places of references.
        ControlError: `positions` is none of these, or regions of a sample name one reference twice.
    """
    from attnctrl.pipelines.kontext import FluxKontextReferences
    from diffusers import FluxKontextPipeline, FluxPipeline

    if not isinstance(pipe, (FluxPipeline, FluxKontextPipeline)):
        raise UnsupportedModelError(
            f"{type(pipe).__name__} follows no reference picture; leave references out, or take a FLUX Kontext model "
            "such as toy-flux (FluxPipeline, FluxKontextPipeline)."
        )
    made = FluxKontextReferences(**pipe.components)
    made.set_progress_bar_config(**getattr(pipe, "_progress_bar_config", {}))
    made.source = pipe
    token = 2 * made.vae_scale_factor
    made.references = plan_references(pictures, token, positions, regions, max_pixels, auto_resize)
    return made


@dataclass(frozen=True)
class References:
    """Reference pictures of a batch, and where the model finds them.

    Attributes:
        pictures: one list per sample, or one for all.
        sizes: (width, height) in pixels to which reference k is brought, in every sample.
        token: pixels a token covers in each direction.
        positions: see `with_references`.
        middles: (x, y) of the place of reference k, as shares of the picture.
    """

    pictures: tuple[tuple[Image.Image, ...], ...]
    sizes: tuple[tuple[int, int], ...]
    token: int
    positions: Positions
    middles: tuple[tuple[float, float], ...]

    @property
    def grids(self) -> list[Grid]:
        """(rows, columns) of the tokens of each reference."""
        return [(height // self.token, width // self.token) for width, height in self.sizes]

    def corners(self, grid: Grid) -> list[Corner]:
        """Where each reference begins; `grid` is (rows, columns) of the picture's tokens."""
        if self.positions != "region":
            step = float(self.positions == "apart")
            return [(1 + step * k, 0.0, 0.0) for k in range(len(self.sizes))]
        (rows, columns) = grid
        corners = [
            (1.0, y * rows - height / 2, x * columns - width / 2)
            for (height, width), (x, y) in zip(self.grids, self.middles, strict=True)
        ]
        if [found for _, found in rasters(raster_ids(self.grids, corners))] == self.grids:
            return corners
        # edge to edge, two references look like one picture to those who read positions
        return [(axis, row, column + k * _NUDGE) for k, (axis, row, column) in enumerate(corners)]


def raster_ids(grids: Sequence[Grid], corners: Sequence[Corner]) -> Tensor:
    """FLUX's position ids float32 [tokens, 3] of pictures of these grids, each from its corner on."""
    ids = [
        torch.cartesian_prod(torch.tensor([axis]), torch.arange(height) + row, torch.arange(width) + column)
        for (height, width), (axis, row, column) in zip(grids, corners, strict=True)
    ]
    return torch.cat([torch.zeros(0, 3), *(one.reshape(-1, 3) for one in ids)])


def plan_references(
    pictures: Sequence[Picture] | Sequence[Sequence[Picture]],
    token: int,
    positions: Positions = "corner",
    regions: Sequence[Region] | Sequence[Sequence[Region]] = (),
    max_pixels: int = MAX_PIXELS,
    auto_resize: bool = False,
) -> References:
    """Read the pictures and say where they go; arguments and errors are those of `with_references`."""
    if positions not in get_args(Positions):
        raise ControlError(f"positions must be one of {', '.join(get_args(Positions))}; found {positions!r}.")
    samples = [[one] if not isinstance(one, (list, tuple)) else list(one) for one in pictures]
    if not any(isinstance(one, (list, tuple)) for one in pictures):
        samples = [[one for sample in samples for one in sample]]
    loaded = tuple(tuple(load_reference(one, f"reference {k}") for k, one in enumerate(sample)) for sample in samples)
    sizes = [
        tuple(
            reference_size(one.size, token, max_pixels, auto_resize, f"reference {k}") for k, one in enumerate(sample)
        )
        for sample in loaded
    ]
    _check_alike("number of references", [len(one) for one in sizes], "give each sample as many")
    _check_alike("sizes of references", [_written(one) for one in sizes], "crop or resize them alike")
    middles = [_middles(scene, len(sizes[0])) for scene in _scenes(regions)]
    if positions == "region":
        remedy = "one forward has one set of positions: use positions='corner', or run the samples one by one"
        _check_alike("places of references", middles, remedy)
    return References(loaded, sizes[0], token, positions, middles[0])


def load_reference(picture: Picture, label: str) -> Image.Image:
    """A picture as it was given or from its file, see `as_rgb`; `label` names it in errors.

    Raises:
        AssetError: it is neither, or the file is missing, too large or damaged.
    """
    given = hasattr(picture, "convert")
    if not given and not isinstance(picture, (str, Path)):
        raise AssetError(f"{label}: give a PIL picture or a path; found {type(picture).__name__}.")
    try:
        return as_rgb(picture) if given else decode_picture(read_bounded(Path(picture), MAX_PICTURE_BYTES))
    except FileRefused as error:
        raise AssetError(f"{label}{'' if given else f' ({picture})'}: {error}; {error.remedy}.") from error


def reference_size(
    size: tuple[int, int], token: int, max_pixels: int = MAX_PIXELS, auto_resize: bool = False, label: str = "reference"
) -> tuple[int, int]:
    """(width, height) to which a reference of `size` is brought: whole tokens, at least one.

    Raises:
        LayoutError: a side is shorter than a token or longer than 4096 pixels.
    """
    width, height = size
    if not (token <= min(size) and max(size) <= _MAX_SIDE):
        raise LayoutError(
            f"{label}: a side must have {token} (one token) to {_MAX_SIDE} pixels; found {width} x {height}; resize it."
        )
    if auto_resize:
        from diffusers.pipelines.flux.pipeline_flux_kontext import PREFERRED_KONTEXT_RESOLUTIONS

        proportion = width / height
        _, width, height = min((abs(proportion - w / h), w, h) for w, h in PREFERRED_KONTEXT_RESOLUTIONS)
    shrink = min(1.0, math.sqrt(max_pixels / (width * height)))
    return _whole(width * shrink, token), _whole(height * shrink, token)


def _whole(side: float, token: int) -> int:
    return max(1, int(side) // token) * token


def _scenes(regions: Sequence[Region] | Sequence[Sequence[Region]]) -> Sequence[Sequence[Region]]:
    nested = [one for one in regions if not isinstance(one, Region)]
    return nested or [[one for one in regions if isinstance(one, Region)]]


def _middles(regions: Sequence[Region], count: int) -> tuple[tuple[float, float], ...]:
    """(x, y) of the place of each of `count` references, as shares of the picture."""
    places: dict[int, tuple[float, float]] = {}
    for region in regions:
        if region.reference is not None:
            if region.reference in places:
                raise ControlError(
                    f"Reference {region.reference} has two places: '{region.label}' names it, and so does another "
                    "region; keep one of them."
                )
            places[region.reference] = centre(region)
    return tuple(places.get(k, (0.5, 0.5)) for k in range(count))


def _check_alike(what: str, found: Sequence[Any], remedy: str) -> None:
    if len(set(found)) > 1:
        listed = "; ".join(f"sample {i}: {one}" for i, one in enumerate(found))
        raise LayoutError(f"The {what} must be the same in all samples of a batch; found {listed}; {remedy}.")


def _written(sizes: Sequence[tuple[int, int]]) -> str:
    return ", ".join(f"{width} x {height}" for width, height in sizes)
