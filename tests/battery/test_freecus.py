"""FreeCus: pivotal sharing of a reference's subject with scaled keys, against section B of its specification."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
import tiny
import torch
from diffusers import FluxTransformer2DModel
from harness import Kernel, Setting, flux, probe, sd3, sides_of, unet
from test_saved_style import attached
from test_sharing import named
from torch import Tensor

import attnctrl as ac
from attnctrl.families import spread
from attnctrl.families.flux import FLUX

SUBJECT = [ac.Region(name="fox", box=(0, 0, 0.5, 1))]
SCENES = [SUBJECT, []]


def pivotal(call: Kernel, row: int, kinds: list[Any], key: Tensor, value: Tensor, told: tuple[float, float]) -> Tensor:
    """float64 [T, H, D]: softmax(Q [s K_ref; t K_txt; K_img]^T / sqrt(D)) V, for reference keys [M, H, D]."""
    scale, text_scale = told
    text = torch.tensor([token.kind == "global" for token in kinds])
    own = torch.where(text[:, None, None], text_scale, 1.0) * call.key[row].double()
    keys = torch.cat([scale * key.double(), own])
    values = torch.cat([value.double(), call.value[row].double()])
    scores = torch.einsum("qhd,khd->hqk", call.query[row].double(), keys) / keys.shape[-1] ** 0.5
    return torch.einsum("hqk,khd->qhd", scores.softmax(-1), values)


@pytest.mark.parametrize(("family", "scale"), [(flux, 1.1), (flux, 1.4), (sd3, 1.1)])
def test_equals_the_papers_formula_and_what_is_no_subject_has_no_influence(family: Any, scale: float) -> None:
    setting = family(batch=2)
    base = setting.run()
    stack = ac.preset("freecus", SCENES, scale=scale)
    with ac.attach(setting.model, stack, branches=named(setting.model)) as handle, probe(grad=True) as calls:
        out = setting.run()
    assert (out[0] - base[0]).abs().max() < 1e-5  # the reference is the plain model's
    met = 0
    for call, kinds in setting.controlled(calls):
        _, keys = sides_of(setting, kinds, SUBJECT)
        mine = torch.tensor([token.kind == "image" and bool(token.members) for token in keys])
        (grad,) = torch.autograd.grad(call.out[1].double().sum(), call.value, retain_graph=True)
        if bool((grad[0] != 0).any()):
            met += 1
            expected = pivotal(call, 1, keys, call.key[0, mine], call.value[0, mine], (scale, scale))
            assert (expected - call.out[1]).abs().max() < 2e-5
            assert (grad[0, ~mine] == 0).all()
            assert (grad[0, mine] != 0).flatten(1).any(-1).all()
    assert met == {flux: 4, sd3: 1}[family]  # of two blocks of SD3 the first is at the place of its vital ones
    assert f"keys of texts times {scale:g}" in str(handle.report())


def test_a_reference_of_another_size_keeps_its_own_places() -> None:
    """Out of a bank, whose keys were rotated on a grid of their own; texts are scaled there too."""
    small = Setting(
        tiny.flux(), tiny.flux_inputs(grid=(2, 4)), [replace(flux().calls[0], grid=(2, 4))] * 4, grid=(2, 4)
    )
    bank = ac.Bank()
    with attached(small, ac.Keep(SUBJECT, bank=bank, tokens="subject")), probe() as captured:
        small.run()
    setting = flux(seed=3, batch=2)
    with attached(setting, ac.preset("freecus", bank=bank)), probe() as calls:
        setting.run()
    _, theirs = sides_of(small, small.calls[0], SUBJECT)
    mine = torch.tensor([token.kind == "image" and bool(token.members) for token in theirs])
    for (call, kinds), first in zip(setting.controlled(calls), captured, strict=True):
        _, keys = sides_of(setting, kinds, [])
        for row in range(2):
            expected = pivotal(call, row, keys, first.key[0, mine], first.value[0, mine], (1.1, 1.1))
            assert (expected - call.out[row]).abs().max() < 2e-5


def test_a_bank_is_the_reference_of_a_batch() -> None:
    setting, bank = flux(batch=2), ac.Bank()
    with attached(setting, ac.preset("freecus", SCENES)):
        joint = setting.run()
    with attached(setting, ac.Keep(SCENES, bank=bank, tokens="subject", pictures=1)):
        setting.run()
    with attached(setting, ac.preset("freecus", bank=bank)):
        assert (setting.run(**setting.single(1))[0] - joint[1]).abs().max() < 2e-5


def test_what_a_reference_takes_at_512_is_told_by_number() -> None:
    """30 steps of keys and values of all tokens in bfloat16: 21.5 GB in all layers of FLUX, 3.8 GB in the vital ones."""
    with torch.device("meta"):
        model = FluxTransformer2DModel().to(torch.bfloat16)
    run: dict[str, Any] = {"grid": (32, 32), "text_tokens": 512, "branches": 1}
    states = 1024 * 24 * 128 * 2

    def told(steps: int, **keep: Any) -> int:
        need = ac.Keep(bank=ac.Bank(), **keep).predict(model, steps=steps, **run)
        return need.nbytes

    assert told(30) == 30 * 57 * 2 * states == pytest.approx(21.5e9, rel=0.01)
    assert told(30, layers="vital") == 30 * 10 * 2 * states == pytest.approx(3.8e9, rel=0.01)
    assert told(1, layers="vital") == pytest.approx(0.13e9, rel=0.04)
    assert told(1, layers="vital", queries=True) == 10 * 3 * states
    assert told(1, layers="vital", texts=True) * 1024 == 10 * 2 * states * (1024 + 512)


def test_without_reference_and_scale_it_is_the_plain_model() -> None:
    setting = flux(batch=2)
    base = setting.run()
    (off,) = ac.preset("freecus", SCENES, weight=0, text_scale=1.0)
    assert off.is_idle
    with ac.attach(setting.model, off):
        assert torch.equal(setting.run(), base)
    (texts,) = ac.preset("freecus", SCENES, weight=0)
    with ac.attach(setting.model, texts), probe() as calls:
        setting.run()
    call, kinds = setting.controlled(calls)[0]
    _, keys = sides_of(setting, kinds, [])
    empty = call.key[0, :0], call.value[0, :0]
    assert (pivotal(call, 1, keys, *empty, (1.0, 1.1)) - call.out[1]).abs().max() < 1e-5
    assert (call.plain()[0] - call.out[0]).abs().max() < 1e-5
    with ac.attach(setting.model, ac.preset("freecus", [[], []])), pytest.raises(ac.ControlError, match="regions"):
        setting.run()


def test_vital_layers_are_the_papers_and_their_places_in_other_depths() -> None:
    (vital,) = {FLUX.presets["vital"]({"double": 19, "single": 38})}
    assert vital == ("double:0,1,2,17,18", "single:6,9,34,35,37")
    assert spread((0, 9), 10, {"a": 2, "b": 3}, "a", "b") == ("a:0", "b:2")
    assert spread((0,), 10, {"a": 2, "b": 3}, "a", "b") == ("a:0",)
    setting = unet(batch=2)
    with pytest.raises(ac.SelectionError, match="vital"), ac.attach(setting.model, ac.preset("freecus", SCENES)):
        pass
    with pytest.raises(ac.ControlError, match=r"text_scale must be in \(0, 10\]"):
        ac.preset("freecus", SCENES, text_scale=0.0)
