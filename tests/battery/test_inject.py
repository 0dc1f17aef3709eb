"""Values and keys of another run in place of the own ones, on every family, against the dense formula in float64."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest
import torch
from harness import FAMILIES, Kernel, Setting, branches, flux, probe, sides_of, unet
from torch import Tensor

import attnctrl as ac
from attnctrl.families import family_of

every_family = pytest.mark.parametrize("family", FAMILIES.values(), ids=FAMILIES)
HALF = [ac.Region(name="fox", box=(0, 0, 0.5, 1))]


def attached(setting: Setting, controls: Any, sigmas: tuple[float, ...] | None = None) -> Any:
    """Controls on a bare model in a run over `sigmas`, the forward standing at the first of them."""
    mark = family_of(setting.model).timestep(setting.inputs).reshape(-1)[:1].float()
    levels = mark / 1000 if sigmas is None else torch.tensor(sigmas)
    marks = torch.cat([mark, mark[0] - 1 - torch.arange(len(levels) - 1)])
    scheduler = SimpleNamespace(timesteps=marks, sigmas=levels, num_inference_steps=len(marks))
    return ac.attach(setting.model, controls, scheduler=scheduler, branches=branches(setting.model) or ("cond",))


def image_of(setting: Setting, kinds: Any, scene: Any = ()) -> Tensor:
    """bool [keys]: image tokens that no region of the scene holds."""
    return torch.tensor([token.kind == "image" and not token.members for token in sides_of(setting, kinds, scene)[1]])


def both_images(kinds: Any) -> bool:
    return all("image" in side.split() for side in (kinds.queries, kinds.keys))


def captured(setting: Setting, row: int, *keep: Any, **more: Any) -> tuple[ac.Bank, list[Kernel]]:
    """A bank of one row of the batch by itself, and the kernel calls of that run."""
    bank = ac.Bank()
    with attached(setting, ac.Keep(*keep, bank=bank, **more)), probe() as calls:
        setting.run(**setting.single(row))
    return bank, calls


def attention(query: Tensor, key: Tensor, value: Tensor, mask: Tensor | None) -> Tensor:
    return Kernel(query, key, value, query, mask).plain()


@every_family
@pytest.mark.parametrize(("states", "strength"), [(("value",), 1.0), (("key", "value"), 0.25)])
def test_equals_the_formula_in_every_layer_and_identity_on_the_same_picture(
    family: Any, states: tuple[str, ...], strength: float
) -> None:
    setting = family(batch=2)
    base = setting.run()
    bank, source = captured(setting, 1)
    inject = ac.Inject(bank=bank, states=states, strength=strength)
    with attached(setting, inject) as handle, probe() as calls:
        out = setting.run()
    met = 0
    for (call, kinds), (theirs, _) in zip(setting.controlled(calls), setting.controlled(source), strict=True):
        key, value = call.key.double().clone(), call.value.double().clone()
        if both_images(kinds):
            met += 1
            mine = image_of(setting, kinds)
            for name, own in (("key", key), ("value", value)):
                if name in states:
                    kept = getattr(theirs, name)[:, mine].double()
                    own[:, mine] = (1 - strength) * own[:, mine] + strength * kept
        wanted = attention(call.query, key, value, call.mask)
        assert (wanted - call.out).abs().max() < 2e-5
    assert met
    assert (out[0] - base[0]).abs().max() > 1e-4
    assert (out[1] - base[1]).abs().max() < 2e-5
    (told,) = handle.report().controls
    assert told.steps == (0,)
    assert torch.equal(setting.run(), base)
    with attached(setting, ac.Inject(bank=bank, strength=0.0)):
        assert torch.equal(setting.run(), base)


@pytest.mark.parametrize("family", [flux, unet])
def test_the_source_alone_gives_itself_to_the_bit_and_tokens_that_are_not_kept_are_left(family: Any) -> None:
    setting = family(batch=2)
    bank, _ = captured(setting, 1)
    alone = setting.run(**setting.single(1))
    with attached(setting, ac.Inject(bank=bank, states=("value", "key"))):
        assert torch.equal(setting.run(**setting.single(1)), alone)
    part, source = captured(setting, 1, HALF, tokens="background")
    with attached(setting, ac.Inject(bank=part)), probe() as calls:
        setting.run()
    for (call, kinds), (theirs, _) in zip(setting.controlled(calls), setting.controlled(source), strict=True):
        value = call.value.double().clone()
        if both_images(kinds):
            free = image_of(setting, kinds, HALF)
            assert 0 < free.sum() < image_of(setting, kinds).sum()
            value[:, free] = theirs.value[:, free].double()
        assert (attention(call.query, call.key, value, call.mask) - call.out).abs().max() < 2e-5


def test_each_row_has_its_own_picture_and_one_bank_stands_for_another_after_it() -> None:
    setting = flux(batch=3)
    base = setting.run()
    bank = ac.Bank()
    with attached(setting, ac.Keep(bank=bank)):
        setting.run()
    with attached(setting, ac.Inject(bank=bank)):
        assert (setting.run() - base).abs().max() < 2e-5
        with pytest.raises(ac.ControlError, match="holds 3 pictures and the batch has 1"):
            setting.run(**setting.single(1))
        turned = {entry: packed for entry, packed in bank.entries.items() if entry.picture == 2}
        places, told = dict(bank.places), (bank.model, bank.sigmas)
        bank.clear()
        bank.model, bank.sigmas = told
        bank.places = {(frame, 0): held for (frame, picture), held in places.items() if picture == 2}
        for entry, packed in turned.items():
            bank.add(entry._replace(picture=0), packed)
        out = setting.run()
    assert (out[2] - base[2]).abs().max() < 2e-5
    assert (out[0] - base[0]).abs().max() > 1e-4


def test_levels_are_found_by_noise_and_what_is_not_there_is_refused() -> None:
    setting = flux(batch=1)
    bank, _ = captured(setting, 0)
    assert bank.sigmas == pytest.approx((0.5,))
    with attached(setting, ac.Inject(bank=bank), (0.5, 0.3, 0.1)):
        setting.run()
    for sigmas in ((0.6, 0.3), (0.4, 0.3)):
        with (
            attached(setting, ac.Inject(bank=bank), sigmas),
            pytest.raises(ac.ScheduleError, match="none of them near"),
        ):
            setting.run()
    bank.sigmas = (0.9, 0.5, 0.1)
    assert [bank.kept_step(0), bank.nearest_step(0.95), bank.nearest_step(1.0)] == [0, 0, 0]
    for sigma in (0.5, 0.2):
        with pytest.raises(ac.ScheduleError, match="keeps no keys for step"):
            bank.nearest_step(sigma)
    bank.sigmas = (float("inf"), 2.0, 0.5)
    assert [bank.nearest_step(sigma) for sigma in (float("inf"), 100.0)] == [0, 0]
    with pytest.raises(ac.ScheduleError, match="cannot be told"):
        bank.nearest_step(None)
    with attached(setting, ac.Inject(bank=ac.Bank())), pytest.raises(ac.ControlError, match="empty"):
        setting.run()
    other, _ = captured(setting, 0, layers="double")
    with attached(setting, ac.Inject(bank=other)), pytest.raises(ac.ControlError, match="keeps no keys of layer"):
        setting.run()
    with pytest.raises(ac.ControlError, match="states is one or both of key, value"):
        ac.Inject(bank=bank, states=("query",))
    with pytest.raises(ac.ControlError, match="bank must be a Bank"):
        ac.Inject(bank=None)
    with pytest.raises(ac.ControlError, match="no control named 'inject'"):
        ac.Control.from_dict({"name": "inject"})
