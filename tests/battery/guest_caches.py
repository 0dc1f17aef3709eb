"""Diffusers' caches as guests, which skip layers in some steps, so they are run over several; and its own PAG."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, nullcontext
from typing import Any

import pytest
import torch
from diffusers import hooks
from diffusers.models import attention_processor
from guest_checks import CASE, Enter, Guest, attached, equals_formula
from harness import Kernel, Setting, probe
from test_battery import sides

import attnctrl as ac

STEPS = 5
_at = {"step": 0}


def timestep() -> int:
    """FasterCache and pyramid attention broadcast skip within a range of timesteps, which a run does not begin in."""
    return 900 if _at["step"] == 0 else 500


def pyramid(**options: Any) -> Callable[[Any], None]:
    given = {
        "spatial_attention_block_skip_range": 2,
        "cross_attention_block_skip_range": 2,
        "current_timestep_callback": timestep,
        **options,
    }
    return lambda model: hooks.apply_pyramid_attention_broadcast(model, hooks.PyramidAttentionBroadcastConfig(**given))


def faster(**options: Any) -> Callable[[Any], None]:
    config = hooks.FasterCacheConfig(
        current_timestep_callback=timestep, attention_weight_callback=lambda _: 0.5, tensor_format="BCHW", **options
    )
    return lambda model: hooks.apply_faster_cache(model, config)


def first_block(model: Any) -> None:
    model.enable_cache(hooks.FirstBlockCacheConfig(threshold=1e9))


def taylor(model: Any) -> None:
    model.enable_cache(hooks.TaylorSeerCacheConfig(cache_interval=2, disable_cache_before_step=1))


def magnitude(model: Any) -> None:
    model.enable_cache(hooks.MagCacheConfig(mag_ratios=torch.ones(STEPS), num_inference_steps=STEPS))


def put(apply: Callable[[Any], None], *, rows: int = 1) -> Enter:
    """The cache on the model, which gets a batch of guidance branches when `rows` is 2."""

    @contextmanager
    def enter(setting: Setting) -> Iterator[None]:
        widen(setting, rows)
        apply(setting.model)
        if not any(hasattr(module, "_diffusers_hook") for module in list(setting.model.modules())[1:]):
            raise LookupError("the cache finds no layer of this model")
        yield

    return enter


def widen(setting: Setting, rows: int) -> None:
    """A batch of different rows."""
    for name, value in setting.inputs.items():
        if isinstance(value, torch.Tensor) and "ids" not in name:
            factors = [1.0] * rows if name == "timestep" else [1 + 0.5 * row for row in range(rows)]
            setting.inputs[name] = torch.cat([value * factor for factor in factors])


def run_steps(
    setting: Setting, steps: Sequence[int] = range(STEPS), *, context: str | None = None
) -> list[torch.Tensor]:
    """The outputs of these steps of a run, each on other latents."""
    name = "sample" if "sample" in setting.inputs else "hidden_states"
    outputs = []
    for step in steps:
        _at["step"] = step
        named = nullcontext() if context is None else setting.model.cache_context(context)
        with named:
            outputs.append(setting.run(**{name: setting.inputs[name] * (1 - 0.1 * step)}))
    return outputs


def forget(model: Any) -> None:
    """As pipelines do between runs."""
    for module in model.modules():
        if hasattr(module, "_diffusers_hook"):
            module._diffusers_hook.reset_stateful_hooks(recurse=False)


def cached(guest: Guest, setting: Setting) -> None:
    """Layers that run are controlled, others keep what they gave under the same controls; nothing of it is left after.

    Controls come and go in the middle of a run, where the cache would next give what it keeps.
    """
    context = "cond" if hasattr(setting.model, "cache_context") else None
    steps = range(2, STEPS)
    (last,) = run_steps(setting, steps[-1:], context=context)
    with guest.enter(setting):
        plain = run_steps(setting, context=context)
        run_steps(setting, range(steps.start), context=context)
        with attached(setting, scene := CASE.scene()) as handle:
            acting = 0
            ran = []
            for step in steps:
                with probe() as calls:
                    (out,) = run_steps(setting, [step], context=context)
                equals_formula(setting, scene, calls, kinds=[kinds_of(setting, scene, call) for call in calls])
                assert (out - plain[step]).abs().max() > 1e-3
                acting += bool(calls)
                ran.append(len(calls))
            assert ran[0] == len(setting.calls)
            assert sum(ran) < len(steps) * len(setting.calls)
            report = handle.report()
            assert all(one.forwards == acting for one in report.controls)
            assert report.forwards == len(steps)
            assert report.warnings == ()
        assert torch.equal(run_steps(setting, steps[-1:], context=context)[0], last)
        forget(setting.model)
        for before, after in zip(plain, run_steps(setting, context=context), strict=True):
            assert torch.equal(before, after)


def kinds_of(setting: Setting, scene: Sequence[Any], call: Kernel) -> Any:
    """Who stands in a kernel call, by the numbers of its tokens."""
    found = {}
    for kinds in dict.fromkeys(setting.calls):
        queries, keys = sides(setting, kinds, list(scene), texts=True)
        found[len(queries), len(keys)] = kinds
    return found[call.query.shape[1], call.key.shape[1]]


def refuses_halves(guest: Guest, setting: Setting) -> None:
    """Controls of one branch cannot follow a batch of which a part is left out; those of all branches can."""
    scene, model = CASE.scene(), setting.model
    with guest.enter(setting):
        plain = run_steps(setting)
        both = ("uncond", "cond")
        forget(model)
        handle = ac.attach(model, ac.Isolate(scene), branches=both)
        with pytest.raises(ac.UnsupportedModelError, match="branch='all'"):
            run_steps(setting)
        handle.detach()
        with ac.attach(model, ac.Isolate(scene, branch="all"), branches=both) as handle:
            out = run_steps(setting)
            assert handle.report().controls[0].forwards == STEPS
        assert all((one - other).abs().max() > 1e-3 for one, other in zip(out, plain, strict=True))
        assert all(map(torch.equal, run_steps(setting), plain))


refuses_halves.outcome = "refused"  # type: ignore[attr-defined]


def refuses_split_batches(guest: Guest, setting: Setting) -> None:
    """Layers of diffusers' own PAG part their batch; controls leave them out, or say that they must."""
    order, scene = ("uncond", "cond", "perturbed"), CASE.scene()
    with guest.enter(setting):
        base = setting.run()
        layers = [name for name, one in setting.model.named_modules() if hasattr(one, "processor")]
        others = [name for name in layers if "PAG" not in type(setting.model.get_submodule(name).processor).__name__]
        assert len(others) < len(layers)
        handle = ac.attach(setting.model, ac.Isolate(scene), branches=order)
        with pytest.raises(ac.PlanError, match=r"perturbed-attention guidance.*Leave this layer out"):
            setting.run()
        handle.detach()
        assert torch.equal(setting.run(), base)
        with ac.attach(setting.model, ac.Isolate(scene, layers=others), branches=order):
            moved = (setting.run() - base).abs().flatten(1).amax(1)
        assert (moved > 1e-3).tolist() == [False, True, False]
        assert torch.equal(setting.run(), base)


refuses_split_batches.outcome = "refused"  # type: ignore[attr-defined]


@contextmanager
def perturbed(setting: Setting) -> Iterator[None]:
    """Diffusers' PAG processor on one layer, and a batch of three branches."""
    name, processor = {
        "UNet2DConditionModel": (
            "mid_block.attentions.0.transformer_blocks.0.attn1",
            attention_processor.PAGCFGIdentitySelfAttnProcessor2_0,
        ),
        "SD3Transformer2DModel": ("transformer_blocks.1.attn", attention_processor.PAGCFGJointAttnProcessor2_0),
    }[type(setting.model).__name__]
    widen(setting, 3)
    setting.model.get_submodule(name).set_processor(processor())
    yield
