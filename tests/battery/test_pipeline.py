"""Whole pipelines: windows, guidance branches, region texts encoded by the pipeline's own encoder, interrupted and repeated runs."""

from __future__ import annotations

import functools
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import pytest
import torch
from diffusers import FluxKontextPipeline
from PIL import Image

import attnctrl as ac
from attnctrl.schedule import active_steps
from attnctrl.toybox.models.flux import tiny_pipeline

PROMPT = "a red circle and a blue square"
LEFT = ac.Region("a red circle", box=(0.0, 0.0, 0.5, 1.0))
RIGHT = ac.Region("a blue square with stripes", box=(0.5, 0.0, 1.0, 1.0))
GRID, TEXT = 24, 16  # 32 x 48 pixels at 8 pixels per token


@functools.cache
def flux() -> Any:
    return tiny_pipeline()


@functools.cache
def kontext() -> Any:
    pipe = FluxKontextPipeline(**{**flux().components, "image_encoder": None, "feature_extractor": None})
    pipe.set_progress_bar_config(disable=True)
    return pipe


def generate(pipe: Any, prompt: Any = PROMPT, steps: int = 4, **options: Any) -> torch.Tensor:
    options = {"height": 32, "width": 48, "max_sequence_length": TEXT, "output_type": "latent", **options}
    if isinstance(pipe, FluxKontextPipeline):
        options = {"max_area": 32 * 48, "_auto_resize": False, **options}
    options.setdefault("generator", torch.Generator().manual_seed(0))
    return pipe(prompt=prompt, num_inference_steps=steps, **options).images


GUIDED = {"negative_prompt": "green", "true_cfg_scale": 2.0}


@contextmanager
def lengths(pipe: Any) -> Iterator[list[int]]:
    """Length of the whole sequence at each forward of the transformer."""
    seen: list[int] = []
    layer = pipe.transformer.single_transformer_blocks[0].attn
    handle = layer.register_forward_pre_hook(
        lambda _m, _a, k: seen.append(k["hidden_states"].shape[1]), with_kwargs=True
    )
    try:
        yield seen
    finally:
        handle.remove()


def region_tokens(pipe: Any, *regions: ac.Region) -> int:
    return sum(len(pipe.tokenizer_2(region.prompt).input_ids) for region in regions)


def test_off_on_off() -> None:
    pipe = flux()
    base = generate(pipe)
    with ac.attach(pipe, [ac.Isolate(strength=0), ac.Regions([])]):
        assert torch.equal(generate(pipe), base)
    with ac.attach(pipe, [ac.Isolate(), ac.Regions([LEFT, RIGHT])]):
        on = generate(pipe)
        assert torch.equal(generate(pipe), on)
    assert (on - base).abs().max() > 1e-3
    assert torch.equal(generate(pipe), base)


def test_processors_are_the_same_as_attach() -> None:
    pipe = flux()
    controls = [ac.Isolate(window=(0, 0.5)), ac.Regions([LEFT, RIGHT], window=(0, 0.75))]
    with ac.attach(pipe, controls):
        expected = generate(pipe)
    originals = dict(pipe.transformer.attn_processors)
    base = generate(pipe)
    pipe.transformer.set_attn_processor(ac.processors(pipe, controls))
    assert torch.equal(generate(pipe), expected)
    pipe.transformer.set_attn_processor(originals)
    assert torch.equal(generate(pipe), base)


@pytest.mark.parametrize(
    ("steps", "window", "active"),
    [
        (1, (0.0, 0.1), [0]),
        (1, (0.9, 1.0), [0]),
        (4, (0.0, 0.5), [0, 1]),
        (4, (0.5, 1.0), [2, 3]),
        (4, (0.3, 0.35), [1]),
        (7, (0.0, 0.05), [0]),
        (4, ac.Sigma(1.0, 0.7), [0, 1]),
    ],
)
def test_the_text_is_there_in_the_window_only(steps: int, window: Any, active: list[int]) -> None:
    pipe = flux()
    more = region_tokens(pipe, LEFT, RIGHT)
    with ac.attach(pipe, ac.Regions([LEFT, RIGHT], window=window)) as handle, lengths(pipe) as seen:
        generate(pipe, steps=steps)
    assert seen == [GRID + TEXT + more * (step in active) for step in range(steps)]
    assert handle.report().controls[0].steps == tuple(active)


