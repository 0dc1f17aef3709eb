"""Every control x every family x both doors."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
import torch
from harness import (
    DOORS,
    FAMILIES,
    WITH_REFERENCES,
    Kinds,
    Setting,
    Token,
    branches,
    dense,
    probe,
    tokens,
    traces,
    weights,
)
from table import CASES, Case

import attnctrl as ac
from attnctrl.families import family_of

every_door = pytest.mark.parametrize("door", DOORS.values(), ids=DOORS)
every_family = pytest.mark.parametrize("family", FAMILIES.values(), ids=FAMILIES)
every_row = pytest.mark.parametrize(
    ("family", "case"),
    [
        pytest.param(family, case, id=f"{name}-{row}")
        for name, family in FAMILIES.items()
        for row, case in CASES.items()
        if name in WITH_REFERENCES or not case.references
    ],
)
Passes = list[tuple[torch.Tensor, torch.Tensor | None]]


def made(family: Any, case: Case, **options: Any) -> Setting:
    return family(**options, **({"references": case.references} if case.references else {}))


def sides(setting: Setting, kinds: Kinds, scene: list[Any], **options: Any) -> tuple[list[Token], list[Token]]:
    queries, keys = (
        tokens(setting, scene, kinds=side, grid=kinds.grid, **options) for side in (kinds.queries, kinds.keys)
    )
    return queries, keys


def passes(setting: Setting, case: Case, scene: list[Any], kinds: Kinds) -> Passes:
    """Weights and shares of each pass of a kernel call, token by token."""
    queries, keys = sides(setting, kinds, scene, texts=case.texts, overlap=case.overlap or "union")
    main = weights(queries, keys, *case.rules(scene))
    # in cross attention a query that would see nothing reads the prompt
    main[(main == 0).all(1)] = torch.tensor([float(token.kind == "global") for token in keys], dtype=torch.float64)
    deep = max((len(token.members) for token in queries if token.kind == "image"), default=0)
    if case.mixes and deep > 1 and "image" not in kinds.keys.split():
        # a softmax for each text of a token, and their mean
        turns = [[_in_turn(token, turn) for token in queries] for turn in range(deep)]
        counts = torch.tensor([max(1, len(token.members)) for token in queries])
        return [
            (weights(turned, keys, *case.rules(scene)), (counts > turn) / counts) for turn, turned in enumerate(turns)
        ]
    if not case.base_ratio:
        return [(main, None)]
    opened = weights(queries, keys, lambda q, k: float("text" not in (q.kind, k.kind)))
    shares = {"global": 1.0, "text": 0.0, "register": 0.0, "image": case.base_ratio, "reference": case.base_ratio}
    share = torch.tensor([shares[token.kind] for token in queries])
    return [(main, 1 - share), (opened, share)]


def _in_turn(token: Token, turn: int) -> Token:
    mine = sorted(token.members)
    return replace(token, members=frozenset([mine[turn]])) if turn < len(mine) else token


@every_row
@every_door
def test_on_differs_and_leaves_no_trace(family: Any, door: Any, case: Case) -> None:
    setting = made(family, case)
    base, before = setting.run(), traces(setting.model)
    with door(setting.model, case.controls(case.scene())):
        out = setting.run()
    assert (out - base).abs().max() > 1e-2
    assert torch.equal(setting.run(), base)
    assert traces(setting.model) == before


@every_row
@every_door
def test_off_equals_base(family: Any, door: Any, case: Case) -> None:
    setting = made(family, case)
    base = setting.run()
    off = [replace(control, strength=0.0) for control in case.controls(case.scene())]
    with door(setting.model, off), probe() as calls:
        assert torch.equal(setting.run(), base)
        assert all(getattr(module, "_attnctrl", None) is None for module in setting.model.modules())
    scene = case.scene()
    for call, kinds in setting.controlled(calls):
        queries, keys = sides(setting, kinds, scene, texts=False)
        assert (call.query.shape[1], call.key.shape[1]) == (len(queries), len(keys))


@every_row
@every_door
def test_equals_the_dense_formula_in_every_layer(family: Any, door: Any, case: Case) -> None:
    setting, scene = made(family, case), case.scene()
    with door(setting.model, case.controls(scene)), probe() as calls:
        setting.run()
    for call, kinds in setting.controlled(calls):
        expected = passes(setting, case, scene, kinds)
        assert call.error(dense(call.query, call.key, call.value, *expected)) < 1e-5


@every_row
def test_blocked_tokens_have_no_influence(family: Any, case: Case) -> None:
    """In each layer the gradient of an output row with respect to an unseen value is exactly zero, and to a seen one is not."""
    setting, scene = made(family, case), case.scene()
    with ac.attach(setting.model, case.controls(scene), branches=branches(setting.model)), probe(grad=True) as calls:
        setting.run()
    for call, kinds in setting.controlled(calls):
        parts = passes(setting, case, scene, kinds)
        sees = sum((table > 0).double() * (1 if share is None else share[:, None]) for table, share in parts) > 0
        for column in torch.unique(sees.T, dim=0):
            alike = (column == sees.T).all(-1)
            if not column.all():
                blind = (call.out[:, ~column] ** 2).sum()
                grad = torch.autograd.grad(blind, call.value, retain_graph=True)[0]
                assert grad[:, alike].abs().max() == 0
            grad = torch.autograd.grad((call.out[:, column] ** 2).sum(), call.value, retain_graph=True)[0]
            assert (grad[:, alike].abs().sum(dim=(0, 2, 3)) > 0).all()


@every_row
def test_half_precision_has_no_nan_and_stays_near_the_formula(family: Any, case: Case) -> None:
    setting, scene = made(family, case, dtype=torch.bfloat16), case.scene()
    with ac.attach(setting.model, case.controls(scene), branches=branches(setting.model)), probe() as calls:
        assert setting.run().isfinite().all()
    for call, kinds in setting.controlled(calls):
        expected = passes(setting, case, scene, kinds)
        want = dense(call.query, call.key, call.value, *expected)
        # one rounding of the output and one of the attention weights, of 8 bits each
        assert (want - call.out.double()).abs().max() <= 2**-6 * call.value.abs().max()


@every_row
@every_door
def test_a_batch_equals_its_rows(family: Any, door: Any, case: Case) -> None:
    setting = made(family, case, batch=2)
    controls = case.controls(case.scene())
    with door(setting.model, controls):
        together = setting.run()
    for row in range(2):
        with door(setting.model, controls):
            assert (setting.run(**setting.single(row)) - together[row : row + 1]).abs().max() < 2e-5


@every_family
@every_door
def test_a_batch_of_scenes_equals_the_scenes_one_by_one(family: Any, door: Any) -> None:
    """Different regions and text lengths per sample; texts are padded to the longest with tokens that nobody sees."""
    setting = family(batch=4)
    first = CASES["regions"].scene()
    second = [ac.Region("whole", box=(0.5, 0.0, 1.0, 1.0), prompt_embeds=torch.randn(11, 12))]
    with door(setting.model, [ac.Isolate(), ac.Regions([first, second])]):
        together = setting.run()
    for row in range(4):
        # two images per prompt stand next to each other
        with door(setting.model, [ac.Isolate(), ac.Regions(first if row < 2 else second)]):
            assert (setting.run(**setting.single(row)) - together[row : row + 1]).abs().max() < 2e-5
    with (
        door(setting.model, ac.Regions([first, second, first])),
        pytest.raises(ac.LayoutError, match=r"3 samples.*4 rows"),
    ):
        setting.run()


@every_family
@every_door
@pytest.mark.parametrize("case", [CASES["stack"], CASES["isolate"]], ids=["stack", "isolate"])
def test_only_selected_layers_are_touched(family: Any, door: Any, case: Case) -> None:
    """In other layers the model's own tokens see each other as ever, and appended texts are seen by nobody."""
    setting, scene = family(), case.scene()
    names = [layer.name for layer in family_of(setting.model).layers(setting.model)]
    controls = [replace(control, layers=names[1:3]) for control in case.controls(scene)]
    with door(setting.model, controls), probe() as calls:
        setting.run()
    for number, (call, kinds) in enumerate(setting.controlled(calls)):
        if number in (1, 2):
            expected = passes(setting, case, scene, kinds)
        else:
            seen = weights(
                *sides(setting, kinds, scene, texts=case.texts),
                lambda q, k: float(q == k or "text" not in (q.kind, k.kind)),
            )
            expected = [(seen, None)]
        assert call.error(dense(call.query, call.key, call.value, *expected)) < 1e-5


