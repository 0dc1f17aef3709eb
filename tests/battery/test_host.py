"""Living with what else may be on the model: LoRA, offload, fused projections, other backends, compilation, exceptions, others."""

from __future__ import annotations

import gc
import weakref
from typing import Any

import pytest
import torch
from diffusers.hooks import apply_group_offloading
from diffusers.models.attention_dispatch import _AttentionBackendRegistry
from harness import DOORS, Setting, flux, probe, regions, traces

import attnctrl as ac

every_door = pytest.mark.parametrize("door", DOORS.values(), ids=DOORS)


def stack() -> list[Any]:
    return [ac.Isolate(background="reads_all"), ac.Regions(regions(), base_ratio=0.2)]


def controlled(setting: Setting, door: Any = DOORS["attach"], **changes: Any) -> torch.Tensor:
    with door(setting.model, stack()):
        return setting.run(**changes)


@every_door
def test_lora_acts_together_with_controls(door: Any) -> None:
    from peft import LoraConfig

    setting = flux()
    plain = controlled(setting, door)
    setting.model.add_adapter(
        LoraConfig(r=2, target_modules=["to_q", "to_k", "to_v", "to_out.0"], init_lora_weights=False)
    )
    base, before = setting.run(), traces(setting.model)
    scale = {"joint_attention_kwargs": {"scale": 0.0}}
    assert (controlled(setting, door) - plain).abs().max() > 1e-3
    assert (controlled(setting, door, **scale) - plain).abs().max() < 1e-5
    assert torch.equal(setting.run(), base)
    assert traces(setting.model) == before


@every_door
@pytest.mark.parametrize("offload_type", ["block_level", "leaf_level"])
@pytest.mark.parametrize("first", ["offload", "controls"])
def test_group_offload(door: Any, offload_type: str, first: str) -> None:
    setting, moved = flux(), flux()
    expected, base = controlled(setting, door), setting.run()
    options: dict[str, Any] = {"onload_device": torch.device("cpu"), "offload_type": offload_type}
    if offload_type == "block_level":
        options["num_blocks_per_group"] = 1
    if first == "offload":
        apply_group_offloading(moved.model, **options)
    with door(moved.model, stack()):
        if first == "controls":
            apply_group_offloading(moved.model, **options)
        assert torch.equal(moved.run(), expected)
    assert torch.equal(moved.run(), base)


@every_door
def test_accelerate_hooks_that_move_inputs(door: Any) -> None:
    from accelerate import cpu_offload

    setting, moved = flux(), flux()
    expected = controlled(setting, door)
    cpu_offload(moved.model, execution_device=torch.device("cpu"))
    assert torch.equal(controlled(moved, door), expected)


@every_door
def test_fused_projections(door: Any) -> None:
    setting = flux()
    expected = controlled(setting, door)
    setting.model.fuse_qkv_projections()
    assert (controlled(setting, door) - expected).abs().max() < 1e-5
    setting.model.unfuse_qkv_projections()
    assert torch.equal(controlled(setting, door), expected)


@every_door
def test_an_exception_in_the_middle_leaves_nothing_dirty(door: Any) -> None:
    setting = flux()
    base, before = setting.run(), traces(setting.model)
    inner = setting.model.single_transformer_blocks[0].attn.to_q

    def fail(*_: Any) -> None:
        raise KeyboardInterrupt("in the middle")

    with door(setting.model, stack()):
        expected = setting.run()
        handle = inner.register_forward_hook(fail)
        with pytest.raises(KeyboardInterrupt):
            setting.run()
        handle.remove()
        # another model must not fall into the scope that was left open
        other = flux(seed=1)
        assert torch.equal(other.run(), flux(seed=1).run())
        assert torch.equal(setting.run(), expected)
        handle = inner.register_forward_hook(fail)
        with pytest.raises(KeyboardInterrupt):
            setting.run()
    handle.remove()
    assert torch.equal(setting.run(), base)
    assert traces(setting.model) == before


def test_an_exception_inside_with_detaches() -> None:
    setting = flux()
    before = traces(setting.model)
    with pytest.raises(ZeroDivisionError), ac.attach(setting.model, stack()):
        _ = 1 / 0
    assert traces(setting.model) == before


@pytest.mark.parametrize("order", ["inner first", "outer first"])
@pytest.mark.parametrize("second", DOORS)
def test_attached_twice_both_act_and_leave_in_any_order(order: str, second: str) -> None:
    setting, scene = flux(), regions()
    base, before = setting.run(), traces(setting.model)
    isolate, regional = ac.Isolate(scene), ac.Regions(scene)
    with ac.attach(setting.model, [isolate, regional]):
        both = setting.run()
    with ac.attach(setting.model, regional):
        one = setting.run()
    with ac.attach(setting.model, isolate):
        other = setting.run()
    originals = dict(setting.model.attn_processors)
    outer = ac.attach(setting.model, isolate)
    if second == "attach":
        inner = ac.attach(setting.model, regional)
        leave = inner.detach
    else:
        setting.model.set_attn_processor(ac.processors(setting.model, regional))

        def leave() -> None:
            setting.model.set_attn_processor(dict(originals))

    assert (setting.run() - both).abs().max() < 1e-5
    if order == "inner first":
        leave()
        assert torch.equal(setting.run(), other)
        outer.detach()
    else:
        outer.detach()
        assert torch.equal(setting.run(), one)
        leave()
    assert torch.equal(setting.run(), base)
    assert traces(setting.model) == before


