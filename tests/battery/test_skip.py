"""Layers that are left out: on every family the same as a model without them, and nothing of it stays."""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import pytest
import settings_video as video
import torch
from harness import DOORS, FAMILIES, Setting, flux, probe, regions, sd3, traces, unet
from torch import nn

import attnctrl as ac
from attnctrl.families import family_of
from attnctrl.select import Layer

EVERY = {**FAMILIES, "sana": video.sana}
every_family = pytest.mark.parametrize("family", EVERY.values(), ids=EVERY)


def firsts(setting: Setting) -> list[Layer]:
    """The first layer of each stack in which controls can act."""
    layers = [layer for layer in family_of(setting.model).layers(setting.model) if not layer.linear]
    return list({layer.stack: layer for layer in reversed(layers)}.values())


def without(model: nn.Module, layer: Layer) -> nn.Module:
    """A copy of the model that does not have the block of a layer."""
    model, block = copy.deepcopy(model), layer.name.rpartition(".")[0]
    stack, _, index = block.rpartition(".")
    if type(model).__name__ == "ChromaTransformer2DModel":
        # it counts its blocks to find their modulation, so the block stays and adds nothing
        for name, parameter in model.get_submodule(block).named_parameters():
            if name.startswith(("attn.to_out", "attn.to_add_out", "ff.net.2", "ff_context.net.2", "proj_out")):
                parameter.zero_()
    else:
        del model.get_submodule(stack)[int(index)]
    return model


def skipped(setting: Setting, *layers: str, **more: Any) -> torch.Tensor:
    """The prediction of the model without some layers."""
    with ac.attach(setting.model, ac.Skip(layers=layers, branch="all", window=(0, 1), **more)):
        return setting.run()


@torch.no_grad()
@every_family
def test_equals_the_model_without_the_block(family: Callable[..., Setting]) -> None:
    setting = family()
    base, before = setting.run(), traces(setting.model)
    for layer in firsts(setting):
        out = skipped(setting, layer.name)
        expected = Setting(without(setting.model, layer), setting.inputs, ()).run()
        assert torch.equal(out, expected), layer.name
        assert (out - base).abs().max() > 1e-3, layer.name
    assert traces(setting.model) == before
    assert torch.equal(setting.run(), base)


@torch.no_grad()
@every_family
def test_attention_adds_zero_behind_its_projection(family: Callable[..., Setting]) -> None:
    """Values and output projections of zeros give it exactly, where the rest of the block stays."""
    setting = family()
    base = setting.run()
    for layer in firsts(setting):
        if layer.stack in family_of(setting.model).fused:
            with pytest.raises(ac.UnsupportedModelError, match=r"one module with the block's feed-forward"):
                skipped(setting, layer.name, what="attention")
            continue
        out = skipped(setting, layer.name, what="attention")
        silent = copy.deepcopy(setting.model)
        for name, parameter in silent.get_submodule(layer.name).named_parameters():
            if name.split(".")[0] in ("to_v", "add_v_proj", "to_out", "to_add_out"):
                parameter.zero_()
        expected = Setting(silent, setting.inputs, ()).run()
        assert torch.equal(out, expected), layer.name
        # the text refiner of a stack may have no way to the picture in so small a model
        assert (out - base).abs().max() > 1e-3 or layer.stack == "context", layer.name
    assert torch.equal(setting.run(), base)


@torch.no_grad()
def test_diffusers_own_skip_layers_gives_the_same() -> None:
    setting = sd3()
    assert torch.equal(skipped(setting, "joint:0"), setting.run(skip_layers=[0]))
    # the second attention of a dual block is in the same block
    assert torch.equal(skipped(setting, "dual:0"), setting.run(skip_layers=[0]))
    assert torch.equal(skipped(setting, "joint:0", "joint:1"), setting.run(skip_layers=[0, 1]))


@torch.no_grad()
@pytest.mark.parametrize("door", DOORS.values(), ids=DOORS)
@pytest.mark.parametrize("what", ["block", "attention"])
def test_the_branch_is_led_away_from(door: Any, what: Any) -> None:
    setting = flux()
    c, p = setting.run(), skipped(setting, "single:1", what=what)
    calls: list[Any] = []
    hook = setting.model.register_forward_hook(lambda *_: calls.append(1))
    with door(setting.model, ac.Skip(what, layers="single:1", scale=2.0, window=(0, 1))):
        assert torch.equal(setting.run(), c + 2.0 * (c - p))
    assert len(calls) == 2
    for off in ({"scale": 0.0}, {"strength": 0}, {"window": (0.3, 0.3)}):
        with ac.attach(setting.model, ac.Skip(what, layers="single:1", **off)):
            assert torch.equal(setting.run(), c)
    assert len(calls) == 5
    hook.remove()


