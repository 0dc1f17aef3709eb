"""A style out of a bank: the picture that is drawn beside its anchor, without the anchor, on every family that can."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest
import torch
from harness import FAMILIES, Kernel, Setting, branches, flux, probe, sides_of, unet
from test_style import matched, rotation, turned

import attnctrl as ac
from attnctrl.families import family_of

MATCHING = [name for name, make in FAMILIES.items() if family_of(make().model).corner]


def attached(setting: Setting, controls: Any) -> Any:
    """Controls on a bare model that runs the one step of a run of its noise level, in the prompt's branch."""
    mark = family_of(setting.model).timestep(setting.inputs).reshape(-1)[:1].float()
    scheduler = SimpleNamespace(timesteps=mark, sigmas=mark / 1000, num_inference_steps=1)
    return ac.attach(setting.model, controls, scheduler=scheduler, branches=branches(setting.model) or ("cond",))


def kept(setting: Setting, **keep: Any) -> ac.Bank:
    bank = ac.Bank()
    with attached(setting, ac.Keep(bank=bank, moments=True, pictures=1, **keep)):
        setting.run()
    return bank


@pytest.mark.parametrize("name", FAMILIES)
def test_a_saved_style_is_the_anchor_of_a_batch(name: str) -> None:
    """What is read, and matched, of a bank is what a joint batch reads; families whose positions are unknown refuse."""
    setting = FAMILIES[name](batch=2)
    if name not in MATCHING:
        with (
            attached(setting, ac.Keep(bank=ac.Bank(), moments=True)),
            pytest.raises(ac.UnsupportedModelError, match="positions"),
        ):
            setting.run()
        return
    base, options = setting.run(), {"match": ("query", "key", "value"), "weight": 2.0, "scale": 1.1}
    with attached(setting, ac.ShareStyle(**options)):
        joint = setting.run()
    bank = kept(setting)
    with attached(setting, ac.ShareStyle(bank=bank, **options)) as handle:
        alone = setting.run(**setting.single(1))
    assert (alone[0] - joint[1]).abs().max() < 2e-5
    assert (base[1] - joint[1]).abs().max() > 1e-4
    assert "to the picture 0 of the bank" in str(handle.report())


def anchored(setting: Setting, call: Kernel, kinds: Any, first: Kernel, weights: tuple[float, ...]) -> torch.Tensor:
    """float64 [T, H, D]: row 0 of `call` in the style of row 0 of `first`; row n is read with the n-th weight."""
    _, keys = sides_of(setting, kinds, [])
    image, places = torch.tensor([token.kind == "image" for token in keys]), rotation(setting)
    own = {name: getattr(call, name)[0].double() for name in ("query", "key", "value")}
    theirs = {name: getattr(first, name).double() for name in ("query", "key", "value")}
    for name in ("query", "key"):
        aim = turned(theirs[name][0, image], places.conj())
        own[name][image] = turned(matched(turned(own[name][image], places.conj()), aim), places)
    shared, depth = theirs["key"][: len(weights), image].flatten(0, 1), call.query.shape[-1]
    own_scores, more = (torch.einsum("qhd,khd->hqk", own["query"], key) / depth**0.5 for key in (own["key"], shared))
    more += torch.tensor(weights, dtype=torch.float64).repeat_interleave(int(image.sum())).log()
    more[:, ~image] = -torch.inf
    value = torch.cat([own["value"], theirs["value"][: len(weights), image].flatten(0, 1)])
    return torch.einsum("hqk,khd->qhd", torch.cat([own_scores, more], -1).softmax(-1), value)


def test_several_pictures_of_a_bank_have_weights_and_the_first_gives_the_moments() -> None:
    """Both formulas in float64, in each layer, from the very tensors of the capturing run."""
    setting, bank = flux(batch=3), ac.Bank()
    with attached(setting, ac.Keep(bank=bank, moments=True, pictures=2)), probe() as captured:
        setting.run()
    with attached(setting, ac.ShareStyle(bank=bank, weight=(2.0, 0.5))), probe() as calls:
        setting.run(**setting.single(2))
    single = setting.controlled(calls)
    for (call, kinds), (first, _) in zip(single, setting.controlled(captured), strict=True):
        assert (anchored(setting, call, kinds, first, (2.0, 0.5)) - call.out[0]).abs().max() < 2e-5
    with (
        attached(setting, ac.ShareStyle(bank=bank, weight=(1.0, 1.0, 1.0))),
        pytest.raises(ac.ControlError, match="3 weights, and the bank keeps 2"),
    ):
        setting.run()


def test_moments_are_of_the_whole_picture_whatever_is_kept_of_it() -> None:
    half = [ac.Region(name="left", box=(0, 0, 0.5, 1))]
    setting = flux(batch=1)
    whole, part = kept(setting), kept(setting, regions=half, tokens="subject")
    for entry, packed in whole.entries.items():
        assert torch.equal(part.entries[entry].moments, packed.moments)
        assert part.entries[entry].states.shape[2] * 2 == packed.states.shape[2]
        heads, depth = packed.states.shape[1], packed.states.shape[3]
        assert packed.moments.shape == (2, 3 * heads, depth)
        assert packed.moments.dtype == torch.float32
        states = packed.states[1].double()
        expected = states.mean(1), (states.var(1) + 1e-5).sqrt()
        for one, other in zip(packed.moments_of("value", states.device), expected, strict=True):
            assert (one[:, 0] - other).abs().max() < 1e-5


def test_adain_alone_reads_no_keys() -> None:
    setting = unet(batch=2)
    with attached(setting, ac.ShareStyle(weight=0)):
        joint = setting.run()
    with attached(setting, ac.ShareStyle(weight=0, bank=kept(setting))):
        assert (setting.run(**setting.single(1))[0] - joint[1]).abs().max() < 2e-5


def test_a_bank_without_moments_is_refused_and_shares_keys() -> None:
    setting, bank = flux(batch=2), ac.Bank()
    with attached(setting, ac.Keep(bank=bank, pictures=1)):
        setting.run()
    with attached(setting, ac.ShareStyle(bank=bank)), pytest.raises(ac.ControlError, match=r"Keep\(moments=True\)"):
        setting.run()
    with attached(setting, ac.ShareStyle(match=())):
        joint = setting.run()
    with attached(setting, ac.ShareStyle(match=(), bank=bank)):
        assert (setting.run()[1] - joint[1]).abs().max() < 2e-5
    with pytest.raises(ac.ControlError, match="with a bank"):
        ac.ShareStyle(bank=bank, group=2)
