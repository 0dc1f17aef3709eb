"""Models that read a padded text and its mask: where the texts of regions stand, what refiners make of them, pipelines."""

from __future__ import annotations

import functools
from collections.abc import Iterator
from contextlib import contextmanager
from types import SimpleNamespace
from typing import Any

import pytest
import tiny_masked_pipes
import tiny_video
import torch
from diffusers.pipelines.hunyuan_video import pipeline_hunyuan_video
from harness import DOORS, FAMILIES, regions
from table import CASES

import attnctrl as ac
from attnctrl.families import family_of, insert

NAMES = ["hunyuan-video", "lumina2", "hunyuan-image"]
every_family = pytest.mark.parametrize("family", NAMES)
PROMPT = "a red circle and a blue square"
LEFT = ac.Region("a red circle", box=(0.0, 0.0, 0.5, 1.0))
RIGHT = ac.Region("a blue square with stripes", box=(0.5, 0.0, 1.0, 1.0))
PIPES: dict[str, dict[str, Any]] = {
    "hunyuan_video": {
        "height": 64,
        "width": 96,
        "num_frames": 5,
        "max_sequence_length": 16,
        "negative_prompt": "a green star",
        "true_cfg_scale": 3.0,
    },
    "lumina2": {"height": 64, "width": 96, "max_sequence_length": 40, "guidance_scale": 3.0},
    "hunyuan_image": {"height": 128, "width": 192, "negative_prompt": "a green star"},
}
every_pipe = pytest.mark.parametrize("name", PIPES)


def padded(setting: Any, lengths: tuple[int, ...]) -> dict[str, torch.Tensor]:
    """Texts of which a row's first tokens are real and the others are noise that the mask hides."""
    mask = torch.arange(setting.text) < torch.tensor(lengths)[:, None]
    text = setting.inputs[setting.prompt]
    noise = 3 * torch.randn(text.shape, generator=torch.Generator().manual_seed(7))
    return {
        "encoder_hidden_states": torch.where(mask[..., None], text, noise),
        "encoder_attention_mask": mask.to(setting.inputs["encoder_attention_mask"].dtype),
    }


def test_texts_stand_between_real_tokens_and_padding() -> None:
    prompt, texts = torch.arange(8).reshape(2, 4), torch.tensor([[10, 11], [20, 21]])
    mask = torch.tensor([[1, 1, 0, 0], [1, 1, 1, 1]])
    expected = [[0, 1, 10, 11, 2, 3], [4, 5, 6, 7, 20, 21]]
    assert insert(prompt, texts, mask).tolist() == expected
    channels = insert(prompt[..., None], texts[..., None], mask.bool())
    assert channels[..., 0].tolist() == expected


@every_family
@pytest.mark.parametrize("case", [CASES["stack"], CASES["regions-base"]], ids=["stack", "regions-base"])
@pytest.mark.parametrize("door", DOORS.values(), ids=DOORS)
def test_prompts_of_unequal_length_equal_each_by_itself(family: str, case: Any, door: Any) -> None:
    """Each row's layout is its own, and padding is seen by nobody."""
    setting, controls = FAMILIES[family](batch=2), case.controls(case.scene())
    changes = padded(setting, (3, 5))
    with door(setting.model, controls):
        together = setting.run(**changes)
    with door(setting.model, controls):
        assert (setting.run(**padded(setting, (4, 5))) - together)[0].abs().max() > 1e-3
    for row, length in enumerate((3, 5)):
        alone = setting.single(row)
        bare = {key: alone[key][:, :length] for key in changes}
        with door(setting.model, controls):
            assert (setting.run(**{**alone, **bare}) - together[row]).abs().max() < 2e-5


@every_family
def test_one_region_with_the_whole_prompt_is_vanilla(family: str) -> None:
    """A region's text is refined as the prompt is, and stands where the prompt stands; the image stays where it was."""
    setting = FAMILIES[family](batch=2)
    changes: dict[str, Any] = padded(setting, (3, 5))
    if setting.glyphs:
        # those are the prompt's, which a region does not read
        changes["encoder_hidden_states_2"] = None
    base = setting.run(**changes)
    texts = setting.inputs[setting.prompt]
    whole = [[ac.Region("whole", prompt_embeds=texts[0, :3])], [ac.Region("whole", prompt_embeds=texts[1])]]
    with ac.attach(setting.model, ac.Regions(whole)):
        assert (setting.run(**changes) - base).abs().max() < 1e-4
    others = [[ac.Region("other", prompt_embeds=scene[0].prompt_embeds.flip(1))] for scene in whole]
    with ac.attach(setting.model, ac.Regions(others)):
        assert (setting.run(**changes) - base).abs().amin(0).max() > 1e-3


