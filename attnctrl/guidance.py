"""Perturbed branches: the prompt's rows once more through the model, and what that adds to a step.

    guided = u + s (c - u) + sum_k w_k (c - p_k)

c is the prediction for the prompt, u that without it, p_k that for the prompt through a perturbed model. A pipeline
computes u + s (c - u) itself from what the model returns. The coefficients of each combination add up to 1, so
g = sum_k w_k (c - p_k) on every row of a step that the pipeline gets adds exactly g to the result, whatever s is, and
whatever further branches of its own it combines. Rescaling in the pipeline (`guidance_rescale`) sees c + g.
`attnctrl.increments` has the arithmetic, and forms in which g is rescaled.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable, Mapping, Sequence
from contextlib import ExitStack, nullcontext
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from .call import Row
from .errors import ControlError
from .families import Arguments, Family
from .increments import Guide, increments
from .nested import mapped
from .perturb import exact
from .place import Branches
from .replay import Prefix, Records, Stretch, recording, replaying
from .schedule import Moment

__all__ = ["Guidance", "Step", "added", "copied", "rows_of_arguments"]

PERTURBED = "perturbed"
_SHARED = frozenset({"image_rotary_emb"})
"""Names of arguments that are the same for all rows."""


@dataclass(frozen=True, eq=False)
class Step:
    """Where a forward stands, what its rows are, and the numbers of the seats that act in each branch.

    Attributes:
        scale: s of the guidance that the pipeline makes of its rows, 1 where it uses none; None where that is not told,
            or branches have forwards of their own.
    """

    moment: Moment
    branches: Branches
    rows: Sequence[Row]
    active: Mapping[str | None, tuple[int, ...]]
    scale: float | None = None


class Guidance:
    """The perturbed branches of one model.

    Attributes:
        further: the step of the perturbed forward that runs at present; None in the pipeline's own forwards.
        replayed: names of the layers that it leaves out.
    """

    def __init__(self, family: Family, model: Any) -> None:
        self.family = family
        self.model = model
        self.further: Step | None = None
        self.replayed: frozenset[str] = frozenset()
        self._prefixes: Mapping[Guide, Prefix] = {}
        self._records: Records | None = None
        self._recording = ExitStack()
        self._due: tuple[Step, Mapping[Guide, tuple[int, ...]], bool] | None = None
        self._kept: tuple[Tensor, Any, list[Tensor]] | None = None
        self._told: set[Guide] = set()

    def begin(
        self,
        step: Step,
        guides: Mapping[Guide, tuple[int, ...]],
        leads: bool,
        prefixes: Callable[[], Mapping[Guide, Prefix]],
    ) -> None:
        """A forward of the pipeline begins, in a step with these branches; `guides` holds the seats of each.

        Args:
            leads: when it holds the prompt's rows, they are the plain ones and not those of a branch that the pipeline
                perturbs by itself.
            prefixes: what the perturbed forwards can take from it.

        Raises:
            ControlError: when a branch is rescaled by the pipeline's guidance, and that cannot be known in time.
        """
        self._due = (step, guides, leads and "cond" in step.branches) if guides else None
        if not guides:
            self._kept = None
        if self._due is not None and self._due[2]:
            reading = next((guide for guide in guides if guide.reads_guidance), None)
            if reading is not None and step.scale is None:
                raise ControlError(
                    f"rescale_mode='{reading.rescale_mode}' takes in what the pipeline's guidance gives: the rows of "
                    "both branches in one forward of a pipeline that tells its guidance_scale. Found branches "
                    f"{', '.join(map(str, dict.fromkeys(step.branches)))}, and the rest is not known here. Attach to "
                    "the pipeline, or take rescale_mode='partial'."
                )
            self._prefixes = prefixes()
            self._records = self._recording.enter_context(
                recording(self.model, self._prefixes.values(), _prompts(step), len(step.rows))
            )

    def ended(self, finished: bool) -> None:
        """A forward has ended, of the pipeline or a perturbed one; `finished` is False after an exception."""
        self._recording.close()
        if not finished:
            self._records = None

    def finish(self, output: Any, arguments: Arguments, forward: Callable[[Arguments], Any]) -> Any:
        """The output of a forward of the pipeline with what the perturbed branches of its step add.

        Args:
            arguments: as the forward got them.
            forward: runs the model.

        Raises:
            ControlError: when the forward is of another branch, and the prompt's of the same step did not come before.
        """
        due, self._due = self._due, None
        if due is None:
            return output
        step, guides, leads = due
        sample = _sample(output)
        latents = arguments[self.family.hidden]

        def cut(rows: Any) -> list[Tensor]:
            return [_guided(row, latents[0]) for row in rows]

        mine = _prompts(step)
        if leads:
            inputs = rows_of_arguments(arguments, mine, len(step.rows), (self.family.hidden, self.family.prompt))
            steps = {guide: _perturbed(step, mine, seats) for guide, seats in guides.items()}
            records, self._records = self._records, None
            perturbed = {
                guide: cut(self._predicted(guide, one, records, lambda: forward(copied(inputs))))
                for guide, one in steps.items()
            }
            found = self._increments(step, mine, cut(sample), perturbed)
            self._kept = (self.family.timestep(inputs).reshape(-1)[0], inputs[self.family.hidden], found)
        else:
            found = self._found(arguments, latents)
        rows = [added(row, found[number % len(found)], latents[0]) for number, row in enumerate(sample)]
        return _with_sample(output, torch.stack(rows) if isinstance(sample, Tensor) else rows)

    def _predicted(self, guide: Guide, step: Step, records: Records | None, forward: Callable[[], Any]) -> Any:
        """What a perturbed forward predicts for the prompt's rows."""
        prefix = self._prefixes[guide]
        reason = prefix.reason or ("nothing was kept" if records is None else records.lack(prefix))
        # caches keep what they know of a branch by its name; a model without diffusers' hooks would be given some
        named = "_diffusers_hook" in vars(self.model) and hasattr(self.model, "cache_context")
        self.further = step
        left_out: Sequence[Stretch] = ()
        try:
            with ExitStack() as stack:
                stack.enter_context(self.model.cache_context(PERTURBED) if named else nullcontext())
                if records is not None and not reason:
                    self.replayed = prefix.layers
                    left_out = stack.enter_context(replaying(self.model, prefix, records))
                output = forward()
        finally:
            self.further, self.replayed = None, frozenset()
        prefix.tell(f"in full: {reason}" if reason else prefix.say(left_out))
        return _sample(output)

    def _increments(
        self, step: Step, mine: Sequence[int], own: Sequence[Tensor], perturbed: Mapping[Guide, Sequence[Tensor]]
    ) -> list[Tensor]:
        """What all branches add, to each of the prompt's rows; `own` is what the pipeline's forward predicts."""
        for guide, rows in perturbed.items():
            told, self._told = guide in self._told, self._told | {guide}
            if not told and all(torch.equal(own[number], row) for number, row in zip(mine, rows, strict=True)):
                warnings.warn(
                    f"A perturbed branch (scale {guide.scale:g}) gives what the prompt's gives, to the bit: it adds "
                    "nothing. Its layers have no influence, or one key only.",
                    stacklevel=2,
                )
        free = {row.image: own[number] for number, row in enumerate(step.rows) if row.branch == "uncond"}
        scale = 1.0 if step.scale is None else step.scale
        found = []
        for place, number in enumerate(mine):
            others = {guide: rows[place] for guide, rows in perturbed.items()}
            parts = increments(own[number], others, free.get(step.rows[number].image), scale)
            found.append(torch.stack(parts).sum(0))
        return found

    def _found(self, arguments: Arguments, latents: Any) -> list[Tensor]:
        """What was kept of the prompt's forward of this step."""
        timestep = self.family.timestep(arguments).reshape(-1)[0]
        if self._kept is None or not (torch.equal(timestep, self._kept[0]) and _same(latents, self._kept[1])):
            raise ControlError(
                "A perturbed branch adds the same to all branches of a step, and this forward is not the prompt's, "
                "which must come first with the same latents and timestep. Run the prompt's branch first, or name the "
                "branches of a batch with attach(..., branches=('uncond', 'cond'))."
            )
        return self._kept[2]


