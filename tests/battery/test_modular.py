"""Diffusers' modular pipelines: controls are attached as to any other, beside whichever guider combines the branches."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import pytest
import tiny_pipes
import torch
from diffusers import ModularPipeline
from diffusers.guiders import AdaptiveProjectedGuidance, ClassifierFreeGuidance
from diffusers.modular_pipelines.stable_diffusion_3 import StableDiffusion3AutoBlocks
from diffusers.modular_pipelines.stable_diffusion_xl import StableDiffusionXLAutoBlocks
from torch import Tensor

import attnctrl as ac

LAYERS = {"sd3": "joint:1", "sdxl": "mid.self"}
GUIDERS: dict[str, Callable[[], Any]] = {
    "none": lambda: ClassifierFreeGuidance(guidance_scale=1.0),
    "classifier-free": lambda: ClassifierFreeGuidance(guidance_scale=4.0),
    "adaptive projected": lambda: AdaptiveProjectedGuidance(guidance_scale=4.0),
}


@functools.cache
def pipeline(family: str) -> ModularPipeline:
    """The parts of a tiny classic pipeline in a modular one."""
    blocks = {"sd3": StableDiffusion3AutoBlocks, "sdxl": StableDiffusionXLAutoBlocks}[family]()
    pipe = blocks.init_pipeline()
    pipe.update_components(**getattr(tiny_pipes, family)().components)
    pipe.set_progress_bar_config(disable=True)
    return pipe


def generate(pipe: ModularPipeline, pictures: int, steps: int = 1) -> Tensor:
    given = {"prompt": "a red circle", "negative_prompt": "green", "num_images_per_prompt": pictures}
    options = {"height": 32, "width": 48, "num_inference_steps": steps, "output_type": "latent"}
    return pipe(**given, **options, generator=torch.Generator().manual_seed(0), output="images")


@pytest.mark.parametrize("guider", GUIDERS)
@pytest.mark.parametrize("pictures", [1, 2])
@pytest.mark.parametrize("family", LAYERS)
def test_a_perturbed_branch_beside_a_guider(family: str, pictures: int, guider: str) -> None:
    """One step is linear in the prediction: latents with and without the branch differ by k w (c - p)."""
    pipe = pipeline(family)
    pipe.update_components(guider=GUIDERS[guider]())
    model = getattr(pipe, "transformer", None) or pipe.unet
    seen: list[Tensor] = []
    hook = model.register_forward_hook(lambda _m, _a, out: seen.append(out[0]))
    try:
        base = generate(pipe, pictures)
        plain, seen[:] = list(seen), []
        with ac.attach(pipe, ac.Perturb("uniform", layers=LAYERS[family], scale=2.0)) as handle:
            out = generate(pipe, pictures)
    finally:
        hook.remove()
    assert [len(one) for one in seen] == [pictures] * (2 if guider == "none" else 3)
    assert all(torch.equal(a, b) for a, b in zip([seen[0], *seen[2:]], plain, strict=True))
    g = 2.0 * (seen[0] - seen[1])
    moved = out - base
    k = (moved * g).sum() / (g * g).sum()
    assert (moved - k * g).abs().max() < 1e-4 * moved.abs().max() + 1e-6
    assert moved.abs().max() > 1e-4
    report = handle.report().controls[0]
    assert report.rows == tuple(("perturbed", sample) for sample in range(1))
    assert any(line.startswith("replayed") for line in report.plans)
    assert torch.equal(generate(pipe, pictures), base)