@torch.no_grad()
def test_skips_and_perturbations_of_one_guide_are_one_branch() -> None:
    setting = flux()
    c = setting.run()
    more = {"scale": 3.0, "window": (0, 1)}
    stack = [ac.Skip(layers="double:0", **more), ac.Perturb("uniform", layers="single:1", **more)]
    with ac.attach(setting.model, [ac.Skip(layers="double:0", branch="all", window=(0, 1)), _uniform()]):
        p = setting.run()
    with ac.attach(setting.model, stack) as handle:
        assert torch.equal(setting.run(), c + 3.0 * (c - p))
    told = handle.report().controls
    assert [(one.acted, one.rows) for one in told] == [
        ("double:0", (("perturbed", 0),)),
        ("single:1", (("perturbed", 0),)),
    ]
    assert told[0].plans == ("blocks left out", "in full: transformer_blocks.0.attn is in the first block")


def _uniform() -> ac.Perturb:
    return ac.Perturb("uniform", layers="single:1", branch="all")


@torch.no_grad()
def test_controls_in_layers_that_are_left_out_are_not_counted() -> None:
    setting = flux()
    scene = regions()
    skip = ac.Skip(layers="double:0", branch="all", window=(0, 1))
    with ac.attach(setting.model, [ac.Isolate(scene), skip]) as handle, probe() as calls:
        setting.run()
    assert len(calls) == 3
    assert [one.acted for one in handle.report().controls] == ["double:1, single:0-1", "double:0"]
    handle = ac.attach(setting.model, [ac.Isolate(scene, layers="double:0"), skip])
    setting.run()
    with pytest.warns(UserWarning, match=r"'isolate'.*none of 1 forwards. In 1 it was due"):
        handle.detach()


@torch.no_grad()
def test_nothing_stays_after_an_error() -> None:
    setting = unet()
    before, base = traces(setting.model), setting.run()
    inner = setting.model.mid_block.attentions[0].transformer_blocks[0]
    inner.forward = marked = inner.forward  # as offloading and other hooks put theirs
    handle = ac.attach(setting.model, ac.Skip(layers="mid.self", branch="all", window=(0, 1)))
    hook = setting.model.up_blocks[0].register_forward_pre_hook(lambda *_: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        setting.run()
    assert inner.__dict__["forward"] is marked
    hook.remove()
    assert (setting.run() - base).abs().max() > 1e-3
    handle.detach()
    assert inner.__dict__["forward"] is marked
    del inner.forward
    assert traces(setting.model) == before
    assert torch.equal(setting.run(), base)


@torch.no_grad()
def test_what_cannot_be_left_out_is_refused() -> None:
    setting = sd3(batch=2)
    skip = ac.Skip(layers="joint:0", branch="cond", window=(0, 1))
    with (
        ac.attach(setting.model, skip, branches=("uncond", "cond")),
        pytest.raises(ac.ControlError, match=r"acts in 1 of 2 rows of this batch alone.*branch='all'"),
    ):
        setting.run()
    with pytest.raises(ac.ControlError, match="needs layers"):
        ac.Skip()
    with pytest.raises(ac.ControlError, match=r"strength is 0 or 1; found 0.5"):
        ac.Skip(layers="joint:0", strength=0.5)
    with pytest.raises(ac.ControlError, match="what must be one of block, attention"):
        ac.Skip("blocks", layers="joint:0")
    compiled = flux()
    compiled.model.transformer_blocks[0].compile(backend="eager")
    with (
        ac.attach(compiled.model, ac.Skip(layers="double:1", branch="all", window=(0, 1))),
        pytest.raises(ac.UnsupportedModelError, match="'skip' goes around whole modules"),
    ):
        compiled.run()


def test_it_is_written_to_documents_and_read_back() -> None:
    control = ac.Skip("attention", layers="joint:7-9", window=(0.0, 0.3))
    data = control.to_dict()
    assert data == {"name": "skip", "what": "attention", "layers": "joint:7-9", "window": [0.0, 0.3]}
    assert ac.Control.from_dict(data).to_dict() == data
