"""Whole pipelines of models with cross attention and of films: encoders, windows, rows of guidance."""

from __future__ import annotations

import inspect
from types import SimpleNamespace
from typing import Any

import pytest
import tiny_video as tiny
import torch
from diffusers import (
    CogVideoXDDIMScheduler,
    CogVideoXPipeline,
    DPMSolverMultistepScheduler,
    FlowMatchEulerDiscreteScheduler,
    LTXPipeline,
    PixArtSigmaPipeline,
    SanaPipeline,
    WanPipeline,
)
from diffusers.pipelines.wan import pipeline_wan

import attnctrl as ac
from attnctrl.families import family_of
from attnctrl.toybox import text

PROMPT = "a red circle and a blue square"
REGIONS = [
    ac.Region("a red circle", box=(0.0, 0.0, 0.5, 1.0)),
    ac.Region("a blue square with stripes", box=(0.5, 0.0, 1.0, 1.0)),
]
PIPELINES: dict[str, tuple[Any, Any, Any, dict[str, Any]]] = {
    "pixart": (
        PixArtSigmaPipeline,
        tiny.pixart,
        DPMSolverMultistepScheduler,
        {"height": 64, "width": 96, "use_resolution_binning": False},
    ),
    "wan": (WanPipeline, tiny.wan, FlowMatchEulerDiscreteScheduler, {"height": 64, "width": 96, "num_frames": 5}),
    "ltx": (LTXPipeline, tiny.ltx, FlowMatchEulerDiscreteScheduler, {"height": 128, "width": 192, "num_frames": 9}),
    "cogvideox": (
        CogVideoXPipeline,
        tiny.cogvideox,
        CogVideoXDDIMScheduler,
        {"height": 64, "width": 96, "num_frames": 5},
    ),
}
SANA: tuple[Any, Any, Any, dict[str, Any]] = (SanaPipeline, tiny.sana, FlowMatchEulerDiscreteScheduler, {})
# the model hides the prompt's padding by a mask in these layers
MASKED = ("pixart", "ltx")


def made(name: str) -> tuple[Any, dict[str, Any]]:
    """A pipeline without autoencoder, and what its call needs."""
    kind, model, scheduler, options = {**PIPELINES, "sana": SANA}[name]
    tokenizer = text.t5_tokenizer()
    with torch.random.fork_rng():
        torch.manual_seed(0)
        encoder = text.t5_encoder(tokenizer, width=tiny.TEXT_DIM, layers=1, heads=2)
    pipe = kind(tokenizer=tokenizer, text_encoder=encoder.eval(), vae=None, transformer=model(), scheduler=scheduler())
    pipe.set_progress_bar_config(disable=True)
    return pipe, {
        "prompt": PROMPT,
        "max_sequence_length": 16,
        "output_type": "latent",
        "num_inference_steps": 4,
        **options,
    }


def outputs(pipe: Any, options: dict[str, Any], **more: Any) -> list[torch.Tensor]:
    """What the model gave in each forward of a run."""
    seen: list[torch.Tensor] = []
    handle = pipe.transformer.register_forward_hook(lambda _m, _a, out: seen.append(out[0].clone()))
    pipe(**options, **more, generator=torch.Generator().manual_seed(0))
    handle.remove()
    return seen


@pytest.fixture(params=PIPELINES)
def name(request: Any, monkeypatch: Any) -> str:
    # Wan's pipeline cleans prompts with a package that is not needed for plain words
    monkeypatch.setattr(pipeline_wan, "ftfy", SimpleNamespace(fix_text=lambda words: words), raising=False)
    return str(request.param)


def test_region_texts_are_encoded_at_their_real_length(name: str) -> None:
    pipe, _ = made(name)
    family = family_of(pipe.transformer)
    ids = pipe.tokenizer(PROMPT, return_tensors="pt").input_ids
    assert family.count(pipe, PROMPT) == ids.shape[1] < 16
    assert torch.allclose(family.encode(pipe, PROMPT), pipe.text_encoder(ids)[0][0], atol=1e-5)
    assert family.count(pipe, "red " * 600) < 600


