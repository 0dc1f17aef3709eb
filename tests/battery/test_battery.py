"""Every control x every family x both doors."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
import torch
from harness import DOORS, FAMILIES, Setting, dense, probe, tokens, traces, weights
from table import CASES, Case

import attnctrl as ac

every_case = pytest.mark.parametrize("case", CASES.values(), ids=CASES)
every_door = pytest.mark.parametrize("door", DOORS.values(), ids=DOORS)
every_family = pytest.mark.parametrize("family", FAMILIES.values(), ids=FAMILIES)


def passes(setting: Setting, case: Case, scene: list[Any]) -> list[tuple[torch.Tensor, torch.Tensor | None]]:
    """Weights and shares of each pass, token by token."""
    row = tokens(setting, scene, texts=case.texts, overlap=case.overlap or "union")
    main = weights(row, *case.rules(scene))
    if not case.base_ratio:
        return [(main, None)]
    opened = weights(row, lambda q, k: float("text" not in (q.kind, k.kind)))
    shares = {"global": 1.0, "text": 0.0, "image": case.base_ratio, "reference": case.base_ratio}
    share = torch.tensor([shares[token.kind] for token in row])
    return [(main, 1 - share), (opened, share)]


@every_family
@every_door
@every_case
def test_on_differs_and_leaves_no_trace(family: Any, door: Any, case: Case) -> None:
    setting = family(references=case.references)
    base, before = setting.run(), traces(setting.model)
    with door(setting.model, case.controls(case.scene())):
        out = setting.run()
    assert (out - base).abs().max() > 1e-2
    assert torch.equal(setting.run(), base)
    assert traces(setting.model) == before


@every_family
@every_door
@every_case
def test_off_equals_base(family: Any, door: Any, case: Case) -> None:
    setting = family(references=case.references)
    base = setting.run()
    off = [replace(control, strength=0.0) for control in case.controls(case.scene())]
    with door(setting.model, off), probe() as calls:
        assert torch.equal(setting.run(), base)
        assert all(getattr(module, "_attnctrl", None) is None for module in setting.model.modules())
    assert calls[0].query.shape[1] == setting.text + len(setting.inputs["img_ids"])


@every_family
@every_door
@every_case
def test_equals_the_dense_formula_in_every_layer(family: Any, door: Any, case: Case) -> None:
    setting, scene = family(references=case.references), case.scene()
    expected = passes(setting, case, scene)
    with door(setting.model, case.controls(scene)), probe() as calls:
        setting.run()
    assert len(calls) == 4
    for call in calls:
        assert (dense(call.query, call.key, call.value, *expected) - call.out).abs().max() < 1e-5


@every_family
@every_case
def test_blocked_tokens_have_no_influence(family: Any, case: Case) -> None:
    """In each layer the gradient of an output row with respect to an unseen value is exactly zero, and to a seen one is not."""
    setting, scene = family(references=case.references), case.scene()
    sees = (
        sum(
            (table > 0).double() * (1 if share is None else share[:, None])
            for table, share in passes(setting, case, scene)
        )
        > 0
    )
    columns = torch.unique(sees.T, dim=0)
    with ac.attach(setting.model, case.controls(scene)), probe(grad=True) as calls:
        setting.run()
    for call in calls:
        for column in columns:
            blind = (call.out[:, ~column] ** 2).sum()
            if blind.requires_grad:
                grad = torch.autograd.grad(blind, call.value, retain_graph=True)[0]
                unseen = (column == sees.T).all(-1)
                assert grad[:, unseen].abs().max() == 0
            grad = torch.autograd.grad((call.out[:, column] ** 2).sum(), call.value, retain_graph=True)[0]
            assert (grad[:, (column == sees.T).all(-1)].abs().sum(dim=(0, 2, 3)) > 0).all()


@every_family
@every_case
def test_half_precision_has_no_nan_and_stays_near_the_formula(family: Any, case: Case) -> None:
    setting, scene = family(references=case.references, dtype=torch.bfloat16), case.scene()
    expected = passes(setting, case, scene)
    with ac.attach(setting.model, case.controls(scene)), probe() as calls:
        assert setting.run().isfinite().all()
    for call in calls:
        want = dense(call.query, call.key, call.value, *expected)
        # one rounding of the output and one of the attention weights, of 8 bits each
        assert (want - call.out.double()).abs().max() <= 2**-6 * call.value.abs().max()


@every_family
@every_door
@every_case
def test_a_batch_equals_its_rows(family: Any, door: Any, case: Case) -> None:
    setting = family(batch=2, references=case.references)
    controls = case.controls(case.scene())
    with door(setting.model, controls):
        together = setting.run()
    for row in range(2):
        single = {key: value[row : row + 1] if key in PER_ROW else value for key, value in setting.inputs.items()}
        with door(setting.model, controls):
            assert (setting.run(**single) - together[row : row + 1]).abs().max() < 2e-5


PER_ROW = ("hidden_states", "encoder_hidden_states", "pooled_projections", "timestep")


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
        single = {key: value[row : row + 1] if key in PER_ROW else value for key, value in setting.inputs.items()}
        # two images per prompt stand next to each other
        with door(setting.model, [ac.Isolate(), ac.Regions(first if row < 2 else second)]):
            assert (setting.run(**single) - together[row : row + 1]).abs().max() < 2e-5
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
    layers = ["double:1", "single:0"]
    on = passes(setting, case, scene)
    row = tokens(setting, scene, texts=case.texts)
    off = weights(row, lambda q, k: float(q == k or "text" not in (q.kind, k.kind)))
    with door(setting.model, [replace(control, layers=layers) for control in case.controls(scene)]), probe() as calls:
        setting.run()
    for call, expected in zip(calls, ([(off, None)], on, on, [(off, None)]), strict=True):
        assert (dense(call.query, call.key, call.value, *expected) - call.out).abs().max() < 1e-5
