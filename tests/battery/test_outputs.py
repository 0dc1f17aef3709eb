"""Every way to perturb x every family: the formula in every layer, the branch, off, batches, half precision, LoRA."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import guest_kinds
import pytest
import torch
from harness import DOORS, FAMILIES, Setting, branches, flux, probe, sd3, traces, unet
from table_outputs import CASES, Call, Case

import attnctrl as ac
from attnctrl.controls import Control

every_door = pytest.mark.parametrize("door", DOORS.values(), ids=DOORS)
every_family = pytest.mark.parametrize("family", FAMILIES.values(), ids=FAMILIES)
every_case = pytest.mark.parametrize("case", CASES.values(), ids=CASES)


@contextmanager
def forwards(model: Any) -> Iterator[list[Any]]:
    """Rows of each forward of a model."""
    seen: list[Any] = []
    name = {"ZImageTransformer2DModel": "x", "UNet2DConditionModel": "sample"}.get(
        type(model).__name__, "hidden_states"
    )
    hook = model.register_forward_pre_hook(lambda _m, _a, k: seen.append(len(k[name])), with_kwargs=True)
    try:
        yield seen
    finally:
        hook.remove()


@every_family
@every_case
def test_every_layer_is_its_dense_formula(family: Any, case: Case) -> None:
    setting: Setting = family()
    control = case.control(setting, branch="all")
    with ac.attach(setting.model, control, branches=branches(setting.model)), probe() as calls:
        setting.run()
    suited = 0
    # an output makes kernel calls of its own inside the layer's, which the probe does not see
    for call, kinds in setting.controlled(calls):
        whole = Call.of(setting, kinds, call)
        expected = case.expected(whole) if case.suits(kinds) else whole.plain @ whole.value
        scale = max(1.0, float(whole.value.abs().max()))
        assert (call.out.transpose(1, 2) - expected).abs().max() < 1e-5 * scale
        suited += case.suits(kinds)
    assert suited == len(control.layers) > 0


@every_family
@every_door
def test_the_branch_adds_what_it_says_and_leaves_no_trace(family: Any, door: Any) -> None:
    """c + w (c - p), with p from the perturbation in the prompt's own branch."""
    setting: Setting = family(batch=2)
    case = CASES["identity"]
    control = case.control(setting, branch="all")
    base, before = setting.run(), traces(setting.model)
    with door(setting.model, control):
        weak = setting.run()
    with door(setting.model, case.control(setting, scale=2.5)), forwards(setting.model) as seen:
        out = setting.run()
    assert seen == [2, 2]
    g = 2.5 * (base - weak)
    if family is FAMILIES["pixart"]:
        g[:, 4:] = 0  # of eight channels, half are a variance
    assert torch.equal(out, base + g)
    assert (out - base).abs().max() > 1e-2
    assert torch.equal(setting.run(), base)
    assert traces(setting.model) == before


@every_family
@every_door
@pytest.mark.parametrize("off", [{"scale": 0}, {"strength": 0}, {"window": (0.4, 0.4)}, {"heads": ()}], ids=str)
def test_off_is_vanilla_and_costs_no_forward(family: Any, door: Any, off: dict[str, Any]) -> None:
    setting: Setting = family()
    base = setting.run()
    with door(setting.model, CASES["identity"].control(setting, **off)), forwards(setting.model) as seen:
        assert torch.equal(setting.run(), base)
    assert len(seen) == 1


@every_family
def test_a_batch_equals_its_rows(family: Any) -> None:
    setting: Setting = family(batch=2)
    control = [CASES["identity-soft"].control(setting), CASES["blur"].control(setting, scale=2.0)]
    with ac.attach(setting.model, control, branches=("cond",)), forwards(setting.model) as seen:
        together = setting.run()
        assert len(seen) == 3  # branches of two scales
        for row in range(2):
            single = setting.run(**setting.single(row))
            assert (single - together[row : row + 1]).abs().max() < 1e-5 * together.abs().max()


