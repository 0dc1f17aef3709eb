"""Subjects of other pictures at their namesake's place: against the dense formula with keys that are turned here, token
by token, and against what resizing a picture's tokens would take.
"""

from __future__ import annotations

import math
import warnings
from collections.abc import Callable
from typing import Any

import pytest
import torch
from harness import FAMILIES, Kernel, branches, flux, probe, sides_of, traces, unet
from torch import Tensor

import attnctrl as ac
from attnctrl.families import family_of
from attnctrl.fitting import fitted, repeats
from attnctrl.region import extent

ROTARY = [name for name, make in FAMILIES.items() if family_of(make().model).rotary is not None]
Box = tuple[float, float, float, float]
FOX: list[Box] = [(0, 0, 2 / 6, 1), (3 / 6, 0, 1, 0.5)]
OWL: Box = (4 / 6, 0, 1, 1)
SCENES = [
    [ac.Region(name="fox", box=FOX[0]), ac.Region(name="owl", box=OWL)],
    [ac.Region(name="fox", box=FOX[1])],
]
"""On 4 x 6 tokens the fox is 4 x 2 tokens at (0, 0), then 2 x 3 at (0, 3); only the first picture has an owl."""
SAME = {"tokens": "subject", "queries": "same"}
FITS: dict[str, Callable[[float, float], tuple[float, float]]] = {
    "stretch": lambda y, x: (y, x),
    "contain": lambda y, x: (min(y, x),) * 2,
    "cover": lambda y, x: (max(y, x),) * 2,
}


def mapped(place: tuple[int, int], source: Box, target: Box, grid: Any, fit: str) -> tuple[float, float]:
    """(y', x') of a token, by the formula of the method: t0 + (p + 1/2 - r0) s - 1/2, scaled about the middles."""
    height, width = grid[-2:]
    r = [source[1] * height, source[0] * width], [source[3] * height, source[2] * width]
    t = [target[1] * height, target[0] * width], [target[3] * height, target[2] * width]
    s = FITS[fit](*((t[1][i] - t[0][i]) / (r[1][i] - r[0][i]) for i in (0, 1)))
    found = [(t[0][i] + t[1][i]) / 2 + (place[i] + 0.5 - (r[0][i] + r[1][i]) / 2) * s[i] - 0.5 for i in (0, 1)]
    return found[0], found[1]