@every_family
def test_layout_probe(family: Any) -> None:
    """Another text moves exactly the rows that the family calls text, up to the first layer that reads it."""
    setting = family()
    spoken = family_of(setting.model)
    frames = spoken.frames(setting.model, setting.inputs)[0]
    text = spoken.text(setting.inputs)
    other = torch.randn_like(text) if isinstance(text, torch.Tensor) else [torch.randn_like(row) for row in text]
    with probe() as before, torch.no_grad():
        setting.run()
    with probe() as after, torch.no_grad():
        setting.run(**{spoken.prompt: other})
    layers = spoken.layers(setting.model)
    first = next(i for i, layer in enumerate(layers) if "text.global" in frames[layer.frame])
    pairs = setting.controlled(list(zip(before, after, strict=True)))
    for layer, ((a, b), _) in list(zip(layers, pairs, strict=True))[: first + 1]:
        frame = frames[layer.frame]
        for side, x, y in ((frame.queries, a.query, b.query), (frame.keys, a.key, b.key)):
            moved = (x - y).abs().amax(dim=(0, 2, 3)) > 1e-6
            reads = torch.zeros(side.tokens, dtype=torch.bool)
            if "text.global" in side:
                reads[side["text.global"].start : side["text.global"].stop] = True
            assert torch.equal(moved, reads)