def test_processors_left_on_when_the_dict_is_gone_and_off_when_replaced() -> None:
    setting, scene = flux(), regions()
    base, before, originals = setting.run(), traces(setting.model), dict(setting.model.attn_processors)
    setting.model.set_attn_processor(ac.processors(setting.model, ac.Isolate(scene, layers="single")))
    kinds = {name: type(processor).__name__ for name, processor in setting.model.attn_processors.items()}
    assert set(kinds.values()) == {"FluxAttnProcessor", "IsolationAttnProcessor"}
    assert isinstance(
        setting.model.attn_processors["single_transformer_blocks.0.attn.processor"], ac.IsolationAttnProcessor
    )
    gc.collect()
    assert (setting.run() - base).abs().max() > 1e-2
    held = dict(setting.model.attn_processors)
    setting.model.set_attn_processor(dict(originals))
    assert torch.equal(setting.run(), base)  # and this forward takes the root hook off
    assert traces(setting.model) == before
    setting.model.set_attn_processor(held)
    with pytest.raises(ac.SilentControlError, match="IsolationAttnProcessor was taken off"):
        setting.run()


def test_processors_that_were_never_set_leave_with_their_dict() -> None:
    setting = flux()
    before = traces(setting.model)
    made = ac.processors(setting.model, ac.Isolate(regions()))
    assert torch.equal(setting.run(), flux().run())
    del made
    gc.collect()
    assert traces(setting.model) == before


def test_processors_forward_the_backend_and_the_signature() -> None:
    import inspect

    setting = flux()
    originals = dict(setting.model.attn_processors)
    setting.model.set_attn_processor(ac.processors(setting.model, ac.Regions(regions())))
    name, processor = next(iter(setting.model.attn_processors.items()))
    assert isinstance(processor, ac.RegionAttnProcessor)
    assert inspect.signature(processor.__call__) == inspect.signature(originals[name].__call__)
    active = _AttentionBackendRegistry._active_backend
    setting.model.set_attention_backend("_native_math")
    _AttentionBackendRegistry.set_active_backend(active)
    assert originals[name]._attention_backend == processor._attention_backend == "_native_math"
    originals[name]._attention_backend = None
    assert processor._attention_backend is None


def test_a_layer_whose_kernel_is_not_met_is_an_error() -> None:
    setting = flux()

    class Lazy:
        def __call__(self, attn: Any, hidden_states: Any, *_: Any, **__: Any) -> Any:
            return hidden_states

    with ac.attach(setting.model, ac.Isolate(regions())):
        setting.run()
        setting.model.single_transformer_blocks[1].attn.set_processor(Lazy())
        with pytest.raises(ac.SilentControlError, match=r"1 of 4 .*single_transformer_blocks\.1\.attn"):
            setting.run()
    with pytest.raises(ac.UnsupportedModelError, match=r"Lazy at single_transformer_blocks\.1\.attn"):
        ac.attach(setting.model, ac.Isolate(regions()))


def test_a_cache_may_skip_layers() -> None:
    setting = flux()

    class Skipping(torch.nn.Module):
        def forward(self, hidden_states: Any, encoder_hidden_states: Any, *_: Any, **__: Any) -> Any:
            return encoder_hidden_states, hidden_states

    with ac.attach(setting.model, ac.Isolate(regions())) as handle:
        setting.model._cache_config = object()
        block = setting.model.single_transformer_blocks[1]
        block.forward = Skipping().forward
        setting.run()
    assert handle.report().controls[0].forwards == 1


def test_refused_models() -> None:
    setting = flux()

    class Parallel:
        context_parallel_config = object()

    setting.model._parallel_config = Parallel()
    with pytest.raises(ac.UnsupportedModelError, match="context parallel"):
        ac.attach(setting.model, ac.Isolate(regions()))
    with pytest.raises(ac.UnsupportedModelError, match=r"Linear is of no known family.*FluxTransformer2DModel"):
        ac.attach(torch.nn.Linear(2, 2), ac.Isolate(regions()))
    with pytest.raises(ac.UnsupportedModelError, match="found str"):
        ac.attach("flux", ac.Isolate(regions()))


def test_gradient_checkpointing_is_refused_where_it_would_drop_controls() -> None:
    setting = flux()
    setting.model.enable_gradient_checkpointing()
    with ac.attach(setting.model, ac.Isolate(regions())):
        with pytest.raises(ac.UnsupportedModelError, match="checkpointing"):
            setting.run()
        with torch.no_grad():
            setting.run()


