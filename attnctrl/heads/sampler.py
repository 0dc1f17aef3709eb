"""Drawing pictures with sets of heads perturbed: what a search needs of a model, and how a stock pipeline gives it."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Protocol

import numpy as np
import torch
from torch import Tensor

from ..attach import attach, parts_of
from ..bank.identity import identity_of
from ..controls.perturb import Perturb
from ..errors import ControlError, UnsupportedModelError
from ..families import family_of
from ..headset import HeadSet, Kind, number_of_heads
from ..schedule import Sigma, active_steps
from ..select import Layer, Selector, select
from ..tappable import is_compiled
from .meter import Cost, Meter

if TYPE_CHECKING:
    from attnctrl.pipelines.runner import Runner

__all__ = ["Head", "Pair", "PipelineSampler", "Sampler"]

Head = tuple[str, int]
"""(name of a layer, number)."""
_OWN: tuple[Kind, ...] = ("identity", "slerp")


@dataclass(frozen=True, order=True)
class Pair:
    """One picture that candidates are compared on."""

    prompt: str
    seed: int


class Sampler(Protocol):
    """Draws pictures."""

    @property
    def heads(self) -> Sequence[Head]:
        """All candidates, in the order of the model."""

    @property
    def identity(self) -> Mapping[str, Any]:
        """All that pictures depend on beside the pair and the set, as JSON data; "model" is which model it is."""

    @property
    def cost(self) -> Cost:
        """What ran so far."""

    @property
    def batch(self) -> int:
        """The most sets of one `draw`."""

    def draw(self, pair: Pair, sets: Sequence[HeadSet]) -> Tensor:
        """Pictures [len(sets), 3, h, w] in [0, 1] of one pair: without perturbation for a set without heads."""

    def price(self, sets: Sequence[HeadSet], first: bool) -> int:
        """Rows of the denoiser that `draw` of these sets will run; `first` of its pair."""


class PipelineSampler:
    """A stock text-to-image pipeline.

    Args:
        runner: the pipeline with its settings; `batch` of it is how many sets run at once.
        layers: in which heads are candidates; None for all in which `kind` is defined.
        kind: of the perturbation.
        share: run what candidates of a pair have in common once.

    Raises:
        SelectionError, ControlError: for layers that are not there, or in which the kind is not defined.
        UnsupportedModelError: for a compiled model.
    """

    def __init__(self, runner: Runner, layers: Selector = None, kind: Kind = "identity", share: bool = True) -> None:
        self.runner, self.share = runner, share
        model, _ = parts_of(runner.pipe)
        if is_compiled(model):
            raise UnsupportedModelError(
                "Heads are searched on a model that is not compiled: every batch of candidates would be compiled anew. "
                "Load it without, and compile it for the set that was found."
            )
        family = family_of(model)
        every = family.layers(model)
        chosen = select(every, layers, family.presets)
        # in cross attention tokens have no value of their own
        defined = [one for one in chosen if not one.linear and not (kind in _OWN and "cross" in one.stack.split("."))]
        if not defined or (layers is not None and len(defined) < len(chosen)):
            refused = next(one for one in chosen if one not in defined)
            raise ControlError(
                f"Heads of {refused.name} cannot be candidates: kind {kind!r} is not defined there. Name other layers "
                "(such as layers='self'), or another kind."
            )
        self.layers: tuple[Layer, ...] = tuple(defined)
        self.meter = Meter(model, family, every)
        self._model = model

    @property
    def heads(self) -> list[Head]:
        """All heads of the layers."""
        return [(layer.name, head) for layer in self.layers for head in range(number_of_heads(layer))]

    @property
    def cost(self) -> Cost:
        return self.meter.cost

    @property
    def batch(self) -> int:
        return self.runner.batch

    @property
    def identity(self) -> dict[str, Any]:
        runner = self.runner
        scheduler = {name: value for name, value in runner.pipe.scheduler.config.items() if not name.startswith("_")}
        told = ("size", "steps", "guidance_scale", "true_cfg_scale", "max_sequence_length", "negative_prompt")
        return {
            "model": identity_of(self._model),
            "pipeline": type(runner.pipe).__name__,
            "scheduler": {"class": type(runner.pipe.scheduler).__name__, **scheduler},
            **{name: getattr(runner, name) for name in told},
        }

    def draw(self, pair: Pair, sets: Sequence[HeadSet]) -> Tensor:
        """See `Sampler`. Rows of one call have one kind, scale and window."""
        plain = [number for number, one in enumerate(sets) if not one.heads]
        weak = [number for number, one in enumerate(sets) if one.heads]
        images: dict[int, np.ndarray] = {}
        for numbers in (plain, weak):
            images |= dict(zip(numbers, self._draw(pair, [sets[number] for number in numbers], sets), strict=True))
        found = torch.from_numpy(np.stack([images[number] for number in range(len(sets))]))
        return found.movedim(-1, 1).float() / 255

    def _draw(self, pair: Pair, sets: Sequence[HeadSet], every: Sequence[HeadSet]) -> list[np.ndarray]:
        if not sets:
            return []
        window, pipe = next(one.window for one in every), self.runner.pipe
        acting = [one for one in sets if one.heads]

        @contextmanager
        def around(_start: int, _stop: int) -> Any:
            with ExitStack() as stack:
                if acting:
                    stack.enter_context(attach(pipe, Perturb(heads=acting)))
                common = window if self.share else None
                stack.enter_context(self.meter.watching((pair, self.runner), len(sets), common, pipe.scheduler))
                yield

        runner = self.runner.with_batch(len(sets))
        return runner.draw([pair.prompt] * len(sets), [pair.seed] * len(sets), around)

    def price(self, sets: Sequence[HeadSet], first: bool) -> int:
        """See `Sampler`. Windows over sigma are counted as if they were always open: only a run knows its sigmas."""
        if not sets:
            return 0
        steps, branches = self.runner.steps, 2 if self.guided else 1
        window = sets[0].window
        acting = range(steps) if isinstance(window, Sigma) else active_steps(window, (0.0,) * steps)
        common = min(acting) if self.share else 0
        weak = sum(bool(one.heads) for one in sets)
        return branches * (common * first + (steps - common) * len(sets)) + len(acting) * weak

    @property
    def guided(self) -> bool:
        """The pipeline runs the negative prompt too."""
        return self.runner.guidance(self.runner.pipe) > 1
