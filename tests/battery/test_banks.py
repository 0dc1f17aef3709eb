"""Banks on every family: a picture that reads kept keys is the picture that reads the others in one batch."""

from __future__ import annotations

from dataclasses import replace
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from harness import FAMILIES, Setting, branches, flux, probe, sides_of, unet

import attnctrl as ac
from attnctrl.families import family_of

every_family = pytest.mark.parametrize("family", FAMILIES.values(), ids=FAMILIES)
LEFT, RIGHT = (0, 0, 2 / 6, 1), (4 / 6, 0, 1, 1)
SCENES = [
    [ac.Region(name="fox", box=LEFT), ac.Region(name="owl", box=RIGHT)],
    [ac.Region(name="owl", box=LEFT)],
    [ac.Region(name="fox", box=RIGHT)],
]


def attached(setting: Setting, controls: Any) -> Any:
    """Controls on a bare model that runs the one step of a run of its noise level, in the prompt's branch."""
    mark = family_of(setting.model).timestep(setting.inputs).reshape(-1)[:1].float()
    scheduler = SimpleNamespace(timesteps=mark, sigmas=mark / 1000, num_inference_steps=1)
    return ac.attach(setting.model, controls, scheduler=scheduler, branches=branches(setting.model) or ("cond",))


@every_family
def test_kept_keys_stand_for_pictures_of_the_batch(family: Any) -> None:
    setting = family(batch=3)
    base = setting.run()
    sharing = {"tokens": "subject", "queries": "same"}
    with attached(setting, ac.Share(SCENES, readers="anchors", **sharing)):
        joint = setting.run()
    bank = ac.Bank()
    keep = ac.Keep(SCENES, bank=bank, tokens="subject", pictures=2)
    with attached(setting, [ac.Share(SCENES, readers="anchors", **sharing), keep]) as handle:
        assert torch.equal(setting.run(), joint)
    assert (bank.pictures, bank.steps, bank.branches) == (2, (0,), ("cond",))
    assert {one.steps for one in handle.report().controls} == {(0,)}
    with attached(setting, ac.Share(SCENES[2], bank=bank, **sharing)):
        alone = setting.run(**setting.single(2))
    assert (alone[0] - joint[2]).abs().max() < 2e-5
    assert (base[2] - joint[2]).abs().max() > 1e-4
    # rows that read the same are alike
    with attached(setting, ac.Share(SCENES[2], bank=bank, **sharing)):
        assert (setting.run()[2] - joint[2]).abs().max() < 2e-5


@every_family
@pytest.mark.parametrize("features", ["value", "out", "query", "place"])
def test_kept_outputs_stand_for_those_of_the_batch(family: Any, features: Any) -> None:
    """Also in families whose pictures are films; `Reposition` weighs what is kept as it does in the batch."""
    setting = family(batch=3)
    if features == "value" and family is unet:
        # two tokens that match equally well but for rounding
        setting = family(batch=3, dtype=torch.float64)
    sharing = {"tokens": "subject", "queries": "same"}
    harmony = {"features": features, "window": (0.0, 1.0), "floor": -1.0}
    joint = [
        ac.Share(SCENES, readers="anchors", **sharing),
        ac.Reposition(mode="resample"),
        ac.Harmonize(SCENES, readers="anchors", **harmony),
    ]
    bank = ac.Bank()
    keep = ac.Keep(SCENES, bank=bank, tokens="subject", pictures=2, outputs=(0.0, 1.0), queries=True, branch="cond")
    with attached(setting, [*joint, keep]):
        expected = setting.run()[2]
    assert all(packed.output is not None for packed in bank.entries.values())
    stored = [
        ac.Share(SCENES[2], bank=bank, **sharing),
        ac.Reposition(mode="resample"),
        ac.Harmonize(SCENES[2], bank=bank, **harmony),
    ]
    with attached(setting, stored):
        assert (setting.run(**setting.single(2))[0] - expected).abs().max() < 2e-5
    with attached(setting, stored[:2]):
        assert (setting.run(**setting.single(2))[0] - expected).abs().max() > 1e-4


@pytest.mark.parametrize("family", [flux, unet])
def test_tokens_that_are_not_read_have_no_influence(family: Any) -> None:
    """The gradient to kept tokens of other names is exactly zero, to those of the own name it is not; what is not kept
    is not there."""
    setting, bank = family(batch=3), ac.Bank()
    with attached(setting, ac.Keep(SCENES, bank=bank, tokens="subject", pictures=2)), probe() as calls:
        setting.run()
    layers = family_of(setting.model).layers(setting.model)
    met = 0
    for layer, (call, kinds) in zip(layers, setting.controlled(calls), strict=True):
        for entry in (entry for entry in bank.entries if entry.layer == layer.name):
            _, keys = sides_of(setting, kinds, SCENES[entry.picture])
            held = torch.tensor([token.kind == "image" and bool(token.members) for token in keys])
            states = bank.entries[entry].states
            assert torch.equal(states[0], call.key[entry.picture, held].transpose(0, 1))
            assert torch.equal(states[1], call.value[entry.picture, held].transpose(0, 1))
            met += 1
    assert met == len(bank.entries) > 0
    leaves = {entry: packed.states.clone().requires_grad_() for entry, packed in bank.entries.items()}
    bank.entries = {entry: replace(bank.entries[entry], states=leaf) for entry, leaf in leaves.items()}
    with attached(setting, ac.Share(SCENES[2], bank=bank, tokens="subject", queries="same")):
        setting.run(**setting.single(2)).double().square().sum().backward()
    frames = {layer.name: layer.frame for layer in layers}
    for entry, leaf in leaves.items():
        held = bank.places[frames[entry.layer], entry.picture]
        fox = held.member[held.names.index("fox")] if "fox" in held.names else torch.zeros(len(held.tokens)).bool()
        assert leaf.grad is None or (leaf.grad[:, :, ~fox] == 0).all()
        assert not fox.any() or (leaf.grad[1][:, fox] != 0).any(-1).any(0).all()


def test_a_branch_or_step_that_cannot_be_told_is_refused() -> None:
    setting, bank = unet(), ac.Bank()
    with (
        ac.attach(setting.model, ac.Keep(bank=bank), branches=("cond",)),
        pytest.raises(ac.ScheduleError, match="step"),
    ):
        setting.run()
    mark = torch.tensor([500.0])
    scheduler = SimpleNamespace(timesteps=mark, sigmas=mark, num_inference_steps=1)
    setting = unet(batch=2)
    with (
        ac.attach(setting.model, ac.Keep(bank=bank), scheduler=scheduler),
        pytest.raises(ac.ControlError, match="branch"),
    ):
        setting.run()
    assert not bank.entries