@pytest.mark.parametrize(
    "control",
    [ac.Isolate(regions(), branch="all"), ac.Isolate(regions(), branch="all", strength=0.5)],
    ids=["hard", "soft"],
)
def test_a_mask_of_the_model_is_merged(control: Any) -> None:
    """A text token that it hides has no influence, as without controls; all else keeps its control."""
    setting = flux()
    mask = torch.ones(1, 1, 1, 29, dtype=torch.bool)
    given = setting.inputs["encoder_hidden_states"]
    other = given.clone()
    other[:, 2] += 1
    with ac.attach(setting.model, control):
        plain = setting.run()
        opened = setting.run(joint_attention_kwargs={"attention_mask": mask})
        mask = mask.clone()
        mask[..., 2] = False
        hidden = setting.run(joint_attention_kwargs={"attention_mask": mask})
        changed = setting.run(joint_attention_kwargs={"attention_mask": mask}, encoder_hidden_states=other)
        assert (setting.run(encoder_hidden_states=other) - plain).abs().max() > 1e-3
    assert (opened - plain).abs().max() < 1e-5
    assert (hidden - plain).abs().max() > 1e-3
    assert torch.equal(changed, hidden)


def test_a_mask_of_other_tokens_is_refused() -> None:
    setting = flux()
    mask = torch.zeros(1, 1, 29, 30)
    with (
        ac.attach(setting.model, ac.Isolate(regions())),
        pytest.raises(ac.PlanError, match=r"\(1, 1, 29, 30\).*29 keys"),
    ):
        setting.run(joint_attention_kwargs={"attention_mask": mask})


def test_an_ip_adapter_reads_its_pictures_untouched() -> None:
    """Its further kernel calls pass by; the joint call is controlled."""
    from diffusers.models.transformers.transformer_flux import FluxIPAdapterAttnProcessor

    setting, scene = flux(), regions()
    for block in setting.model.transformer_blocks:
        block.attn.set_processor(FluxIPAdapterAttnProcessor(hidden_size=32, cross_attention_dim=32))
    pictures = {"joint_attention_kwargs": {"ip_hidden_states": [torch.randn(1, 4, 32)]}}
    with probe() as plain:
        setting.run(**pictures)
    with ac.attach(setting.model, ac.Isolate(scene)), probe() as calls:
        setting.run(**pictures)
    assert [call.key.shape[1] for call in calls] == [29, 4, 29, 4, 29, 29]
    assert not torch.equal(calls[0].out, plain[0].out)
    assert torch.equal(calls[1].out, plain[1].out)
    with pytest.raises(ac.UnsupportedModelError, match="hold weights"):
        ac.processors(setting.model, ac.Isolate(scene))


def test_inference_mode_first_and_gradients_after() -> None:
    setting = flux()
    expected = controlled(setting)
    with ac.attach(setting.model, [ac.Isolate(regions()), ac.Regions(regions())]):
        with torch.inference_mode():
            inputs = {
                name: value.clone() if torch.is_tensor(value) else value for name, value in setting.inputs.items()
            }
            first = setting.model(**inputs)[0]
        latents = setting.inputs["hidden_states"].clone().requires_grad_()
        second = setting.run(hidden_states=latents)
        second.sum().backward()
    assert torch.equal(first, second)
    assert latents.grad.abs().min() > 0
    assert not torch.equal(first, expected)


def test_controls_whose_regions_leave_are_named() -> None:
    setting = flux()
    base = setting.run()
    outer = ac.attach(setting.model, ac.Regions(regions()))
    inner = ac.attach(setting.model, ac.Isolate())
    with pytest.warns(UserWarning, match="stay attached can no longer act: 'isolate' needs regions"):
        outer.detach()
    assert torch.equal(setting.run(), base)
    with pytest.warns(UserWarning, match="acted in none"):
        inner.detach()


def test_the_random_state_is_left_alone() -> None:
    setting = flux()
    state = torch.random.get_rng_state()
    controlled(setting)
    assert torch.equal(torch.random.get_rng_state(), state)


def test_positional_arguments_and_user_hooks() -> None:
    setting = flux()
    expected = controlled(setting)
    seen: list[Any] = []
    handle = setting.model.transformer_blocks[0].attn.register_forward_hook(lambda *_: seen.append(1))
    names = ("hidden_states", "encoder_hidden_states", "pooled_projections", "timestep", "img_ids", "txt_ids")
    with ac.attach(setting.model, stack()):
        out = setting.model(*(setting.inputs[name] for name in names), return_dict=False)[0]
        with pytest.raises(ac.LayoutError, match="cannot be called like this"):
            setting.model(nonsense=1)
    handle.remove()
    assert torch.equal(out, expected)
    assert seen == [1]


@every_door
def test_a_model_that_is_dropped_while_controlled_is_collected(door: Any) -> None:
    setting = flux()
    registry = dict(_AttentionBackendRegistry._backends)
    controls = ac.Isolate(regions())
    if door is DOORS["attach"]:
        ac.attach(setting.model, controls)
    else:
        setting.model.set_attn_processor(ac.processors(setting.model, controls))
    setting.run()
    model = weakref.ref(setting.model)
    assert registry != _AttentionBackendRegistry._backends
    del setting
    gc.collect()
    assert model() is None
    assert registry == _AttentionBackendRegistry._backends
