"""Outputs of attention modules that are kept from step to step: when by which policy, and what is kept.

A policy is a function of the step. What is kept is told apart by control, layer and guidance branch, and serves only
rows whose sequence and acting controls are those it was made under.
"""

from __future__ import annotations

from collections.abc import Hashable, Sequence
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING, Any, Literal, NamedTuple

import torch
from torch import Tensor

from .errors import PlanError, UnsupportedModelError
from .nested import mapped, tensors_in
from .perturb import exact

if TYPE_CHECKING:
    from .controls.reuse import Reuse
    from .region import Grid

__all__ = ["Action", "Kept", "Key", "Output", "Part", "broadcast", "gated", "joined", "kept_bytes", "parted"]

Action = Literal["compute", "store", "mean", "reuse"]
"""Compute; compute and keep; the same, and keep the mean of the guided branches; give what is kept."""
Output = Tensor | tuple[Tensor | None, ...]
"""What an attention module returns, tensors with the rows of the batch first."""


def gated(step: int, crossed: bool, *, gate: int, warmup: int, early: int, late: int) -> Action:
    """T-GATE: cross attention up to the gate, the mean of its guided branches from there on.

    Args:
        step: of the run.
        crossed: the layer is cross attention; else self-attention.
        gate: m; step m - 1 keeps the means.
        warmup: self-attention is kept from this step on.
        early, late: self-attention is computed at multiples of it, before the gate and behind it; 1 computes always.
    """
    if step == gate - 1:
        return "mean" if crossed or late > 1 else "compute"
    if crossed:
        return "reuse" if step >= gate else "compute"
    every = late if step >= gate else early
    if every == 1 or step < warmup:
        return "compute"
    return "store" if step % every == 0 or step == warmup else "reuse"


def broadcast(step: int, timestep: float, *, every: int, between: tuple[float, float]) -> Action:
    """Pyramid attention broadcast: computed at every so many steps, where the timestep lies between two."""
    if every == 1:
        return "compute"
    return "reuse" if between[0] < timestep < between[1] and step % every else "store"


class Part(NamedTuple):
    """Rows of one guidance branch that follow each other in a batch.

    Attributes:
        branch: its name; None where it is unknown.
        guides: numbers of the seats that open it, where it is a perturbed one.
        rows: which they are.
        epoch: what must be equal for a kept output to serve: sequences, acting controls, dtype and device.
    """

    branch: str | None
    guides: tuple[int, ...]
    rows: slice
    epoch: Hashable


class Key(NamedTuple):
    """What an output is kept under."""

    control: Any
    layer: str
    branch: str
    guides: tuple[int, ...]


@dataclass(frozen=True, eq=False)
class _Entry:
    output: Output
    epoch: Hashable
    run: Any
    step: int
    mean: bool = False


@dataclass(eq=False)
class Kept:
    """What is kept of one model's outputs.

    An entry lives as long as each step stores or reads it; a run that begins, and an end by error, find nothing.
    """

    entries: dict[Key, _Entry] = field(default_factory=dict)

    @property
    def nbytes(self) -> int:
        """Of all that is kept; a tensor that several branches share counts once."""
        tensors = {id(one): one for entry in self.entries.values() for one in tensors_in(entry.output)}
        return sum(one.nbytes for one in tensors.values())

    def age(self, run: Any, step: int | None) -> None:
        """A forward of a step begins: drop what neither this step nor the one before has touched."""
        fresh = () if step is None else (step - 1, step)
        self.entries = {key: one for key, one in self.entries.items() if one.run is run and one.step in fresh}

    def clear(self) -> None:
        """Drop everything."""
        self.entries = {}

    def take(self, keys: Sequence[Key], parts: Sequence[Part], step: int, last: bool) -> list[Output] | None:
        """The outputs kept for these parts; None unless there are all of them. In the last step they are dropped."""
        found = [self.entries.get(key) for key in keys]
        good = [one for one, part in zip(found, parts, strict=True) if one is not None and one.epoch == part.epoch]
        if last:
            self.drop(keys)
        elif len(good) == len(keys):
            self.entries |= {key: replace(one, step=step) for key, one in zip(keys, good, strict=True)}
        return [one.output for one in good] if len(good) == len(keys) else None

    def drop(self, keys: Sequence[Key]) -> None:
        """Forget these."""
        for key in keys:
            self.entries.pop(key, None)

    def store(self, key: Key, part: Part, output: Output, run: Any, step: int, mean: bool) -> None:
        """Keep an output; with `mean`, what "cond" and "uncond" keep of one step becomes the mean of both."""
        self.entries[key] = _Entry(mapped(torch.Tensor.detach, output), part.epoch, run, step, mean)
        pair = [self.entries.get(key._replace(branch=branch)) for branch in ("cond", "uncond")]
        both = [one for one in pair if one is not None and one.mean and one.step == step]
        if mean and len(both) == 2:
            middle = mapped(_middle, both[0].output, both[1].output)
            for branch, one in zip(("cond", "uncond"), both, strict=True):
                self.entries[key._replace(branch=branch)] = replace(one, output=middle, mean=False)


