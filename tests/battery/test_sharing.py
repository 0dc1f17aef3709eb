"""Pictures that read each other: against the dense formula over all rows of the batch, written out token by token."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import pytest
import torch
from harness import DOORS, FAMILIES, Kernel, Setting, Token, branches, flux, probe, sides_of, traces, unet
from torch import Tensor

import attnctrl as ac

every_family = pytest.mark.parametrize("family", FAMILIES.values(), ids=FAMILIES)
every_door = pytest.mark.parametrize("door", DOORS.values(), ids=DOORS)
BATCH = 3


def cast(*boxes: Any) -> list[Any]:
    """A picture's subjects: "fox" and "owl" in these boxes."""
    return [ac.Region(name=name, box=box) for name, box in zip(("fox", "owl"), boxes, strict=False)]


SCENES = [
    cast((0, 0, 2 / 6, 1), (4 / 6, 0, 1, 1)),
    cast((3 / 6, 0, 1, 0.5)),
    [ac.Region(name="owl", box=(0, 0, 1, 0.5)), ac.Region(name="bear", box=(0, 0.5, 2 / 6, 1))],
]
Reads = dict[int, tuple[int, ...]]
ALL: Reads = {0: (1, 2), 1: (0, 2), 2: (0, 1)}


def subjects(scene: Sequence[Any], token: Token) -> frozenset[str]:
    return frozenset(scene[r].name for r in token.members)


def shared(setting: Setting, call: Kernel, kinds: Any, reads: Reads, sees: Any, scenes: Any = SCENES) -> Tensor:
    """The formula in float64: own keys, and those of the pictures that are read, in one softmax."""
    q, k, v = (x.double() for x in (call.query, call.key, call.value))
    rows = []
    for image in range(BATCH):
        queries, keys = sides_of(setting, kinds, scenes[image])
        found = [(1.0, image, n) for n in range(len(keys))]
        table = torch.ones(len(queries), len(keys), dtype=torch.float64)
        for other in reads.get(image, ()):
            _, theirs = sides_of(setting, kinds, scenes[other])
            mine = [n for n, token in enumerate(theirs) if token.kind == "image"]
            found += [(1.0, other, n) for n in mine]
            more = [
                [
                    sees(token.kind, subjects(scenes[image], token), subjects(scenes[other], theirs[n]))
                    if token.kind == "image" else 0.0
                    for n in mine
                ]
                for token in queries
            ]  # fmt: skip
            table = torch.cat([table, torch.tensor(more, dtype=torch.float64)], 1)
        key = torch.stack([k[other, n] for _, other, n in found])
        value = torch.stack([v[other, n] for _, other, n in found])
        scores = torch.einsum("qhd,khd->hqk", q[image], key) / q.shape[-1] ** 0.5 + table.log()
        rows.append(torch.einsum("hqk,khd->qhd", scores.softmax(-1), value))
    return torch.stack(rows)


def named(model: Any) -> tuple[str, ...]:
    return branches(model) or ()


CASES: dict[str, tuple[dict[str, Any], Reads, Any]] = {
    "all": ({}, ALL, lambda kind, q, k: 1.0),
    "anchors": ({"readers": "anchors", "anchors": 1}, {1: (0,), 2: (0,)}, lambda kind, q, k: 1.0),
    "groups": ({"group": 2}, {0: (1,), 1: (0,)}, lambda kind, q, k: 1.0),
    "subjects": ({"tokens": "subject"}, ALL, lambda kind, q, k: float(bool(k))),
    "same": ({"tokens": "subject", "queries": "same"}, ALL, lambda kind, q, k: float(bool(q & k))),
    "scene": ({"tokens": "background", "queries": "background"}, ALL, lambda kind, q, k: float(not q and not k)),
    "weighted": ({"weight": 3.0, "strength": 0.5}, ALL, lambda kind, q, k: 1.5),
}


@every_family
@every_door
@pytest.mark.parametrize("case", CASES.values(), ids=CASES)
def test_equals_the_dense_formula_in_every_layer(family: Any, door: Any, case: Any) -> None:
    options, reads, sees = case
    setting = family(batch=BATCH)
    before = traces(setting.model)
    base = setting.run()
    with door(setting.model, ac.Share(SCENES, **options)), probe() as calls:
        out = setting.run()
    assert (out - base).abs().max() > 1e-3
    met = 0
    for call, kinds in setting.controlled(calls):
        if "image" in kinds.keys.split():
            met += 1
            expected = shared(setting, call, kinds, reads, sees)
            assert call.error(expected) < 1e-5
        else:
            assert call.error(call.plain()) < 1e-5
    assert met
    assert torch.equal(setting.run(), base)
    assert traces(setting.model) == before


