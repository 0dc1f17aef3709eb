"""A pipeline's denoiser as a function of latents and timestep: the pipeline's own conditions, guided as it does."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass
from typing import Any

import torch
from attnctrl.pipelines.latents import Adapter
from torch import Tensor

from attnctrl.attach import parts_of
from attnctrl.families import Family, family_of
from attnctrl.peek import first_forward

__all__ = ["Denoiser", "begun"]


@dataclass(frozen=True)
class Denoiser:
    """The denoiser of a pipeline whose run has begun.

    Attributes:
        pipe: its scheduler is one of its own for this run, with the levels set.
        adapter: of the pipeline.
        family: of the model.
        given: by guidance branch, what the denoiser is called with; under None where one batch holds all branches.
        guidance: weight of the prompt's branch against the negative one.
    """

    pipe: Any
    adapter: Adapter
    family: Family
    given: Mapping[str | None, Mapping[str, Any]]
    guidance: float

    @property
    def scheduler(self) -> Any:
        """Of this run."""
        return self.pipe.scheduler

    def set_levels(self, timesteps: Sequence[float], sigmas: Sequence[float]) -> None:
        """Tell the scheduler, and so windows of controls, at which levels the denoiser will be called."""
        device = self.scheduler.timesteps.device
        self.scheduler.timesteps = torch.tensor(timesteps, dtype=torch.float32, device=device)
        self.scheduler.sigmas = torch.tensor(sigmas, dtype=torch.float32)
        self.scheduler.num_inference_steps = len(timesteps)

    @torch.no_grad()
    def __call__(self, latents: Tensor, timestep: float, index: int) -> Tensor:
        """The guided prediction float32 [B, ...] for latents [B, ...].

        Args:
            timestep: in the scheduler's unit.
            index: its place among the scheduler's timesteps.
        """
        if hasattr(self.scheduler, "set_begin_index"):
            self.scheduler.set_begin_index(index)
        found = [(branch, self._forward(branch, latents, timestep).float()) for branch in self.given]
        if self.given.keys() == {None}:
            rows = found[0][1].chunk(len(self._order))
            found = list(zip(self._order, rows, strict=True))
        answers = dict(found)
        if "uncond" not in answers:
            return answers["cond"]
        return answers["uncond"] + self.guidance * (answers["cond"] - answers["uncond"])

    @property
    def _order(self) -> tuple[str, ...]:
        return self.family.batch if self.guidance > 1 else ("cond",)

    def _forward(self, branch: str | None, latents: Tensor, timestep: float) -> Tensor:
        given = self.given[branch]
        model: Any = parts_of(self.pipe)[0]
        like = given[self.family.hidden]
        inputs = torch.cat([latents] * (len(like) // len(latents))).to(like)
        label = self.adapter.label(torch.full_like(given["timestep"], timestep))
        announced: AbstractContextManager[Any] = nullcontext() if branch is None else model.cache_context(branch)
        with announced:
            answer: Tensor = model(**{**given, self.family.hidden: inputs, "timestep": label})[0]
        return answer


@contextmanager
def begun(pipe: Any, adapter: Adapter, arguments: Mapping[str, Any], guidance: float) -> Iterator[Denoiser]:
    """The denoiser of a run that the pipeline began with `arguments`; afterwards its scheduler is the one it had.

    Args:
        pipe: the pipeline.
        adapter: of its class.
        arguments: of its call; with a negative prompt where guidance is above 1.
        guidance: classifier-free.

    Raises:
        UnsupportedModelError: its scheduler's levels cannot be walked.
    """
    before, family = pipe.scheduler, family_of(parts_of(pipe)[0])
    pipe.scheduler = adapter.scheduler(before)
    try:
        if family.batch:
            given: dict[str | None, dict[str, Any]] = {None: first_forward(pipe, **arguments)}
        else:
            plain = {name: value for name, value in arguments.items() if name != "negative_prompt"}
            told = {"cond": arguments["prompt"], "uncond": arguments.get("negative_prompt")}
            given = {
                branch: first_forward(pipe, **{**plain, "prompt": text})
                for branch, text in told.items()
                if text is not None
            }
        yield Denoiser(pipe, adapter, family, given, guidance)
    finally:
        pipe.scheduler = before
        pipe.maybe_free_model_hooks()