def added(row: Tensor, found: Tensor, latents: Tensor) -> Tensor:
    """A row of the model's output with g, in its own dtype; a learned variance behind the prediction stays."""
    if found.shape == row.shape:
        return (exact(row) + found).to(row.dtype)
    dim = _doubled(row, latents)
    rest = row.narrow(dim, found.shape[dim], row.shape[dim] - found.shape[dim])
    return torch.cat([(exact(_guided(row, latents)) + found).to(row.dtype), rest], dim)


def _guided(row: Tensor, latents: Tensor) -> Tensor:
    """The part of a row that is a prediction: all of it, but half where the model learns a variance as well."""
    dim = _doubled(row, latents)
    return row if dim is None else row.narrow(dim, 0, latents.shape[dim])


def _doubled(row: Tensor, latents: Tensor) -> Any:
    """The axis along which a row of the output is twice its latents, and equal along all others; None without one."""
    if row.ndim != latents.ndim:
        return None
    other = [dim for dim in range(row.ndim) if row.shape[dim] != latents.shape[dim]]
    return other[0] if len(other) == 1 and row.shape[other[0]] == 2 * latents.shape[other[0]] else None


def rows_of_arguments(arguments: Arguments, rows: Sequence[int], batch: int, lists: Sequence[str]) -> Arguments:
    """The arguments of a forward of some rows of a batch.

    Tensors of `batch` rows are cut, also within lists and dictionaries; `lists` names arguments that may hold an entry
    per row.
    """
    if len(rows) == batch:
        return arguments

    def cut(name: str, value: Any) -> Any:
        if name in _SHARED:
            return value
        if name in lists and isinstance(value, list):
            return [value[number] for number in rows]
        return mapped(lambda x: x[list(rows)] if x.ndim and len(x) == batch else x, value)

    return {name: cut(name, value) for name, value in arguments.items()}


def copied(arguments: Arguments) -> Arguments:
    """The same tensors in other lists and dictionaries: some models take things out of those that they are given."""
    return {name: mapped(lambda x: x, value) for name, value in arguments.items()}


def _prompts(step: Step) -> list[int]:
    """Numbers of the rows of the prompt."""
    return [number for number, row in enumerate(step.rows) if row.branch == "cond"]


def _perturbed(step: Step, mine: Sequence[int], seats: tuple[int, ...]) -> Step:
    """The step of a perturbed forward: the prompt's rows, and what acts there, in the order of the stack."""
    rows = [replace(step.rows[number], branch=PERTURBED) for number in mine]
    acting = tuple(sorted({*step.active["cond"], *seats}))
    return Step(step.moment, (PERTURBED,), rows, {PERTURBED: acting})


def _same(first: Any, second: Any) -> bool:
    if isinstance(first, Tensor):
        return first is second or (first.shape == second.shape and torch.equal(first, second))
    return len(first) == len(second) and all(map(_same, first, second))


def _sample(output: Any) -> Any:
    return output[0] if isinstance(output, tuple) else output.sample


def _with_sample(output: Any, sample: Any) -> Any:
    return (sample, *output[1:]) if isinstance(output, tuple) else type(output)(**{**output, "sample": sample})