@pytest.mark.parametrize("family", [flux, unet])
def test_unread_tokens_and_pictures_have_no_influence(family: Any) -> None:
    """The gradient of a picture with respect to values that it does not read is exactly zero, and to read ones is not."""
    setting = family(batch=BATCH)
    control = ac.Share(SCENES, tokens="subject", readers="anchors", anchors=1)
    with ac.attach(setting.model, control, branches=named(setting.model)), probe(grad=True) as calls:
        setting.run()
    call, kinds = next((c, k) for c, k in setting.controlled(calls) if "image" in k.keys.split())
    (grad,) = torch.autograd.grad(call.out[1].double().sum(), call.value, retain_graph=True)
    _, keys = sides_of(setting, kinds, SCENES[0])
    read = torch.tensor([token.kind == "image" and bool(token.members) for token in keys])
    assert (grad[0, ~read] == 0).all()
    assert (grad[0, read] != 0).any(-1).any(-1).all()
    assert (grad[2] == 0).all()
    (grad,) = torch.autograd.grad(call.out[0].double().sum(), call.value)
    assert (grad[1:] == 0).all()


def test_identical_pictures_that_share_everything_are_vanilla() -> None:
    """Keys that come twice with equal scores change nothing (C4, S6)."""
    setting = unet(batch=BATCH)
    alike = {
        name: value[:1].expand(BATCH, *value.shape[1:]).clone()
        for name, value in setting.inputs.items()
        if isinstance(value, Tensor) and value.ndim and len(value) == BATCH
    }
    base = setting.run(**alike)
    with ac.attach(setting.model, ac.Share(), branches=("cond",)):
        assert (setting.run(**alike) - base).abs().max() < 1e-5


def test_branches_and_groups_do_not_mix() -> None:
    """Both branches in one batch are the two one by one (C8, I12)."""
    setting = unet(batch=4)
    with ac.attach(setting.model, ac.Share(), branches=("uncond", "cond")):
        together = setting.run()
    with ac.attach(setting.model, ac.Share(group=2), branches=("cond",)):
        grouped = setting.run()
    assert (together - grouped).abs().max() < 1e-5
    halves = []
    for half in (slice(0, 2), slice(2, 4)):
        own = {k: v[half] for k, v in setting.inputs.items() if isinstance(v, Tensor) and v.ndim and len(v) == 4}
        with ac.attach(setting.model, ac.Share(), branches=("cond",)):
            halves.append(setting.run(**own))
    assert (together - torch.cat(halves)).abs().max() < 1e-5


def test_a_picture_alone_is_vanilla_and_told() -> None:
    setting = flux(batch=1)
    base = setting.run()
    with pytest.warns(UserWarning, match="'share'"), ac.attach(setting.model, ac.Share()):
        assert torch.equal(setting.run(), base)


def test_drawn_tokens_are_as_many_as_asked_for_and_the_same_in_all_layers() -> None:
    """S3, S5, S7: what was not drawn has no influence; the same seed draws the same, another step others."""
    setting = flux(batch=2)

    def read(seed: int) -> list[Tensor]:
        with ac.attach(setting.model, ac.Share(ratio=0.25, seed=seed)), probe(grad=True) as calls:
            setting.run()
        found = []
        for call, _ in setting.controlled(calls):
            (grad,) = torch.autograd.grad(call.out[1].double().sum(), call.value, retain_graph=True)
            found.append((grad[0] != 0).any(-1).any(-1))
        return found

    first = read(1)
    assert [int(one.sum()) for one in first] == [6] * 4
    assert all(torch.equal(one, first[0]) for one in first)
    assert all(torch.equal(a, b) for a, b in zip(read(1), first, strict=True))
    assert not torch.equal(read(2)[0], first[0])


def test_queries_that_were_not_drawn_read_nothing_of_others() -> None:
    """IR-Diffusion's query dropout: of each picture and kind as many read as asked for, the same in all layers."""
    setting = flux(batch=2)
    scenes = [cast((0, 0, 2 / 6, 1)), cast((0, 0, 2 / 6, 1))]
    control = ac.Share(scenes, queries="subject", query_ratio=0.5, ratio=0.5)
    with ac.attach(setting.model, control), probe(grad=True) as calls:
        setting.run()
    kept = []
    for call, kinds in setting.controlled(calls):
        reading = [
            bool((torch.autograd.grad(one.double().sum(), call.value, retain_graph=True)[0][0] != 0).any())
            for one in call.out[1]
        ]
        kept.append(reading)
        queries, _ = sides_of(setting, kinds, scenes[1])
        assert not any(one and not token.members for one, token in zip(reading, queries, strict=True))
        assert sum(reading) == 4
    assert all(one == kept[0] for one in kept)


