"""Diffusers' guiders as guests: in a forward of its own they take the scores of a layer away, or leave its block out."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass
from typing import Any

import torch
from diffusers.guiders import PerturbedAttentionGuidance, SkipLayerGuidance
from diffusers.hooks import LayerSkipConfig
from guest_checks import CASE, Enter, Guest, attached, equals_formula
from harness import Kernel, Setting, branches, probe

BLOCKS = {
    # of its others, diffusers' skipping gives image and text on in the wrong order
    "Flux2Transformer2DModel": "single_transformer_blocks",
    "UNet2DConditionModel": "mid_block.attentions.0.transformer_blocks",
    "AuraFlowTransformer2DModel": "joint_transformer_blocks",
    "ZImageTransformer2DModel": "layers",
    "Lumina2Transformer2DModel": "layers",
    "WanTransformer3DModel": "blocks",
}
"""Lists of blocks that are called otherwise than `transformer_blocks`."""

Make = Callable[[str], Any]


def perturbing(blocks: str) -> PerturbedAttentionGuidance:
    config = LayerSkipConfig([0], blocks, skip_attention=False, skip_attention_scores=True, skip_ff=False)
    return PerturbedAttentionGuidance(perturbed_guidance_config=config, perturbed_guidance_stop=1.0)


def skipping(blocks: str) -> SkipLayerGuidance:
    return SkipLayerGuidance(skip_layer_config=LayerSkipConfig([0], blocks), skip_layer_guidance_stop=1.0)


@dataclass
class Forward:
    """One forward of a guided step.

    Attributes:
        name: of its prediction.
        out: of the model.
        calls: of the kernel.
        layers: names of the attention layers that the calls are made in.
        controlled: names of the layers that ran with controls.
        hooked: names of the layers or blocks that the guider has put a hook on.
        shapes: what each block of the guider's list gives on.
    """

    name: str
    out: torch.Tensor
    calls: list[Kernel]
    layers: list[str]
    controlled: set[str]
    hooked: tuple[str, ...]
    shapes: list[Any]

    def perturbs(self, layer: str) -> bool:
        return layer.startswith(self.hooked)


def step(make: Make, setting: Setting) -> list[Forward]:
    """The forwards of one step as diffusers' pipelines run them: the prompt's, the negative one's, the prompt's again."""
    model, text = setting.model, setting.inputs[setting.prompt]
    blocks = BLOCKS.get(type(model).__name__, "transformer_blocks")
    guider = make(blocks)
    guider.set_state(step=1, num_inference_steps=4, timestep=None)
    negative = [-row for row in text] if isinstance(text, list) else -text
    forwards = []
    for batch in guider.prepare_inputs({setting.prompt: (text, negative)}):
        guider.prepare_models(model)
        name = getattr(batch, guider._identifier_key)
        (hook,) = guider._skip_layer_hook_names
        registries = {part: x._diffusers_hook for part, x in model.named_modules() if hasattr(x, "_diffusers_hook")}
        hooked = tuple(part for part, registry in registries.items() if hook in registry.hooks)
        announced = model.cache_context(name) if hasattr(model, "cache_context") else nullcontext()
        with (
            announced,
            probe() as calls,
            layers_of(model, calls) as (layers, controlled),
            shapes_of(model, blocks) as shapes,
        ):
            out = setting.run(**{setting.prompt: getattr(batch, setting.prompt)})
        guider.cleanup_models(model)
        forwards.append(Forward(name, out, calls, layers, controlled, hooked, shapes))
    return forwards


@contextmanager
def layers_of(model: Any, calls: list[Kernel]) -> Iterator[tuple[list[str], set[str]]]:
    """Names of the attention layers that the calls are made in, and of those with controls, filled while the model runs."""
    names: list[str] = []
    controlled: set[str] = set()

    def ended(name: str) -> Callable[..., None]:
        def note(module: Any, *_: Any) -> None:
            names.extend([name] * (len(calls) - len(names)))
            controlled.update([name] if getattr(module, "_attnctrl", None) is not None else [])

        return note

    handles = [x.register_forward_hook(ended(name)) for name, x in model.named_modules() if hasattr(x, "processor")]
    yield names, controlled
    for handle in handles:
        handle.remove()


@contextmanager
def shapes_of(model: Any, blocks: str) -> Iterator[list[Any]]:
    """What each of these blocks gives on, filled while the model runs."""
    shapes: list[Any] = []

    def ended(_module: Any, _inputs: Any, out: Any) -> None:
        shapes.append([part.shape for part in (out if isinstance(out, tuple) else (out,))])

    handles = [block.register_forward_hook(ended) for block in model.get_submodule(blocks)]
    yield shapes
    for handle in handles:
        handle.remove()


def put(make: Make) -> Enter:
    """Where the guider works without controls: the perturbed forward differs, and its blocks give the same things on."""

    @contextmanager
    def enter(setting: Setting) -> Iterator[None]:
        plain, _, perturbed = step(make, setting)
        if perturbed.shapes != plain.shapes or torch.equal(perturbed.out, plain.out):
            raise LookupError("the guider does nothing here, or what a skipped block gives on is mixed up")
        yield

    return enter


def left_alone(make: Make) -> Callable[[Guest, Setting], None]:
    """In the hooked layers of the third forward nothing is controlled; all other calls are as the branch asks for."""

    def check(guest: Guest, setting: Setting) -> None:
        with guest.enter(setting):
            plain = step(make, setting)
            with attached(setting, scene := CASE.scene()) as handle:
                controlled = step(make, setting)
                report = handle.report()
            assert [one.name for one in controlled] == ["pred_cond", "pred_uncond", "pred_cond_skip"]
            places = list(zip(controlled[0].layers, setting.calls, strict=True))
            acting = 0
            assert [bool(one.hooked) for one in controlled] == [False, False, True]
            for base, one in zip(plain, controlled, strict=True):
                # a model whose branches are given holds the same one in each forward
                due = one.name != "pred_uncond" or bool(branches(setting.model))
                if not due or all(one.perturbs(layer) for layer, _ in places):
                    assert torch.equal(one.out, base.out)
                    continue
                acting += 1
                assert (one.out - base.out).abs().max() > 1e-3
                made = list(zip(one.layers, one.calls, strict=True))
                kinds = [kind for layer, kind in places if not one.perturbs(layer)]
                equals_formula(setting, scene, [call for layer, call in made if not one.perturbs(layer)], kinds)
                assert one.controlled
                assert not any(map(one.perturbs, one.controlled))
                # without scores, each token reads itself alone
                assert all(torch.equal(call.out, call.value) for layer, call in made if one.perturbs(layer))
            assert all(one.forwards == acting for one in report.controls)
            assert report.warnings == ()
            for base, again in zip(plain, step(make, setting), strict=True):
                assert torch.equal(base.out, again.out)

    return check