@every_family
def test_the_prompt_does_not_reach_the_texts_of_regions(family: str) -> None:
    """Not by the refiner either: what a region reads stays, whatever the prompt says."""
    setting = FAMILIES[family]()
    only = ac.Region("all", prompt_embeds=torch.randn(4, 12, generator=torch.Generator().manual_seed(3)))
    with ac.attach(setting.model, ac.Regions([only], global_text="none", branch="all")):
        first = setting.run()
        assert (setting.run(encoder_hidden_states=torch.randn(1, 5, 12)) - first).abs().max() < 1e-5


@every_family
def test_texts_of_regions_do_not_reach_each_other(family: str) -> None:
    """Each is refined by itself: another text of the right half leaves the left one as it was."""
    setting = FAMILIES[family]()
    texts = torch.randn(3, 4, 12, generator=torch.Generator().manual_seed(3))
    seen = []
    for right in texts[1:]:
        halves = [
            ac.Region(half.prompt, box=half.box, prompt_embeds=text)
            for half, text in ((LEFT, texts[0]), (RIGHT, right))
        ]
        with ac.attach(setting.model, [ac.Isolate(), ac.Regions(halves, global_text="none")]):
            seen.append(setting.run())
    moved = (seen[0] - seen[1]).abs()
    half = moved.shape[-1] // 2
    assert moved[..., :half].max() < 1e-5
    assert moved[..., half:].max() > 1e-3


def test_compiled_refiner_that_has_run_before_is_not_passed_over() -> None:
    torch._dynamo.reset()
    setting, controls = FAMILIES["hunyuan-video"](), ac.Regions(regions())
    base = setting.run()
    with ac.attach(setting.model, controls):
        expected = setting.run()
    setting.model.compile_repeated_blocks(backend="eager", fullgraph=True)
    assert (setting.run() - base).abs().max() < 1e-5
    with ac.attach(setting.model, controls):
        assert (setting.run() - expected).abs().max() < 1e-5
    assert (setting.run() - base).abs().max() < 1e-5


def test_a_first_frame_that_is_given_keeps_the_layout() -> None:
    """HunyuanVideo's image to video modulates the tokens of the first frame by themselves, in the same order."""
    setting = FAMILIES["hunyuan-video"]()
    setting.model = tiny_video.hunyuan_video(image_condition_type="token_replace")
    base, latents = setting.run(), setting.inputs["hidden_states"]
    left, right = (ac.Region(half.prompt, box=half.box, prompt_embeds=torch.randn(2, 12)) for half in (LEFT, RIGHT))
    other = latents.clone()
    other[..., 6:] = torch.randn_like(other[..., 6:])
    with ac.attach(setting.model, [ac.Isolate(), ac.Regions([left, right])]):
        controlled = setting.run()
        moved = (controlled - setting.run(hidden_states=other)).abs()
    assert (controlled - base).abs().max() > 1e-2
    assert moved[..., :6].max() == 0 < moved[..., 6:].max()


def test_glyphs_stand_before_the_text_and_are_the_prompts() -> None:
    """Of each row the real ones only; without them the text follows the image."""
    setting, mask = FAMILIES["hunyuan-image"](batch=2), torch.tensor([[1, 0, 0], [1, 1, 1]])
    family = family_of(setting.model)
    changes = {**padded(setting, (3, 5)), "encoder_attention_mask_2": mask}
    first, second = family.frames(setting.model, {**setting.inputs, **changes})
    assert [(r.name, len(r)) for r in first["joint"].with_texts([("text.region0", 2)]).keys.ranges] == [
        ("image", 24), ("text.glyphs", 1), ("text.global", 3), ("text.region0", 2), ("padding", 4)
    ]  # fmt: skip
    assert second["joint"].keys.names == ("image", "text.glyphs", "text.global")
    controls = [ac.Isolate(), ac.Regions(regions())]
    with ac.attach(setting.model, controls):
        together = setting.run(**changes)
    alone = setting.single(0)
    bare = {key: alone[key][:, :1] for key in ("encoder_hidden_states_2", "encoder_attention_mask_2")}
    bare |= {key: alone[key][:, :3] for key in ("encoder_hidden_states", "encoder_attention_mask")}
    with ac.attach(setting.model, controls):
        assert (setting.run(**{**alone, **bare}) - together[0]).abs().max() < 2e-5
    bare |= dict.fromkeys(("encoder_hidden_states_2", "encoder_attention_mask_2"))
    frames = family.frames(setting.model, {**setting.inputs, **alone, **bare})[0]
    assert frames["joint"].keys.names == ("image", "text.global")


