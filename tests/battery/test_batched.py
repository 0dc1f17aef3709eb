"""Pipelines that run their guidance branches as one batch: Stable Diffusion and Stable Diffusion 3, tiny and real."""

from __future__ import annotations

import functools
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import pytest
import tiny_pipes
import torch
from diffusers import DDIMScheduler, DPMSolverMultistepScheduler, EulerDiscreteScheduler, LCMScheduler, PNDMScheduler
from harness import sd3, unet

import attnctrl as ac

PROMPT = "a red circle and a blue square"
LEFT = ac.Region("a red circle", box=(0.0, 0.0, 0.5, 1.0))
RIGHT = ac.Region("a blue square with stripes", box=(0.5, 0.0, 1.0, 1.0))
SIZES = {"sd": {"height": 16, "width": 24}, "sd3": {"height": 32, "width": 48, "max_sequence_length": 16}}
every_pipe = pytest.mark.parametrize("name", SIZES)


@functools.cache
def pipeline(name: str) -> Any:
    return getattr(tiny_pipes, name)()


def model_of(pipe: Any) -> Any:
    return getattr(pipe, "unet", None) or pipe.transformer


def generate(name: str, prompt: Any = PROMPT, steps: int = 4, guidance: float = 3.0, **options: Any) -> torch.Tensor:
    generator = torch.Generator().manual_seed(0)
    return pipeline(name)(
        prompt, num_inference_steps=steps, guidance_scale=guidance, output_type="latent", generator=generator,
        **{**SIZES[name], **options},
    ).images  # fmt: skip


@contextmanager
def predictions(name: str) -> Iterator[list[torch.Tensor]]:
    """What the model predicts at each forward, [rows, ...]."""
    seen: list[torch.Tensor] = []
    handle = model_of(pipeline(name)).register_forward_hook(lambda _m, _a, out: seen.append(out[0]))
    try:
        yield seen
    finally:
        handle.remove()


@every_pipe
@pytest.mark.parametrize("branch", ["cond", "uncond", "all"])
@pytest.mark.parametrize("door", ["attach", "processors"])
def test_a_control_touches_the_rows_of_its_branch(name: str, branch: Any, door: str) -> None:
    pipe = pipeline(name)
    with predictions(name) as vanilla:
        base = generate(name, steps=1)
    stack = [ac.Isolate(branch=branch), ac.Regions([LEFT, RIGHT], branch=branch)]
    with predictions(name) as controlled:
        if door == "attach":
            with ac.attach(pipe, stack):
                generate(name, steps=1)
        else:
            before = dict(model_of(pipe).attn_processors)
            model_of(pipe).set_attn_processor(ac.processors(pipe, stack))
            generate(name, steps=1)
            model_of(pipe).set_attn_processor(before)
    moved = (vanilla[0] - controlled[0]).abs().amax(dim=(1, 2, 3))
    rows = {"uncond": [True, False], "cond": [False, True], "all": [True, True]}[branch]
    told = {"uncond": (("uncond", 0),), "cond": (("cond", 0),), "all": (("cond", 0), ("uncond", 0))}[branch]
    assert [one.rows for one in ac.report().controls] == [told, told]
    assert (moved > 1e-3).tolist() == rows
    assert (moved[~torch.tensor(rows)] < 1e-5).all()
    assert torch.equal(generate(name, steps=1), base)


@every_pipe
def test_without_guidance_the_whole_batch_is_the_prompts(name: str) -> None:
    stack = [ac.Isolate(), ac.Regions([LEFT, RIGHT])]
    prompts = [PROMPT, "a green star"]
    with predictions(name) as vanilla:
        generate(name, prompts, steps=1, guidance=1.0)
    with ac.attach(pipeline(name), stack), predictions(name) as controlled:
        generate(name, prompts, steps=1, guidance=1.0)
    assert ((vanilla[0] - controlled[0]).abs().amax(dim=(1, 2, 3)) > 1e-3).all()