def test_a_window_follows_custom_sigmas_and_repeated_runs() -> None:
    pipe = flux()
    more = region_tokens(pipe, LEFT)
    with ac.attach(pipe, ac.Regions([LEFT], window=(0.0, 0.4))), lengths(pipe) as seen:
        generate(pipe, steps=3, sigmas=[1.0, 0.9, 0.1])
        generate(pipe, steps=1)
        generate(pipe, steps=5)
    plain = GRID + TEXT
    assert seen == [plain + more, plain, plain, plain + more] + [plain + more] * 2 + [plain] * 3


def test_half_precision_latents_find_their_step() -> None:
    """Timesteps reach the model rounded to bfloat16; neighbours of a 50-step run still are told apart."""
    pipe = tiny_pipeline().to(torch.bfloat16)
    with ac.attach(pipe, ac.Isolate([LEFT, RIGHT], window=(0.02, 0.5))) as handle:
        generate(pipe, steps=50)
    assert handle.report().controls[0].steps == tuple(range(1, 25))


@pytest.mark.parametrize("make", [flux, kontext], ids=["flux", "kontext"])
@pytest.mark.parametrize(("branch", "pattern"), [("cond", (1, 0)), ("uncond", (0, 1)), ("all", (1, 1))])
@pytest.mark.parametrize("steps", [1, 3])
def test_true_guidance_touches_its_branch_only(make: Any, branch: Any, pattern: tuple[int, int], steps: int) -> None:
    pipe = make()
    more = region_tokens(pipe, LEFT)
    with ac.attach(pipe, ac.Regions([LEFT], branch=branch)), lengths(pipe) as seen:
        generate(pipe, steps=steps, **GUIDED)
        generate(pipe, "a green star", steps=steps, **GUIDED)
        generate(pipe, steps=steps)
    both = [GRID + TEXT + more * on for on in pattern]
    assert seen == both * steps * 2 + [GRID + TEXT + more * (branch != "uncond")] * steps


class Stop(Exception):
    pass


@pytest.mark.parametrize("after", [1, 2, 3])
def test_interrupted_between_the_branches(after: int) -> None:
    """Kontext never says which branch it runs; a run that broke off after cond must not turn the next one around."""
    pipe = kontext()
    more, plain = region_tokens(pipe, LEFT), GRID + TEXT
    with ac.attach(pipe, ac.Regions([LEFT])), lengths(pipe) as seen:
        calls = 0

        def stop(*_: Any) -> None:
            nonlocal calls
            calls += 1
            if calls == after:
                raise Stop

        handle = pipe.transformer.proj_out.register_forward_hook(stop)
        with pytest.raises(Stop):
            generate(pipe, **GUIDED)
        handle.remove()
        seen.clear()
        generate(pipe, steps=2, **GUIDED)
        assert seen == [plain + more, plain] * 2

        def interrupt(one: Any, step: int, _t: Any, kwargs: Any) -> Any:
            one._interrupt = True
            return kwargs

        generate(pipe, callback_on_step_end=interrupt, **GUIDED)
        seen.clear()
        generate(pipe, steps=1, **GUIDED)
        assert seen == [plain + more, plain]


def test_a_callback_that_changes_the_prompt_keeps_the_branches() -> None:
    pipe = kontext()
    more, plain = region_tokens(pipe, LEFT), GRID + TEXT

    def swap(_pipe: Any, _step: int, _t: Any, kwargs: Any) -> Any:
        return {"prompt_embeds": kwargs["prompt_embeds"] * 0.5}

    with ac.attach(pipe, ac.Regions([LEFT])), lengths(pipe) as seen:
        generate(
            pipe,
            steps=3,
            callback_on_step_end=swap,
            callback_on_step_end_tensor_inputs=["prompt_embeds"],
            **GUIDED,
        )
    assert seen == [plain + more, plain] * 3


