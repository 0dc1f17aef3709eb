"""Tiny pipelines whose pictures read banks, and one way to call them all."""

from __future__ import annotations

from typing import Any

import tiny_pipes
import torch
from torch import Tensor

import attnctrl as ac
from attnctrl.toybox.models import flux

PIPES = {"sd": tiny_pipes.sd, "sd3": tiny_pipes.sd3, "flux": flux.tiny_pipeline}
PROMPTS = ["a red star", "a blue heart", "a red star left", "a red circle"]
STEPS = 3


def run(pipe: Any, rows: range, controls: Any = (), guidance: float = 3.0, **more: Any) -> Tensor:
    """Latents of the pictures `rows` of `PROMPTS`, each from a seed of its own; FLUX runs its branches one by one."""
    sequential = hasattr(pipe, "_pack_latents")
    told = {"true_cfg_scale": guidance, "guidance_scale": 1.0} if sequential else {"guidance_scale": guidance}
    if guidance > 1:
        told["negative_prompt"] = ["a blue square"] * len(rows)
    call = {"num_inference_steps": STEPS, "width": 32, "height": 16, **told, **more}
    seeds = [torch.Generator().manual_seed(row) for row in rows]
    with ac.attach(pipe, list(controls) if isinstance(controls, (list, tuple)) else [controls]):
        return pipe([PROMPTS[row] for row in rows], generator=seeds, output_type="latent", **call).images


def captured(pipe: Any, rows: range = range(2), beside: Any = (), guidance: float = 3.0, **keep: Any) -> ac.Bank:
    """A bank of the pictures `rows`."""
    bank = keep.pop("bank", None) or ac.Bank()
    run(pipe, rows, [*beside, ac.Keep(bank=bank, **keep)], guidance)
    return bank
