"""Replay: a perturbed forward that leaves out what it shares with the prompt's gives what a whole one gives, to the bit."""

from __future__ import annotations

import re
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, nullcontext
from typing import Any

import guest_caches
import guest_kinds
import pytest
import tiny
import torch
from diffusers.hooks import FirstBlockCacheConfig, apply_group_offloading
from harness import DOORS, FAMILIES, Setting, branches, flux, regions, sd3, traces, unet
from table_outputs import CASES
from torch import Tensor, nn

import attnctrl as ac
from attnctrl.families import family_of
from attnctrl.prefix import lists_of
from attnctrl.toybox.models.flux import tiny_pipeline

every_family = pytest.mark.parametrize("family", FAMILIES.values(), ids=FAMILIES)


def blocks_of(model: Any) -> list[str]:
    family = family_of(model)
    return [name for part in lists_of(family, model, family.layers(model)).values() for name in part]


@contextmanager
def computed(model: Any, blocks: Sequence[str] = ()) -> Iterator[list[str]]:
    """Names of the blocks that compute, in order, told by their classes' own forwards."""
    names = {id(model.get_submodule(name)): name for name in blocks or blocks_of(model)}
    ran: list[str] = []
    kinds = {type(module) for module in model.modules() if id(module) in names}
    originals = {kind: kind.forward for kind in kinds}

    def counting(original: Any) -> Any:
        def forward(self: Any, *args: Any, **kwargs: Any) -> Any:
            ran.extend([names[id(self)]] if id(self) in names else [])
            return original(self, *args, **kwargs)

        return forward

    for kind, original in originals.items():
        kind.forward = counting(original)
    try:
        yield ran
    finally:
        for kind, original in originals.items():
            kind.forward = original


def outcome(setting: Setting, *controls: Any) -> tuple[Tensor, tuple[str, ...]]:
    """The guided output, and what the report says of the perturbed forwards."""
    cached = getattr(setting.model, "is_cache_enabled", False)
    with (
        ac.attach(setting.model, controls, branches=branches(setting.model)) as handle,
        setting.model.cache_context("cond") if cached else nullcontext(),
    ):
        out = setting.run()
    told = [line for one in handle.report().controls for line in one.plans if line.startswith(("replayed", "in full"))]
    return out, tuple(dict.fromkeys(told))


def pair(setting: Setting, *controls: Any, **more: Any) -> tuple[Tensor, Tensor, tuple[str, ...]]:
    """The guided output with replay, without it, and what was replayed."""
    out, told = outcome(setting, *controls, ac.Perturb("uniform", **more))
    full, refused = outcome(setting, *controls, ac.Perturb("uniform", replay=False, **more))
    assert refused == ("in full: replay=False",)
    return out, full, told


@every_family
def test_every_layer_gives_what_the_whole_forward_gives(family: Any) -> None:
    setting: Setting = family(batch=2)
    model, base = setting.model, setting.run()
    blocks = blocks_of(model)
    for layer in CASES["uniform"].layers(setting):
        first = next(number for number, name in enumerate(blocks) if layer.startswith(f"{name}."))
        with computed(model) as ran:
            out, told = outcome(setting, ac.Perturb("uniform", layers=layer))
        full, _ = outcome(setting, ac.Perturb("uniform", layers=layer, replay=False))
        assert torch.equal(out, full)
        assert not torch.equal(out, base)
        assert sorted(ran) == sorted([*blocks, *blocks[first:]])
        some = first or family is unet
        expected = f"replayed {first} of {len(blocks)} blocks" if some else f"in full: {layer} is in the first block"
        assert [line.partition(" and")[0] for line in told] == [expected]


@pytest.mark.parametrize(
    ("family", "layers", "replayed", "parts"),
    [
        (flux, "double:1", 1, 0),
        (flux, ["single:1", "double:1"], 1, 0),
        (flux, "single:1", 3, 0),
        (sd3, "joint:1", 1, 0),
        (unet, "down.self:0", 0, 1),
        (unet, "down.self:1", 1, 1),
        (unet, "mid", 2, 1),
        (unet, "up.self:0", 3, 1),
        (unet, "up.self:3", 4, 3),
    ],
)
def test_how_much_is_left_out(family: Any, layers: Any, replayed: int, parts: int) -> None:
    setting: Setting = family()
    model, blocks = setting.model, blocks_of(setting.model)
    inside = [f"{blocks[replayed]}.{name}" for name in family_of(model).parts(model.get_submodule(blocks[replayed]))]
    with computed(model) as ran, computed(model, inside or blocks) as pieces:
        _, told = outcome(setting, ac.Perturb("uniform", layers=layers))
    assert ran == [*blocks, *blocks[replayed:]]
    assert pieces == [*(inside or blocks), *(inside[parts:] or blocks[replayed:])]
    more = f" and {parts} part{'s' * (parts > 1)} of the next" if parts else ""
    assert told == (f"replayed {replayed} of {len(blocks)} blocks{more}",)