@pytest.mark.parametrize("window", [(0.0, 1.0), (0.0, 0.5), (0.5, 1.0)])
@pytest.mark.parametrize("guided", [False, True])
def test_with_a_cache_that_skips_blocks(window: Any, guided: bool) -> None:
    """The cache is filled anew where the sequence changes its length, and used where it does not."""
    from diffusers import FirstBlockCacheConfig

    pipe = tiny_pipeline()
    steps, options = 6, GUIDED if guided else {}
    stack = [ac.Isolate(window=window), ac.Regions([LEFT, RIGHT], window=window)]
    pipe.transformer.enable_cache(FirstBlockCacheConfig(threshold=1e9))
    with ac.attach(pipe, stack) as handle, lengths(pipe) as seen:
        generate(pipe, steps=steps, **options)
    more = region_tokens(pipe, LEFT, RIGHT)
    computed = {(0.0, 1.0): [0], (0.0, 0.5): [0, 3], (0.5, 1.0): [0, 3]}[window]
    acting = set(active_steps(window, [0.0] * steps))
    cond = [GRID + TEXT + more * (step in acting) for step in computed]
    expected = cond if not guided else [n for pair in zip(cond, [GRID + TEXT] * len(cond), strict=True) for n in pair]
    assert seen == expected
    assert handle.report().controls[1].steps == tuple(sorted(acting))


def test_two_branches_on_a_bare_model_need_a_name() -> None:
    pipe = flux()
    embeds, pooled, ids = pipe.encode_prompt(PROMPT, max_sequence_length=TEXT)
    other, _, _ = pipe.encode_prompt("green", max_sequence_length=TEXT)
    inputs = {
        "hidden_states": torch.randn(1, GRID, 64, generator=torch.Generator().manual_seed(0)),
        "pooled_projections": pooled,
        "timestep": torch.tensor([0.5]),
        "img_ids": pipe._prepare_latent_image_ids(1, 4, 6, torch.device("cpu"), torch.float32),
        "txt_ids": ids,
    }
    model = pipe.transformer
    with ac.attach(model, ac.Isolate([LEFT])) as handle:
        model(encoder_hidden_states=embeds, **inputs)
        model(encoder_hidden_states=embeds.clone(), **inputs)
        assert handle.report().controls[0].forwards == 2
        with pytest.raises(ac.ControlError, match=r"two texts came at one noise level.*cache_context"):
            model(encoder_hidden_states=other, **inputs)
        with model.cache_context("uncond"):
            model(encoder_hidden_states=other, **inputs)
        with model.cache_context("cond"):
            model(encoder_hidden_states=other, **inputs)
        assert handle.report().controls[0].forwards == 3
    with ac.attach(model, ac.Isolate([LEFT], window=(0, 0.5))), pytest.raises(ac.ScheduleError, match="no scheduler"):
        model(encoder_hidden_states=embeds, **inputs)
    with (
        pytest.warns(UserWarning, match="acted in none"),
        ac.attach(model, ac.Isolate([LEFT], window=ac.Sigma(0.6, 0.5))),
    ):
        pass_through = model(encoder_hidden_states=embeds, **inputs).sample
    assert torch.equal(pass_through, model(encoder_hidden_states=embeds, **inputs).sample)
    with ac.attach(model, ac.Regions([LEFT])), pytest.raises(ac.ControlError, match="no text encoder"):
        model(encoder_hidden_states=embeds, **inputs)


def test_a_bare_model_with_a_scheduler_has_windows() -> None:
    pipe = flux()
    base = generate(pipe)
    with ac.attach(pipe.transformer, ac.Isolate([LEFT, RIGHT], window=(0, 0.5)), scheduler=pipe.scheduler) as handle:
        assert not torch.equal(generate(pipe), base)
    assert handle.report().controls[0].steps == (0, 1)


