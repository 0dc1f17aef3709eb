"""Stacks by the names of their papers: each layer of each phase equals the paper's tables, token by token."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
import tiny
import tiny_mmdit
import torch
from harness import Token, dense, flux, probe, regions, tokens, unet, weights
from table import Rule, isolating, lamic, regional

import attnctrl as ac
from attnctrl import presets
from attnctrl.errors import ControlError

BETA = 0.2


def m_reg(q: Token, k: Token) -> float:
    """The mask of arXiv 2411.02395: no T_g; texts with their own, images where both are in a region or both in none."""
    if "global" in (q.kind, k.kind):
        return float(q.kind == k.kind)
    if q.kind == "text":
        return float(q.owner in k.members if k.kind != "text" else q.owner == k.owner)
    if k.kind == "text":
        return float(k.owner in q.members)
    return float(bool(q.members & k.members) or not (q.members or k.members))


def all_texts(q: Token, k: Token) -> float:
    """The regional pass of the blocks between: no mask, and no T_g in it."""
    return float(("global" in (q.kind, k.kind)) <= (q.kind == k.kind))


def everything(q: Token, k: Token) -> float:
    return 1.0


def coupled(q: Token, k: Token) -> float:
    """InvokeAI: the prompt and the background see each other; regions see their own and the background."""
    return regional("background")(q, k) * isolating("shared")(q, k)


SEG2ANY = [regional("open"), isolating("reads_all", prompt="background")]
EXPECTED: dict[str, tuple[dict[str, Any], list[list[Rule]], float]] = {
    "regional-prompting": ({}, [[m_reg]] * 4, BETA),
    "regional-prompting, every second": ({"every": 2}, [[m_reg], [all_texts]] * 2, BETA),
    "seg2any": ({}, [SEG2ANY] * 4, 0.0),
    "seg2any, single-early": ({"layers": "single-early"}, [SEG2ANY[:1], SEG2ANY[:1], SEG2ANY, SEG2ANY[:1]], 0.0),
    "alternating": ({}, [[coupled], [everything]] * 2, 0.0),
    "lamic": ({}, [[lamic("A")]] * 4, 0.0),
    "lamic-fixed": ({}, [[lamic("A", "source")]] * 4, 0.0),
    "layout": ({}, [[coupled]] * 4, 0.0),
}


@pytest.mark.parametrize("case", EXPECTED)
def test_the_first_step_follows_the_papers_tables(case: str) -> None:
    options, rules, base_ratio = EXPECTED[case]
    setting, scene = flux(), regions()
    row = tokens(setting, scene, texts=True)
    tables = [weights(row, row, *layer) for layer in rules]
    stack = [always(one) for one in ac.preset(case.split(",")[0], scene, **options)]
    with ac.attach(setting.model, stack), probe() as calls:
        setting.run()
    base = weights(row, row, lambda q, k: float("text" not in (q.kind, k.kind)))
    share = torch.tensor([{"global": 1.0, "image": base_ratio}.get(token.kind, 0.0) for token in row])
    for call, table in zip(calls, tables, strict=True):
        passes = [(table, 1 - share), (base, share)] if base_ratio else [(table, None)]
        assert (call.out - dense(call.query, call.key, call.value, *passes)).abs().max() < 1e-5


def test_layouts_leave_words_of_the_prompt_to_group_isolation() -> None:
    """The ground reads them in joint attention, and nothing else parts them; appended texts are parted from the rest."""
    appended = regions()
    worded = [replace(one, prompt_embeds=None, spans=((2 * r, 2 * r + 1),)) for r, one in enumerate(appended)]
    isolate, own = ac.preset("layout", worded)
    assert (isolate.text, own.name, own.ground, own.window) == (False, "group_isolation", "open", (0.0, 1.0))
    assert ac.preset("layout", worded, ground="parted")[1].ground == "parted"
    assert ac.preset("texts", worded)[0].ground == "parted"
    assert ac.preset("layout", appended)[0].text
    isolate, *own = ac.preset("layout", [worded, appended, []])
    assert isolate.text
    assert [[len(scene) for scene in one.scenes] for one in own] == [[3, 0, 0], [0, 3, 0]]


def test_emphasis_weighs_words_in_their_regions_and_cuts_nothing() -> None:
    setting = flux()
    spans = [(0, 2), (2, 3), (4, 5)]
    scene = [replace(one, prompt_embeds=None, spans=(own,)) for one, own in zip(regions(), spans, strict=True)]
    row = tokens(setting, scene, texts=False)
    table = torch.ones(len(row), len(row), dtype=torch.float64)
    for i, token in enumerate(row):
        for region in token.members:
            table[i, slice(*spans[region])] = 2.5
    assert (table > 1).any()
    assert (table == 1).any()
    with ac.attach(setting.model, ac.preset("emphasis", scene, weight=2.5)), probe() as calls:
        setting.run()
    assert calls
    for call in calls:
        assert call.error(dense(call.query, call.key, call.value, (table, None))) < 1e-5
    # appended texts stay those of their regions
    (own,) = ac.preset("emphasis", regions())
    assert (own.name, own.text_weight) == ("regions", 2.0)


def test_families_have_the_preset_that_was_measured_best() -> None:
    models = {"layout": (tiny.flux(), tiny_mmdit.chroma()), "texts": (tiny.unet(),), "emphasis": (tiny.sd3(),)}
    assert {name: {presets.default_preset(model) for model in own} for name, own in models.items()} == {
        name: {name} for name in models
    }


def always(control: Any) -> Any:
    """The control at all steps, the same at each: a bare model has no first one."""
    flat = {"last": control.first} if isinstance(control, ac.PlainQueries) else {}
    return replace(control, window=(0.0, 1.0), **flat)


STYLES = ("style-aligned", "alignedgen", "freecus")
"""They take no regions, or those of a reference, and are tested where styles are."""


@pytest.mark.parametrize("name", [name for name in presets.PRESETS if name not in STYLES])
def test_presets_build_on_every_architecture(name: str) -> None:
    """Two samples with scenes of their own; no row of a plan is left without a key."""
    for make in (flux, unet):
        setting = make(batch=2)
        stack = [always(one) for one in ac.preset(name, [regions(), regions(overlap=True)])]
        # where a control changes on its way, it is there once for each part of the run
        for one in {type(one): one for one in stack}.values():
            assert not one.is_idle
        with ac.attach(setting.model, list({type(one): one for one in stack}.values()), branches=("cond",)):
            assert setting.run().isfinite().all()


def test_regions_of_one_branch_are_nothing_to_borrowers_of_the_other() -> None:
    """`OpenTexts` of the prompt's branch shows its texts alone."""
    stack = [
        *ac.preset("alternating", regions()),
        ac.Regions([ac.Region("no", prompt_embeds=torch.zeros(7, 16))], branch="uncond"),
    ]
    setting = flux()
    with ac.attach(setting.model, [always(one) for one in stack]) as handle, probe() as calls:
        setting.run()
        texts = sum(len(one.prompt_embeds) for one in regions())
        assert {call.key.shape[1] for call in calls} == {5 + texts + 24}
        assert [one.forwards for one in handle.report().controls] == [1, 1, 1, 0]


@pytest.mark.parametrize(
    ("name", "options", "message"),
    [("lamik", {}, "no preset named 'lamik'. Known: layout, lamic"), ("lamic", {"hubs": 1}, "preset 'lamic'.*'hubs'")],
)
def test_what_is_no_preset_is_refused(name: str, options: Any, message: str) -> None:
    with pytest.raises(ControlError, match=message):
        ac.preset(name, regions(), **options)
