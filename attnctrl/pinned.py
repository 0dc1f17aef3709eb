"""Rows of a batch that the model does not draw: at every step it finds them on a path that is given.

A picture whose latents are known at every noise level becomes one that others of the batch can read (`Share`): a
reference, a canvas on which subjects were put, a style. The pipeline runs as it is; what it draws for these rows is
overwritten before the model sees it, in every guidance branch.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from inspect import signature
from typing import Any, TypeVar

import torch
from torch import Tensor, nn

from .attach import parts_of
from .errors import ControlError, LayoutError, ScheduleError, UnsupportedModelError
from .families import Family, family_of
from .inversion import Map, diffusion_shares, flow_shares, noised
from .place import Place, rows_of

__all__ = ["Path", "Pins", "pinned", "still"]

Path = Callable[[float], Tensor]
"""Noise level, in the unit of `attnctrl.schedule.run_levels`, -> latents of one row [...], in the form in which the
denoiser gets them: `lambda sigma: trajectory.at(sigma)[0]`, or `still`."""
T = TypeVar("T")


class Pins:
    """The rows that are pinned, and whether the model has met them.

    Attributes:
        rows: path of each, by its place among the pictures of the batch.
        forwards: forwards of the model so far.
    """

    def __init__(self, pipe: Any, rows: Mapping[int, Path]) -> None:
        self.pipe = pipe
        self.rows = dict(rows)
        self.forwards = 0

    def kept(self, pictures: Sequence[T]) -> list[T]:
        """What the pipeline returned, without these rows: what it drew there was never looked at."""
        return [one for number, one in enumerate(pictures) if number not in self.rows]

    def put(self, latents: Any, images: Sequence[int], sigma: float) -> Any:
        """Latents (a tensor, or a list of one for each row) with the pinned rows at a noise level.

        Args:
            images: of each row, which of the batch's pictures it is.

        Raises:
            LayoutError: a row that the batch does not hold, or latents of another shape.
        """
        found = list(latents)
        if missing := sorted(set(self.rows) - set(images)):
            raise LayoutError(
                f"Row {missing[0]} is pinned, but a guidance branch of this batch holds {1 + max(images)} pictures. "
                "Give the pipeline a prompt for each row, the pinned ones included."
            )
        paths = {image: path(sigma) for image, path in self.rows.items()}
        for number, image in enumerate(images):
            if image not in paths:
                continue
            if paths[image].shape != found[number].shape:
                raise LayoutError(
                    f"Row {image} is pinned to latents {tuple(paths[image].shape)}, but the denoiser gets rows of "
                    f"{tuple(found[number].shape)}. Encode the picture at the size that is drawn, in the denoiser's "
                    "form (attnctrl.pipelines.canvas.pinned_pictures does both)."
                )
            found[number] = paths[image].to(found[number])
        return torch.stack(found) if isinstance(latents, Tensor) else found


@contextmanager
def pinned(pipe: Any, rows: Mapping[int, Path]) -> Iterator[Pins]:
    """Hold rows of a pipeline's batch on paths while the context lasts; controls may be attached before or after.

        with ac.pinned(pipe, {0: path}) as pins, ac.attach(pipe, ac.Share(readers="anchors", anchors=1)):
            images = pins.kept(pipe([style, *prompts]).images)

    Args:
        pipe: a pipeline; its scheduler tells the noise level of a forward.
        rows: path by the row's place in the batch, as pipelines count: each prompt num_images_per_prompt times.

    Raises:
        ControlError: a bare model.
        UnsupportedModelError: the model is of no known family, or compiled as a whole.
        LayoutError, ScheduleError: from the forward, when rows, shapes or noise levels do not fit.
    """
    model, found = parts_of(pipe)
    if found is None:
        raise ControlError("Rows are pinned at noise levels, which a bare model does not tell; give the pipeline.")
    second = getattr(pipe, "transformer_2", None)
    pins = Pins(pipe, rows)
    models = [model] if second is None or second is model else [model, second]
    hooks = [(one, _hook(one, pins)) for one in models]
    handles = [one.register_forward_pre_hook(hook, prepend=True, with_kwargs=True) for one, hook in hooks]
    try:
        yield pins
    finally:
        for handle in handles:
            handle.remove()
    if not pins.forwards:
        warnings.warn("Rows were pinned, but the pipeline's model did not run meanwhile.", stacklevel=3)


def still(clean: Tensor, noise: Tensor, *, flow: bool, cleaner: Map = lambda sigma: sigma) -> Path:
    """The path of a picture and one fixed noise, mixed anew at every level.

    Args:
        clean, noise: latents of one row, of one shape.
        flow: of flow models, (1 - sigma) clean + sigma noise; else of diffusion models, both by the square roots of
            their shares 1 / (1 + sigma^2) and the rest, as scaled model inputs of all their schedulers are.
        cleaner: level of the run -> level of the picture, see `attnctrl.inversion.noised`.
    """
    if flow:
        return lambda sigma: noised(clean, noise, flow_shares([sigma], cleaner))[0]
    return lambda sigma: noised(clean, noise, diffusion_shares([1 / (1 + sigma * sigma)], cleaner))[0]


def _hook(model: nn.Module, pins: Pins) -> Callable[..., Any]:
    """What is called before each forward of the model, and changes its latents."""
    if hasattr(model, "_orig_mod") or getattr(model, "_compiled_call_impl", None):
        raise UnsupportedModelError(
            f"{type(getattr(model, '_orig_mod', model)).__name__} is compiled as a whole, which leaves no place to pin "
            "rows. Use model.compile_repeated_blocks() instead."
        )
    family = family_of(model)
    place, names = Place(family), signature(model.forward)

    def before(_module: nn.Module, given: tuple[Any, ...], named: dict[str, Any]) -> tuple[tuple[()], dict[str, Any]]:
        arguments = names.bind(*given, **named).arguments
        sigma, images = _where(family, place, arguments, pins.pipe)
        pins.forwards += 1
        return (), {**arguments, family.hidden: pins.put(arguments[family.hidden], images, sigma)}

    return before


def _where(family: Family, place: Place, arguments: Mapping[str, Any], pipe: Any) -> tuple[float, list[int]]:
    """The noise level of a forward, and of each row which of the batch's pictures it is."""
    told = dict(arguments)
    moment = place.moment(told, pipe.scheduler, needed=True)
    if moment.sigma is None:
        raise ScheduleError(
            f"Rows are pinned at noise levels, but this forward's timestep is none of the {moment.steps} that the "
            f"pipeline's {type(pipe.scheduler).__name__} lists. Use a scheduler that visits its own timesteps."
        )
    branches = (family.batch and place.batch(told, [pipe])) or (None,)
    return moment.sigma, [row.image for row in rows_of(len(told[family.hidden]), branches, 1)]