def test_region_texts_are_encoded_once_by_themselves_without_padding() -> None:
    pipe = flux()
    calls: list[torch.Size] = []
    handle = pipe.text_encoder_2.register_forward_hook(lambda _m, args, _o: calls.append(args[0].shape))
    texts: list[torch.Tensor] = []
    root = pipe.transformer.context_embedder.register_forward_pre_hook(lambda _m, args: texts.append(args[0]))
    with ac.attach(pipe, ac.Regions([LEFT, RIGHT, ac.Region(LEFT.prompt, box=(0, 0, 0.2, 0.2))])):
        generate(pipe)
        generate(pipe)
    handle.remove()
    root.remove()
    left, right = (region_tokens(pipe, region) for region in (LEFT, RIGHT))
    assert sorted(tuple(shape) for shape in calls) == sorted([(1, TEXT), (1, left), (1, right), (1, TEXT)])
    alone = [
        pipe._get_t5_prompt_embeds([r.prompt], max_sequence_length=n)[0] for r, n in ((LEFT, left), (RIGHT, right))
    ]
    assert torch.equal(texts[0][0, TEXT:], torch.cat([*alone, alone[0]]))


def test_a_batch_of_prompts_and_scenes_with_two_images_each() -> None:
    pipe = flux()
    prompts, scenes = [PROMPT, "a green star"], [[LEFT, RIGHT], [ac.Region("star", box=(0.3, 0.2, 1.0, 1.0))]]
    latents = torch.randn(4, GRID, 64, generator=torch.Generator().manual_seed(3))
    with ac.attach(pipe, [ac.Isolate(), ac.Regions(scenes)]):
        together = generate(pipe, prompts, latents=latents, num_images_per_prompt=2)
    for row in range(4):
        with ac.attach(pipe, [ac.Isolate(), ac.Regions(scenes[row // 2])]):
            alone = generate(pipe, prompts[row // 2], latents=latents[row : row + 1])
        assert (alone - together[row : row + 1]).abs().max() < 1e-4


def test_kontext_reads_its_reference() -> None:
    pipe, picture = kontext(), Image.new("RGB", (24, 16), "red")
    bound = ac.Region("a red circle", box=(0.0, 0.0, 0.5, 1.0), reference=0)
    with ac.attach(pipe, ac.Regions([bound, RIGHT])) as handle:
        generate(pipe, image=picture, steps=2)
    assert handle.report().controls[0].forwards == 2
    missing = ac.Region("a red circle", box=(0.0, 0.0, 0.5, 1.0), reference=1)
    with ac.attach(pipe, ac.Regions([missing])), pytest.raises(ac.LayoutError, match=r"reference 1, .* 1 reference"):
        generate(pipe, image=picture, steps=1)


def test_one_region_with_the_whole_prompt_is_vanilla() -> None:
    """Identity 1 of regional prompting, with the prompt at its real length and any base ratio, over all steps."""
    pipe = flux()
    length = len(pipe.tokenizer_2(PROMPT).input_ids)
    base = generate(pipe, max_sequence_length=length)
    for options in ({}, {"global_text": "none"}, {"base_ratio": 0.4, "global_text": "none"}, {"window": (0, 0.5)}):
        with ac.attach(pipe, ac.Regions([ac.Region(PROMPT)], **options)):
            assert (generate(pipe, max_sequence_length=length) - base).abs().max() < 1e-5


def test_a_control_that_never_acts_is_warned_about() -> None:
    pipe = flux()
    handle = ac.attach(pipe, ac.Isolate([LEFT], branch="uncond"))
    generate(pipe, steps=2)
    assert "acted in none" in str(handle.report())
    with pytest.warns(UserWarning, match="'isolate' .*branch uncond.* acted in none of 2 forwards"):
        handle.detach()
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        with ac.attach(pipe, ac.Isolate([LEFT], strength=0)):
            generate(pipe, steps=1)
        with ac.attach(pipe, ac.Isolate([LEFT])):
            pass
