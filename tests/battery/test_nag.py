"""A negative prompt by attention alone: the formula in float64, and the authors' two streams side by side."""

from __future__ import annotations

import types
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import pytest
import tiny
import torch
from diffusers.models import attention_processor
from diffusers.models.attention_dispatch import AttentionBackendName, _AttentionBackendRegistry
from harness import DOORS, FAMILIES, Kernel, Setting, Token, dense, flux, probe, regions, sd3, tokens, unet, weights
from torch import Tensor

import attnctrl as ac
from attnctrl.controls.nag import normalized
from attnctrl.declared import Declared
from attnctrl.toybox.models.flux import tiny_pipeline

every_family = pytest.mark.parametrize("family", FAMILIES.values(), ids=FAMILIES)
NUMBERS = {"scale": 3.0, "tau": 1.2, "strength": 0.4}
WORDS = ("global", "text")
HALVES = [ac.Region(side, box=box) for side, box in (("left", (0, 0, 0.5, 1)), ("right", (0.5, 0, 1, 1)))]


def nag(length: int = 3, **more: Any) -> ac.NAG:
    return ac.NAG(negative_embeds=tiny.embeds(7, length), **{**NUMBERS, **more})


def led(plus: Tensor, minus: Tensor, scale: float, tau: float, strength: float) -> Tensor:
    """The formula of the paper for [B, T, H, D], step by step."""
    away = plus + scale * (plus - minus)
    ratio = away.abs().sum((2, 3), keepdim=True) / plus.abs().sum((2, 3), keepdim=True)
    return strength * away * torch.minimum(ratio, torch.tensor(tau)) / ratio + (1 - strength) * plus


def main(q: Token, k: Token) -> float:
    """The negative prompt ("text") and the prompt do not know each other, and nobody else reads the former."""
    if k.kind == "text":
        return float(q.kind == "text")
    return float(not (q.kind == "text" and k.kind in WORDS))


def contrast(q: Token, k: Token) -> float:
    return float(k.kind != "global" or q.kind == "global")


def parted(q: Token, k: Token) -> float:
    return float(not q.kind == k.kind == "image" or q.members == k.members)


def expected(setting: Setting, kinds: Any, call: Kernel, rules: Any = (), scene: Any = ()) -> Tensor:
    """A kernel call in full, [B, T, H, D]; the negative prompt stands where texts are appended."""
    spelled = [*scene, ac.Region("against", box=(0, 0, 1e-9, 1e-9), prompt_embeds=tiny.embeds(7, 3))]
    queries, keys = (_tokens(setting, spelled, side, kinds.grid) for side in (kinds.queries, kinds.keys))
    plus = dense(call.query, call.key, call.value, (weights(queries, keys, main, *rules), None))
    image = torch.tensor([token.kind == "image" for token in queries])
    if "text" not in {token.kind for token in keys}:
        return plus
    minus = dense(call.query, call.key, call.value, (weights(queries, keys, contrast, *rules), None))
    return torch.where(image[:, None, None], led(plus, minus, **NUMBERS), plus)


def _tokens(setting: Setting, scene: Any, side: str, grid: Any) -> list[Token]:
    made = [ac.Region(one.label, box=one.box, prompt_embeds=one.prompt_embeds) for one in scene]
    for one in made[:-1]:
        object.__setattr__(one, "prompt_embeds", torch.zeros(0, 12))
    return tokens(setting, made, texts=True, kinds=side, grid=grid)


@torch.no_grad()
@every_family
def test_equals_the_formula_in_every_layer(family: Callable[..., Setting]) -> None:
    setting = family()
    base = setting.run()
    with ac.attach(setting.model, nag(), branches=("cond",)) as handle, probe() as calls:
        out = setting.run()
    for call, kinds in setting.controlled(calls):
        assert (expected(setting, kinds, call) - call.out).abs().max() < 2e-5
    assert (out - base).abs().max() > 1e-2
    (told,) = handle.report().controls
    assert "away from the negative prompt by 3 (tau 1.2, alpha 0.4)" in told.plans
    assert torch.equal(setting.run(), base)