@every_family
@pytest.mark.parametrize("case", [CASES["identity-soft"], CASES["mean-query"]], ids=["identity-soft", "mean-query"])
def test_half_precision_stays_near_the_formula(family: Any, case: Case) -> None:
    setting: Setting = family(dtype=torch.bfloat16)
    with (
        ac.attach(setting.model, case.control(setting, branch="all"), branches=branches(setting.model)),
        probe() as calls,
    ):
        assert setting.run().isfinite().all()
    for call, kinds in setting.controlled(calls):
        whole = Call.of(setting, kinds, call)
        expected = case.expected(whole) if case.suits(kinds) else whole.plain @ whole.value
        assert (expected - call.out.transpose(1, 2)).abs().max() <= 2**-6 * call.value.abs().max()


@pytest.mark.parametrize("family", [flux, sd3, unet])
def test_with_an_adapter(family: Any) -> None:
    setting: Setting = family()
    plain = setting.run()
    guest_kinds.lora(setting)
    adapted = setting.run()
    assert (adapted - plain).abs().max() > 1e-3
    case = CASES["identity"]
    with ac.attach(setting.model, case.control(setting, branch="all"), branches=branches(setting.model)):
        weak = setting.run()
    with ac.attach(setting.model, case.control(setting), branches=branches(setting.model)):
        assert torch.equal(setting.run(), adapted + 3.0 * (adapted - weak))


@pytest.mark.parametrize("family", [sd3, unet])
def test_rows_without_the_prompt_get_the_same(family: Any) -> None:
    """Rows [uncond, cond] of two samples: the prompt's alone run again, and g = w (c - p) goes on both."""
    setting: Setting = family(batch=4)
    case, base = CASES["identity"], setting.run()
    with ac.attach(setting.model, case.control(setting, branch="cond"), branches=("uncond", "cond")):
        weak = setting.run()
    assert torch.equal(weak[:2], base[:2])
    with (
        ac.attach(setting.model, case.control(setting), branches=("uncond", "cond")) as handle,
        forwards(setting.model) as seen,
    ):
        out = setting.run()
    assert seen == [4, 2]
    g = 3.0 * (base[2:] - weak[2:])
    assert (out - base - torch.cat([g, g])).abs().max() < 1e-5 * out.abs().max()
    assert handle.report().controls[0].rows == (("perturbed", 0),)


def test_other_controls_act_in_the_branch_too() -> None:
    setting = flux()
    scene = [ac.Region("left", box=(0, 0, 0.5, 1.0))]
    both = [ac.Isolate(scene), ac.Perturb("uniform", branch="all", strength=0.5)]
    with ac.attach(setting.model, both[:1]):
        c = setting.run()
    with ac.attach(setting.model, both):
        p = setting.run()
    with ac.attach(setting.model, [both[0], ac.Perturb("uniform", strength=0.5)]) as handle:
        assert torch.equal(setting.run(), c + 3.0 * (c - p))
    isolate, perturb = handle.report().controls
    assert (isolate.rows, perturb.rows) == ((("cond", 0), ("perturbed", 0)), (("perturbed", 0),))


def test_equal_branches_are_one_and_others_add() -> None:
    setting = flux()
    base = setting.run()
    first, second = "double:0", "single:1"
    with ac.attach(setting.model, [ac.Perturb(layers=first), ac.Perturb(layers=second)]), forwards(setting.model) as n:
        together = setting.run()
    assert len(n) == 2
    with ac.attach(setting.model, ac.Perturb(layers=[first, second])):
        assert torch.equal(setting.run(), together)
    increments = []
    for layers, scale in ((first, 3.0), (second, 1.0)):
        with ac.attach(setting.model, ac.Perturb(layers=layers, scale=scale)):
            increments.append(setting.run() - base)
    stack = [ac.Perturb(layers=first), ac.Perturb(layers=second, scale=1.0)]
    with ac.attach(setting.model, stack), forwards(setting.model) as n:
        out = setting.run()
    assert len(n) == 3
    assert (out - base - sum(increments)).abs().max() < 1e-5 * out.abs().max()