@pytest.mark.parametrize("door", DOORS.values(), ids=DOORS)
def test_nothing_stays_on_the_model(door: Any) -> None:
    setting = unet()
    before, base = traces(setting.model), setting.run()
    with door(setting.model, ac.Perturb("uniform", layers="up.self:0")):
        setting.run()
        assert all("forward" not in vars(module) for module in setting.model.modules())
        guidance = vars(setting.model)["_attnctrl_engine"]._guidance
        assert guidance._records is None
        for where in ("mid_block", "up_blocks.1"):
            failing = setting.model.get_submodule(where).register_forward_hook(_fail)
            with pytest.raises(KeyboardInterrupt):
                setting.run()
            failing.remove()
            assert all("forward" not in vars(module) for module in setting.model.modules())
            assert guidance._records is None
    assert traces(setting.model) == before
    assert torch.equal(setting.run(), base)


def _fail(*_: Any) -> None:
    raise KeyboardInterrupt


@pytest.mark.parametrize("family", [sd3, unet, FAMILIES["zimage"], FAMILIES["auraflow"]])
def test_rows_of_a_guided_batch_agree_within_rounding(family: Any) -> None:
    """The whole forward runs the prompt's rows alone; kernels may round batches of other sizes in another way."""
    setting: Setting = family(batch=4)
    layers = CASES["identity"].layers(setting)[-1]
    order = ("cond", "uncond") if family is FAMILIES["zimage"] else ("uncond", "cond")
    found = []
    for replay in (True, False):
        with (
            ac.attach(setting.model, ac.Perturb(layers=layers, replay=replay), branches=order) as handle,
            computed(setting.model) as ran,
        ):
            found.append(setting.run())
        assert any(line.startswith("replayed") for line in handle.report().controls[0].plans) is replay
    assert len(ran) > 2
    assert (found[0] - found[1]).abs().max() < 1e-5 * found[1].abs().max()


def test_rows_that_are_packed_otherwise_by_themselves_are_computed() -> None:
    """Captions of a batch are filled up to its longest: the prompt's alone are shorter."""
    setting: Setting = FAMILIES["zimage"](batch=2)
    generator = torch.Generator().manual_seed(1)
    setting.inputs["cap_feats"] = [torch.randn(tokens, tiny.TEXT_DIM, generator=generator) for tokens in (5, 40)]
    found, told = [], []
    for replay in (True, False):
        control = ac.Perturb(layers="main:1", replay=replay)
        with ac.attach(setting.model, control, branches=("cond", "uncond")) as handle:
            found.append(setting.run())
        told.append(handle.report().controls[0].plans[-1])
    assert (found[0] - found[1]).abs().max() < 1e-5 * found[1].abs().max()
    # the refiner of the picture alone is given the same
    assert told[0] == "replayed 1 of 4 blocks"


def test_other_controls_act_in_what_is_replayed() -> None:
    setting = flux()
    isolate = ac.Isolate([ac.Region("left", box=(0, 0, 0.5, 1.0))])
    out, full, told = pair(setting, isolate, layers="single:1")
    assert torch.equal(out, full)
    assert told == ("replayed 3 of 4 blocks",)
    with ac.attach(setting.model, [isolate, ac.Perturb("uniform", layers="single:1")]) as handle:
        setting.run()
    report = handle.report()
    assert report.warnings == ()
    assert report.controls[0].rows == (("cond", 0), ("perturbed", 0))


@pytest.mark.parametrize(
    ("more", "told"),
    [
        (ac.Isolate(layers="single:0", branch="perturbed"), "replayed 2 of 4 blocks"),
        (
            ac.Regions(regions(), layers="single:0", branch="perturbed"),
            "in full: transformer_blocks.0.attn is in the first block",
        ),
        (ac.Isolate(layers="single:0", branch="all"), "replayed 3 of 4 blocks"),
        (ac.Perturb("max", layers="double:1"), "replayed 1 of 4 blocks"),
        (ac.Perturb("max", layers="double:1", branch="cond"), "replayed 3 of 4 blocks"),
    ],
)
def test_what_acts_in_the_branch_alone_is_where_it_parts(more: Any, told: str) -> None:
    setting = flux()
    declared = [ac.Regions(regions(), layers="double:0")] if more.name == "isolate" else []
    other = [more if more.guide is None else ac.Perturb(more.kind, layers=more.layers, replay=False)]
    out, lines = outcome(setting, *declared, more, ac.Perturb("uniform", layers="single:1"))
    full, _ = outcome(setting, *declared, *other, ac.Perturb("uniform", layers="single:1", replay=False))
    assert torch.equal(out, full)
    assert lines == (told,)