@contextmanager
def two_streams() -> Iterator[None]:
    """The authors' way: a row reads the prompt, one the negative prompt, and both get the same picture back."""
    registry = _AttentionBackendRegistry._backends
    original, functional = registry[AttentionBackendName.NATIVE], attention_processor.F

    def joined(out: Tensor, tail: int) -> Tensor:
        image = led(out[:1, tail:].double(), out[1:, tail:].double(), **NUMBERS).to(out.dtype)
        return torch.cat([out[:, :tail], image.expand(2, -1, -1, -1)], 1)

    def dispatched(**call: Any) -> Tensor:
        return joined(original(**call), 5)

    def attention(query: Tensor, key: Tensor, value: Tensor, **more: Any) -> Tensor:
        out = functional.scaled_dot_product_attention(query, key, value, **more)
        return joined(out.transpose(1, 2), 0).transpose(1, 2) if key.shape[2] == 5 else out

    registry[AttentionBackendName.NATIVE] = dispatched
    attention_processor.F = types.SimpleNamespace(**{**vars(functional), "scaled_dot_product_attention": attention})
    try:
        yield
    finally:
        registry[AttentionBackendName.NATIVE] = original
        attention_processor.F = functional


@torch.no_grad()
@pytest.mark.parametrize("family", [flux, unet])
def test_equals_the_two_streams_of_the_authors(family: Callable[..., Setting]) -> None:
    setting = family()
    against = tiny.embeds(7, 5)
    twice = {
        name: torch.cat([value, value])
        for name, value in setting.inputs.items()
        if isinstance(value, Tensor) and "ids" not in name
    }
    twice["encoder_hidden_states"][1] = against
    with two_streams():
        wanted = setting.run(**twice)[:1]
    with ac.attach(setting.model, nag(5), branches=("cond",)):
        out = setting.run()
    assert (out - wanted).abs().max() < 2e-5 * wanted.abs().max()
    assert (out - setting.run()).abs().max() > 1e-2


@torch.no_grad()
@pytest.mark.parametrize("door", DOORS.values(), ids=DOORS)
@pytest.mark.parametrize("off", [{"scale": 0.0}, {"strength": 0.0}, {"window": (0.5, 0.5)}])
def test_off_is_the_plain_model_to_the_bit(door: Any, off: Any) -> None:
    setting = flux()
    base = setting.run()
    with door(setting.model, nag(**off)), probe() as calls:
        assert torch.equal(setting.run(), base)
    assert {call.key.shape[1] for call in calls} == {29}


@torch.no_grad()
@pytest.mark.parametrize("family", [flux, unet])
def test_what_others_hide_is_hidden_in_both_passes(family: Callable[..., Setting]) -> None:
    setting = family()
    with ac.attach(setting.model, [ac.Isolate(HALVES), nag()], branches=("cond",)), probe() as calls:
        setting.run()
    for call, kinds in setting.controlled(calls):
        assert (expected(setting, kinds, call, [parted], HALVES) - call.out).abs().max() < 2e-5


@torch.no_grad()
def test_it_acts_on_the_prompts_rows_of_a_batch() -> None:
    setting = sd3(batch=2)
    base = setting.run()
    with ac.attach(setting.model, nag(), branches=("uncond", "cond")) as handle:
        out = setting.run()
    alone = Setting(setting.model, {**setting.inputs, **setting.single(1)}, setting.calls)
    with ac.attach(setting.model, nag(), branches=("cond",)):
        single = alone.run()
    assert (out[:1] - base[:1]).abs().max() < 2e-5
    assert (out[1:] - single).abs().max() < 2e-5 < 1e-2 < (out[1:] - base[1:]).abs().max()
    assert handle.report().controls[0].rows == (("cond", 0),)


def test_it_is_no_region_of_the_picture() -> None:
    scene, control = regions(), nag()
    regional, isolate = ac.Regions(scene), ac.Isolate()
    declared = Declared([control, regional, isolate])
    assert declared.own(isolate, 0) == declared.own(regional, 0) == frozenset({1, 2, 3})
    assert declared.own(control, 0) == frozenset({0})
    member = declared.member(0, (4, 6))
    assert declared.placed(0) == [1, 2, 3]
    assert member.shape == (4, 24)
    assert not member[0].any()
    assert torch.equal(member[1:], Declared([regional]).member(0, (4, 6)))
    with pytest.raises(ac.ControlError, match="needs regions"):
        ac.attach(flux().model, [control, isolate])