def test_sana_reads_region_texts_after_its_instruction() -> None:
    pipe, _ = made("sana")
    family = family_of(pipe.transformer)
    instruction = inspect.signature(SanaPipeline.__call__).parameters["complex_human_instruction"].default
    embeds, mask, *_ = pipe.encode_prompt(PROMPT, False, complex_human_instruction=instruction)
    expected = embeds[0][mask[0].bool()]
    assert family.count(pipe, PROMPT) == len(expected) < 20
    assert torch.allclose(family.encode(pipe, PROMPT), expected, atol=1e-5)


@pytest.mark.parametrize("branch", ["cond", "uncond"])
def test_a_window_and_a_branch_of_a_guided_run(name: str, branch: Any) -> None:
    """In the first step, where the latents are the same with and without controls, other rows come out as ever."""
    pipe, options = made(name)
    base = outputs(pipe, options, guidance_scale=3.0)
    rows = () if family_of(pipe.transformer).batch == () or name == "ltx" else ("uncond", "cond")
    control = ac.Isolate(REGIONS, layers="all" if name not in MASKED else "self", window=(0, 0.5), branch=branch)
    with ac.attach(pipe, control, branches=rows) as handle:
        controlled = outputs(pipe, options, guidance_scale=3.0)
    assert handle.report().controls[0].steps == (0, 1)
    if name == "wan":
        moved = [bool((a - b).abs().max() > 1e-4) for a, b in zip(base[:2], controlled[:2], strict=True)]
        order = ["cond", "uncond"]
    else:
        moved = [bool((a - b).abs().max() > 1e-4) for a, b in zip(base[0], controlled[0], strict=True)]
        order = ["uncond", "cond"]
    assert moved == [one == branch for one in order]


def test_region_texts_reach_the_model(name: str) -> None:
    if name in MASKED:
        return
    pipe, options = made(name)
    base = outputs(pipe, options, guidance_scale=3.0)
    rows = () if name == "wan" else ("uncond", "cond")
    with ac.attach(pipe, [ac.Isolate(), ac.Regions(REGIONS, window=(0, 0.5))], branches=rows) as handle:
        controlled = outputs(pipe, options, guidance_scale=3.0)
    assert handle.report().controls[1].steps == (0, 1)
    assert (base[0] - controlled[0]).abs().max() > 1e-3


def test_a_batch_that_may_be_guided_is_not_guessed() -> None:
    pipe, options = made("cogvideox")
    with ac.attach(pipe, ac.Isolate(REGIONS)), pytest.raises(ac.ControlError, match=r"branches=\('uncond', 'cond'\)"):
        pipe(**options)


def test_both_transformers_of_wan_are_controlled(monkeypatch: Any) -> None:
    """High noise levels run on the first, low ones on the second: windows, rows and warnings are those of the run."""
    monkeypatch.setattr(pipeline_wan, "ftfy", SimpleNamespace(fix_text=lambda words: words), raising=False)
    pipe, options = made("wan")
    pipe.register_modules(transformer_2=tiny.wan(seed=1))
    pipe.register_to_config(boundary_ratio=0.6)
    early, late = ac.Isolate(REGIONS, window=(0.0, 0.25)), ac.Isolate(REGIONS, window=(0.75, 1.0))

    def run(scale: float = 3.0) -> torch.Tensor:
        return pipe(generator=torch.Generator().manual_seed(0), guidance_scale=scale, **options).frames

    base = run()
    with ac.attach(pipe, [ac.Regions(REGIONS), early, late]) as handle:
        out = run()
        report = handle.report()
    assert (out - base).abs().max() > 1e-3
    assert [one.steps for one in report.controls] == [(0, 1, 2, 3), (0,), (3,)]
    assert [one.forwards for one in report.controls] == [4, 1, 1]
    assert (report.forwards, report.warnings) == (8, ())
    assert report.controls[0].rows == (("cond", 0),)
    assert ac.report() == report
    assert torch.equal(run(), base)
    # who acts in neither is warned of, once
    with (
        pytest.warns(UserWarning, match=r"acted in none of") as told,
        ac.attach(pipe, ac.Isolate(REGIONS, branch="uncond")),
    ):
        run(scale=1.0)
    assert len(told) == 1