def test_what_is_watched_in_the_branch_runs_in_it() -> None:
    pipe = tiny_pipeline()
    options = {"height": 32, "width": 48, "num_inference_steps": 1, "max_sequence_length": 16, "output_type": "latent"}
    found = []
    for replay in (True, False):
        bank, control = ac.Bank(), ac.Perturb("uniform", layers="single:1", replay=replay)
        with ac.attach(pipe, [ac.Keep(bank=bank, layers="double:1", branch="perturbed"), control]) as handle:
            pipe("a red circle", generator=torch.Generator().manual_seed(0), **options)
        found.append((bank.layers, bank.steps, bank.branches, bank.nbytes))
        assert ("replayed 1 of 4 blocks" in handle.report().controls[1].plans) is replay
    assert found[0] == found[1]
    assert found[0][0] == ("transformer_blocks.1.attn",)
    assert found[0][2] == ("perturbed",)


def test_what_draws_at_random_is_computed() -> None:
    setting: Setting = flux(batch=2)
    share = ac.Share(layers="double:1", ratio=0.5)
    out, full, told = pair(setting, share, layers="single:1")
    assert torch.equal(out, full)
    assert told == ("replayed 1 of 4 blocks",)


def test_branches_of_their_own_replay_each_its_own() -> None:
    setting = flux()
    stack = [("double:1", 3.0), ("single:1", 1.0)]
    with computed(setting.model) as ran:
        out, told = outcome(setting, *(ac.Perturb(layers=layers, scale=scale) for layers, scale in stack))
    full, _ = outcome(setting, *(ac.Perturb(layers=layers, scale=scale, replay=False) for layers, scale in stack))
    assert torch.equal(out, full)
    assert len(ran) == 4 + 3 + 1
    assert told == ("replayed 1 of 4 blocks", "replayed 3 of 4 blocks")


@pytest.mark.parametrize("family", [flux, sd3, unet])
def test_what_a_model_adds_between_its_blocks_is_added_once(family: Any) -> None:
    """Residuals of a ControlNet."""
    setting: Setting = family()
    bare = setting.run()
    guest_kinds.residuals(setting)
    base = setting.run()
    assert (base - bare).abs().max() > 1e-3
    for layer in CASES["uniform"].layers(setting)[1:]:
        out, full, _ = pair(setting, layers=layer)
        assert torch.equal(out, full)
        assert not torch.equal(out, base)


def test_what_a_model_writes_into_its_blocks_outputs_is_written_once() -> None:
    """T2I adapters: the last block's output and the residual that is the same tensor grow in place, so does the middle's."""
    kinds = {
        "down_block_types": ("CrossAttnDownBlock2D", "DownBlock2D"),
        "up_block_types": ("UpBlock2D", "CrossAttnUpBlock2D"),
    }
    model = tiny._made(
        type(tiny.unet()), 0, torch.float32, **{**tiny.UNET_SIZES, **kinds}, cross_attention_dim=tiny.TEXT_DIM
    )
    sizes = ((16, (8, 12)), (32, (4, 6)), (32, (4, 6)))
    added = [torch.randn(1, channels, *grid) for channels, grid in sizes]
    setting = Setting(model, tiny.sd_inputs(grid=(8, 12)), [])

    def run(*controls: ac.Perturb) -> Tensor:
        with ac.attach(model, controls, branches=("cond",)):
            return setting.run(down_intrablock_additional_residuals=[x.clone() for x in added])

    assert (run() - setting.run()).abs().max() > 1e-3
    for layers in ("mid.self", "up.self:0"):
        stack = [("uniform", 2.0), ("max", 1.0)]
        out = run(*(ac.Perturb(kind, layers=layers, scale=scale) for kind, scale in stack))
        full = run(*(ac.Perturb(kind, layers=layers, scale=scale, replay=False) for kind, scale in stack))
        assert torch.equal(out, full)


def block_offload(setting: Setting, blocks: int = 1) -> None:
    options: dict[str, Any] = {"onload_device": torch.device("cpu"), "offload_type": "block_level"}
    apply_group_offloading(setting.model, num_blocks_per_group=blocks, **options)