def test_the_gate_is_a_coin_for_each_layer_and_step() -> None:
    """A closed layer is the plain model's; open ones are as without a gate; each step has coins of its own."""
    control = ac.Share(gate=0.4, seed=3)
    setting = flux(batch=2)
    layers = ac.families.flux.FLUX.layers(setting.model)
    coins = [[control.opens(layer, draw) for layer in layers] for draw in range(1, 401)]
    assert abs(sum(map(sum, coins)) / 1600 - 0.4) < 0.04
    assert len({tuple(one) for one in coins}) == 16
    assert coins[0] == [ac.Share(gate=0.4, seed=3).opens(layer, 1) for layer in layers]
    assert all(ac.Share().opens(layer, 1) for layer in layers)
    with ac.attach(setting.model, control), probe() as calls:
        setting.run()
    for (call, kinds), is_open in zip(setting.controlled(calls), coins[0], strict=True):
        sees = float(is_open)
        queries, keys = sides_of(setting, kinds, [])
        assert call.key.shape[1] == len(keys)
        key = torch.cat([call.key[0], call.key[1][setting.text :]]).double()
        value = torch.cat([call.value[0], call.value[1][setting.text :]]).double()
        scores = torch.einsum("qhd,khd->hqk", call.query[0].double(), key) / key.shape[-1] ** 0.5
        hidden = torch.zeros(len(queries), len(key))
        hidden[: setting.text, len(keys) :] = float("-inf")
        hidden[setting.text :, len(keys) :] = torch.tensor(sees).log()
        expected = torch.einsum("hqk,khd->qhd", (scores + hidden).softmax(-1), value)
        assert (expected - call.out[0]).abs().max() < 1e-5
    assert 0 < sum(coins[0]) < 4


def test_pictures_without_subjects_share_too() -> None:
    """One that shows nobody reads the subjects of the others; it is no reason to refuse the stack."""
    setting = flux(batch=2)
    with ac.attach(setting.model, ac.Share([SCENES[0], []], tokens="subject")), probe() as calls:
        setting.run()
    call, _ = setting.controlled(calls)[0]
    member = torch.tensor([token.kind == "image" and bool(token.members) for token in sides_of(
        setting, setting.controlled(calls)[0][1], SCENES[0])[1]])  # fmt: skip
    key = torch.cat([call.key[1], call.key[0][member]]).double()
    value = torch.cat([call.value[1], call.value[0][member]]).double()
    scores = torch.einsum("qhd,khd->hqk", call.query[1].double(), key) / key.shape[-1] ** 0.5
    scores[:, : setting.text, call.key.shape[1] :] = float("-inf")
    assert (torch.einsum("hqk,khd->qhd", scores.softmax(-1), value) - call.out[1]).abs().max() < 1e-5


def test_pictures_side_by_side_stand_apart() -> None:
    """Moved keys give the scores of queries that stand as much further to the left."""
    setting = flux(batch=2)
    with ac.attach(setting.model, ac.Share(positions="apart")), probe() as calls:
        setting.run()
    rotary = ac.families.flux.FLUX.rotary(setting.model)
    for call, kinds in setting.controlled(calls):
        queries, keys = sides_of(setting, kinds, [])
        mine = torch.tensor([token.kind == "image" for token in keys])
        moved = rotary.turn(call.key.transpose(1, 2), rotary.shift(x=6.0)).transpose(1, 2)
        expected = []
        for image in range(2):
            key = torch.cat([call.key[image], moved[1 - image][mine]]).double()
            value = torch.cat([call.value[image], call.value[1 - image][mine]]).double()
            scores = torch.einsum("qhd,khd->hqk", call.query[image].double(), key) / key.shape[-1] ** 0.5
            hidden = torch.zeros(len(queries), len(key), dtype=torch.bool)
            hidden[~mine, len(keys) :] = True
            scores = scores.masked_fill(hidden, float("-inf"))
            expected.append(torch.einsum("hqk,khd->qhd", scores.softmax(-1), value))
        assert call.error(torch.stack(expected)) < 1e-5
    plain = unet(batch=2)
    apart = ac.attach(plain.model, ac.Share(positions="apart"), branches=("cond",))
    with apart, pytest.raises(ac.UnsupportedModelError, match="no rotary"):
        plain.run()


def test_isolation_parts_subjects_of_other_names() -> None:
    setting = unet(batch=BATCH)
    stack = [ac.Isolate(SCENES, background="shared", branch="all"), ac.Share(tokens="subject")]
    with ac.attach(setting.model, stack, branches=("cond",)), probe() as calls:
        setting.run()

    def sees(kind: str, q: frozenset[str], k: frozenset[str]) -> float:
        return float(bool(k) and (not q or bool(q & k)))

    call, kinds = next((c, k) for c, k in setting.controlled(calls) if "image" in k.keys.split())
    expected = shared(setting, call, kinds, ALL, sees)
    # own tokens of different subjects are parted as well, so only pictures of one subject are as the formula says
    assert (expected[1] - call.out[1]).abs().max() < 1e-5
    assert (expected[0] - call.out[0]).abs().max() > 1e-4


