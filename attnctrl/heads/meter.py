"""What a search costs, and what its runs have in common: the steps before anything acts are the same for all of them.

Rows that start from one noise and one prompt stay equal, to the bit, until a control acts on them. So before that one
row of each guidance branch runs, and the others take over its output; the batches that follow take over what was kept.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from inspect import signature
from typing import Any

import torch
from torch import Tensor, nn

from ..families import Arguments, Family
from ..guidance import rows_of_arguments
from ..place import Place
from ..schedule import Window, active_steps
from ..select import Layer
from ..standin import standing_in

__all__ = ["Cost", "Meter"]


@dataclass
class Cost:
    """What ran so far.

    Attributes:
        rows: rows of the denoiser's forwards, perturbed ones included.
        layers: rows of calls of its attention layers; a forward of one row that runs whole has as many as there are
            layers, and one that takes over a part of another has fewer.
    """

    rows: int = 0
    layers: int = 0


class Meter:
    """Counts the forwards of a model, and shares those of equal rows.

    Args:
        model: the denoiser.
        family: of it.
        layers: its attention layers.
    """

    def __init__(self, model: nn.Module, family: Family, layers: tuple[Layer, ...]) -> None:
        self.model, self.family, self.layers = model, family, layers
        self.cost = Cost()
        self._for: object = None
        self._kept: dict[tuple[int, int], tuple[Tensor, Any]] = {}

    @contextmanager
    def watching(self, run: object, copies: int, window: Window | None, scheduler: Any) -> Iterator[None]:
        """Around a pipeline's call.

        Args:
            run: which noise and prompt it starts from.
            copies: rows of each guidance branch, all of that noise and prompt.
            window: when the rows begin to differ; None shares nothing.
            scheduler: the pipeline's.
        """
        if self._for != run:
            self._for, self._kept = run, {}
        # no hooks: blocks that have some are not passed over by what replays them
        counted = ((layer.module, self._counted) for layer in self.layers)
        with standing_in([(self.model, _Run(self, copies, window, scheduler)), *counted]):
            yield

    def _counted(self, forward: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
        out = forward(*args, **kwargs)
        self.cost.layers += len(out[0] if isinstance(out, tuple) else out)
        return out


class _Run:
    """Stands for the model's forward during one call of a pipeline."""

    def __init__(self, meter: Meter, copies: int, window: Window | None, scheduler: Any) -> None:
        self.meter, self.copies, self.window = meter, copies, window
        self.place, self.scheduler = Place(meter.family), scheduler
        self.last, self.nth = -1, 0
        bound = signature(type(meter.model).forward).bind
        self.bound = partial(bound, meter.model)

    def __call__(self, forward: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
        arguments: Arguments = dict(self.bound(*args, **kwargs).arguments)
        arguments.pop(next(iter(arguments)))
        latents = arguments[self.meter.family.hidden]
        step = self._common_step(arguments)
        if step is None or not _alike(latents, self.copies):
            self.meter.cost.rows += len(latents)
            return forward(*args, **kwargs)
        return self._shared(forward, arguments, latents, step)

    def _common_step(self, arguments: Arguments) -> int | None:
        """The step, if it comes before the first in which something acts."""
        if self.window is None:
            return None
        moment = self.place.moment(arguments, self.scheduler, True)
        acting = active_steps(self.window, moment.sigmas)
        if moment.step is None or moment.step >= min(acting, default=0):
            # nothing is common any more, and nobody has to ask again
            self.window = None
            return None
        return moment.step

    def _shared(self, forward: Callable[..., Any], arguments: Arguments, latents: Tensor, step: int) -> Any:
        """One row for all copies; the n-th forward of a step is that of the n-th branch."""
        self.nth, self.last = (self.nth + 1 if step == self.last else 0), step
        family, rows = self.meter.family, list(range(0, len(latents), self.copies))
        key, mine = (step, self.nth), latents[rows]
        kept = self.meter._kept.get(key)
        if kept is None or not torch.equal(kept[0], mine):
            given = rows_of_arguments(arguments, rows, len(latents), (family.hidden, family.prompt))
            self.meter.cost.rows += len(rows)
            kept = self.meter._kept[key] = (mine.clone(), forward(**given))
        return _repeated(kept[1], self.copies)


def _alike(latents: Any, copies: int) -> bool:
    """Whether latents are one tensor, and each `copies` rows of it are equal."""
    if not isinstance(latents, Tensor) or len(latents) % copies:
        return False
    groups = latents.unflatten(0, (-1, copies))
    return torch.equal(groups, groups[:, :1].expand_as(groups))


def _repeated(output: Any, copies: int) -> Any:
    """An output of a model with each row so many times."""
    if isinstance(output, tuple):
        return (output[0].repeat_interleave(copies, 0), *output[1:])
    return type(output)(**{**output, "sample": output.sample.repeat_interleave(copies, 0)})