@every_pipe
def test_prompts_with_scenes_of_their_own_and_two_images_each(name: str) -> None:
    """Equal to the prompts one by one: rows are [negative prompts..., prompts...], the images of a prompt together."""
    scenes = [[LEFT, RIGHT], [ac.Region("a green star", box=(0.0, 0.5, 1.0, 1.0))]]
    prompts = [PROMPT, "a green star on black background"]
    with ac.attach(pipeline(name), [ac.Isolate(), ac.Regions(scenes)]), predictions(name) as together:
        generate(name, prompts, steps=1, num_images_per_prompt=2)
    assert len(together[0]) == 8
    assert ac.report().controls[1].rows == (("cond", 0), ("cond", 1))
    for number, (prompt, scene) in enumerate(zip(prompts, scenes, strict=True)):
        # the noise of the batch's own rows
        noise = torch.randn(4, 4, *together[0].shape[-2:], generator=torch.Generator().manual_seed(0))
        rows = slice(2 * number, 2 * number + 2)
        with ac.attach(pipeline(name), [ac.Isolate(), ac.Regions(scene)]), predictions(name) as alone:
            generate(name, prompt, steps=1, num_images_per_prompt=2, latents=noise[rows])
        both = torch.cat([together[0][:4][rows], together[0][4:][rows]])
        assert (both - alone[0]).abs().max() < 1e-4


@every_pipe
@pytest.mark.parametrize(("steps", "window", "acting"), [(4, (0.0, 0.5), (0, 1)), (1, (0.0, 0.1), (0,)), (50, (0.9, 1.0), tuple(range(45, 50)))])  # fmt: skip
def test_windows(name: str, steps: int, window: Any, acting: tuple[int, ...]) -> None:
    with ac.attach(pipeline(name), [ac.Isolate(window=window), ac.Regions([LEFT, RIGHT])]) as handle:
        generate(name, steps=steps)
    isolate, regions = handle.report().controls
    assert isolate.steps == acting
    assert regions.steps == tuple(range(steps))


@pytest.mark.parametrize(
    "kind", [EulerDiscreteScheduler, DPMSolverMultistepScheduler, LCMScheduler, PNDMScheduler]
)  # fmt: skip
def test_windows_follow_the_scheduler(kind: Any) -> None:
    pipe = pipeline("sd")
    before = pipe.scheduler
    pipe.scheduler = kind.from_config(before.config, **({"skip_prk_steps": True} if kind is PNDMScheduler else {}))
    try:
        with ac.attach(pipe, ac.Isolate([LEFT, RIGHT], window=(0.0, 0.5))) as handle:
            generate("sd", steps=6)
        (one,) = handle.report().controls
        # PNDM has a second timestep twice, and both forwards stand at the same step
        assert one.steps == ((0, 1) if kind is PNDMScheduler else (0, 1, 2))
        sigmas = handle._parts[0][0]._place.levels(pipe.scheduler)[1]
        with ac.attach(pipe, ac.Isolate([LEFT, RIGHT], window=ac.Sigma(sigmas[1], sigmas[-2]))) as handle:
            generate("sd", steps=6)
        chosen = {i for i, sigma in enumerate(sigmas) if sigmas[-2] < sigma <= sigmas[1]}
        assert set(handle.report().controls[0].steps) <= chosen
        assert handle.report().controls[0].steps
    finally:
        pipe.scheduler = before


def test_steps_are_told_without_a_scheduler_that_counts_them() -> None:
    pipe = pipeline("sd")
    before = pipe.scheduler
    pipe.scheduler = DDIMScheduler.from_config(before.config)
    try:
        with ac.attach(pipe, ac.Isolate([LEFT, RIGHT])) as handle:
            generate("sd", steps=3)
        assert handle.report().controls[0].steps == (0, 1, 2)
    finally:
        pipe.scheduler = before


def test_one_region_with_the_whole_prompt_is_vanilla() -> None:
    """Also through cross attention, where the region's text stands in for the prompt."""
    for name in SIZES:
        base = generate(name)
        options = {"global_text": "none"}
        encoded = pipeline(name).encode_prompt(
            PROMPT, **({"device": "cpu", "num_images_per_prompt": 1, "do_classifier_free_guidance": False} if name == "sd" else {"prompt_2": None, "prompt_3": None, "do_classifier_free_guidance": False, "max_sequence_length": 16})
        )[0][0]  # fmt: skip
        whole = ac.Region("all", prompt_embeds=encoded)
        with ac.attach(pipeline(name), [ac.Isolate(), ac.Regions([whole], **options)]):
            assert (generate(name) - base).abs().max() < 1e-3


