"""The attention backend that the user selects is the one that is met, whatever masks it honours."""

from __future__ import annotations

import warnings
from typing import Any

import pytest
import torch
from diffusers.models.attention_dispatch import _AttentionBackendRegistry, attention_backend
from harness import FAMILIES, flux, regions
from test_host import controlled, every_door, stack

import attnctrl as ac


@every_door
@pytest.mark.filterwarnings("ignore:flex_attention called without torch.compile")
@pytest.mark.parametrize("backend", ["_native_math", "flex"])
@pytest.mark.parametrize("when", ["before", "after", "context"])
def test_the_users_backend_is_the_one_that_runs(door: Any, backend: str, when: str) -> None:
    setting, active = flux(), _AttentionBackendRegistry._active_backend
    expected = controlled(setting, door)
    key = next(key for key in _AttentionBackendRegistry._backends if key.value == backend)
    original, met = _AttentionBackendRegistry._backends[key], []

    def counting(**call: Any) -> torch.Tensor:
        met.append(call["query"].shape)
        return original(**call)

    _AttentionBackendRegistry._backends[key] = counting
    try:
        if when == "before":
            setting.model.set_attention_backend(backend)
        with door(setting.model, stack()):
            if when == "after":
                setting.model.set_attention_backend(backend)
            if when == "context":
                with attention_backend(backend):
                    out = setting.run()
            else:
                out = setting.run()
        assert _AttentionBackendRegistry._backends[key] is counting
    finally:
        _AttentionBackendRegistry._backends[key] = original
        _AttentionBackendRegistry.set_active_backend(active)
    assert len(met) >= 4
    assert (out - expected).abs().max() < 2e-5


def test_a_backend_without_masks_keeps_the_unmasked_calls_and_warns_once() -> None:
    """Grouped calls run on the user's backend; calls with a bias run on native, with one warning that names both."""
    registry = _AttentionBackendRegistry._backends
    key = next(key for key in registry if key.value == "_native_flash")
    native = next(function for name, function in registry.items() if name.value == "native")
    original, masks = registry[key], []

    def maskless(**call: Any) -> torch.Tensor:
        masks.append(call.get("attn_mask"))
        return native(**call)

    soft, hard = ac.Isolate(regions(), strength=0.5), ac.Isolate(regions())
    setting = flux()
    with ac.attach(setting.model, soft):
        expected = setting.run()
    registry[key] = maskless
    try:
        with attention_backend("_native_flash"), ac.attach(setting.model, soft):
            with pytest.warns(
                UserWarning, match="'_native_flash' cannot honour a mask.*transformer_blocks.0.attn.*'native'"
            ):
                out = setting.run()
            with warnings.catch_warnings():
                warnings.simplefilter("error")
                setting.run()
        assert masks == []
        assert torch.equal(out, expected)
        with attention_backend("_native_flash"), ac.attach(setting.model, hard), warnings.catch_warnings():
            warnings.simplefilter("ignore")
            setting.run()
        assert all(mask is None for mask in masks)
    finally:
        registry[key] = original


def test_a_mask_of_the_model_on_a_backend_without_masks_is_told(monkeypatch: pytest.MonkeyPatch) -> None:
    """The plan itself needs none: the model's padding does, once it is merged."""
    registry = _AttentionBackendRegistry._backends
    key = next(key for key in registry if key.value == "_native_flash")
    native = next(function for name, function in registry.items() if name.value == "native")
    original = registry[key]
    monkeypatch.setattr("attnctrl.kernels.known_maskless", set())

    def maskless(**call: Any) -> torch.Tensor:
        assert call.get("attn_mask") is None
        return native(**call)

    setting, hard = FAMILIES["qwen"](), ac.Isolate(regions())
    padded = {"encoder_hidden_states_mask": torch.tensor([[True] * 4 + [False]])}
    with ac.attach(setting.model, hard):
        expected = setting.run(**padded)
    registry[key] = maskless
    try:
        with attention_backend("_native_flash"), ac.attach(setting.model, hard):
            with pytest.warns(UserWarning, match="'_native_flash' cannot honour a mask; calls under control"):
                out = setting.run(**padded)
            with warnings.catch_warnings():
                warnings.simplefilter("error")
                setting.run(**padded)
    finally:
        registry[key] = original
    assert torch.equal(out, expected)
