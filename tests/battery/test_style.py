"""One style for a set: AdaIN before positions, and keys of the anchor, against the formulas of both papers in float64."""

from __future__ import annotations

import json
import math
import runpy
from pathlib import Path
from typing import Any

import pytest
import tiny
import torch
from harness import FAMILIES, Kernel, Setting, flux, probe, sd3, sides_of, unet
from test_sharing import named
from torch import Tensor

import attnctrl as ac
from attnctrl.content import States, adain, moments
from attnctrl.controls import Control
from attnctrl.controls.style import OfRow
from attnctrl.families import family_of

BATCH = 3
PLACED = [name for name, make in FAMILIES.items() if (family := family_of(make().model)).rotary and family.corner]


def rotation(setting: Any) -> Tensor:
    """complex128 [image tokens, D / 2]: how the model turns each image token, written out by hand for FLUX."""
    channels, parts = setting.model.config.axes_dims_rope, []
    height, width = setting.grid
    places = [(0, y, x) for y in range(height) for x in range(width)]
    for axis, count in enumerate(channels):
        rates = [10000.0 ** (-2 * i / count) for i in range(count // 2)]
        parts.append(torch.tensor([[place[axis] * rate for rate in rates] for place in places], dtype=torch.float64))
    return torch.polar(torch.ones_like(torch.cat(parts, 1)), torch.cat(parts, 1))


def turned(states: Tensor, by: Tensor) -> Tensor:
    """States [T, H, D] turned by complex [T or 1, D / 2]."""
    pairs = torch.view_as_complex(states.double().unflatten(-1, (-1, 2)).contiguous())
    return torch.view_as_real(pairs * by[:, None]).flatten(-2)


def matched(x: Tensor, y: Tensor) -> Tensor:
    """AdaIN over tokens of [T, H, D], as the papers' code has it."""
    spread = [(one.var(0, unbiased=True) + 1e-5).sqrt() for one in (x, y)]
    return (x - x.mean(0)) / spread[0] * spread[1] + y.mean(0)


PLAIN: dict[str, Any] = {"shift": None, "scale": 1.0, "odds": 1.0, "match": ("query", "key"), "texts": False}


def formula(setting: Any, call: Kernel, kinds: Any, **told: Any) -> Tensor:
    """float64 [B, T, H, D]: section 4 of AlignedGen and section 3 of StyleAligned; row 0 is the anchor of all."""
    shift, scale, odds, match, texts = {**PLAIN, **told}.values()
    queries, keys = sides_of(setting, kinds, [])
    image = [torch.tensor([token.kind == "image" for token in side]) for side in (queries, keys)]
    states = {n: getattr(call, n).double() for n in ("query", "key", "value")}
    turning = rotation(setting) if shift is not None else None
    rows = []
    for row in range(len(call.query)):
        own = {n: x[row].clone() for n, x in states.items()}
        for name in match if row else ():
            mine = image[0] if name == "query" else image[1]
            x, y = states[name][row, mine], states[name][0, mine]
            if turning is None or name == "value":
                own[name][mine] = matched(x, y)
            else:
                back = turning.conj()
                own[name][mine] = turned(matched(turned(x, back), turned(y, back)), turning)
        scores = torch.einsum("qhd,khd->hqk", own["query"], own["key"])
        value = own["value"]
        if row and odds:
            theirs = states["key"][0, image[1]]
            if shift:
                step = torch.zeros_like(theirs[:, 0, ::2])
                t, y, x = setting.model.config.axes_dims_rope
                step[:, (t + y) // 2 :] = shift * 10000.0 ** (-torch.arange(0, x, 2, dtype=torch.float64) / x)
                theirs = turned(theirs, torch.polar(torch.ones_like(step), step))
            more = scale * torch.einsum("qhd,khd->hqk", own["query"], theirs)
            if not texts:
                more[:, ~image[0]] = -torch.inf
            scores = torch.cat([scores, more + math.log(odds) * call.query.shape[-1] ** 0.5], -1)
            value = torch.cat([value, states["value"][0, image[1]]])
        shares = (scores / call.query.shape[-1] ** 0.5).softmax(-1)
        rows.append(torch.einsum("hqk,khd->qhd", shares, value))
    return torch.stack(rows)


CASES: dict[str, tuple[Any, dict[str, Any], dict[str, Any]]] = {
    "alignedgen": (flux, {"positions": "apart", "scale": 1.1, "texts": True}, {"shift": 6.0, "scale": 1.1, "texts": True}),
    "alignedgen-odds": (flux, {"positions": "apart", "weight": 2.5}, {"shift": 6.0, "odds": 2.5}),
    "naive": (flux, {"match": ()}, {"shift": 0.0, "match": ()}),
    "adain-only-flux": (flux, {"weight": 0}, {"shift": 0.0, "odds": 0}),
    "all-three": (flux, {"match": ("query", "key", "value")}, {"shift": 0.0, "match": ("query", "key", "value")}),
    "style-aligned": (unet, {"weight": 2.0, "scale": 0.5}, {"odds": 2.0, "scale": 0.5}),
    "adain-only-unet": (unet, {"weight": 0}, {"odds": 0}),
    "sd3": (sd3, {"match": "key"}, {"match": ("key",)}),
}  # fmt: skip


@pytest.mark.parametrize("case", CASES.values(), ids=CASES)
def test_equals_the_papers_formula_in_every_layer(case: Any) -> None:
    family, options, told = case
    setting = family(batch=BATCH)
    base = setting.run()
    with ac.attach(setting.model, ac.ShareStyle(**options), branches=named(setting.model)), probe() as calls:
        out = setting.run()
    assert (out[1:] - base[1:]).abs().max() > 1e-3
    assert (out[0] - base[0]).abs().max() < 1e-5  # the anchor is the plain model's picture
    met = 0
    for call, kinds in setting.controlled(calls):
        if "image" in kinds.keys.split():
            met += 1
            assert (formula(setting, call, kinds, **told) - call.out).abs().max() < 2e-5
        else:
            assert call.error(call.plain()) < 1e-5
    assert met
    assert torch.equal(setting.run(), base)


@pytest.mark.parametrize("name", PLACED)
def test_states_are_turned_back_to_where_the_model_has_them_before_positions(name: str) -> None:
    """Keys of image tokens in the first layer, against what the model's own norm of keys gave."""
    is_turned_back(FAMILIES[name]())


@pytest.mark.parametrize("name", ["flux", "flux2", "chroma"])
def test_pictures_whose_ids_begin_elsewhere_are_turned_back_from_there(name: str) -> None:
    """As those of tiles or canvases do: the corner is read off the forward's own ids, fractions of a token too."""
    setting = FAMILIES[name]()
    ids = setting.inputs["img_ids"]
    away = torch.tensor([0.0, 3.0, 7.5, 0.0])[: ids.shape[-1]]
    setting.inputs["img_ids"] = ids + away
    is_turned_back(setting)


def is_turned_back(setting: Setting) -> None:
    family = family_of(setting.model)
    layer = next(one for one in family.layers(setting.model) if one.name.split(".")[0] != "context_refiner")
    kept: list[Tensor] = []
    hook = layer.module.norm_k.register_forward_hook(lambda module, inputs, output: kept.append(output))
    with torch.no_grad(), probe() as calls:
        setting.run()
    hook.remove()
    frames = family.frames(setting.model, setting.inputs)[0]
    places = family.standing(setting.model).places(frames, layer.frame, torch.device("cpu"))
    image = frames[layer.frame].keys["image"]
    given = calls[0].key[0, image.start : image.stop].transpose(0, 1)  # [H, T, D]
    found = places.undone(given)
    before = kept[0][0].reshape(-1, len(given), given.shape[-1])
    # joint norms hold the text as well
    mine = before[image.start : image.stop] if len(before) > len(image) else before
    assert (found - given).abs().max() > 1e-2
    torch.testing.assert_close(found, mine.transpose(0, 1), atol=2e-5, rtol=1e-5)
    torch.testing.assert_close(places.done(found), given, atol=2e-5, rtol=1e-5)


def test_moments_and_their_identities() -> None:
    """AdaIN(x, x) = x; the result has the model's moments; no affine change of x matters; turned first, it differs."""
    x, y = torch.randn(2, 3, 40, 8, generator=torch.Generator().manual_seed(0), dtype=torch.float64) * 3 + 1
    assert (adain(x, x) - x).abs().max() < 1e-12
    found = adain(x, y)
    for one, other in zip(moments(found), moments(y), strict=True):
        assert (one - other).abs().max() < 1e-4
    assert (adain(2.5 * x - 4, y) - found).abs().max() < 1e-4
    assert torch.equal(adain(x, y, 0.0), x)
    assert (adain(x, y, 0.25) - (0.75 * x + 0.25 * found)).abs().max() < 1e-12
    assert adain(x[:, :1], y).isfinite().all()  # of one token
    half = adain(x.half() * 100, y.half() * 100)  # sums of squares overflow half precision
    assert half.dtype == torch.float16
    assert (half.double() - adain(x * 100, y * 100)).abs().max() < 1


def test_equal_pictures_are_vanilla_without_text_and_know_ln_2_with_it() -> None:
    """Without texts among the keys any odds leave equal pictures as they are; with them image keys count twice."""
    odds = ac.ShareStyle(weight=4.0)
    setting = unet(batch=2)
    names = ("sample", "encoder_hidden_states")
    alike = {k: setting.inputs[k][:1].repeat(2, *[1] * (setting.inputs[k].ndim - 1)) for k in names}
    base = setting.run(**alike)
    with ac.attach(setting.model, odds, branches=("cond",)):
        assert (setting.run(**alike) - base).abs().max() < 1e-5
    setting = sd3(batch=2)
    names = ("hidden_states", "encoder_hidden_states", "pooled_projections")
    alike = {k: setting.inputs[k][:1].repeat(2, *[1] * (setting.inputs[k].ndim - 1)) for k in names}
    with ac.attach(setting.model, ac.ShareStyle(texts=True), branches=("cond",)), probe() as calls:
        setting.run(**alike)
    call, kinds = setting.controlled(calls)[0]
    _, keys = sides_of(setting, kinds, [])
    more = torch.tensor([math.log(2.0) * (token.kind == "image") for token in keys], dtype=torch.float64)
    scores = torch.einsum("qhd,khd->hqk", call.query[1].double(), call.key[1].double()) / call.query.shape[-1] ** 0.5
    expected = torch.einsum("hqk,khd->qhd", (scores + more).softmax(-1), call.value[1].double())
    assert (expected - call.out[1]).abs().max() < 1e-5
    assert (call.plain()[1] - call.out[1]).abs().max() > 1e-4


def test_only_what_is_shared_has_influence() -> None:
    """The anchor's texts and other pictures have none; its image values, and its states by their moments, have."""
    setting = flux(batch=BATCH)
    with ac.attach(setting.model, ac.ShareStyle(texts=True, positions="apart")), probe(grad=True) as calls:
        setting.run()
    call, kinds = setting.controlled(calls)[0]
    _, keys = sides_of(setting, kinds, [])
    image = torch.tensor([token.kind == "image" for token in keys])
    (grad,) = torch.autograd.grad(call.out[1].double().square().sum(), call.value, retain_graph=True)
    assert (grad[2] == 0).all()
    assert (grad[0, ~image] == 0).all()
    assert (grad[0, image].abs().amax((-1, -2)) > 0).all()
    (grad,) = torch.autograd.grad(call.out[0].double().square().sum(), call.value)
    assert (grad[1:] == 0).all()
    batch = States(*(getattr(call, name).detach().transpose(1, 2).requires_grad_() for name in States._fields))
    content = OfRow(("query",), ((5, 29), (5, 29)), 1.0, None, -2)
    found = content(States(*(x[2:].detach() for x in batch)), batch, torch.tensor([2]))
    assert torch.equal(found.query[:, :, :5], batch.query[2:, :, :5])
    (grad,) = torch.autograd.grad(found.query.square().sum(), batch.query)
    assert (grad[1:] == 0).all()
    assert (grad[0, :, :5] == 0).all()
    assert (grad[0, :, 5:] != 0).any(-1).all()


def test_groups_and_branches_have_anchors_of_their_own() -> None:
    """Both branches of two groups in one batch are the four one by one (section 9, 9 and 10)."""
    setting = unet(batch=8)
    with ac.attach(setting.model, ac.ShareStyle(group=2, weight=1.5), branches=("uncond", "cond")):
        together = setting.run()
    whole = {name: x for name, x in setting.inputs.items() if isinstance(x, Tensor) and x.ndim and len(x) == 8}
    for start in range(0, 8, 2):
        own = {name: x[start : start + 2] for name, x in whole.items()}
        with ac.attach(setting.model, ac.ShareStyle(weight=1.5), branches=("cond",)):
            assert (setting.run(**own) - together[start : start + 2]).abs().max() < 1e-5


def test_each_anchor_has_its_weight() -> None:
    """Weights 0 and 2: of the two anchors the second is read alone, as if it were there twice."""
    setting = flux(batch=BATCH)
    with ac.attach(setting.model, ac.ShareStyle(anchors=2, weight=(0.0, 2.0), match=())), probe() as calls:
        setting.run()
    call, kinds = setting.controlled(calls)[0]
    _, keys = sides_of(setting, kinds, [])
    image = torch.tensor([token.kind == "image" for token in keys])
    key, value = (torch.cat([x[2], x[1, image], x[1, image]]).double() for x in (call.key, call.value))
    scores = torch.einsum("qhd,khd->hqk", call.query[2, image].double(), key) / key.shape[-1] ** 0.5
    expected = torch.einsum("hqk,khd->qhd", scores.softmax(-1), value)
    assert (expected - call.out[2, image]).abs().max() < 1e-5


@pytest.mark.parametrize("off", [{"strength": 0}, {"window": (0.4, 0.4)}, {"weight": 0, "match": ()}], ids=str)
def test_off_is_vanilla(off: Any) -> None:
    setting = flux(batch=2)
    base = setting.run()
    control = ac.ShareStyle(**off)
    assert control.is_idle
    with ac.attach(setting.model, control):
        assert torch.equal(setting.run(), base)


def test_half_the_strength_is_half_the_way() -> None:
    setting = unet(batch=2)
    control = ac.ShareStyle(weight=0, strength=0.5, layers="mid")
    with ac.attach(setting.model, control, branches=("cond",)) as handle, probe() as calls:
        setting.run()
    call = next(call for call in calls if not torch.allclose(call.plain().float(), call.out, atol=1e-4))
    q, k, v = (x.double() for x in (call.query, call.key, call.value))
    q1, k1 = (x[1].lerp(matched(x[1], x[0]), 0.5) for x in (q, k))
    scores = torch.einsum("qhd,khd->hqk", q1, k1) / q.shape[-1] ** 0.5
    assert (torch.einsum("hqk,khd->qhd", scores.softmax(-1), v[1]) - call.out[1]).abs().max() < 1e-5
    assert "AdaIN of query, key by 0.5" in str(handle.report())


@pytest.mark.parametrize("family", [flux, unet])
def test_half_precision_stays_near_the_formula(family: Any) -> None:
    setting = family(batch=2, dtype=torch.bfloat16)
    with ac.attach(setting.model, ac.ShareStyle(), branches=named(setting.model)), probe() as calls:
        assert setting.run().isfinite().all()
    shift = 0.0 if family is flux else None
    for call, kinds in setting.controlled(calls):
        if "image" in kinds.keys.split():
            assert (formula(setting, call, kinds, shift=shift) - call.out).abs().max() <= 2**-4 * call.value.abs().max()


def test_documents_and_errors() -> None:
    control = ac.ShareStyle(scale=1.1, match=("key",), weight=[1.0, 2.0], anchors=2, window=(0.0, 0.5))
    again = Control.from_dict(control.to_dict())
    assert isinstance(again, ac.ShareStyle)
    assert (again.scale, again.match, again.weights, again.anchors) == (1.1, ("key",), (1.0, 2.0), 2)
    wrong = {"match": ("quarry",), "scale": 0.0, "weight": (1.0, 2.0)}
    for field, value in wrong.items():
        with pytest.raises(ac.ControlError, match=field):
            ac.ShareStyle(**{field: value})
    with pytest.raises(ac.ControlError, match="weight must be in"):
        ac.ShareStyle(weight=-1.0)
    setting = FAMILIES["cogview4"](batch=2)
    model, batch = setting.model, named(setting.model)
    with ac.attach(model, ac.ShareStyle(), branches=batch), pytest.raises(ac.UnsupportedModelError, match="match="):
        setting.run()
    with ac.attach(model, ac.ShareStyle(match=()), branches=batch):
        setting.run()


def test_compiled_with_full_graphs_it_is_the_same() -> None:
    torch._dynamo.reset()
    inputs = tiny.flux_inputs(batch=2)
    setting = Setting(tiny.flux(double=1, single=1), inputs, [None] * 2)
    control = ac.ShareStyle(positions="apart", scale=1.1)
    with ac.attach(setting.model, control):
        expected = setting.run()
    setting.model.compile_repeated_blocks(backend="eager", fullgraph=True)
    with ac.attach(setting.model, control):
        assert (setting.run() - expected).abs().max() < 1e-5


def test_what_perturbs_attention_sees_what_was_matched() -> None:
    """The output stage attends again with matched queries and keys, over the anchor's as the model made them."""
    setting = unet(batch=2)
    control = [ac.ShareStyle(weight=2.0), ac.Perturb("temperature", temperature=1.0, branch="all", layers="mid.self")]
    with ac.attach(setting.model, control, branches=("cond",)):
        out = setting.run()
    with ac.attach(setting.model, control[:1], branches=("cond",)):
        assert (setting.run() - out).abs().max() < 1e-5
    alone = [ac.ShareStyle(weight=0), *control[1:]]
    with ac.attach(setting.model, alone, branches=("cond",)):
        out = setting.run()
    with ac.attach(setting.model, alone[:1], branches=("cond",)):
        assert (setting.run() - out).abs().max() < 1e-5


def test_sharing_of_flux_at_full_size_makes_no_mask() -> None:
    """Four pictures of 1024 x 1024, one layer: the published code's mask takes 7.7 GB; the stored figures are ours."""
    root = Path(__file__).parents[2] / "benchmarks"
    measured = runpy.run_path(str(root / "plan_memory.py"))["measure_sharing"]()
    assert json.loads((root / "results" / "plan-memory.json").read_text())["sharing"] == measured
    assert [row["plan_bytes"] for row in measured] == [0, 0]
    styled, plain = (row["peak_bytes"] / row["mask_bytes"] for row in measured)
    assert styled < 0.035
    assert plain < 0.027