GUESTS = {
    "LoRA": (flux, guest_kinds.once(guest_kinds.lora), "replayed 3"),
    "CPU offload": (flux, guest_kinds.once(guest_kinds.cpu_offload), "replayed 3"),
    "group offload, leaves": (flux, guest_kinds.once(guest_kinds.group_offload), "replayed 3"),
    "group offload, blocks": (flux, guest_kinds.once(block_offload), "replayed 3"),
    "group offload, pairs": (
        flux,
        guest_kinds.once(lambda one: block_offload(one, 2)),
        "in full: .* loads the weights",
    ),
    "fp8": (flux, guest_kinds.once(guest_kinds.fp8), "replayed 3"),
    "IP-Adapter": (flux, guest_kinds.ip_adapter, "replayed 3"),
    "hooks": (flux, guest_kinds.once(guest_kinds.user_hooks), "in full: .* has forward hooks"),
    "compiled": (flux, guest_kinds.compiled_blocks, "in full: .* compiled"),
    "first-block cache": (flux, guest_caches.put(guest_caches.first_block), "in full: a cache"),
    "pyramid": (flux, guest_caches.put(guest_caches.pyramid()), "in full: a cache"),
}


@torch.no_grad()
@pytest.mark.parametrize("name", GUESTS)
def test_guests(name: str) -> None:
    family, enter, expected = GUESTS[name]
    setting: Setting = family()
    with enter(setting):
        out, full, (told,) = pair(setting, layers="single:1")
        assert torch.equal(out, full)
    assert re.match(expected, told), told


@torch.no_grad()
def test_what_changes_between_steps_is_seen() -> None:
    """A hook that comes, one on a part that comes, a cache: the next step runs in full; it replays when they are gone."""
    setting = flux()
    model = setting.model
    first = blocks_of(model)[0]

    def runs() -> int:
        with computed(model) as ran, model.cache_context("cond"):
            setting.run()
        return ran.count(first)

    def hooked(module: nn.Module) -> Any:
        return module.register_forward_hook(lambda *_: called.append(1)).remove

    def late() -> Any:
        block = model.get_submodule(first)
        block.add_module("late", nn.Identity())
        hooked(block.late)
        return lambda: delattr(block, "late")

    called: list[int] = []
    with ac.attach(model, ac.Perturb("uniform", layers="single:1"), branches=branches(model)) as handle:
        assert runs() == 1
        for change, times in ((lambda: hooked(model.get_submodule(first)), 2), (late, 2)):
            undo = change()
            assert (runs(), len(called)) == (2, times)
            undo()
            assert runs() == 1
        # with it, blocks are called otherwise than by their classes
        model.enable_cache(FirstBlockCacheConfig(threshold=1e-9))
        runs()
        model.disable_cache()
    told = " ".join(line for one in handle.report().controls for line in one.plans)
    assert all(reason in told for reason in ("replayed 3", f"{first} has forward hooks", "a cache on the model"))


@torch.no_grad()
def test_a_compiled_wrapper_runs_in_full() -> None:
    setting = flux()
    torch._dynamo.reset()
    wrapper = torch.compile(setting.model, backend="eager", fullgraph=True)
    expected, _ = outcome(setting, ac.Perturb("uniform", layers="single:1"))
    with ac.attach(wrapper, ac.Perturb("uniform", layers="single:1")) as handle:
        out = wrapper(**setting.inputs)[0]
    assert "in full: the model or its blocks are compiled" in handle.report().controls[0].plans
    assert (out - expected).abs().max() < 1e-5 * expected.abs().max()


def test_gradients_pass_through_what_is_replayed() -> None:
    setting = flux()
    latents = setting.inputs["hidden_states"].clone().requires_grad_()
    found = []
    for replay in (True, False):
        with ac.attach(setting.model, ac.Perturb("uniform", layers="single:1", replay=replay)):
            (grad,) = torch.autograd.grad(setting.run(hidden_states=latents).square().sum(), latents)
        found.append(grad)
    assert (found[0] - found[1]).abs().max() < 1e-5 * found[1].abs().max()


@every_family
@pytest.mark.parametrize("what", ["block", "attention"])
def test_layers_left_out_cost_what_comes_behind_them(family: Any, what: Any) -> None:
    """`Skip` opens such a branch as well: its first block is the first that runs."""
    setting: Setting = family(batch=2)
    last = family_of(setting.model).layers(setting.model)[-1]
    told = {"layers": last.name, "window": (0.0, 1.0)}
    if last.stack in family_of(setting.model).fused and what == "attention":
        with pytest.raises(ac.UnsupportedModelError, match="cannot be left out alone"):
            outcome(setting, ac.Skip(what, **told))
        return
    out, replayed = outcome(setting, ac.Skip(what, **told))
    full, refused = outcome(setting, ac.Skip(what, replay=False, **told))
    assert torch.equal(out, full)
    assert not torch.equal(out, setting.run())
    assert refused == ("in full: replay=False",)
    alone = len(blocks_of(setting.model)) == 1
    assert replayed[0].startswith("in full: " if alone else "replayed")
