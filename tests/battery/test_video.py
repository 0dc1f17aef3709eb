"""What is particular to single families with cross attention, and of films."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest
import settings_video as settings
import tiny_video as tiny
import torch
from harness import DOORS, dense, regions, tokens, weights
from harness import probe as probed
from setting import Setting
from table import regional

import attnctrl as ac


@pytest.mark.parametrize("door", DOORS.values(), ids=DOORS)
def test_sanas_cross_attention_equals_the_dense_formula(door: Any) -> None:
    setting, scene = settings.sana(), regions()
    base = setting.run()
    with door(setting.model, [ac.Regions(scene, layers="cross")]), probed() as calls:
        on = setting.run()
    assert (on - base).abs().max() > 1e-2
    for call, _ in setting.controlled(calls):
        rows, columns = (tokens(setting, scene, texts=True, kinds=kind) for kind in ("image", "text"))
        table = weights(rows, columns, regional("background"))
        assert call.error(dense(call.query, call.key, call.value, (table, None))) < 1e-5
    assert torch.equal(setting.run(), base)


def test_sanas_linear_attention_is_refused() -> None:
    model = tiny.sana()
    for layers in (None, "self", "transformer_blocks.1.attn1"):
        with pytest.raises(ac.UnsupportedModelError, match=r"'isolate' selects self:.*attn1.*layers='cross'"):
            ac.attach(model, ac.Isolate(regions(), layers=layers))
    assert not any(hasattr(module, "_attnctrl") for module in model.modules())


def test_a_film_has_its_regions_in_every_frame() -> None:
    """Nothing of one half of the pictures reaches the other, in no frame."""
    setting = settings.wan()
    left = ac.Region("left", box=(0, 0, 0.5, 1), prompt_embeds=torch.randn(2, 12))
    right = ac.Region("right", box=(0.5, 0, 1, 1), prompt_embeds=torch.randn(2, 12))
    latents = setting.inputs["hidden_states"]
    other = latents.clone()
    other[..., 6:] = torch.randn_like(other[..., 6:])
    with ac.attach(setting.model, [ac.Isolate(), ac.Regions([left, right])]):
        moved = (setting.run() - setting.run(hidden_states=other)).abs().amax(dim=(0, 1))
    assert moved[..., :6].max() == 0
    assert (moved[..., 6:] > 1e-4).all()


def test_the_texts_of_image_to_video_take_the_place_of_padding_only() -> None:
    setting = settings.wan_i2v()
    whole = setting.inputs["encoder_hidden_states"].clone()
    whole[:, -1] = 1
    crowded = pytest.raises(ac.LayoutError, match="9 of them are wanted for regions, but the prompt reaches")
    with ac.attach(setting.model, ac.Regions(regions())), crowded:
        setting.run(encoder_hidden_states=whole)
    long = ac.Region("long", prompt_embeds=torch.randn(512, 12))
    with ac.attach(setting.model, ac.Regions([long])), pytest.raises(ac.LayoutError, match="512 tokens, but this"):
        setting.run()


def test_processors_warn_of_a_second_transformer() -> None:
    pipe = SimpleNamespace(transformer=tiny.wan(), transformer_2=tiny.wan(seed=1))
    with pytest.warns(UserWarning, match="second transformer"):
        ac.processors(pipe, ac.Isolate(regions()))


def test_what_cannot_go_on_the_second_transformer_leaves_the_first() -> None:
    pipe = SimpleNamespace(transformer=tiny.wan(), transformer_2=torch.nn.Linear(1, 1))
    base = dict(pipe.transformer.__dict__)
    with pytest.raises(ac.UnsupportedModelError, match="Linear"):
        ac.attach(pipe, ac.Isolate(regions()))
    assert pipe.transformer.__dict__.keys() == base.keys()


def _forwards_of(pipe: Any, setting: Any, controls: list[ac.Control]) -> list[int]:
    with ac.attach(pipe, controls) as handle:
        setting.run()
        return [one.forwards for one in handle.report().controls]


def test_a_silent_control_is_told_apart_from_its_namesake() -> None:
    """One of two isolations never comes, and the second transformer never runs: the warning is of the silent one."""
    first = settings.wan()
    pipe = SimpleNamespace(transformer=first.model, transformer_2=tiny.wan(seed=1))
    with pytest.warns(UserWarning, match=r"branch uncond\) acted in none of 1 forwards") as told:
        assert _forwards_of(pipe, first, [ac.Isolate(regions()), ac.Isolate(regions(), branch="uncond")]) == [1, 0]
    assert len(told) == 1


def test_a_given_first_frame_does_not_hide_the_noise_level() -> None:
    """Each token has its timestep, 0 in the first frame."""
    setting = settings.wan()
    timestep = torch.cat([torch.zeros(1, 24), torch.full((1, 24), 500.0)], dim=1)
    for window, acts in ((ac.Sigma(0.6, 0.4), 1), (ac.Sigma(0.4, 0.0), 0)):
        handle = ac.attach(setting.model, ac.Isolate(regions(), window=window))
        setting.run(timestep=timestep)
        assert handle.report().controls[0].forwards == acts
        handle._remove()


def test_ltx_wants_the_sizes_of_the_film() -> None:
    setting = settings.ltx()
    unlike = pytest.raises(ac.LayoutError, match=r"48 film tokens, but .*\(3, 4, 6\)")
    with ac.attach(setting.model, ac.Isolate(regions()), branches=("cond",)), unlike:
        setting.run(num_frames=3)


def test_a_cogvideox_with_positions_in_the_text_takes_no_further_texts() -> None:
    inputs = tiny.inputs(1, 2, 4, 8, 12)
    setting = Setting(tiny.cogvideox(rotary=False), inputs, [], grid=settings.FILM)
    base = setting.run()
    with ac.attach(setting.model, ac.Isolate(regions()), branches=("cond",)):
        assert (setting.run() - base).abs().max() > 1e-3
    closed = pytest.raises(ac.LayoutError, match="exactly 5 tokens of text")
    with ac.attach(setting.model, ac.Regions(regions()), branches=("cond",)), closed:
        setting.run()
