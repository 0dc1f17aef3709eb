"""What diffusers' caches and guiders keep or leave out never passes for what controls do."""

from __future__ import annotations

import warnings
from typing import Any

import pytest
import torch
from diffusers.hooks.layer_skip import LayerSkipConfig, _apply_layer_skip_hook
from guest_caches import faster, forget, pyramid, run_steps
from harness import FAMILIES, Setting, branches, flux, probe, regions

import attnctrl as ac

LONG = {"spatial_attention_block_skip_range": 100}


def at(setting: Setting, sigma: float, step: int, **context: Any) -> torch.Tensor:
    """One step of FLUX at a noise level."""
    setting.inputs["timestep"] = torch.full_like(setting.inputs["timestep"], sigma)
    return run_steps(setting, [step], **context)[0]


@torch.no_grad()
@pytest.mark.parametrize("apply", [pyramid(**LONG), faster(is_guidance_distilled=True, **LONG)], ids=["pab", "faster"])
@pytest.mark.parametrize("window", [ac.Sigma(1.0, 0.5), ac.Sigma(0.5, 0.0)])
def test_a_cache_is_emptied_where_a_window_begins_or_ends(apply: Any, window: Any) -> None:
    """The sequence keeps its length, so nothing but the outputs would tell."""
    setting, control = flux(), ac.Isolate(regions(), window=window)
    sigmas = (0.9, 0.8, 0.4, 0.3)
    acts = [window.low < sigma <= window.high for sigma in sigmas]
    uncached = []
    for step, (sigma, on) in enumerate(zip(sigmas, acts, strict=True)):
        with ac.attach(setting.model, control if on else ac.Isolate(regions(), strength=0)):
            uncached.append(at(setting, sigma, step))
    apply(setting.model)
    with ac.attach(setting.model, control) as handle:
        counts = []
        for step, sigma in enumerate(sigmas):
            with probe() as calls:
                out = at(setting, sigma, step)
            counts.append(len(calls))
            if step in (0, 2):
                assert (out - uncached[step]).abs().max() < 1e-5
    assert counts == [4, 0, 4, 0]
    assert handle.report().controls[0].forwards == 1


@torch.no_grad()
def test_pyramid_broadcast_does_not_carry_a_control_into_the_other_branch() -> None:
    """It keeps one output of a layer for all branches, so it is emptied between them, and says so once."""
    setting = flux()
    control = ac.Isolate(regions())
    base = at(setting, 0.9, 0)
    other = at(setting, 0.9, 1)
    pyramid(**LONG)(setting.model)
    with ac.attach(setting.model, control):
        assert (at(setting, 0.9, 0, context="cond") - base).abs().max() > 1e-3
        with pytest.warns(UserWarning, match="all guidance branches.*attnctrl.Reuse"):
            uncond = at(setting, 0.9, 1, context="uncond")
        assert torch.equal(uncond, other)
        with warnings.catch_warnings():
            warnings.simplefilter("error")
            assert (at(setting, 0.9, 0, context="cond") - base).abs().max() > 1e-3
            assert torch.equal(at(setting, 0.9, 1, context="uncond"), other)
    forget(setting.model)
    with ac.attach(setting.model, ac.Isolate(regions(), branch="all")) as handle:
        at(setting, 0.9, 1, context="cond")
        with probe() as calls, pytest.warns(UserWarning, match="emptied between them"):
            at(setting, 0.9, 1, context="uncond")
        assert len(calls) == 4
        with probe() as calls:
            at(setting, 0.9, 1, context="uncond")
        assert calls == []
        assert handle.report().controls[0].forwards == 2


@torch.no_grad()
def test_a_control_whose_layers_a_guider_left_out_is_reported() -> None:
    setting = FAMILIES["wan"]()
    handle = ac.attach(setting.model, ac.Isolate(regions(), layers="blocks.1.attn1"))
    _apply_layer_skip_hook(setting.model, LayerSkipConfig(indices=[1], fqn="blocks"), name="skip")
    setting.run()
    (text,) = handle.report().warnings
    assert "none of 1 forwards. In 1 it was due, but a cache or a guider left its layers out" in text
    with pytest.warns(UserWarning, match="left its layers out"):
        handle.detach()


@torch.no_grad()
@pytest.mark.parametrize("family", ["unet", "qwen"])
def test_layers_that_a_guider_perturbs_keep_its_identity(family: str) -> None:
    """Perturbed attention guidance gives back the values; a plan's parts of equal length would be mixed up by it."""
    setting = FAMILIES[family]()
    name = "mid_block.attentions.0.transformer_blocks" if family == "unet" else "transformer_blocks"
    index = 0 if family == "unet" else 1
    layer = setting.model.get_submodule(f"{name}.{index}." + ("attn1" if family == "unet" else "attn"))
    config = LayerSkipConfig(indices=[index], fqn=name, skip_attention=False, skip_attention_scores=True, skip_ff=False)
    halves = [ac.Region(side, box=box) for side, box in (("left", (0, 0, 0.5, 1)), ("right", (0.5, 0, 1, 1)))]
    control = ac.Isolate(halves, layers="self" if family == "unet" else None)
    with ac.attach(setting.model, control, branches=branches(setting.model)):
        expected = setting.run()
        _apply_layer_skip_hook(setting.model, config, name="pag")
        acts = []
        hook = layer.register_forward_pre_hook(lambda module, _: acts.append(module._attnctrl))
        out = setting.run()
        hook.remove()
        assert acts == [None]
        assert (out - expected).abs().max() > 1e-3
        layer._diffusers_hook.remove_hook("pag")
        assert torch.equal(setting.run(), expected)