def test_layer_1_is_not_layer_10() -> None:
    setting = Setting(tiny_flux_deep(), flux().inputs, [None] * 12)
    with ac.attach(setting.model, ac.Perturb(layers="single:1")) as handle:
        setting.run()
    assert handle.report().controls[0].acted == "single:1"


def tiny_flux_deep() -> Any:
    import tiny

    return tiny.flux(double=1, single=11)


def test_heads_by_layer_are_those_heads_of_that_layer() -> None:
    setting = flux()
    control = ac.Perturb(heads={"double:1": [1], "single_transformer_blocks.0.attn": [0]}, branch="all")
    with ac.attach(setting.model, control), probe() as calls:
        setting.run()
    touched = [
        [head for head in range(2) if torch.equal(call.out[:, :, head], call.value[:, :, head])] for call in calls
    ]
    assert touched == [[], [1], [0], []]
    again = Control.from_dict(control.to_dict())
    assert (again.heads, again.layers) == (control.heads, control.layers)


def test_a_learned_variance_is_not_guided() -> None:
    """PixArt models predict as many channels of variance behind the noise."""
    setting = FAMILIES["pixart"]()
    base = setting.run()
    assert base.shape[1] == 2 * setting.inputs["hidden_states"].shape[1]
    with ac.attach(setting.model, ac.Perturb(layers="self", branch="all")):
        weak = setting.run()
    with ac.attach(setting.model, ac.Perturb(layers="self"), branches=("cond",)):
        out = setting.run()
    assert torch.equal(out[:, 4:], base[:, 4:])
    assert torch.equal(out[:, :4], base[:, :4] + 3.0 * (base - weak)[:, :4])
    assert (out - base)[:, :4].abs().max() > 1e-4


def test_an_error_in_the_perturbed_forward_leaves_the_model_as_it_was() -> None:
    setting = flux()
    base, before = setting.run(), traces(setting.model)
    with (
        pytest.raises(ac.ControlError, match="no head 7: the layer has 2"),
        ac.attach(setting.model, ac.Perturb(heads=[7])),
    ):
        setting.run()
    assert traces(setting.model) == before
    assert torch.equal(setting.run(), base)
    with ac.attach(setting.model, ac.Perturb(heads=[1])):
        assert (setting.run() - base).abs().max() > 1e-3


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (
            lambda: ac.Perturb("identity", layers="cross"),
            r"identity.*mid_block.*cross attention|cross attention.*'self'",
        ),
        (lambda: ac.Perturb("uniform", rows="text"), r"has no rows 'text'; its queries are image"),
        (lambda: ac.Perturb("max", block="within"), r"block='within' is defined for kind='identity'"),
        (lambda: ac.Perturb("blur", rows="text"), r"smooths over a picture"),
        (lambda: ac.Perturb("blur", sigma=0.0), r"sigma must be in \[0.001, inf\)"),
        (lambda: ac.Perturb("identiy"), r"kind must be one of.*Did you mean 'identity'"),
        (lambda: ac.Perturb(heads={"mid.self:0": [0]}, layers="mid"), r"heads by layer name the layers"),
        (lambda: ac.Perturb(heads={"mid": [0]}), r"want a layer's own name or 'stack:number'.*Write 'mid.self:0'"),
    ],
)
def test_errors_say_what_to_do(make: Any, message: str) -> None:
    setting = unet()
    with pytest.raises(ac.ControlError, match=message), ac.attach(setting.model, make(), branches=("cond",)):
        setting.run()


def test_processors_have_a_name_of_their_own() -> None:
    setting = flux()
    made = ac.processors(setting.model, ac.Perturb(layers="double:0"))
    assert type(made["transformer_blocks.0.attn.processor"]).__name__ == "PerturbedAttnProcessor"
    assert isinstance(made["transformer_blocks.0.attn.processor"], ac.PerturbedAttnProcessor)


def test_explained_before_it_runs() -> None:
    setting = flux()
    told = ac.explain(setting.model, ac.Perturb(layers="single:1", heads=[0], window=(0, 0.5)), grid=(4, 6), steps=4)
    assert "steps 0-1" in str(told)
    assert "single:1: identity by 1, heads 0" in str(told)
