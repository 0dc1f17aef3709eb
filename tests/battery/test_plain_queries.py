"""Queries of a plain forward in one that shares: against the dense formula with queries that a run alone gave, what it
costs, when it acts, and that nothing is kept."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import pytest
import tiny_pipes
import torch
from harness import FAMILIES, branches, flux, probe, sd3, sides_of, traces, unet
from torch import Tensor

import attnctrl as ac
from attnctrl.schedule import Moment
from attnctrl.toybox.models.flux import tiny_pipeline

SCENES = [[ac.Region(name="fox", box=(0, 0, 2 / 6, 1))], [ac.Region(name="fox", box=(3 / 6, 0, 1, 0.5))]]
FULL: dict[str, Any] = {"window": (0.0, 1.0)}
PIPES = {"flux": tiny_pipeline, "sd": tiny_pipes.sd, "sd3": tiny_pipes.sd3}
CALLS: dict[str, dict[str, Any]] = {
    "flux": {"max_sequence_length": 16, "negative_prompt": ["green"] * 2, "true_cfg_scale": 2.0},
    "sd": {"guidance_scale": 3.0},
    "sd3": {"max_sequence_length": 16, "guidance_scale": 3.0},
}


def queries(nu: float, **more: Any) -> ac.PlainQueries:
    return ac.PlainQueries(nu, nu, **{**FULL, **more})


def draw(pipe: Any, name: str, steps: int) -> Tensor:
    size = {"height": 32, "width": 48, "output_type": "latent", "num_inference_steps": steps}
    generators = [torch.Generator().manual_seed(seed) for seed in (0, 1)]
    return pipe(["a red circle", "a blue star"], generator=generators, **size, **CALLS[name]).images


def model_of(pipe: Any) -> Any:
    return getattr(pipe, "unet", None) or pipe.transformer


@contextmanager
def forwards(model: Any) -> Iterator[list[Tensor]]:
    """What the model gives out at each forward."""
    seen: list[Tensor] = []
    hook = model.register_forward_hook(lambda _m, _a, out: seen.append(out[0]))
    yield seen
    hook.remove()


@pytest.mark.parametrize("nu", [1.0, 0.3])
@pytest.mark.parametrize("name", ["flux", "sd3", "unet", "qwen"])
def test_attention_is_that_of_blended_queries(name: str, nu: float) -> None:
    """C5: softmax over own and shared keys of ((1 - nu) q + nu q of the same layer in a plain run); texts ask as ever."""
    setting = FAMILIES[name](batch=2)
    before, told = traces(setting.model), branches(setting.model)
    with torch.no_grad(), probe() as alone:
        base = setting.run()
    stack = [ac.Share(SCENES, tokens="subject"), queries(nu)]
    with ac.attach(setting.model, stack, branches=told), probe() as calls, torch.no_grad():
        out = setting.run()
    assert (out - base).abs().max() > 1e-4
    # kernels see the plain forward first
    assert all(torch.equal(one.query, other.query) for one, other in zip(alone, calls, strict=False))
    met = 0
    for (plain, kinds), (call, _) in zip(
        setting.controlled(alone), setting.controlled(calls[len(alone) :]), strict=True
    ):
        if "image" not in kinds.keys.split() or "image" not in kinds.queries.split():
            continue
        met += 1
        for image, other in ((0, 1), (1, 0)):
            asks, _ = sides_of(setting, kinds, SCENES[image])
            _, theirs = sides_of(setting, kinds, SCENES[other])
            fox = [n for n, token in enumerate(theirs) if token.kind == "image" and token.members]
            asking = torch.tensor([token.kind == "image" for token in asks])
            query = call.query[image].double()
            query[asking] = (1 - nu) * query[asking] + nu * plain.query[image, asking].double()
            key = torch.cat([call.key[image], call.key[other, fox]]).double()
            value = torch.cat([call.value[image], call.value[other, fox]]).double()
            scores = torch.einsum("qhd,khd->hqk", query, key) / key.shape[-1] ** 0.5
            scores[:, ~asking, len(call.key[image]) :] = float("-inf")
            expected = torch.einsum("hqk,khd->qhd", scores.softmax(-1), value)
            assert (expected - call.out[image]).abs().max() < 2e-5
    assert met
    assert torch.equal(setting.run(), base)
    assert traces(setting.model) == before


def test_no_share_of_them_is_sharing_alone_to_the_bit_and_free() -> None:
    setting = sd3(batch=2)
    share = ac.Share(SCENES, tokens="subject")
    with ac.attach(setting.model, share, branches=("cond",)):
        expected = setting.run()
    for none in (queries(0.0), queries(0.5, strength=0.0), queries(0.5, window=(0.5, 0.5))):
        with ac.attach(setting.model, [share, none], branches=("cond",)), forwards(setting.model) as seen:
            assert torch.equal(setting.run(), expected)
        assert len(seen) == 1
    # a picture that reads nobody asks as ever
    alone = ac.Share(SCENES, readers="anchors", anchors=1)
    with ac.attach(setting.model, [alone, queries(1.0)], branches=("cond",)):
        assert torch.equal(setting.run()[0], sd3(batch=2).run()[0])


@pytest.mark.parametrize("name", PIPES)
def test_each_step_at_which_something_is_shared_costs_one_forward_more(name: str) -> None:
    """Of 10 steps, reading from the second on, plain queries in the first three: two steps, in each forward of a step."""
    pipe = PIPES[name]()
    each = 2 if name == "flux" else 1
    with forwards(model_of(pipe)) as seen:
        plain = draw(pipe, name, 10)
    assert len(seen) == 10 * each
    share = ac.Share(window=(0.1, 1.0))
    with ac.attach(pipe, [share, ac.PlainQueries(window=(0.0, 0.3))]) as handle, forwards(model_of(pipe)) as seen:
        blended = draw(pipe, name, 10)
    assert len(seen) == 12 * each
    told = {one.name: one.steps for one in handle.report().controls}
    assert told == {"share": tuple(range(1, 10)), "plain_queries": (1, 2)}
    with ac.attach(pipe, share):
        shared = draw(pipe, name, 10)
    assert len({one.sum().item() for one in (plain, blended, shared)}) == 3
    # the forwards of the first shared step are the plain ones, then those that share
    with ac.attach(pipe, [ac.Share(), queries(0.5, window=(0.0, 0.1))]), forwards(model_of(pipe)) as seen:
        draw(pipe, name, 2)
    with forwards(model_of(pipe)) as alone:
        draw(pipe, name, 2)
    assert torch.equal(seen[0], alone[0])
    assert not torch.equal(seen[1], alone[0])


def test_shares_go_from_the_first_step_of_the_window_to_the_last() -> None:
    """ConsiStory: 0.9 to 0.818 over steps 0 to 5 of 50."""
    control = ac.PlainQueries()
    levels = tuple(torch.linspace(1, 0, 50).tolist())
    found = [control.share(Moment(levels[step], step, levels)) for step in range(6)]
    assert found == pytest.approx([0.9, 0.8836, 0.8672, 0.8508, 0.8344, 0.818])
    assert ac.PlainQueries(strength=0.5).share(Moment(levels[0], 0, levels)) == pytest.approx(0.45)
    with pytest.raises(ac.ScheduleError, match="cannot be told"):
        control.share(Moment(levels[6], 6, levels))


def test_nothing_is_kept_and_other_controls_act_in_the_plain_forward() -> None:
    pipe = tiny_pipes.sd3()
    control, kept = queries(0.5, layers="joint:0"), []
    stack = [ac.Isolate([ac.Region("a", box=(0, 0, 0.5, 1)), ac.Region("b", box=(0.5, 0, 1, 1))], branch="all")]
    watch = pipe.transformer.register_forward_pre_hook(lambda *_: kept.append(len(control.kept)))
    with ac.attach(pipe, [*stack, ac.Share(), control]), forwards(pipe.transformer) as seen:
        draw(pipe, "sd3", 2)
    watch.remove()
    # empty ahead of the plain forward, one layer's while the other runs
    assert kept == [0, 1] * 2
    assert control.kept == {}
    with ac.attach(pipe, stack), forwards(pipe.transformer) as isolated:
        draw(pipe, "sd3", 2)
    assert torch.equal(seen[0], isolated[0])

    class Stop(Exception):
        pass

    def stop(*_: Any) -> None:
        if len(control.kept):
            raise Stop

    breaks = pipe.transformer.transformer_blocks[1].register_forward_pre_hook(stop)
    with ac.attach(pipe, [ac.Share(), control]), pytest.raises(Stop):
        draw(pipe, "sd3", 2)
    breaks.remove()
    assert control.kept == {}


def test_what_does_not_go_with_it_is_an_error_that_says_why() -> None:
    setting = flux(batch=2)

    def refused(match: str, *stack: Any, error: Any = ac.ControlError) -> None:
        with ac.attach(setting.model, stack), pytest.raises(error, match=match):
            setting.run()

    refused("'plain_queries' and 'perturb' both add forwards", ac.Share(), queries(0.5), ac.Perturb("identity"))
    with pytest.raises(ac.ControlError, match="no control of the stack shares anything"):
        ac.attach(setting.model, queries(0.5))
    with pytest.raises(ac.ControlError, match=r"first must be in \[0, 1\]; found 1.5"):
        ac.PlainQueries(1.5)
    assert ac.Control.from_dict(ac.PlainQueries(0.5, 0.25).to_dict()).to_dict() == {
        "name": "plain_queries",
        "first": 0.5,
        "last": 0.25,
    }
    compiled = sd3(batch=2)
    compiled.model.transformer_blocks[0].compile(backend="eager")
    reason = r"compiled code keeps none.*plain=\(0, 0\)"
    attached = ac.attach(compiled.model, [ac.Share(), queries(0.5)], branches=("cond",))
    with attached, pytest.raises(ac.UnsupportedModelError, match=reason):
        compiled.run()
    from diffusers import PyramidAttentionBroadcastConfig

    pipe = tiny_pipeline()
    pipe.transformer.enable_cache(
        PyramidAttentionBroadcastConfig(spatial_attention_block_skip_range=2, current_timestep_callback=lambda: 500)
    )
    with ac.attach(pipe, [ac.Share(), queries(0.5)]), pytest.raises(ac.UnsupportedModelError, match="disable_cache"):
        draw(pipe, "flux", 1)


def test_the_preset_has_it_and_can_leave_it_out() -> None:
    names = [one.name for one in ac.preset("consistory", SCENES)]
    assert names == ["share", "plain_queries", "harmonize"]
    assert [one.name for one in ac.preset("consistory", SCENES, plain=(0, 0))] == ["share", "harmonize"]
    model = unet(batch=2).model
    assert ac.attach(model, ac.preset("consistory", SCENES, anchors=1), branches=("cond",)).detach() is None
