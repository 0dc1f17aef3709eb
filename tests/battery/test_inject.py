"""Queries, keys and values of another run in place of the own ones, on every family, against the dense formula in float64."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest
import torch
from harness import FAMILIES, Kernel, Setting, branches, flux, probe, sides_of, unet
from torch import Tensor

import attnctrl as ac
from attnctrl.content import States
from attnctrl.controls.inject import Injected
from attnctrl.families import family_of
from attnctrl.layout import Measures

every_family = pytest.mark.parametrize("family", FAMILIES.values(), ids=FAMILIES)
HALF = [ac.Region(name="fox", box=(0, 0, 0.5, 1))]


def attached(setting: Setting, controls: Any, sigmas: tuple[float, ...] | None = None) -> Any:
    """Controls on a bare model in a run over `sigmas`, the forward standing at the first of them."""
    mark = family_of(setting.model).timestep(setting.inputs).reshape(-1)[:1].float()
    levels = mark / 1000 if sigmas is None else torch.tensor(sigmas)
    marks = torch.cat([mark, mark[0] - 1 - torch.arange(len(levels) - 1)])
    scheduler = SimpleNamespace(timesteps=marks, sigmas=levels, num_inference_steps=len(marks))
    return ac.attach(setting.model, controls, scheduler=scheduler, branches=branches(setting.model) or ("cond",))


def image_of(setting: Setting, kinds: Any, scene: Any = (), whose: str = "image") -> Tensor:
    """bool [keys]: image tokens that no region of the scene holds; with "all", those of texts and registers too."""
    wanted = {"image": ("image",), "all": ("image", "global", "register")}[whose]
    return torch.tensor([token.kind in wanted and not token.members for token in sides_of(setting, kinds, scene)[1]])


def has_texts(setting: Setting) -> bool:
    """Image tokens share a sequence with texts somewhere."""
    sides = [set(kinds.queries.split()) & set(kinds.keys.split()) for kinds in setting.calls if kinds is not None]
    return any({"image", "text"} <= side for side in sides)


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
@pytest.mark.parametrize(
    ("states", "strength", "whose"),
    [
        (("value",), 1.0, "image"),
        (("key", "value"), 0.25, "image"),
        (("query",), 1.0, "image"),
        (("value",), 1.0, "all"),
        (("query", "key"), 0.5, "all"),
    ],
)
def test_equals_the_formula_in_every_layer_and_identity_on_the_same_picture(
    family: Any, states: tuple[str, ...], strength: float, whose: str
) -> None:
    setting = family(batch=2)
    base = setting.run()
    more = {"queries": "query" in states, "texts": whose == "all"}
    if whose == "all" and not has_texts(setting):
        with pytest.raises(ac.UnsupportedModelError, match="in none of these layers texts share a sequence"):
            captured(setting, 1, **more)
        return
    bank, source = captured(setting, 1, **more)
    inject = ac.Inject(bank=bank, states=states, strength=strength, tokens=whose)
    with attached(setting, inject) as handle, probe() as calls:
        out = setting.run()
    met = 0
    for (call, kinds), (theirs, _) in zip(setting.controlled(calls), setting.controlled(source), strict=True):
        made = {name: getattr(call, name).double().clone() for name in ("query", "key", "value")}
        if both_images(kinds):
            met += 1
            mine = image_of(setting, kinds, whose=whose)
            for name in states:
                kept = getattr(theirs, name)[:, mine].double()
                made[name][:, mine] = (1 - strength) * made[name][:, mine] + strength * kept
        wanted = attention(**made, mask=call.mask)
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
    every = {"query", "key", "value"}
    whole, _ = captured(setting, 1, queries=True, texts=has_texts(setting))
    with attached(setting, ac.Inject(bank=whole, states=tuple(every), tokens="all" if has_texts(setting) else "image")):
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
    with pytest.raises(ac.ControlError, match="states is some of query, key, value"):
        ac.Inject(bank=bank, states=("score",))
    with pytest.raises(ac.ControlError, match="tokens"):
        ac.Inject(bank=bank, tokens="text")
    for asked, said in (
        ({"states": ("query",)}, "keeps keys and values alone"),
        ({"tokens": "all"}, "nothing of texts"),
    ):
        with attached(setting, ac.Inject(bank=bank, **asked)), pytest.raises(ac.ControlError, match=said):
            setting.run()
    texts, _ = captured(setting, 0, texts=True)
    short = setting.single(0)
    short = {
        **short,
        "encoder_hidden_states": short["encoder_hidden_states"][:, :-1],
        "txt_ids": setting.inputs["txt_ids"][:-1],
    }
    with attached(setting, ac.Inject(bank=texts, tokens="all")), pytest.raises(ac.LayoutError, match="tokens of texts"):
        setting.run(**short)
    with attached(setting, ac.Inject(bank=texts)):
        setting.run(**short)
    with pytest.raises(ac.ControlError, match="bank must be a Bank"):
        ac.Inject(bank=None)
    with pytest.raises(ac.ControlError, match="no control named 'inject'"):
        ac.Control.from_dict({"name": "inject"})


@pytest.mark.parametrize("family", [flux, unet])
def test_with_queries_and_keys_of_the_source_attention_is_the_source_s(family: Any) -> None:
    """Told by an indicator: values that are 1 for one token and 0 for others give the attention that it gets."""
    setting = family(batch=2)
    whose = "all" if has_texts(setting) else "image"
    bank, source = captured(setting, 1, queries=True, texts=whose == "all")
    inject = ac.Inject(bank=bank, states=("query", "key"), tokens=whose)
    given: list[Tensor] = []

    class Indicator(ac.Control):
        name = "indicator"
        in_documents = False

        def content(self, situation: Any, layer: Any, places: Any) -> Any:
            return (self,)

        def __call__(self, own: States, batch: States, rows: Tensor) -> States:
            heads, tokens, depth = own.value.shape[1:]
            value = torch.eye(depth).repeat(1 + tokens // depth, 1)[:tokens].expand(len(rows), heads, -1, -1)
            given.append(value)
            return own._replace(value=value)

        def explain(self) -> str:
            return "who looks where"

    with attached(setting, [inject, Indicator()]), probe() as calls:
        setting.run(**setting.single(0))
    pairs = zip(setting.controlled(calls), setting.controlled(source), given, strict=True)
    there = [(call, theirs, value.transpose(1, 2)) for (call, kinds), (theirs, _), value in pairs if both_images(kinds)]
    assert there
    for call, theirs, value in there:
        wanted = attention(theirs.query, theirs.key, value, None)
        assert call.error(wanted) < 1e-5
        assert (wanted - attention(call.query, call.key, value, None)).abs().max() > 1e-3


def test_what_is_replaced_has_no_influence_and_what_is_not_has() -> None:
    """Gradients of the attention to the own states: exactly zero of the tokens and states that were put in."""
    setting = flux(batch=2)
    bank, _ = captured(setting, 1, queries=True, texts=True)
    entry = next(iter(bank.entries))
    frame = family_of(setting.model).arrange(setting.model, Measures(setting.text, setting.grid))["joint"]
    (held,) = bank.held("joint")
    states = bank.entries[entry].states
    tokens = frame.keys.tokens
    for names in (("value",), ("query", "key"), ("query", "key", "value")):
        for whose in ("image", "all"):
            shape = (1, states.shape[1], tokens, states.shape[3])
            own = States(
                *(torch.randn(shape, generator=torch.Generator().manual_seed(n), requires_grad=True) for n in range(3))
            )
            edit = Injected(names, bank, entry, held, frame, whose == "all", 1.0)
            made = edit(own, own, torch.arange(1))
            torch.nn.functional.scaled_dot_product_attention(*made).square().sum().backward()
            image = frame.keys["image"]
            for name, one in zip(States._fields, own, strict=True):
                inside = one.grad[:, :, image.start : image.stop]
                outside = torch.cat([one.grad[:, :, : image.start], one.grad[:, :, image.stop :]], 2)
                assert (name in names) == bool((inside == 0).all())
                assert (name in names and whose == "all") == bool((outside == 0).all())


def test_queries_and_texts_of_a_bank_are_nothing_to_those_who_share_it() -> None:
    setting = flux(batch=2)
    plain, rich = (captured(setting, 1, **more)[0] for more in ({}, {"queries": True, "texts": True}))
    assert rich.nbytes == plain.nbytes * 3 * (setting.text + 24) // (2 * 24)
    found = []
    for bank in (plain, rich):
        with attached(setting, ac.Share(bank=bank)):
            found.append(setting.run(**setting.single(0)))
    assert torch.equal(*found)
    again = ac.Keep(bank=plain, queries=True)
    said = r"keeps tokens='all', every=1, queries=False.*queries=True"
    with attached(setting, again), pytest.raises(ac.ControlError, match=said):
        setting.run(**setting.single(0))
