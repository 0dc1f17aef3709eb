"""Pipelines of FLUX.2, Qwen-Image, Z-Image and AuraFlow, tiny and real: encoding, branches, windows, positions."""

from __future__ import annotations

import functools
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import pytest
import settings_mmdit as settings
import tiny_mmdit_pipes
import torch

import attnctrl as ac
from attnctrl.families import family_of

PROMPT = "a red circle and a blue square"
LEFT = ac.Region("a red circle", box=(0.0, 0.0, 0.5, 1.0))
RIGHT = ac.Region("a blue square with stripes", box=(0.5, 0.0, 1.0, 1.0))
SIZES: dict[str, dict[str, Any]] = {
    "flux2": {"height": 8, "width": 12, "max_sequence_length": 16},
    "qwen": {"height": 64, "width": 96},
    "zimage": {"height": 64, "width": 96},
    "auraflow": {"height": 32, "width": 48, "max_sequence_length": 16},
}
GUIDED: dict[str, dict[str, Any]] = {
    "flux2": {"guidance_scale": 3.0},
    "qwen": {"negative_prompt": "a green star", "true_cfg_scale": 3.0},
    "zimage": {"guidance_scale": 3.0},
    "auraflow": {"guidance_scale": 3.0},
}
ORDER = {
    "flux2": ("cond", "uncond"),
    "qwen": ("cond", "uncond"),
    "zimage": ("cond", "uncond"),
    "auraflow": ("uncond", "cond"),
}
# AuraFlow's pipeline does not say whether it uses guidance
NAMED = {"auraflow": {"branches": ORDER["auraflow"]}}
every_pipe = pytest.mark.parametrize("name", SIZES)


@functools.cache
def pipeline(name: str) -> Any:
    return getattr(tiny_mmdit_pipes, name)()


def generate(name: str, prompt: Any = PROMPT, steps: int = 1, **options: Any) -> torch.Tensor:
    generator = torch.Generator().manual_seed(0)
    given = {**SIZES[name], **GUIDED[name], **options}
    return pipeline(name)(
        prompt=prompt, num_inference_steps=steps, output_type="latent", generator=generator, **given
    ).images  # fmt: skip


@contextmanager
def predictions(name: str) -> Iterator[list[torch.Tensor]]:
    """What the model predicts, row by row of all forwards."""
    seen: list[torch.Tensor] = []
    handle = pipeline(name).transformer.register_forward_hook(lambda _m, _a, out: seen.extend(out[0]))
    try:
        yield seen
    finally:
        handle.remove()


@every_pipe
@pytest.mark.parametrize("branch", ["cond", "uncond"])
def test_a_control_touches_its_branch_only(name: str, branch: Any) -> None:
    pipe = pipeline(name)
    with predictions(name) as vanilla:
        base = generate(name)
    stack = [ac.Isolate(branch=branch), ac.Regions([LEFT, RIGHT], branch=branch)]
    with ac.attach(pipe, stack, **NAMED.get(name, {})), predictions(name) as controlled:
        generate(name)
    assert len(vanilla) == len(controlled) == 2
    moved = [(a - b).abs().max() for a, b in zip(vanilla, controlled, strict=True)]
    for number, other in enumerate(ORDER[name]):
        assert moved[number] > 1e-3 if other == branch else moved[number] < 1e-5
    assert torch.equal(generate(name), base)


@pytest.mark.parametrize("name", [*SIZES, "flux2_dev", "chroma"])
def test_a_region_is_encoded_as_the_prompt_is(name: str) -> None:
    """Alone and at its real length; `count` foretells it."""
    pipe = pipeline(name)
    family = family_of(pipe.transformer)
    encoded = family.encode(pipe, PROMPT)
    assert len(encoded) == family.count(pipe, PROMPT)
    options = {"do_classifier_free_guidance": False} if name in ("zimage", "auraflow", "chroma") else {}
    if name not in ("qwen", "zimage"):
        options["max_sequence_length"] = 32
    whole = pipe.encode_prompt(PROMPT, device="cpu", **options)[0][0]
    assert len(encoded) < len(whole) or name in ("qwen", "zimage")
    assert (encoded - whole[: len(encoded)]).abs().max() < 1e-5
    assert (encoded[0] - encoded[-1]).abs().max() > 1e-3


@every_pipe
def test_windows(name: str) -> None:
    with ac.attach(
        pipeline(name), [ac.Isolate(window=(0, 0.5)), ac.Regions([LEFT, RIGHT])], **NAMED.get(name, {})
    ) as on:
        generate(name, steps=4)
    isolate, regions = on.report().controls
    assert isolate.steps == (0, 1)
    assert regions.steps == (0, 1, 2, 3)


