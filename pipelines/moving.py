"""A picture and, beside it, the same picture with a subject at another place.

found = move(pipe, "a red circle, white background", Region("a red circle", box=(0, 0.25, 0.4, 0.65)), (0.5, 0.0))
found.moved.save("moved.png")

DiffUHaul (arXiv 2406.01594) as we read it, see `attnctrl.presets_sets.diffuhaul`; its layouts come from a model that
was trained for them, here the subject's text is read at its new place (`Regions`), and what neither place covers stays
the first picture's, latent by latent. The noise from which the subject came goes where it goes.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from inspect import signature
from typing import TYPE_CHECKING, Any

import torch
from attnctrl.pipelines.base import canvas_of, stock_name
from attnctrl.pipelines.latents import ADAPTERS
from torch import Tensor

from attnctrl.attach import attach, parts_of
from attnctrl.controls import Regions
from attnctrl.errors import ControlError, UnsupportedModelError
from attnctrl.families import family_of
from attnctrl.presets_sets import diffuhaul
from attnctrl.region import Grid, Region, coverage

if TYPE_CHECKING:
    from PIL import Image

__all__ = ["Moved", "move", "moved_cells"]

Box = tuple[float, float, float, float]


@dataclass(frozen=True, eq=False)
class Moved:
    """Two pictures of one batch.

    Attributes:
        source: as the plain model draws it.
        moved: with the subject at its new place.
        box: which that is.
        report: what acted where.
    """

    source: Image.Image
    moved: Image.Image
    box: Box
    report: str


def move(
    pipe: Any,
    prompt: str | Sequence[str],
    subject: Region,
    to: Sequence[float],
    *,
    seed: int = 0,
    keep_ground: bool = True,
    call: Any = None,
    **options: Any,
) -> Moved:
    """Draw a picture, and again with a subject moved.

    Args:
        pipe: a pipeline of `attnctrl.pipelines.latents.ADAPTERS`.
        prompt: of both pictures, or one of each.
        subject: where it stands in the first picture, a box; its prompt, if it has one, is read at the new place.
        to: its box there, or (x, y): by which shares of the picture it moves.
        seed: of the noise from which both begin; what the subject's box held of it moves along.
        keep_ground: what neither place covers is taken from the first picture after every step.
        call: further arguments of the pipeline, such as num_inference_steps or guidance_scale.
        options: of the preset "diffuhaul".

    Raises:
        ControlError: the subject has no box, its new place is not on the picture, or an option is unknown.
        UnsupportedModelError: another pipeline.
    """
    if stock_name(pipe, tuple(ADAPTERS)) is None:
        raise UnsupportedModelError(f"Subjects are moved in {', '.join(ADAPTERS)}; found {type(pipe).__name__}.")
    old, box = _boxes(subject, to)
    here = replace(subject, box=box, name=subject.label)
    scenes = [[replace(subject, name=subject.label)], [here]]
    rotary = family_of(parts_of(pipe)[0]).rotary
    unknown = options.keys() - signature(diffuhaul).parameters.keys()
    if unknown:
        raise ControlError(f"The preset 'diffuhaul' has no options {', '.join(sorted(unknown))}.")
    stack = diffuhaul(scenes, **{"reposition": None if rotary is None else "rope", **options})
    if subject.prompt:
        stack.insert(0, Regions([[], [here]]))
    prompts = [prompt, prompt] if isinstance(prompt, str) else list(prompt)
    if len(prompts) != 2:
        raise ControlError(f"There are two pictures, the first and the moved one; found {len(prompts)} prompts.")
    told = {**(call or {}), "generator": torch.Generator("cpu").manual_seed(seed)}
    canvas = canvas_of(pipe)
    grid = tuple(int(told.get(side) or canvas.own) // canvas.multiple for side in ("height", "width"))
    told["latents"] = _noises(pipe, seed, grid, (old, box))
    if keep_ground:
        told["callback_on_step_end"] = _grounding([subject, here], grid)
    with attach(pipe, stack) as handle:
        source, moved = pipe(prompts, **told).images
        return Moved(source, moved, box, str(handle.report()))


def _boxes(subject: Region, to: Sequence[float]) -> tuple[Box, Box]:
    """The subject's box, and that at its new place.

    Raises:
        ControlError: there is none, or it leaves the picture.
    """
    if subject.box is None:
        raise ControlError(f"'{subject.label}' has no box; give Region(box=...) around what is to be moved.")
    if len(to) not in (2, 4):
        raise ControlError(f"`to` is a box (x0, y0, x1, y1), or the shares (x, y) to move by; found {tuple(to)}.")
    x0, y0, x1, y1 = to if len(to) == 4 else (place + to[i % 2] for i, place in enumerate(subject.box))
    if not (0 <= x0 < x1 <= 1 and 0 <= y0 < y1 <= 1):
        raise ControlError(f"The new box {(x0, y0, x1, y1)} is not on the picture; move '{subject.label}' less far.")
    return subject.box, (x0, y0, x1, y1)


def _noises(pipe: Any, seed: int, grid: Grid, boxes: tuple[Box, Box]) -> Tensor:
    """The noise of both pictures in the denoiser's form: that of this seed, and the same whose cells moved along.

    Moving is a permutation of cells, so it is noise as before; where sizes differ nothing is moved.
    """
    cell = canvas_of(pipe).multiple // pipe.vae_scale_factor
    shape = (1, pipe.vae.config.latent_channels, grid[0] * cell, grid[1] * cell)
    noise = torch.randn(shape, generator=torch.Generator("cpu").manual_seed(seed))
    cells = torch.nn.functional.pixel_unshuffle(noise, cell).flatten(2)
    moved = cells[:, :, moved_cells(*boxes, grid)].unflatten(2, grid)
    both = torch.cat([noise, torch.nn.functional.pixel_shuffle(moved, cell)])
    made: Tensor = ADAPTERS[str(stock_name(pipe, tuple(ADAPTERS)))].pack(pipe, both)
    return made.to(device=pipe._execution_device, dtype=next(parts_of(pipe)[0].parameters()).dtype)


def moved_cells(source: Box, target: Box, grid: Grid) -> Tensor:
    """int64 [cells]: which cell each becomes when those of one box go to another of its size, and others make room."""
    old, new = (_cells(box, grid) for box in (source, target))
    order = torch.arange(grid[0] * grid[1])
    if len(old) != len(new):
        return order
    order[new] = old
    held = torch.zeros(2, len(order), dtype=torch.bool)
    held[0, old], held[1, new] = True, True
    order[(held[0] & ~held[1]).nonzero().flatten()] = (held[1] & ~held[0]).nonzero().flatten()
    return order


def _cells(box: Box, grid: Grid) -> Tensor:
    """Numbers of a box's cells in raster order, its sides rounded to whole ones."""
    rows, columns = (
        torch.arange(round(box[side] * size), max(round(box[side] * size) + 1, round(box[side + 2] * size)))
        for side, size in ((1, grid[0]), (0, grid[1]))
    )
    return (rows[:, None] * grid[1] + columns).flatten()


def _grounding(places: Sequence[Region], grid: Grid) -> Callable[..., dict[str, Any]]:
    """A callback after each step: what no place covers of the second picture's latents is the first one's."""

    def on_step_end(_pipe: Any, _index: int, _timestep: Any, tensors: dict[str, Any]) -> dict[str, Any]:
        latents: Tensor = tensors["latents"]
        # packed latents are a token a row
        size = grid if latents.ndim == 3 else tuple(latents.shape[-2:])
        covered = torch.stack([coverage(one, size) for one in places]).amax(0) > 0
        mine = covered.to(latents.device).reshape((-1, 1) if latents.ndim == 3 else (1, *size))
        return {"latents": torch.stack([latents[0], torch.where(mine, latents[1], latents[0])])}

    return on_step_end