def test_lengths_are_bounded_and_zero_stays_zero() -> None:
    generator = torch.Generator().manual_seed(0)
    plus, minus = torch.randn(2, 1, 3, 4, 8, generator=generator, dtype=torch.float64)
    far = normalized(plus, 100 * minus, 5.0, 2.5, 1.0)
    assert torch.allclose(far.abs().sum((1, 3)), 2.5 * plus.abs().sum((1, 3)), rtol=1e-12)
    assert torch.equal(normalized(plus, plus, 5.0, 2.5, 1.0), plus)
    zero = torch.zeros_like(plus)
    assert torch.equal(normalized(zero, minus, 5.0, 2.5, 0.5), zero)
    assert torch.equal(normalized(zero, zero, 5.0, 2.5, 0.5), zero)
    assert normalized(plus.half(), minus.half(), 5.0, 2.5, 0.5).dtype == torch.float16


@torch.no_grad()
def test_who_looks_for_subjects_does_not_find_the_negative_prompt() -> None:
    setting = flux()
    keep = ac.Keep(bank=ac.Bank(), tokens="subject")
    scheduler = types.SimpleNamespace(
        timesteps=torch.tensor([500.0]), sigmas=torch.tensor([0.5]), num_inference_steps=1
    )
    with (
        ac.attach(setting.model, [nag(), keep], scheduler=scheduler, branches=("cond",)),
        pytest.raises(ac.LayoutError, match="no control of the stack declares regions"),
    ):
        setting.run()


@torch.no_grad()
def test_a_pipeline_encodes_the_negative_prompt_and_runs_no_further_forward() -> None:
    pipe = tiny_pipeline()
    size = {"height": 32, "width": 48, "output_type": "latent", "max_sequence_length": 16, "num_inference_steps": 2}

    def draw() -> Tensor:
        return pipe("a red circle", generator=torch.Generator().manual_seed(0), **size).images

    base = draw()
    with ac.attach(pipe, ac.NAG("green", scale=5.0)) as handle:
        out = draw()
    assert (out - base).abs().max() > 1e-4
    report = handle.report()
    assert (report.forwards, report.controls[0].steps) == (2, (0, 1))
    assert torch.equal(draw(), base)


def test_what_it_is_told_is_checked_and_written_down() -> None:
    with pytest.raises(ac.ControlError, match="needs a negative prompt"):
        ac.NAG()
    with pytest.raises(ac.ControlError, match=r"tau must be in \[1, inf\); found 0.5"):
        ac.NAG("green", tau=0.5)
    data = ac.NAG("green", scale=4.0).to_dict()
    assert data == {"name": "nag", "negative_prompt": "green", "scale": 4.0}
    assert ac.Control.from_dict(data).to_dict() == data
    with pytest.raises(ac.ControlError, match="not written to documents"):
        nag().to_dict()


def test_it_is_explained_beside_what_goes_around_modules() -> None:
    stack = [nag(), ac.Skip(layers="single:1"), ac.Reuse()]
    told = str(ac.explain(flux().model, stack, grid=(4, 6), steps=4, text_tokens=5))
    assert "image tokens" not in told
    assert "skip: layers single:1; steps 0; branch perturbed" in told
    assert "reuse: layers double:0-1, single:0-1; steps 0-3; branch all" in told
    assert "double:0-1, single:0-1: away from the negative prompt by 3 (tau 1.2, alpha 0.4)" in told


@torch.no_grad()
@pytest.mark.parametrize("door", DOORS.values(), ids=DOORS)
def test_pictures_that_read_each_other_do_so_in_both_passes(door: Any) -> None:
    """Two rows of one picture each that share: as if their keys stood in one sequence."""
    setting = flux(batch=2)
    with door(setting.model, [ac.Share(), nag()]), probe() as calls:
        setting.run()
    # the first layer: the second row's image stands behind the first one's own keys in both passes
    call = calls[0]
    queries = _tokens(setting, [ac.Region("against", prompt_embeds=tiny.embeds(7, 3))], "text image", (4, 6))
    image = [number for number, token in enumerate(queries) if token.kind == "image"]
    keys = [*queries, *(queries[number] for number in image)]
    key, value = (torch.cat([x[:1], x[1:, image]], 1) for x in (call.key, call.value))
    text = weights(queries, keys, lambda q, k: float(q.kind == "image" or k.kind != "image"))
    text[:, : len(queries)] = 1
    plus, minus = (
        dense(call.query[:1], key, value, (weights(queries, keys, rule) * text, None)) for rule in (main, contrast)
    )
    wanted = led(plus, minus, **NUMBERS)
    assert (call.out[:1, image] - wanted[:, image]).abs().max() < 2e-5