def turned(rotary: Any, key: Tensor, y: float, x: float) -> Tensor:
    """Key [H, D] turned on by (y, x) tokens, channel pair by channel pair, in complex numbers."""
    pairs = torch.view_as_complex(key.double().unflatten(-1, (-1, 2)).contiguous())
    angles = []
    for axis, channels in zip(rotary.axes, rotary.channels, strict=True):
        by = {"y": y, "x": x}.get(axis, 0.0)
        angles += [by * rotary.theta ** (-2 * i / channels) for i in range(channels // 2)]
    return torch.view_as_real(pairs * torch.exp(1j * torch.tensor(angles, dtype=torch.float64))).flatten(-2)


def reference(setting: Any, call: Kernel, kinds: Any, rotary: Any, fit: str, g: float, density: bool) -> Tensor:
    """Output of both pictures, in which foxes alone read each other, moved."""
    grid, rows = kinds.grid or setting.grid, []
    for image, other in ((0, 1), (1, 0)):
        queries, own = sides_of(setting, kinds, SCENES[image])
        _, theirs = sides_of(setting, kinds, SCENES[other])
        first = next(n for n, token in enumerate(theirs) if token.kind == "image")
        mine = [n for n, token in enumerate(theirs) if token.kind == "image" and 0 in token.members]
        keys, area = [], 0.0
        for n in mine:
            cell = (n - first) % (grid[-2] * grid[-1])
            place = divmod(cell, grid[-1])
            goal = mapped(place, FOX[other], FOX[image], grid, fit)
            keys.append(turned(rotary, call.key[other, n], *(g * (b - a) for a, b in zip(place, goal, strict=True))))
            below = mapped((place[0] + 1, place[1] + 1), FOX[other], FOX[image], grid, fit)
            area = (below[0] - goal[0]) * (below[1] - goal[1])
        key = torch.cat([call.key[image].double(), torch.stack(keys)])
        value = torch.cat([call.value[image], call.value[other, mine]]).double()
        scores = torch.einsum("qhd,khd->hqk", call.query[image].double(), key) / key.shape[-1] ** 0.5
        reads = torch.tensor([token.kind == "image" and 0 in token.members for token in queries])
        bias = torch.full((len(queries), len(mine)), float("-inf"), dtype=torch.float64)
        bias[reads] = g * math.log(area) if density else 0.0
        scores = scores + torch.cat([torch.zeros(len(queries), len(own), dtype=torch.float64), bias], 1)
        rows.append(torch.einsum("hqk,khd->qhd", scores.softmax(-1), value))
    return torch.stack(rows)


@pytest.mark.parametrize("options", [{}, {"fit": "contain", "strength": 0.4}, {"fit": "cover", "density": False}])
@pytest.mark.parametrize("name", ROTARY)
def test_rope_equals_the_dense_formula_with_moved_keys(name: str, options: dict[str, Any]) -> None:
    setting = FAMILIES[name](batch=2)
    rotary = family_of(setting.model).rotary(setting.model)
    before, base = traces(setting.model), setting.run()
    control = ac.Reposition(**options)
    stack = [ac.Share(SCENES, **SAME), control]
    attached = ac.attach(setting.model, stack, branches=branches(setting.model))
    with pytest.warns(UserWarning, match="owl"), attached, probe() as calls:
        out = setting.run()
    assert (out - base).abs().max() > 1e-4
    met = 0
    for call, kinds in setting.controlled(calls):
        if "image" in kinds.keys.split() and "image" in kinds.queries.split():
            met += 1
            expected = reference(setting, call, kinds, rotary, control.fit, control.strength, control.density)
            assert (expected - call.out).abs().max() < 2e-5
    assert met
    assert torch.equal(setting.run(), base)
    assert traces(setting.model) == before


def test_equal_places_change_nothing_and_a_common_translation_leaves_scores_alone() -> None:
    """I11: b_r = b_t is plain sharing, bit for bit; R(p' - p) R(p) k = R(p') k; moving both boxes moves no score."""
    setting = flux(batch=2)
    alike = [[ac.Region(name="fox", box=FOX[0])]] * 2
    with ac.attach(setting.model, ac.Share(alike, **SAME)):
        plain = setting.run()
    with ac.attach(setting.model, [ac.Share(alike, **SAME), ac.Reposition()]):
        assert torch.equal(setting.run(), plain)
    rotary = family_of(setting.model).rotary(setting.model)
    key, query = torch.randn(2, 3, 16, dtype=torch.float64, generator=torch.Generator().manual_seed(0)).unbind()
    here, there = turned(rotary, key, 3, 1), turned(rotary, key, 1.5, 4.25)
    assert (turned(rotary, here, -1.5, 3.25) - there).abs().max() < 1e-12
    scores = (turned(rotary, query, 1.5, 4.25) * there).sum(-1)
    assert (scores - (query * key).sum(-1)).abs().max() < 1e-12
    by = fitted((0, 0, 2, 4), (3, 0, 6, 2), "stretch"), fitted((1, 2, 3, 6), (4, 2, 7, 4), "stretch")
    places = torch.tensor([[0, 0], [3, 1]])
    assert torch.equal(by[0].shift(places), by[1].shift(places + torch.tensor([2, 1])))


def test_moved_keys_score_as_if_they_had_been_made_at_their_new_place() -> None:
    """A fox that moves by whole tokens is read as a model would read it whose ids say so."""
    setting = flux(batch=2)
    scenes = [[ac.Region(name="fox", box=(0, 0, 2 / 6, 1))], [ac.Region(name="fox", box=(4 / 6, 0, 1, 1))]]
    anchors = ac.Share(scenes, readers="anchors", anchors=1, **SAME)
    with ac.attach(setting.model, [anchors, ac.Reposition()]), probe() as calls:
        setting.run()
    call, _ = setting.controlled(calls)[0]
    ids = setting.inputs["img_ids"].clone()
    ids[..., 2] += 4
    with torch.no_grad(), probe() as again:
        setting.run(img_ids=ids)
    moved = again[0].key[0]
    text, fox = setting.text, [setting.text + 6 * y + x for y in range(4) for x in (0, 1)]
    reads = [text + 6 * y + x for y in range(4) for x in (4, 5)]
    key = torch.cat([call.key[1], moved[fox]]).double()
    value = torch.cat([call.value[1], call.value[0, fox]]).double()
    scores = torch.einsum("qhd,khd->hqk", call.query[1, reads].double(), key) / key.shape[-1] ** 0.5
    expected = torch.einsum("hqk,khd->qhd", scores.softmax(-1), value)
    assert (expected - call.out[1, reads]).abs().max() < 1e-5


@pytest.mark.parametrize("mode", ["rope", "resample"])
def test_tokens_outside_of_the_subject_have_no_influence_and_references_are_one_way(mode: Any) -> None:
    """I5: exact zeros of gradients; the reference's rows are those of a run alone."""
    setting = flux(batch=2)
    share = ac.Share(SCENES, readers="anchors", anchors=1, **SAME)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        with ac.attach(setting.model, [share, ac.Reposition(mode=mode)]), probe(grad=True) as calls:
            out = setting.run()
    call, kinds = setting.controlled(calls)[0]
    queries, _ = sides_of(setting, kinds, SCENES[1])
    _, theirs = sides_of(setting, kinds, SCENES[0])
    fox = torch.tensor([0 in token.members for token in theirs])
    reader = torch.tensor([0 in token.members for token in queries])
    (grad,) = torch.autograd.grad(call.out[1, reader].double().sum(), call.value, retain_graph=True)
    # 4 x 2 tokens become 2 x 3: resizing takes rows 0 and 2 and both columns
    read = fox & (torch.tensor([(n - setting.text) // 6 in (0, 2) for n in range(len(fox))]) | (mode == "rope"))
    assert (grad[0, ~read] == 0).all()
    assert (grad[0, read] != 0).any(-1).any(-1).all()
    (grad,) = torch.autograd.grad(call.out[1, ~reader].double().sum(), call.value, retain_graph=True)
    assert (grad[0] == 0).all()
    (grad,) = torch.autograd.grad(call.out[0].double().sum(), call.value)
    assert (grad[1] == 0).all()
    assert torch.equal(out[0], setting.run()[0])


@pytest.mark.parametrize("family", [flux, unet])
def test_resample_is_what_resized_tokens_would_do(family: Any) -> None:
    """I9: keys copied by nearest resizing to the new box, against unique keys and the logarithm of how often."""
    setting = family(batch=2)
    stack = [ac.Share(SCENES, **SAME), ac.Reposition(mode="resample")]
    with ac.attach(setting.model, stack, branches=branches(setting.model)), probe() as calls:
        setting.run()
    met = 0
    for call, kinds in setting.controlled(calls):
        if "image" not in kinds.keys.split() or (kinds.grid or setting.grid)[-1] < 6:
            continue
        met += 1
        width = (kinds.grid or setting.grid)[-1]
        for image, other in ((0, 1), (1, 0)):
            queries, _ = sides_of(setting, kinds, SCENES[image])
            _, theirs = sides_of(setting, kinds, SCENES[other])
            first = next(n for n, token in enumerate(theirs) if token.kind == "image")
            unit = width // 6
            sides = [(4 * unit, 2 * unit, 0), (2 * unit, 3 * unit, 3 * unit)]
            (tall, wide, _), (high, broad, left) = sides[image], sides[other]
            copies = [
                first + (y * high // tall) * width + left + x * broad // wide for y in range(tall) for x in range(wide)
            ]
            key = torch.cat([call.key[image], call.key[other, copies]]).double()
            value = torch.cat([call.value[image], call.value[other, copies]]).double()
            reads = [n for n, token in enumerate(queries) if token.kind == "image" and 0 in token.members]
            scores = torch.einsum("qhd,khd->hqk", call.query[image, reads].double(), key) / key.shape[-1] ** 0.5
            expected = torch.einsum("hqk,khd->qhd", scores.softmax(-1), value)
            assert (expected - call.out[image, reads]).abs().max() < 1e-5
    assert met


def test_resample_of_equal_sizes_is_plain_sharing() -> None:
    """I9: a move that is one to one is a no-op where positions are not told to attention."""
    setting = unet(batch=2)
    scenes = [[ac.Region(name="fox", box=(0, 0, 2 / 6, 1))], [ac.Region(name="fox", box=(4 / 6, 0, 1, 1))]]
    share = ac.Share(scenes, **SAME)
    with ac.attach(setting.model, share, branches=("cond",)):
        plain = setting.run()
    with ac.attach(setting.model, [share, ac.Reposition(mode="resample")], branches=("cond",)):
        assert torch.equal(setting.run(), plain)
    assert repeats(4, 0.5).tolist() == [1, 0, 1, 0]
    assert repeats(2, 1.5).tolist() == [2, 1]
    assert repeats(3, 0.01).tolist() == [1, 0, 0]


def test_what_cannot_be_moved_is_an_error_that_says_why() -> None:
    setting, plain = flux(batch=2), unet(batch=2)

    def refused(match: str, *stack: ac.Control, on: Any = setting, error: Any = ac.ControlError) -> None:
        with ac.attach(on.model, stack, branches=branches(on.model)), pytest.raises(error, match=match):
            on.run()

    reason = r"no rotary positions.*mode='resample'"
    refused(reason, ac.Share(SCENES), ac.Reposition(), on=plain, error=ac.UnsupportedModelError)
    refused("share and reposition both say", ac.Share(SCENES, positions="apart"), ac.Reposition())
    refused("no control of the stack declares regions", ac.Share(), ac.Reposition())
    with pytest.raises(ac.ControlError, match=r"'reposition' changes what pictures share.*Share"):
        ac.attach(setting.model, ac.Reposition())
    with pytest.raises(ac.ControlError, match=r"no control of the stack shares anything"):
        ac.attach(setting.model, [ac.Share(SCENES, layers="single"), ac.Reposition(layers="double")])
    with pytest.raises(ac.ControlError, match="fit must be one of stretch, contain, cover"):
        ac.Reposition(fit="fill")


def test_the_extent_of_boxes_and_masks() -> None:
    assert extent(ac.Region("a", box=(0.1, 0.2, 0.3, 0.4))) == (0.1, 0.2, 0.3, 0.4)
    assert extent(ac.Region("a")) == (0, 0, 1, 1)
    mask = torch.zeros(4, 8)
    mask[1, 2:5], mask[0, 7] = 0.9, 0.2
    assert extent(ac.Region("a", mask=mask)) == (2 / 8, 1 / 4, 5 / 8, 2 / 4)
    assert extent(ac.Region("a", mask=mask * 0.4)) == (2 / 8, 1 / 4, 5 / 8, 2 / 4)
