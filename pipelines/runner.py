"""Running a stock pipeline with its settings: loading by name, prompts in batches with a generator for each picture."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from contextlib import nullcontext
from dataclasses import dataclass, replace
from inspect import signature
from typing import Any

import numpy as np
import torch
from attnctrl.pipelines.base import best_device
from attnctrl.pipelines.models import find_model, load_pipeline
from attnctrl.pipelines.references import Positions, with_references
from PIL import Image

from attnctrl.region import Region

__all__ = ["Counter", "Decorate", "Positions", "Progress", "Runner"]

Progress = Callable[[int, int], None]
"""Called with (pictures done, pictures in all)."""
Decorate = Callable[[int, int], Any]
"""(start, stop) of a batch -> a context manager to be in while it runs."""

BATCH = 16


@dataclass(frozen=True)
class Runner:
    """A pipeline and the settings it wants.

    Attributes:
        pipe: a text-to-image pipeline.
        size: (width, height) in pixels.
        steps, guidance_scale, true_cfg_scale, max_sequence_length, negative_prompt: arguments of the pipeline, as
            far as it has them.
        batch: pictures that run at once.
    """

    pipe: Any
    size: tuple[int, int] = (64, 64)
    steps: int = 20
    guidance_scale: float = 1.0
    true_cfg_scale: float = 3.0
    max_sequence_length: int = 40
    negative_prompt: str = ""
    batch: int = BATCH

    @classmethod
    def load(cls, model: str) -> Runner:
        """The model called `model`, with the settings of its attnctrl.json.

        Raises:
            AssetError: There is no such model.
        """
        found, device = find_model(model), best_device()
        pipe = load_pipeline(found, torch.float32 if device == "cpu" else torch.bfloat16, device)
        return cls.of(pipe, found.defaults)

    @classmethod
    def of(cls, pipe: Any, settings: Mapping[str, Any]) -> Runner:
        """`pipe` with the settings of an attnctrl.json; those that are no fields are left out."""
        known = {key: settings[key] for key in cls.__dataclass_fields__ if key in settings}
        if "size" in known:
            width, height = known["size"]
            known["size"] = (int(width), int(height))
        return cls(pipe, **known)

    @property
    def grid(self) -> tuple[int, int]:
        """(rows, columns) of image tokens."""
        token = 2 * self.pipe.vae_scale_factor
        return self.size[1] // token, self.size[0] // token

    def guidance(self, pipe: Any) -> float:
        """Weight of the prompt's branch of a pipeline against that of the negative prompt, which runs above 1."""
        trained = "true_cfg_scale" in signature(type(pipe).__call__).parameters
        return self.true_cfg_scale if trained else self.guidance_scale

    def with_guidance(self, scale: float) -> Runner:
        """The same with another weight of the prompt's branch, see `guidance`."""
        trained = "true_cfg_scale" in signature(type(self.pipe).__call__).parameters
        return replace(self, true_cfg_scale=scale) if trained else replace(self, guidance_scale=scale)

    def with_batch(self, batch: int) -> Runner:
        """The same with `batch` pictures at once."""
        return replace(self, batch=batch)

    def with_steps(self, steps: int) -> Runner:
        """The same with so many denoising steps."""
        return replace(self, steps=steps)

    def draw(
        self,
        prompts: Sequence[str],
        seeds: Sequence[int],
        around: Decorate | None = None,
        progress: Callable[[int], None] | None = None,
        showing: Callable[[int, int], Any] | None = None,
    ) -> list[np.ndarray]:
        """Pictures uint8 [H, W, 3], one for each prompt; each starts from its own seed whatever the batch.

        Args:
            prompts, seeds: equally many.
            around: makes a context manager for the pictures [start, stop) of a batch, for controls.
            progress: called after every batch with the number of pictures it held.
            showing: makes a pipeline for the pictures [start, stop) of a batch, in the place of `pipe`; see
                `Runner.showing`.
        """
        images: list[np.ndarray] = []
        for start in range(0, len(prompts), self.batch):
            stop = min(start + self.batch, len(prompts))
            pipe = self.pipe if showing is None else showing(start, stop)
            accepted = signature(type(pipe).__call__).parameters
            scale = self.guidance(pipe)
            part = list(prompts[start:stop])
            arguments: dict[str, Any] = {
                "prompt": part,
                "negative_prompt": [self.negative_prompt] * len(part) if scale > 1 else None,
                "width": self.size[0],
                "height": self.size[1],
                "num_inference_steps": self.steps,
                "guidance_scale": self.guidance_scale,
                "true_cfg_scale": self.true_cfg_scale,
                "max_sequence_length": self.max_sequence_length,
                "generator": [torch.Generator("cpu").manual_seed(seed) for seed in seeds[start:stop]],
                "output_type": "np",
                # of Kontext, which else draws at resolutions of its own
                "max_area": self.size[0] * self.size[1],
                "_auto_resize": False,
            }
            arguments = {name: value for name, value in arguments.items() if name in accepted}
            with around(start, stop) if around is not None else nullcontext():
                drawn = pipe(**arguments).images
            images.extend(np.rint(np.clip(drawn, 0, 1) * 255).astype(np.uint8))
            if progress is not None:
                progress(stop - start)
        return images

    def showing(
        self,
        references: Sequence[Sequence[np.ndarray]],
        positions: Positions = "corner",
        regions: Sequence[Sequence[Region]] = (),
    ) -> Any:
        """A pipeline on the same modules that follows the reference pictures uint8 [h, w, 3] of each prompt of a batch.

        Raises:
            UnsupportedModelError: The model follows none.
        """
        shown = [[Image.fromarray(one) for one in sample] for sample in references]
        return with_references(self.pipe, shown, positions=positions, regions=regions)


class Counter:
    """Adds up what is done and tells it to a `Progress`."""

    def __init__(self, total: int, progress: Progress | None) -> None:
        self.total, self.done, self.progress = total, 0, progress

    def __call__(self, more: int) -> None:
        self.done += more
        if self.progress is not None:
            self.progress(self.done, self.total)