def parted(output: Output, parts: Sequence[Part], layer: str) -> list[Output]:
    """What a module returned, part by part.

    Raises:
        PlanError: when its tensors have other rows than the batch.
    """
    if len(parts) == 1:
        return [output]
    rows = parts[-1].rows.stop
    if any(len(one) != rows for one in tensors_in(output)):
        raise PlanError(
            f"Layer {layer} returns {[len(one) for one in tensors_in(output)]} rows for a batch of {rows}, so what "
            "belongs to which guidance branch cannot be told. Leave it out of the control's `layers`."
        )
    return [mapped(lambda one, rows=part.rows: one[rows], output) for part in parts]


def joined(outputs: Sequence[Output]) -> Output:
    """Outputs of parts as that of the batch."""
    return outputs[0] if len(outputs) == 1 else mapped(lambda *ones: torch.cat(ones), *outputs)


def _middle(first: Tensor, second: Tensor) -> Tensor:
    return ((exact(first) + exact(second)) / 2).to(first.dtype)


def kept_bytes(
    pipe_or_model: Any,
    reuse: Reuse,
    *,
    width: int | None = None,
    height: int | None = None,
    grid: Grid | None = None,
    pictures: int = 1,
    branches: int = 2,
    text_tokens: int = 512,
) -> int:
    """The most bytes that a control keeps at once. Runs nothing; a model on the meta device will do.

    Args:
        pipe_or_model: a pipeline or its denoiser, in the dtype that it will run in.
        reuse: the control.
        width, height: pixels of the picture; or `grid`, its (rows, columns) of image tokens.
        pictures: of the batch.
        branches: guidance branches that the run has, perturbed ones included.
        text_tokens: length of the encoded prompt.

    Raises:
        UnsupportedModelError: when a module does not tell the width of its output.
        AttnCtrlError: whatever `attach` would raise.
    """
    from .attach import parts_of
    from .explain import grid_of
    from .families import family_of
    from .layout import Measures
    from .stack import Stack

    model, pipe = parts_of(pipe_or_model)
    model = getattr(model, "_orig_mod", model)
    family = family_of(model)
    stack = Stack([reuse], family.layers(model), family.presets)
    frames = family.arrange(model, Measures(text_tokens, grid or grid_of(pipe, family, width, height)))
    size = next(model.parameters()).element_size()
    total = 0
    for layer in stack.layers:
        frame = frames[layer.frame]
        rows = reuse.rows_kept(not frame.is_joint, branches)
        if rows and any(layer.name in seat.layers for seat in stack.seats):
            total += rows * pictures * frame.queries.tokens * _channels(layer.module) * size
    return total


def _channels(module: Any) -> int:
    """The width of what an attention module returns."""
    project = getattr(module, "to_out", None)
    last = project[0] if isinstance(project, torch.nn.ModuleList) else project
    channels = getattr(last, "out_features", None) or getattr(module, "inner_dim", None)
    if channels is None:
        raise UnsupportedModelError(
            f"{type(module).__name__} does not tell the width of its output (to_out, inner_dim), so what is kept of it "
            "cannot be told beforehand."
        )
    return int(channels)
