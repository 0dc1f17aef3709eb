"""Real pictures into a bank: the model looks at them at every noise level, and keys and values are kept.

inverter = Inverter.from_pipe(pipe)
bank = Bank()
keep_pictures(inverter, "fox.png", Keep(bank=bank, layers="up.self"), InversionSettings(prompt="a fox", steps=30))
with attach(pipe, Share(bank=bank, layers="up.self")):
    pipe("a fox in the snow", num_inference_steps=30)

As the real references of ConsiStory (arXiv 2402.03286), whose latents are the picture and one fixed noise, mixed anew
at every level; no inversion is needed.
"""

from __future__ import annotations

import copy
from dataclasses import replace
from typing import Any

import torch
from attnctrl.pipelines.base import Progress
from attnctrl.pipelines.denoiser import begun
from attnctrl.pipelines.inversion import InversionSettings, Inverter
from attnctrl.pipelines.latents import read_pictures, size_of

from attnctrl.attach import attach
from attnctrl.controls import Keep
from attnctrl.inversion import Map, diffusion_shares, flow_shares, noised
from attnctrl.schedule import active_steps, run_levels

__all__ = ["keep_pictures"]


def keep_pictures(
    inverter: Inverter,
    pictures: Any,
    keep: Keep,
    settings: InversionSettings = InversionSettings(),
    *,
    cleaner: Map = lambda sigma: sigma,
    progress: Progress | None = None,
) -> None:
    """Fill the bank of `keep` with pictures; one forward (or one a branch) for each step that is kept.

    Args:
        inverter: around the pipeline that will read the bank.
        pictures: PIL pictures or paths, one or a list; of one size.
        keep: what is kept.
        settings: prompts, steps and guidance, as of the runs that will read it; `seed` is that of the noise. With
            guidance above 1 both branches are kept. How pictures are inverted is not asked.
        cleaner: level of the run -> level of the picture: lower levels show detail earlier.
        progress: called after every forward.

    Raises:
        AssetError, LayoutError: a picture cannot be read, or its size does not suit the model.
        ControlError: the bank holds something else, and as `attach`.
    """
    read = read_pictures(pictures)
    size, clean = size_of(inverter.pipe, read), inverter.encode(read)
    settings = inverter.completed(settings)
    noise = torch.randn(clean.shape, generator=torch.Generator("cpu").manual_seed(settings.seed)).to(clean)
    # the levels are those of the pipeline's own scheduler, whatever it solves by
    adapter = replace(inverter.adapter, scheduler=copy.deepcopy)
    arguments = inverter.call_arguments(settings, size, len(clean))
    with attach(inverter.pipe, keep), begun(inverter.pipe, adapter, arguments, settings.guidance) as denoiser:
        marks, sigmas = run_levels(denoiser.scheduler)
        steps = [step for step in active_steps(keep.window, sigmas) if keep.is_kept(step)]
        levels = [sigmas[step] for step in steps]
        kept = (1 / (1 + s * s) for s in levels)
        shares = flow_shares(levels, cleaner) if adapter.flow else diffusion_shares(kept, cleaner)
        for done, (step, latents) in enumerate(zip(steps, noised(clean, noise, shares), strict=True), start=1):
            denoiser(latents, marks[step], step)
            if progress is not None:
                progress(done, len(steps))