@pytest.mark.parametrize("name", ["pixart", "ltx", "qwen", "chroma", "hunyuan-video", "lumina2", "hunyuan-image"])
@pytest.mark.parametrize(
    "case", [CASES["stack"], CASES["isolate"], CASES["regions-base"]], ids=["stack", "isolate", "regions-base"]
)
def test_padding_that_the_model_masks_changes_nothing(name: str, case: Case) -> None:
    """The model's own mask is merged with the plans: a padded prompt under controls equals the bare one."""
    setting = FAMILIES[name]()
    prompt = setting.inputs["encoder_hidden_states"]
    padded = torch.cat([prompt, 3 * torch.randn(1, 3, prompt.shape[-1])], dim=1)
    mask = torch.tensor([[1.0] * prompt.shape[1] + [0.0] * 3])
    changes: dict[str, Any] = {"encoder_hidden_states": padded}
    if name == "qwen":
        changes["encoder_hidden_states_mask"] = mask.bool()
    elif name == "chroma":
        changes["attention_mask"] = torch.cat([mask, torch.ones(1, 24)], dim=1).bool()
        changes["txt_ids"] = torch.zeros(padded.shape[1], 3)
    else:
        # Lumina2 cuts by its sum
        changes["encoder_attention_mask"] = mask.long() if name == "lumina2" else mask
    with ac.attach(setting.model, case.controls(case.scene()), branches=("cond",)):
        bare = setting.run()
        assert (setting.run(**changes) - bare).abs().max() < 1e-4
    assert (setting.run() - bare).abs().max() > 1e-2


@every_family
def test_both_doors_give_the_same_bits(family: Any) -> None:
    setting, case = family(), CASES["stack"]
    results = []
    for door in DOORS.values():
        with door(setting.model, case.controls(case.scene())):
            results.append(setting.run())
    assert torch.equal(*results)
