"""Where a forward stands: at which step of the run, and which guidance branches and samples its rows are.

Told from the forward's own arguments and the scheduler, never by counting calls.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch

from .call import Row
from .errors import LayoutError
from .families import Arguments, Family, Text, sizes_of
from .schedule import Moment, locate, run_levels

__all__ = ["Branches", "Place", "guidance_of", "rows_of", "skipped_blocks"]

Branches = tuple[str | None, ...]
"""Guidance branches of one batch in the order of its rows; None where unknown."""


class Place:
    """What is remembered between the forwards of a model to tell runs, steps and branches apart."""

    def __init__(self, family: Family) -> None:
        self.family = family
        self._timesteps: Any = None
        self._levels: tuple[tuple[float, ...], tuple[float, ...]] = ((), ())
        self._where: tuple[Any, float] = (None, 0.0)
        self._first: Text | None = None
        self._second: Text | None = None
        self._rows = 0

    @property
    def run(self) -> Any:
        """The same object for all forwards of one run; None without a scheduler."""
        return self._timesteps

    def levels(self, scheduler: Any) -> tuple[tuple[float, ...], tuple[float, ...]]:
        """(timesteps, sigmas) of the scheduler's run, read once a run: `set_timesteps` makes new tensors."""
        timesteps = getattr(scheduler, "timesteps", None)
        if timesteps is not self._timesteps:
            self._timesteps, self._levels, self._rows = timesteps, run_levels(scheduler), 0
        return self._levels

    def moment(self, arguments: Arguments, scheduler: Any, needed: bool) -> Moment:
        """The step of a forward; unless its position is `needed`, the scheduler's word is taken.

        Raises:
            LayoutError: when rows are at different noise levels.
        """
        marks, sigmas = self.levels(scheduler)
        index = step_index(scheduler)
        # DDIM and its kin do not count their steps
        if not needed and (scheduler is None or hasattr(scheduler, "step_index")):
            step = index if index < len(sigmas) else None
            return Moment(None if step is None else sigmas[step], step, sigmas)
        timestep = self.family.timestep(arguments).reshape(-1)
        levels = timestep.tolist()
        if max(levels) != min(levels):
            raise LayoutError(
                f"Rows of one forward are at different noise levels (timesteps {min(levels):g} to {max(levels):g})."
            )
        rounding = torch.finfo(timestep.dtype).eps if timestep.is_floating_point() else 0.0
        step = locate(levels[0], marks, index, rounding)
        if step is not None:
            return Moment(sigmas[step], step, sigmas)
        return Moment(None if self.family.sigma is None else self.family.sigma(levels[0]), None, sigmas)

    def batch(self, arguments: Arguments, pipes: Sequence[Any]) -> Branches:
        """Branches of a family that runs them as one batch; () when this forward holds a single one."""
        # guiders of modular pipelines run each branch in a forward of its own
        apart = any(getattr(pipe, "guider", None) is not None for pipe in pipes)
        if len(arguments[self.family.hidden]) == 1 or skipped_blocks(arguments) or apart:
            return ()
        guided = next((found for pipe in pipes if (found := _guided(pipe)) is not None), None)
        if guided is None:
            return (None,)
        perturbed = any(getattr(pipe, "do_perturbed_attention_guidance", False) for pipe in pipes)
        order = tuple(name for name in self.family.batch if guided or name == "cond")
        if guided and self._is_part(len(arguments[self.family.hidden]), len(order)):
            return ("cond",)
        return (*order, "perturbed") if perturbed else order if guided else ()

    def _is_part(self, rows: int, branches: int) -> bool:
        """Whether a batch is one branch of those that the run began with: some pipelines drop guidance on the way."""
        self._rows = self._rows or rows
        return rows * branches == self._rows

    def branch_by_text(self, arguments: Arguments, scheduler: Any) -> str | None:
        """The branch of a forward of its own: the prompt comes first at each step."""
        text, (marks, _) = self.family.text(arguments), self.levels(scheduler)
        index = step_index(scheduler)
        if index < len(marks):
            return self.family.branches[0 if self._is_first_text(self._timesteps, index, text) else 1]
        level = self.family.timestep(arguments).reshape(-1)[0].item()
        return self.family.branches[0] if self._is_first_text(None, level, text) else None

    def _is_first_text(self, run: Any, where: float, text: Text) -> bool:
        """Whether `text` is the first that came at this place of this run: the first branch in CFG order."""
        if self._first is None or run is not self._where[0] or where != self._where[1]:
            self._where, self._first, self._second = (run, where), text, None
            return True
        if text is self._first:
            return True
        if text is self._second:
            return False
        if sizes_of(text) == sizes_of(self._first) and all(map(torch.equal, text, self._first)):
            return True
        self._second = text
        return False


def rows_of(batch: int, branches: Branches, scenes: int) -> list[Row]:
    """Branch and sample of each of `batch` rows, when the controls hold regions for `scenes` samples.

    Raises:
        LayoutError: when they do not divide.
    """
    each, left = divmod(batch, len(branches))
    if left or each % scenes:
        parts = f" of {len(branches)} guidance branches ({', '.join(map(str, branches))})" * (len(branches) > 1)
        raise LayoutError(
            f"The controls hold regions for {scenes} samples, but the batch has {batch} rows{parts}. Give one list of "
            "regions per prompt, or one list for all."
        )
    # pipelines repeat each prompt num_images_per_prompt times in a row
    return [Row(branch, index * scenes // each, index) for branch in branches for index in range(each)]


def skipped_blocks(arguments: Arguments) -> Sequence[int]:
    """Blocks that skip layer guidance leaves out of a forward of its own, which holds the prompt's rows alone."""
    return arguments.get("skip_layers") or ()


def guidance_of(family: Family, pipes: Sequence[Any], branches: Branches) -> float | None:
    """s of the guidance u + s (c - u) that a pipeline makes of a forward with these branches, 1 where it uses none;
    None where none of the pipelines tells it, or where the other branch has a forward of its own."""
    if "uncond" in branches and "cond" in branches:
        told = (getattr(pipe, "guidance_scale", None) for pipe in pipes)
        scale = next((float(one) for one in told if one is not None), None)
        return None if scale is None else scale + family.beyond
    return 1.0 if any(_guided(pipe) is False for pipe in pipes) else None


def step_index(scheduler: Any) -> int:
    """The scheduler's step, also before its first one; past the last one after a run."""
    index = getattr(scheduler, "step_index", None)
    return index if index is not None else getattr(scheduler, "begin_index", None) or 0


def _guided(pipe: Any) -> bool | None:
    """Whether a pipeline's present run uses classifier-free guidance; None where it does not tell."""
    try:
        return bool(pipe.do_classifier_free_guidance)
    except AttributeError:  # no pipeline, none of this property, or no run yet
        return None