def test_padding_before_the_text_is_refused() -> None:
    setting = FAMILIES["hunyuan-image"]()
    left = pytest.raises(ac.LayoutError, match=r"ones behind zeros.*Pad prompts on the right")
    with ac.attach(setting.model, ac.Isolate(regions())), left:
        setting.run(encoder_attention_mask=torch.tensor([[0, 1, 1, 1, 1]]))


def test_quoted_words_of_a_region_are_warned_of() -> None:
    pipe = pipeline("hunyuan_image")
    with pytest.warns(UserWarning, match=r"'a sign \"open\"' quotes words.*there as well"):
        family_of(pipe.transformer).encode(pipe, 'a sign "open"')


def test_a_text_that_is_encoded_with_a_picture_is_refused() -> None:
    family = family_of(tiny_video.hunyuan_video())
    pipe = SimpleNamespace(encode_prompt=lambda image, prompt: None)
    with pytest.raises(ac.ControlError, match=r"'a red circle' cannot be encoded by itself.*prompt_embeds"):
        family.encode(pipe, "a red circle")


@functools.cache
def pipeline(name: str) -> Any:
    return getattr(tiny_masked_pipes, name)()


@pytest.fixture(autouse=True)
def short_template(monkeypatch: Any) -> None:
    """The head of the real template is 95 tokens of another vocabulary."""
    for key, value in {"template": "a b {} c", "crop_start": 2}.items():
        monkeypatch.setitem(pipeline_hunyuan_video.DEFAULT_PROMPT_TEMPLATE, key, value)


@contextmanager
def predictions(name: str) -> Iterator[list[torch.Tensor]]:
    """What the model predicts in each forward."""
    seen: list[torch.Tensor] = []
    handle = pipeline(name).transformer.register_forward_hook(lambda _m, _a, out: seen.append(out[0].clone()))
    try:
        yield seen
    finally:
        handle.remove()


def generate(name: str, steps: int = 1) -> Any:
    options = {"output_type": "latent", "generator": torch.Generator().manual_seed(0), "return_dict": False}
    return pipeline(name)(prompt=PROMPT, num_inference_steps=steps, **PIPES[name], **options)[0]


@every_pipe
def test_a_region_is_encoded_as_the_prompt_is(name: str) -> None:
    """Alone and at its real length; `count` foretells it, and a long text is cut where a prompt would be."""
    pipe = pipeline(name)
    family = family_of(pipe.transformer)
    with predictions(name), pytest.MonkeyPatch.context() as patch:
        given: list[dict[str, Any]] = []
        forward = pipe.transformer.forward
        patch.setattr(pipe.transformer, "forward", lambda **kwargs: given.append(kwargs) or forward(**kwargs))
        generate(name)
    prompt, mask = given[0]["encoder_hidden_states"][0], given[0]["encoder_attention_mask"][0].bool()
    encoded = family.encode(pipe, PROMPT)
    assert len(encoded) == family.count(pipe, PROMPT) == mask.sum() < len(mask)
    assert (encoded - prompt[mask]).abs().max() < 1e-5
    assert (encoded[0] - encoded[-1]).abs().max() > 1e-3
    assert family.count(pipe, "red " * 2000) < 1200


@every_pipe
@pytest.mark.parametrize("branch", ["cond", "uncond"])
def test_a_control_touches_its_branch_only(name: str, branch: Any) -> None:
    with predictions(name) as vanilla:
        base = generate(name)
    stack = [ac.Isolate(branch=branch), ac.Regions([LEFT, RIGHT], branch=branch)]
    with ac.attach(pipeline(name), stack), predictions(name) as controlled:
        generate(name)
    moved = [bool((a - b).abs().max() > 1e-3) for a, b in zip(vanilla, controlled, strict=True)]
    assert moved == [one == branch for one in ("cond", "uncond")]
    assert torch.equal(generate(name), base)


@every_pipe
def test_windows(name: str) -> None:
    with ac.attach(pipeline(name), [ac.Isolate(window=(0, 0.5)), ac.Regions([LEFT, RIGHT])]) as on:
        generate(name, steps=4)
    isolate, texts = on.report().controls
    assert isolate.steps == (0, 1)
    assert texts.steps == (0, 1, 2, 3)
