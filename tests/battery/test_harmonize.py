"""Outputs blended between matching tokens of pictures: against the formula, written out token by token."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from harness import DOORS, Kernel, branches, flux, probe, sd3, sides_of, traces, unet
from test_sharing import ALL, BATCH, SCENES, Reads, subjects
from torch import Tensor

import attnctrl as ac

every_family = pytest.mark.parametrize("family", [flux, sd3, unet])
NOW: dict[str, Any] = {"window": (0.0, 1.0), "branch": "all", "floor": 0.0}


def ground(setting: Any, kinds: Any, scene: Any) -> list[frozenset[str]]:
    """The subjects of each token."""
    return [subjects(scene, one) if one.kind == "image" else frozenset() for one in sides_of(setting, kinds, scene)[0]]


def expected(
    setting: Any, call: Kernel, kinds: Any, reads: Reads, *, share: float, floor: float, heat: float
) -> Tensor:
    """Of all rows [B, tokens, H, D] in float64."""
    out, value = call.plain().double(), call.value.double().flatten(2)
    told = [ground(setting, kinds, scene) for scene in SCENES]
    result = out.clone()
    for image in range(BATCH):
        for p, mine in enumerate(told[image]):
            found = []
            for other in reads.get(image, ()):
                may = [s for s, theirs in enumerate(told[other]) if mine & theirs]
                if may:
                    close = torch.cosine_similarity(value[image, p], value[other, may], dim=-1)
                    found.append((float(close.max()), out[other, may[int(close.argmax())]]))
            found = [(c, o) for c, o in found if c > floor]
            if found:
                weights = (torch.tensor([c for c, _ in found]).double() / heat).softmax(0)
                mixed = sum(w * o for w, (_, o) in zip(weights, found, strict=True))
                result[image, p] = (1 - share) * out[image, p] + share * mixed
    return result


CASES: dict[str, tuple[dict[str, Any], Reads]] = {
    "all": ({}, ALL),
    "anchors": ({"readers": "anchors", "anchors": 1}, {1: (0,), 2: (0,)}),
    "group": ({"group": 2}, {0: (1,), 1: (0,)}),
    "strict": ({"floor": 0.4, "strength": 0.3, "temperature": 1.0}, ALL),
}


@every_family
@pytest.mark.parametrize("door", DOORS.values(), ids=DOORS)
@pytest.mark.parametrize("case", CASES.values(), ids=CASES)
def test_equals_the_formula_in_every_layer(family: Any, door: Any, case: Any) -> None:
    options, reads = case
    setting = family(batch=BATCH)
    before, base = traces(setting.model), setting.run()
    control = ac.Harmonize(SCENES, **{**NOW, **options})
    with door(setting.model, control), probe() as calls:
        out = setting.run()
    assert (out - base).abs().max() > 1e-3
    met = 0
    for call, kinds in setting.controlled(calls):
        whole = call.plain()
        if "image" in kinds.keys.split():
            rule = {"share": control.strength, "floor": control.floor, "heat": control.temperature}
            whole, met = expected(setting, call, kinds, reads, **rule), met + 1
        assert call.error(whole) < 1e-5
    assert met
    assert torch.equal(setting.run(), base)
    assert traces(setting.model) == before


def first(setting: Any, *controls: Any, **more: Any) -> tuple[Kernel, Any]:
    with ac.attach(setting.model, list(controls), branches=branches(setting.model)), probe() as calls:
        setting.run(**more)
    return next((c, k) for c, k in setting.controlled(calls) if "image" in k.keys.split())


def test_tokens_of_no_subject_and_without_a_match_stay_to_the_bit() -> None:
    """R1, R2: a floor of 1 keeps all; else subjects alone change."""
    setting = unet(batch=BATCH)
    call, kinds = first(setting, ac.Harmonize(SCENES, **NOW))
    plain, _ = first(setting, ac.Harmonize(SCENES, **{**NOW, "floor": 1.0}))
    for image, scene in enumerate(SCENES):
        names = [{"fox", "owl"} & mine for mine in ground(setting, kinds, scene)]
        held = torch.tensor([bool(one) for one in names])
        assert torch.equal(call.out[image, ~held], plain.out[image, ~held])
        assert ((call.out - plain.out)[image, held] != 0).flatten(1).any(1).all()
    with ac.attach(setting.model, ac.Harmonize(SCENES, **{**NOW, "floor": 1.0}), branches=("cond",)):
        kept = setting.run()
    assert torch.equal(kept, setting.run())


def test_full_weight_of_one_match_is_the_other_picture_before_any_update() -> None:
    """C6: whatever the order of pictures, both take what the other was."""
    setting = unet(batch=2)
    whole = [[ac.Region(name="fox", box=(0, 0, 1, 1))]] * 2
    call, _ = first(setting, ac.Harmonize(whole, **{**NOW, "floor": -1.0}, strength=1.0, temperature=0.0))
    plain, value = call.plain(), call.value.double().flatten(2)
    for image in range(2):
        close = (
            torch.nn.functional.normalize(value[image], dim=-1)
            @ torch.nn.functional.normalize(value[1 - image], dim=-1).mT
        )
        assert (call.out[image] - plain[1 - image, close.argmax(-1)]).abs().max() < 1e-5


def test_identical_pictures_are_vanilla() -> None:
    """R3."""
    setting = unet(batch=2)
    alike = {
        name: value[:1].expand(2, *value.shape[1:]).clone()
        for name, value in setting.inputs.items()
        if isinstance(value, Tensor) and value.ndim and len(value) == 2
    }
    base = setting.run(**alike)
    with ac.attach(setting.model, ac.Harmonize([SCENES[0]] * 2, **NOW), branches=("cond",)):
        assert (setting.run(**alike) - base).abs().max() < 1e-5


def test_a_new_token_is_a_mean_of_old_ones() -> None:
    """R5: no coordinate leaves the range of those before; features of a neighbourhood are other features."""
    setting = flux(batch=BATCH)
    calls = [first(setting, ac.Harmonize(SCENES, **NOW, radius=radius))[0] for radius in (0, 1)]
    assert (calls[0].out - calls[1].out).abs().max() > 1e-3
    for call in calls:
        plain = call.plain()
        assert call.out.amax() <= plain.amax() + 1e-5
        assert call.out.amin() >= plain.amin() - 1e-5


def test_neighbours_are_those_of_the_subject() -> None:
    from attnctrl.controls.harmony import _smoothed

    features, held = torch.arange(6.0).reshape(1, 6, 1), torch.tensor([1, 1, 0, 1, 0, 0]).bool()
    found = _smoothed(features, held, (2, 3), 1)[0, :, 0]
    # 0 1 2      tokens 0, 1 and 3 are the subject's
    # 3 4 5
    assert found[[0, 1, 2]].tolist() == pytest.approx([4 / 3, 4 / 3, 1.0])


def test_branches_of_one_batch_do_not_mix() -> None:
    """Both branches in one batch are the two one by one."""
    setting = unet(batch=4)
    scenes = SCENES[:2]
    with ac.attach(setting.model, ac.Harmonize(scenes, **NOW), branches=("uncond", "cond")):
        together = setting.run()
    for half in (slice(0, 2), slice(2, 4)):
        own = {k: v[half] for k, v in setting.inputs.items() if isinstance(v, Tensor) and v.ndim and len(v) == 4}
        with ac.attach(setting.model, ac.Harmonize(scenes, **NOW), branches=("cond",)):
            assert (setting.run(**own) - together[half]).abs().max() < 1e-5


def test_it_works_beside_shared_attention_in_half_precision() -> None:
    setting = flux(batch=BATCH, dtype=torch.bfloat16)
    stack = [ac.Share(SCENES, tokens="subject"), ac.Harmonize(SCENES, **NOW)]
    with ac.attach(setting.model, stack) as handle:
        assert setting.run().isfinite().all()
    assert [one.forwards for one in handle.report().controls] == [1, 1]
    assert "harmonized by 0.8 with pictures 1, 2, matched by value" in str(handle.report())


def test_what_cannot_be_is_refused() -> None:
    for options, message in (
        ({"features": "keys"}, "features must be one of"),
        ({"radius": -1}, "radius must be"),
        ({"floor": 2.0}, "floor must be in"),
        ({"temperature": -1.0}, "temperature must be in"),
        ({"anchors": 0}, "anchors must be"),
    ):
        with pytest.raises(ac.ControlError, match=message):
            ac.Harmonize(**options)
    setting = flux(batch=2)
    with ac.attach(setting.model, ac.Harmonize(**NOW)), pytest.raises(ac.ControlError, match="no control of the stack"):
        setting.run()


def test_it_survives_json() -> None:
    control = ac.Harmonize(SCENES[0], radius=1, strength=0.5)
    assert ac.Control.from_dict(control.to_dict()).to_dict() == control.to_dict()
    assert ac.Control.from_dict({"name": "harmonize"}).window == (0.1, 0.34)