@pytest.mark.parametrize("make", [settings.flux2, settings.qwen, settings.zimage])
def test_one_region_with_the_whole_prompt_is_vanilla(make: Any) -> None:
    """A region's text stands where the prompt stands, and the image where it stood."""
    # multiples of 32, so that Z-Image fills nothing up
    setting = make(grid=(4, 8), text=32)
    prompt = family_of(setting.model).text(setting.inputs)[0]
    base = setting.run()
    whole = [ac.Regions([ac.Region("whole", prompt_embeds=prompt)])]
    with ac.attach(setting.model, whole):
        assert (setting.run() - base).abs().max() < 1e-4
    with ac.attach(setting.model, [ac.Regions([ac.Region("whole", prompt_embeds=prompt.flip(0))])]):
        assert (setting.run() - base).abs().max() > 1e-2


def test_images_of_z_image_stand_still_in_rows_without_a_region() -> None:
    """A long text appended for one row of the batch moves nothing in the other one."""
    setting = settings.zimage(batch=2)
    base = setting.run()
    long = ac.Region("long", box=(0.0, 0.0, 0.5, 1.0), prompt_embeds=torch.randn(40, 12))
    with ac.attach(setting.model, ac.Regions([long]), branches=("cond", "uncond")):
        moved = (setting.run() - base).abs().amax(dim=(1, 2, 3, 4))
    assert moved[0] > 1e-2
    assert moved[1] < 1e-5


def test_guidance_of_z_image_that_ends_on_the_way() -> None:
    """Then the whole batch is the prompts'."""
    stack = [ac.Isolate([LEFT, RIGHT], window=(0.5, 1.0))]
    options = {"steps": 2, "cfg_truncation": 0.1, "guidance_scale": 3.0}
    with predictions("zimage") as vanilla:
        generate("zimage", [PROMPT] * 2, **options)
    with ac.attach(pipeline("zimage"), stack), predictions("zimage") as controlled:
        generate("zimage", [PROMPT] * 2, **options)
    assert len(vanilla) == 4 + 2
    moved = [float((a - b).abs().max()) for a, b in zip(vanilla, controlled, strict=True)]
    assert [move > 1e-3 for move in moved] == [False] * 4 + [True, True]


def test_chroma_opens_its_mask_for_appended_texts() -> None:
    """They stand between the prompt and the image."""
    setting = settings.chroma(batch=2)
    mask = torch.cat([torch.tensor([[1.0, 1, 1, 0, 0], [1, 1, 1, 1, 1]]), torch.ones(2, 24)], dim=1)
    longer = family_of(setting.model).append_text({**setting.inputs, "attention_mask": mask}, torch.randn(2, 3, 12))
    assert torch.equal(longer["attention_mask"], torch.cat([mask[:, :5], torch.ones(2, 27)], dim=1))
    assert longer["txt_ids"].shape == (8, 3)
    assert longer["encoder_hidden_states"].shape == (2, 8, 12)


def test_rows_of_z_image_know_their_padding() -> None:
    """Captions of different lengths: each is filled up by itself, then to the longest of the batch."""
    setting = settings.zimage(batch=2)
    family, captions = family_of(setting.model), [torch.randn(5, 12), torch.randn(40, 12)]
    short, long = family.frames(setting.model, {**setting.inputs, "cap_feats": captions})
    assert [(r.name, len(r)) for r in short["joint"].with_texts([("text.region0", 3)]).keys.ranges] == [
        ("image", 24), ("image.registers", 8), ("text.global", 5), ("text.registers", 27), ("text.region0", 3),
        ("padding", 32),
    ]  # fmt: skip
    assert [(r.name, len(r)) for r in long["text"].keys.ranges] == [("text.global", 40), ("text.registers", 24)]
    assert short["image"] == long["image"]


def test_what_z_image_and_flux2_cannot_do_is_said() -> None:
    setting, control = settings.zimage(), ac.Isolate([LEFT, RIGHT])
    omni = {"x": [setting.inputs["x"]], "cap_feats": [setting.inputs["cap_feats"]]}
    with ac.attach(setting.model, control), pytest.raises(ac.UnsupportedModelError, match="omni mode"):
        setting.run(**omni)
    setting = settings.flux2(references=1)
    with ac.attach(setting.model, control), pytest.raises(ac.UnsupportedModelError, match="kv_cache_mode='extract'"):
        setting.run(kv_cache_mode="extract", num_ref_tokens=6)


def test_qwen_pictures_must_fit_their_shapes() -> None:
    setting, control = settings.qwen(), ac.Isolate([LEFT, RIGHT])
    with ac.attach(setting.model, control), pytest.raises(ac.LayoutError, match=r"24 image tokens .* hold 20"):
        setting.run(img_shapes=[[(1, 4, 5)]])
    with ac.attach(setting.model, control), pytest.raises(ac.LayoutError, match="2 x 3 x 4"):
        setting.run(img_shapes=[[(2, 3, 4)]])