def test_skipped_layers_of_sd3_run_as_a_third_forward_of_the_prompt() -> None:
    """`skip_guidance_layers` adds a forward with the prompt alone, whose skipped blocks call no kernel."""
    stack = [ac.Isolate(layers="joint:0"), ac.Regions([LEFT, RIGHT], layers="joint:0")]
    options = {"skip_guidance_layers": [1], "skip_layer_guidance_start": 0.0, "skip_layer_guidance_stop": 1.0}
    with ac.attach(pipeline("sd3"), stack), predictions("sd3") as seen:
        generate("sd3", steps=2, **options)
    assert [len(rows) for rows in seen] == [2, 2, 1]  # not in the first step


@pytest.mark.filterwarnings("ignore:.*deprecated")
def test_perturbed_attention_guidance_adds_a_third_branch() -> None:
    """Rows [negative prompt, prompt, perturbed]; its own layers split the batch, so controls leave them out or refuse."""
    from diffusers import StableDiffusionPAGPipeline

    pipe = StableDiffusionPAGPipeline(
        **pipeline("sd").components, pag_applied_layers="mid", requires_safety_checker=False
    )
    pipe.set_progress_bar_config(disable=True)
    rows: list[torch.Tensor] = []
    hook = pipe.unet.register_forward_hook(lambda _m, _a, out: rows.append(out[0]))

    def run() -> None:
        pipe(
            PROMPT, num_inference_steps=1, guidance_scale=3.0, pag_scale=2.0, output_type="latent",
            generator=torch.Generator().manual_seed(0), **SIZES["sd"],
        )  # fmt: skip

    try:
        run()
        with ac.attach(pipe, ac.Isolate([LEFT, RIGHT], layers=["down", "up"])):
            run()
        moved = (rows[0] - rows[1]).abs().amax(dim=(1, 2, 3))
        assert (moved > 1e-3).tolist() == [False, True, False]
        with ac.attach(pipe, ac.Isolate([LEFT, RIGHT])), pytest.raises(ac.PlanError, match="Leave this layer out"):
            run()
    finally:
        hook.remove()


def test_region_texts_of_sd3_without_t5() -> None:
    pipe = tiny_pipes.sd3(with_t5=False)
    with ac.attach(pipe, ac.Regions([LEFT, RIGHT])) as handle:
        pipe(PROMPT, num_inference_steps=1, output_type="latent", **SIZES["sd3"])
        clip = pipe.tokenizer_max_length
        assert [len(handle._parts[0][1].embeds(region, handle._parts[0][0].family)) for region in (LEFT, RIGHT)] == [
            clip,
            clip,
        ]


@pytest.mark.parametrize("make", [unet, sd3])
def test_a_batch_of_a_bare_model_must_be_named(make: Any) -> None:
    setting = make(batch=2)
    control = ac.Isolate([LEFT, RIGHT])
    base = setting.run()
    with ac.attach(setting.model, control), pytest.raises(ac.ControlError, match=r"branches=\('uncond', 'cond'\)"):
        setting.run()
    with ac.attach(setting.model, control, branches=("uncond", "cond")):
        moved = (setting.run() - base).abs().amax(dim=(1, 2, 3))
    assert moved[0] < 1e-5
    assert moved[1] > 1e-3
    with (
        ac.attach(setting.model, control, branches=("uncond", "cond", "perturbed")),
        pytest.raises(ac.LayoutError, match="batch has 2 rows of 3 guidance branches"),
    ):
        setting.run()
    # one row cannot hold two branches
    single = make()
    with ac.attach(single.model, control):
        assert (single.run() - make().run()).abs().max() > 1e-3


@every_pipe
def test_compiled_as_one_full_graph(name: str) -> None:
    """With controls no more graphs than layers have distinct plans, and the results of eager mode."""
    torch._dynamo.reset()
    setting = {"sd": unet, "sd3": sd3}[name]()
    control = ac.Isolate([LEFT, RIGHT])
    base = setting.run()
    with ac.attach(setting.model, control):
        expected = setting.run()
    setting.model.compile(backend="eager", fullgraph=True)
    assert (setting.run() - base).abs().max() < 1e-5
    with ac.attach(setting.model, control):
        assert (setting.run() - expected).abs().max() < 1e-5
    assert (setting.run() - base).abs().max() < 1e-5
