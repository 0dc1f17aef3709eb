"""Processors of the user's own choice, as they are while controls are on the model: stand-ins, and the IP-Adapter's."""

from __future__ import annotations

import types
from typing import Any

import pytest
import torch
from diffusers.loaders import IPAdapterMixin
from diffusers.models.attention_processor import AttnProcessor, IPAdapterAttnProcessor2_0, SlicedAttnProcessor
from guest_kinds import ip_adapter
from harness import Setting, regions, traces, unet
from test_host import controlled, every_door, stack

import attnctrl as ac


def processors_of(setting: Setting) -> list[Any]:
    return [module.processor for module in setting.model.modules() if hasattr(module, "processor")]


def slow() -> Setting:
    setting = unet()
    setting.model.set_attn_processor(AttnProcessor())
    setting.model.get_submodule(MIDDLE).set_processor(SlicedAttnProcessor(1))
    return setting


MIDDLE = "mid_block.attentions.0.transformer_blocks.0.attn2"


@torch.no_grad()
@every_door
def test_bmm_processors_have_stand_ins_only_while_controls_act(door: Any) -> None:
    expected = controlled(unet(), door)
    setting = slow()
    base, before = setting.run(), traces(setting.model)
    assert (controlled(setting, door) - expected).abs().max() < 1e-4
    assert traces(setting.model) == before
    for off in (ac.Isolate(regions(), strength=0.0), ac.Isolate(regions(), window=(0.2, 0.2))):
        with door(setting.model, off):
            assert torch.equal(setting.run(), base)


@torch.no_grad()
def test_stand_ins_are_told_of_and_leave_with_each_forward() -> None:
    setting = slow()
    before = processors_of(setting)
    with ac.attach(setting.model, stack()) as handle:
        setting.run()
        assert processors_of(setting) == before
        inner = setting.model.get_submodule(MIDDLE).to_q
        hook = inner.register_forward_hook(lambda *_: 1 / 0)
        with pytest.raises(ZeroDivisionError):
            setting.run()
        hook.remove()
        assert processors_of(setting) == before
        notes = handle.report().notes
    assert [note.split(" in the ")[0] for note in notes if "Sliced" in note] == [
        "AttnProcessor2_0 stands in for SlicedAttnProcessor at mid.cross:0"
    ]
    assert set(notes) <= set(ac.explain(setting.model, stack(), grid=(8, 12), text_tokens=5).notes)


def test_processors_that_compute_something_else_are_refused() -> None:
    """A norm that the bmm processor passes over, and that its stand-in would not."""
    setting = slow()
    setting.model.get_submodule(MIDDLE).norm_q = torch.nn.Identity()
    with pytest.raises(ac.UnsupportedModelError, match=r"SlicedAttnProcessor at mid_block.*AttnProcessor2_0\(\)"):
        ac.attach(setting.model, ac.Isolate(regions()))


@torch.no_grad()
def test_the_scale_of_an_ip_adapter_is_set_while_attached() -> None:
    setting = unet()
    pipe = types.SimpleNamespace(unet=setting.model, unet_name="unet")
    with ip_adapter(setting):
        plain = setting.run()
        with ac.attach(setting.model, ac.Isolate(regions())):
            full = setting.run()
            IPAdapterMixin.set_ip_adapter_scale(pipe, 0.0)
            found = [one for one in processors_of(setting) if isinstance(one, IPAdapterAttnProcessor2_0)]
            assert [one.scale for one in found] == [[0.0]] * 7
            none = setting.run()
            # without its pictures
            setting.model.encoder_hid_proj, setting.model.config.encoder_hid_dim_type = None, None
            setting.model.set_attn_processor(unet().model.attn_processors)
            assert (none - setting.run()).abs().max() < 1e-5
    assert (full - none).abs().max() > 1e-3
    assert (full - plain).abs().max() > 1e-3