def test_pictures_share_in_a_perturbed_branch_as_well() -> None:
    """guided = c + w (c - p), where p is what the perturbed model gives to pictures that share."""
    setting = flux(batch=2)

    def run(*controls: Any) -> Tensor:
        with ac.attach(setting.model, list(controls), branches=("cond",)):
            return setting.run()

    c, p = run(ac.Share()), run(ac.Share(), ac.Perturb(branch="all", layers="double"))
    assert (c - p).abs().max() > 1e-3
    guided = run(ac.Share(), ac.Perturb(layers="double", scale=2.0))
    assert (guided - (c + 2 * (c - p))).abs().max() < 1e-5


@pytest.mark.parametrize("kind", ["uniform", "mean_query", "identity"])
def test_maps_are_perturbed_over_what_is_shared_as_well(kind: Any) -> None:
    """A query that attends again reads what the pictures read; the own value is that of the picture itself."""
    setting = flux(batch=2)
    stack = [ac.Share(positions="apart"), ac.Perturb(kind, branch="all", rows="image")]
    with ac.attach(setting.model, stack), probe() as calls:
        setting.run()
    rotary = ac.families.flux.FLUX.rotary(setting.model)
    call, kinds = setting.controlled(calls)[0]
    _, keys = sides_of(setting, kinds, [])
    mine = torch.tensor([token.kind == "image" for token in keys])
    moved = rotary.turn(call.key.transpose(1, 2), rotary.shift(x=6.0)).transpose(1, 2)
    for image in range(2):
        key = torch.cat([call.key[image], moved[1 - image][mine]]).double()
        value = torch.cat([call.value[image], call.value[1 - image][mine]]).double()
        query = call.query[image, mine].double()
        query = {"uniform": 0 * query, "mean_query": query.mean(0, keepdim=True).expand_as(query), "identity": query}[
            kind
        ]
        scores = torch.einsum("qhd,khd->hqk", query, key) / key.shape[-1] ** 0.5
        expected = torch.einsum("hqk,khd->qhd", scores.softmax(-1), value)
        expected = call.value[image, mine].double() if kind == "identity" else expected
        assert (expected - call.out[image, mine]).abs().max() < 1e-5


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"ratio": 0.0}, "ratio must be in"), ({"query_ratio": 1.5}, "query_ratio must be in"),
        ({"gate": 0.0}, "gate must be in"), ({"weight": -1.0}, "weight must be in"), ({"anchors": 0}, "anchors must be"),
        ({"group": 1}, "group must be"), ({"tokens": "subjects"}, "tokens must be one of"),
    ],
)  # fmt: skip
def test_what_cannot_be_is_refused(options: Any, message: str) -> None:
    with pytest.raises(ac.ControlError, match=message):
        ac.Share(**options)


def test_subjects_need_regions_and_one_control_shares() -> None:
    setting = flux(batch=2)
    with (
        ac.attach(setting.model, ac.Share(tokens="subject")),
        pytest.raises(ac.ControlError, match="no control of the"),
    ):
        setting.run()
    with (
        ac.attach(setting.model, [ac.Share(), ac.Share()]),
        pytest.raises(ac.ControlError, match="both share pictures"),
    ):
        setting.run()


def test_a_model_mask_is_widened() -> None:
    """Keys of others are not hidden by a mask of the own ones."""
    setting = flux(batch=2)
    tokens = setting.text + 24
    mask = torch.zeros(2, 1, 1, tokens)
    mask[:, :, :, 1] = float("-inf")
    with ac.attach(setting.model, ac.Share()), probe() as calls:
        setting.run(joint_attention_kwargs={"attention_mask": mask})
    call, _ = setting.controlled(calls)[0]
    assert call.mask is not None
    key = torch.cat([call.key[0], call.key[1][setting.text :]]).double()
    value = torch.cat([call.value[0], call.value[1][setting.text :]]).double()
    scores = torch.einsum("qhd,khd->hqk", call.query[0].double(), key) / key.shape[-1] ** 0.5
    scores[:, :, 1] = float("-inf")
    scores[:, : setting.text, tokens:] = float("-inf")
    assert (torch.einsum("hqk,khd->qhd", scores.softmax(-1), value) - call.out[0]).abs().max() < 1e-5


def test_it_survives_json() -> None:
    control = ac.Share(SCENES[0], readers="anchors", tokens="subject", ratio=0.5, window=(0.1, 0.6))
    back = ac.Control.from_dict(control.to_dict())
    assert back.to_dict() == control.to_dict()
