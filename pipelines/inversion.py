"""Real pictures to the noise that a model would draw them from, and back, on the user's own pipeline.

inverter = Inverter.from_pipe(pipe)
trajectory = inverter.invert(picture, InversionSettings(prompt="a red circle", steps=20))
again = inverter.pictures(inverter.generate(trajectory))[0]

The pipeline itself encodes prompts, packs latents and sets its scheduler's levels: its call is run up to the first
forward of the denoiser, and the solvers of `attnctrl.inversion` repeat that forward with other latents and levels.
Controls that are attached to the pipeline act in these forwards, and their windows find the steps.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import asdict, dataclass, replace
from functools import partial
from inspect import signature
from typing import Any, Literal, get_args

import torch
from attnctrl.pipelines.base import Progress, Wrapper, stock_name
from attnctrl.pipelines.denoiser import Denoiser, begun
from attnctrl.pipelines.latents import ADAPTERS, Adapter, Size, decode, encode, read_pictures, size_of
from torch import Tensor

from attnctrl.errors import ControlError
from attnctrl.inversion import FLOW_STEPS, Level, Trajectory, evaluations, fading, pulled, walk, walk_ddim
from attnctrl.schedule import Window, checked_window, window_from_json, window_to_json

__all__ = ["InversionSettings", "Inverter", "Method"]

Method = Literal["midpoint", "euler", "fireflow", "controlled", "ddim"]
FLOW_METHODS: tuple[Method, ...] = ("midpoint", "euler", "fireflow", "controlled")
DIFFUSION_METHODS: tuple[Method, ...] = ("ddim",)


@dataclass(frozen=True)
class InversionSettings:
    """How a picture is inverted and drawn again.

    Attributes:
        prompt, negative_prompt: what the picture shows; "" lets the model speak for itself.
        method: "midpoint" (RF-Solver), "euler", "fireflow", "controlled" (RF-Inversion) for flow models, "ddim" for
            UNets; None for the first that suits the model.
        steps: None for the model's own number.
        guidance: classifier-free guidance; above 1 reconstructions suffer.
        distilled_guidance: what guidance-distilled models are told.
        gamma: of "controlled": pull towards a fixed noise while inverting, in [0, 1].
        eta, window, power: of "controlled": pull towards the picture while drawing, see `attnctrl.inversion.fading`.
        seed: of that noise.
    """

    prompt: str = ""
    negative_prompt: str = ""
    method: Method | None = None
    steps: int | None = None
    guidance: float = 1.0
    distilled_guidance: float = 1.0
    gamma: float = 0.5
    eta: float = 0.9
    window: Window = (0.0, 0.25)
    power: float = 0.0
    seed: int = 0

    def __post_init__(self) -> None:
        if self.method is not None and self.method not in get_args(Method):
            raise ControlError(f"method must be one of {', '.join(get_args(Method))}; found {self.method!r}.")
        for name in ("gamma", "eta"):
            if not 0 <= getattr(self, name) <= 1:
                raise ControlError(f"{name} must be in [0, 1]; found {getattr(self, name):g}.")
        if self.steps is not None and self.steps < 1:
            raise ControlError(f"steps must be 1 or more; found {self.steps}.")
        checked_window(self.window, "window")


class Inverter(Wrapper):
    """A pipeline that inverts pictures. It stays what it is: its scheduler is put back after every call."""

    runs_on = tuple(ADAPTERS)

    @property
    def adapter(self) -> Adapter:
        """The entry of `ADAPTERS` for this pipeline."""
        return ADAPTERS[str(stock_name(self.pipe, self.runs_on))]

    @property
    def methods(self) -> tuple[Method, ...]:
        """Those that suit the model, the one to take first."""
        return FLOW_METHODS if self.adapter.flow else DIFFUSION_METHODS

    def completed(self, settings: InversionSettings) -> InversionSettings:
        """The settings with every open value filled in. Raises `ControlError` if the method is not the model's."""
        if settings.method is not None and settings.method not in self.methods:
            raise ControlError(
                f"method '{settings.method}' does not suit {type(self.pipe).__name__}, which takes "
                f"{', '.join(self.methods)}; leave it out for '{self.methods[0]}'."
            )
        own = self.defaults.get("steps", signature(self.pipe.__call__).parameters["num_inference_steps"].default)
        return replace(settings, method=settings.method or self.methods[0], steps=settings.steps or int(own))

    def encode(self, pictures: Any) -> Tensor:
        """Latents float32 [B, ...] of pictures (PIL or paths, one or a list): the VAE's mode.

        Raises:
            AssetError: a picture cannot be read.
            LayoutError: sizes differ or are no multiples of what the model draws.
        """
        read = read_pictures(pictures)
        size_of(self.pipe, read)
        return encode(self.pipe, self.adapter, read)

    def pixels(self, latents: Tensor, size: Size) -> Tensor:
        """Pixels float32 [B, 3, height, width] in [0, 1] of latents [B, ...]."""
        return decode(self.pipe, self.adapter, latents, size)

    def pictures(self, trajectory: Trajectory) -> list[Any]:
        """The PIL pictures at the clean end of a trajectory."""
        width, height = trajectory.record["size"]
        pixels = self.pixels(trajectory.clean, (width, height))
        found: list[Any] = self.pipe.image_processor.numpy_to_pil(pixels.permute(0, 2, 3, 1).numpy())
        return found

    def invert(
        self,
        pictures: Any,
        settings: InversionSettings = InversionSettings(),
        *,
        progress: Progress | None = None,
        keep: str | None = "cpu",
        arrive: bool = False,
    ) -> Trajectory:
        """The path from pictures to noise, over the levels that generation uses, reversed.

        Args:
            pictures: PIL pictures or paths, one or a list; of one size.
            settings: how.
            progress: called after every step.
            keep: device of the latents that are kept; None leaves them where the model is.
            arrive: flow models run once more where the path ends, so that controls that watch have met every level at
                which generation runs; the path stays what it is.

        Raises:
            AssetError, LayoutError: as `encode`.
            ControlError: the method is not the model's.
            ScheduleError: the scheduler's levels cannot be walked.
            UnsupportedModelError: another scheduler or kind of prediction.
        """
        read = read_pictures(pictures)
        size, clean = size_of(self.pipe, read), self.encode(read)
        path, sigmas, record = self._run(clean, size, settings, None, progress, keep, arrive)
        return Trajectory(torch.stack(path[::-1]), sigmas, record)

    def generate(
        self,
        trajectory: Trajectory,
        settings: InversionSettings | None = None,
        *,
        progress: Progress | None = None,
        keep: str | None = "cpu",
    ) -> Trajectory:
        """The path from the noisiest latents of a trajectory down to pictures.

        Args:
            trajectory: of this model.
            settings: how; as it was inverted if left out.
            progress, keep: as in `invert`.

        Raises:
            AssetError: the trajectory is of another model.
            ControlError: it does not say how it was made or how large its pictures are; and as `invert`.
            ScheduleError, UnsupportedModelError: as `invert`.
        """
        trajectory.check_model(self.identity)
        lacking = {"size", *(["settings"] if settings is None else [])} - trajectory.record.keys()
        if lacking:
            raise ControlError(
                f'The trajectory\'s record lacks {" and ".join(sorted(lacking))}; give `settings` here and "size" '
                "(width, height) in the record, as `invert` writes them."
            )
        if settings is None:
            told = trajectory.record["settings"]
            settings = InversionSettings(**{**told, "window": window_from_json(told["window"])})
        width, height = trajectory.record["size"]
        start = trajectory.noisiest.to(self.pipe._execution_device)
        path, sigmas, record = self._run(start, (width, height), settings, trajectory.clean, progress, keep)
        return Trajectory(torch.stack(path), sigmas, record)

    def _run(
        self,
        start: Tensor,
        size: Size,
        settings: InversionSettings,
        clean: Tensor | None,
        progress: Progress | None,
        keep: str | None,
        arrive: bool = False,
    ) -> tuple[list[Tensor], tuple[float, ...], dict[str, Any]]:
        """Latents along the way, the descending sigmas, the record; `clean` is what generation may hold on to."""
        settings = self.completed(settings)
        path: list[Tensor] = []
        route = partial(flow_route, arrive=arrive) if self.adapter.flow else diffusion_route
        with begun(
            self.pipe, self.adapter, self.call_arguments(settings, size, len(start)), settings.guidance
        ) as denoiser:
            sigmas, latents_at = route(denoiser, settings, start, clean)
            for done, latents in enumerate(latents_at):
                path.append(latents.to(device=keep or latents.device, dtype=torch.float32))
                if progress is not None and done:
                    progress(done, len(sigmas) - 1)
        told = {**asdict(settings), "window": window_to_json(settings.window)}
        record = {"model": self.identity, "pipeline": stock_name(self.pipe, self.runs_on)}
        return path, sigmas, {**record, "settings": told, "size": list(size)}

    def call_arguments(self, settings: InversionSettings, size: Size, count: int) -> dict[str, Any]:
        """What the pipeline is called with; those of them that it does not have are left out."""
        accepted = signature(self.pipe.__call__).parameters
        distilled = "true_cfg_scale" in accepted
        arguments = {
            "prompt": [settings.prompt] * count,
            "negative_prompt": [settings.negative_prompt] * count if settings.guidance > 1 else None,
            "width": size[0],
            "height": size[1],
            "num_inference_steps": settings.steps,
            "guidance_scale": settings.distilled_guidance if distilled else settings.guidance,
            "max_sequence_length": self.defaults.get("max_sequence_length"),
            # the noise it draws is never used, and the global generator is not ours
            "generator": torch.Generator("cpu").manual_seed(settings.seed),
        }
        return {name: value for name, value in arguments.items() if name in accepted and value is not None}


