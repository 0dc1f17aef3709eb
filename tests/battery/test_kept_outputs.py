"""Outputs of attention kept from step to step on real models: what serves, what is computed, and what is never mixed up."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, nullcontext
from types import SimpleNamespace
from typing import Any

import pytest
import settings_video as video
import tiny_pipes
import torch
from guest_caches import pyramid
from harness import FAMILIES, Setting, flux, probe, regions, sd3, traces, unet
from torch import Tensor

import attnctrl as ac
from attnctrl.engine import engine_of
from attnctrl.families import family_of
from attnctrl.select import describe

EVERY = {**FAMILIES, "sana": video.sana}
TIMES = (950.0, 700.0, 500.0, 400.0, 300.0, 200.0, 50.0)
PAB = {"every": 2, "cross_every": 3}
SERVES = {"self": (1, 3, 5), "cross": (1, 2, 4, 5)}
"""Steps of these times at which PAB serves."""


def scheduler(times: Sequence[float] = TIMES) -> Any:
    marks = torch.tensor(times)
    return SimpleNamespace(timesteps=marks, sigmas=marks / 1000, num_inference_steps=len(marks))


def attached(setting: Setting, controls: Any, branches: tuple[str, ...] = (), times: Sequence[float] = TIMES) -> Any:
    return ac.attach(setting.model, controls, scheduler=scheduler(times), branches=branches)


def forward(setting: Setting, step: int, *, branch: str = "", moving: float = 0.1, **more: Any) -> Tensor:
    """One step on latents of its own."""
    setting = Setting(setting.model, {**setting.inputs, **more}, setting.calls)
    inputs, unit = setting.inputs, 1000 if type(setting.model).__name__.startswith("Flux") else 1
    hidden = family_of(setting.model).hidden
    changes = {
        "timestep": torch.full_like(inputs["timestep"], TIMES[step] / unit, dtype=torch.float32),
        hidden: inputs[hidden] * (1 - moving * step),
    }
    with setting.model.cache_context(branch) if branch else nullcontext():
        return setting.run(**changes)


@contextmanager
def by_hand(setting: Setting, action: Callable[[bool], str]) -> Iterator[None]:
    """Modules that run and whose output is then kept or replaced, as `action` (of cross attention or not) says."""
    kept: dict[str, Any] = {}
    family, handles = family_of(setting.model), []
    for layer in family.layers(setting.model):

        def hook(_m: Any, _a: Any, output: Any, name: str = layer.name, cross: bool = "cross" in layer.stack) -> Any:
            return kept[name] if action(cross) == "reuse" else kept.update({name: output})

        handles.append(layer.module.register_forward_hook(hook))
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


def one_picture() -> Setting:
    """FLUX with two texts on the same latents."""
    setting = flux(batch=2)
    setting.inputs["hidden_states"] = setting.inputs["hidden_states"][1:].expand(2, -1, -1).contiguous()
    return setting


def kept(setting: Setting) -> Any:
    return engine_of(setting.model)._wraps.kept


@torch.no_grad()
@pytest.mark.parametrize("family", [flux, sd3, unet])
def test_pyramid_broadcast_is_the_rule_done_by_hand(family: Callable[..., Setting]) -> None:
    setting = family(batch=2)
    before, now = traces(setting.model), {"step": 0}

    def action(cross: bool) -> str:
        return "reuse" if now["step"] in SERVES["cross" if cross else "self"] else "store"

    with by_hand(setting, action):
        wanted = []
        for now["step"] in range(len(TIMES)):
            wanted.append(forward(setting, now["step"]))
    projections: list[str] = []
    hooks = [
        layer.module.to_q.register_forward_hook(lambda *_, name=layer.frame: projections.append(name[:5]))
        for layer in family_of(setting.model).layers(setting.model)
    ]
    with attached(setting, ac.Reuse(**PAB), ("uncond", "cond")) as handle:
        for step in range(len(TIMES)):
            projections.clear()
            with probe() as calls:
                out = forward(setting, step)
            assert torch.equal(out, wanted[step]), step
            served = [name for name in ("cross", "self") if step in SERVES[name]]
            runs = [name for name in projections if ("cross" if name == "cross" else "self") not in served]
            assert projections == runs
            assert len(calls) == len(projections)
            if step == 1:
                assert projections == []
                size = {"text_tokens": 5, "branches": 2, "grid": setting.grid}
                assert kept(setting).nbytes == ac.Reuse(**PAB).predict(setting.model, **size)
        assert kept(setting).entries == {}
        (told,) = handle.report().controls
    serving = SERVES["cross"] if family is unet else SERVES["self"]
    assert set(told.steps) == set(serving) | set(SERVES["self"])
    assert told.plans == ("outputs kept by pab",)
    for hook in hooks:
        hook.remove()
    assert traces(setting.model) == before


@torch.no_grad()
def test_branches_are_never_mixed_up_one_by_one_or_as_a_batch() -> None:
    setting = one_picture()
    perturb = ac.Perturb("uniform", layers="single:1")

    def by_one(*controls: Any) -> list[Tensor]:
        outputs = []
        with attached(setting, controls):
            for step in range(len(TIMES)):
                pair = [
                    forward(setting, step, branch=name, **setting.single(row))
                    for name, row in (("cond", 1), ("uncond", 0))
                ]
                outputs.append(torch.cat(pair[::-1]))
        return outputs

    for more in ((), (perturb,)):
        alone = by_one(ac.Reuse(), *more)
        with attached(setting, [ac.Reuse(), *more], ("uncond", "cond")):
            together = [forward(setting, step) for step in range(len(TIMES))]
        for one, other in zip(alone, together, strict=True):
            assert (one - other).abs().max() < 1e-4 * one.abs().max()
        plain = by_one(*more) if more else [forward(setting, step) for step in range(len(TIMES))]
        moved = [bool((a - b).abs().max() > 1e-3) for a, b in zip(alone, plain, strict=True)]
        assert moved == [step in SERVES["self"] for step in range(len(TIMES))]


FURTHER = {
    "alone": (),
    "perturbed": (ac.Perturb("uniform", layers="single:1"),),
    "skipped": (ac.Skip(layers="double:0", window=(0, 1)),),
    "two branches": (ac.Perturb("uniform", layers="single:1"), ac.Perturb("identity", layers="double:0", scale=1.0)),
    "zeroed": (ac.Skip("attention", layers="single:0", branch="all", window=(0, 1)),),
}


@torch.no_grad()
@pytest.mark.parametrize("further", FURTHER.values(), ids=FURTHER)
def test_steps_that_are_alike_lose_nothing(further: Any) -> None:
    """What is kept is then what would be computed, in each branch."""
    setting = one_picture()
    rows = [("cond", setting.single(1)), ("uncond", setting.single(0))]

    def step(number: int, marks: Any) -> list[Tensor]:
        marks.step_index = number
        found = []
        for branch, inputs in rows:
            with setting.model.cache_context(branch):
                found.append(setting.run(**{**inputs, "timestep": torch.tensor([0.5])}))
        return found

    marks = scheduler([500.0] * 4)
    with ac.attach(setting.model, [ac.Isolate(regions()), *further], scheduler=marks):
        wanted = step(0, marks)
    with ac.attach(setting.model, [ac.Reuse(), ac.Isolate(regions()), *further], scheduler=marks) as handle:
        for number in range(4):
            with probe() as calls:
                assert all(map(torch.equal, step(number, marks), wanted)), number
            # what is left out is not kept either, so its module runs, once in each branch
            served = 2 * (further == FURTHER["zeroed"])
            assert (len(calls) == served) == (number in (1, 3))
    told = handle.report().controls
    assert told[0].steps == (1, 3)
    assert told[1].steps == (0, 2)


@torch.no_grad()
@pytest.mark.parametrize("family", EVERY.values(), ids=EVERY)
def test_every_family_is_served_what_it_would_compute(family: Callable[..., Setting]) -> None:
    setting = family()
    known = family_of(setting.model)
    mark = float(known.timestep(setting.inputs).reshape(-1)[0])
    marks, wanted = scheduler([mark] * 3), setting.run()
    stacks = {layer.stack for layer in known.layers(setting.model) if not (layer.linear or layer.stack in known.fused)}
    reuse = ac.Reuse(between=(0, 1000), layers=sorted(stacks))
    ran = []
    with ac.attach(setting.model, reuse, scheduler=marks, branches=("cond",)) as handle:
        for marks.step_index in range(3):
            with probe() as calls:
                assert torch.equal(setting.run(), wanted)
            ran.append(len(calls))
    (told,) = handle.report().controls
    served = [layer for layer in known.layers(setting.model) if layer.stack in stacks]
    assert told.steps == (1,)
    assert told.acted == describe(served)
    assert ran[0] - ran[1] == sum(layer.call + 1 for layer in served)
    assert ran[2] == ran[0]


@torch.no_grad()
@pytest.mark.parametrize("family", [flux, unet])
def test_a_control_that_begins_at_a_step_that_would_be_served_acts(family: Callable[..., Setting]) -> None:
    setting = family()
    late = ac.Isolate(regions(), window=ac.Sigma(0.45, 0.25))  # steps 3 and 4
    with attached(setting, late, ("cond",)):
        wanted = [forward(setting, step) for step in range(len(TIMES))]
    with attached(setting, [late, ac.Reuse()], ("cond",)) as handle:
        found = [forward(setting, step) for step in range(len(TIMES))]
    same = [torch.equal(one, other) for one, other in zip(found, wanted, strict=True)]
    # at 3 and 5 the controls are others than at the step before
    assert same == [True, False, True, True, True, True, True]
    assert [one.steps for one in handle.report().controls] == [(3, 4), (1,)]


@torch.no_grad()
def test_layers_that_are_recorded_are_computed() -> None:
    setting = flux()
    bank = ac.Bank()
    with attached(setting, [ac.Reuse(), ac.Keep(bank=bank, layers="double")], ("cond",)) as handle:
        for step in range(4):
            with probe() as calls:
                forward(setting, step)
            assert len(calls) == (2 if step in (1, 3) else 4)
    assert handle.report().controls[0].acted == "single:0-1"
    assert {entry.step for entry in bank.entries} == {0, 1, 2, 3}


@torch.no_grad()
def test_nothing_is_kept_from_run_to_run_after_errors_or_when_controls_come_and_go() -> None:
    setting = flux()
    other = setting.inputs["encoder_hidden_states"] + 1
    with attached(setting, ac.Reuse(), ("cond",)):
        fresh = [forward(setting, step, encoder_hidden_states=other) for step in range(4)]
    marks = scheduler()
    handle = ac.attach(setting.model, ac.Reuse(), scheduler=marks, branches=("cond",))
    store = kept(setting)
    for step in range(3):
        forward(setting, step)
    assert len(store.entries) == 4
    # another run: its tensors of timesteps are others, though no step tells
    marks.timesteps = marks.timesteps.clone()
    with probe() as calls:
        forward(setting, 3)
    assert len(calls) == 4
    for step, wanted in enumerate(fresh):
        assert torch.equal(forward(setting, step, encoder_hidden_states=other), wanted)
    hook = setting.model.single_transformer_blocks[0].register_forward_pre_hook(lambda *_: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        forward(setting, 2)
    hook.remove()
    assert store.entries == {}
    forward(setting, 2)
    # another batch
    wide = flux(batch=2)
    with probe() as calls:
        forward(setting, 3, **{**wide.single(0), "hidden_states": wide.inputs["hidden_states"][:1]})
    assert len(calls) == 0
    forward(setting, 4)
    with ac.attach(setting.model, ac.Isolate(regions())):
        assert store.entries == {}
        forward(setting, 4)
        assert len(store.entries) == 4
    assert store.entries == {}
    forward(setting, 4)
    handle.detach()
    assert store.entries == {}


@torch.no_grad()
def test_off_and_one_in_one_are_the_plain_model_to_the_bit() -> None:
    setting = unet()
    base = [forward(setting, step) for step in range(4)]
    never = ac.Reuse("tgate", gate=100, early=1)
    for control in (ac.Reuse(every=1, cross_every=1), ac.Reuse(strength=0), ac.Reuse(window=(0.5, 0.5)), never):
        handle = attached(setting, control, ("cond",))
        for step, wanted in enumerate(base):
            with probe() as calls:
                assert torch.equal(forward(setting, step), wanted)
            assert len(calls) == len(setting.calls)
        handle._remove()


@torch.no_grad()
def test_processors_open_the_same_door() -> None:
    setting = flux()
    plain = forward(setting, 3)
    with attached(setting, ac.Reuse(), ("cond",)):
        wanted = [forward(setting, step) for step in range(4)]
    originals = dict(setting.model.attn_processors)
    made = ac.processors(setting.model, ac.Reuse(), scheduler=scheduler(), branches=("cond",))
    ac.set_processors(setting.model, made)
    for step, expected in enumerate(wanted):
        assert torch.equal(forward(setting, step), expected)
    store = kept(setting)
    assert len(store.entries) == 4
    ac.set_processors(setting.model, originals)
    assert torch.equal(forward(setting, 3), plain)
    assert not torch.equal(wanted[3], plain)
    assert store.entries == {}


@torch.no_grad()
def test_what_does_not_go_together_is_refused() -> None:
    setting = flux()
    with attached(setting, ac.Reuse("tgate"), ("cond",)), pytest.raises(ac.UnsupportedModelError, match="policy='pab'"):
        forward(setting, 0)
    with attached(setting, [ac.Reuse(), ac.Reuse()], ("cond",)), pytest.raises(ac.ControlError, match="Two 'reuse'"):
        forward(setting, 0)
    with (
        ac.attach(setting.model, ac.Reuse(), branches=("cond",)),
        pytest.raises(ac.ScheduleError, match="goes by steps"),
    ):
        forward(setting, 0)
    pyramid()(setting.model)
    with attached(setting, ac.Reuse(), ("cond",)), pytest.raises(ac.ControlError, match=r"model\.disable_cache"):
        forward(setting, 0)


def gated_run(
    pipe: Any, controls: Any, *, steps: int = 6, gate: int = 3, noise: float = 0.0
) -> tuple[Tensor, list[int]]:
    """A run that drops guidance at the gate, and the rows of its forwards; `noise` on all texts from there on."""
    rows: list[int] = []

    def drop(pipe: Any, step: int, timestep: Any, given: dict[str, Any]) -> dict[str, Any]:
        if step != gate - 1:
            return given
        pipe._guidance_scale = 1.0
        return {"prompt_embeds": given["prompt_embeds"].chunk(2)[-1] + noise}

    hook = pipe.unet.register_forward_hook(lambda _m, _a, out: rows.append(len(out[0])))
    size = {"height": 32, "width": 48, "output_type": "latent", "guidance_scale": 3.0, "num_inference_steps": steps}
    try:
        with ac.attach(pipe, controls) if controls else nullcontext():
            found = pipe(
                "a red circle",
                generator=torch.Generator().manual_seed(0),
                callback_on_step_end=drop,
                callback_on_step_end_tensor_inputs=["prompt_embeds"],
                **size,
            ).images
    finally:
        hook.remove()
    return found, rows


@torch.no_grad()
def test_behind_the_gate_cross_attention_is_the_mean_and_texts_do_nothing() -> None:
    pipe = tiny_pipes.sd()
    control = ac.Reuse("tgate", gate=3, warmup=1, early=2)
    plain, rows = gated_run(pipe, None)
    assert rows == [2, 2, 2, 1, 1, 1]
    found, _ = gated_run(pipe, control)
    other, _ = gated_run(pipe, control, noise=5.0)
    assert torch.equal(found, other)
    assert (found - plain).abs().max() > 1e-4 < (gated_run(pipe, None, noise=5.0)[0] - plain).abs().max()
    layers = family_of(pipe.unet).layers(pipe.unet)
    means: dict[str, Tensor] = {}
    forwards = {"n": -1}
    handles = [pipe.unet.register_forward_pre_hook(lambda *_: forwards.update(n=forwards["n"] + 1))]
    for layer in layers:
        if "cross" in layer.stack:

            def hook(_m: Any, _a: Any, output: Tensor, name: str = layer.name) -> Any:
                if forwards["n"] == 2:
                    means[name] = ((output[:1].double() + output[1:].double()) / 2).float()
                return means[name] if forwards["n"] > 2 else None

            handles.append(layer.module.register_forward_hook(hook))
    wanted, _ = gated_run(pipe, None)
    for handle in handles:
        handle.remove()
    alone, _ = gated_run(pipe, ac.Reuse("tgate", gate=3, early=1))
    assert torch.equal(alone, wanted)
    assert torch.equal(gated_run(pipe, None)[0], plain)