Route = tuple[tuple[float, ...], Iterator[Tensor]]
"""Descending sigmas of generation, and the latents at them, in the order in which they are walked."""


def flow_route(
    denoiser: Denoiser, settings: InversionSettings, start: Tensor, clean: Tensor | None, *, arrive: bool = False
) -> Route:
    """From `start` up to noise, or down to a picture where `clean` is given; `arrive` runs the denoiser there too."""
    scheduler, step = denoiser.scheduler, _STEP[str(settings.method)]
    sigmas = tuple(scheduler.sigmas.tolist())
    to_noise = clean is None
    along = sigmas[::-1] if to_noise else sigmas
    marks = sorted({*(one.sigma for one in evaluations(along, step)), *along[-1:] * arrive}, reverse=True)
    unit = scheduler.config.num_train_timesteps
    denoiser.set_levels([unit * mark for mark in marks], marks)

    def velocity(z: Tensor, sigma: float) -> Tensor:
        return denoiser(z, unit * sigma, marks.index(sigma))

    def arriving(path: Iterator[Tensor]) -> Iterator[Tensor]:
        for latents in path:  # the last of them stays
            yield latents
        if arrive:
            velocity(latents, along[-1])

    if settings.method != "controlled":
        return sigmas, arriving(walk(velocity, start, along, step))
    if clean is None:
        noise = torch.randn(start.shape, generator=torch.Generator("cpu").manual_seed(settings.seed)).to(start)
        towards_noise = pulled(velocity, noise, 1.0, lambda _sigma: settings.gamma)
        return sigmas, arriving(walk(towards_noise, start, along, step))
    strength = fading(sigmas, settings.eta, settings.window, settings.power)
    return sigmas, walk(pulled(velocity, clean.to(start), 0.0, strength), start, along, step)


def diffusion_route(denoiser: Denoiser, settings: InversionSettings, start: Tensor, clean: Tensor | None) -> Route:
    """As `flow_route`, by DDIM over the scheduler's timesteps."""
    scheduler = denoiser.scheduler
    marks = [int(timestep) for timestep in scheduler.timesteps.tolist()]
    kept = scheduler.alphas_cumprod.double()
    levels = [*(Level(mark, kept[mark].item()) for mark in marks), Level(-1, float(scheduler.final_alpha_cumprod))]

    def predict(z: Tensor, timestep: int) -> Tensor:
        return denoiser(z, timestep, marks.index(timestep))

    along = levels[::-1] if clean is None else levels
    latents = walk_ddim(predict, start, along, scheduler.config.prediction_type)
    return tuple(level.sigma for level in levels), latents


_STEP = {**FLOW_STEPS, "controlled": FLOW_STEPS["euler"]}
