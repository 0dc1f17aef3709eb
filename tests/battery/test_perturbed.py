"""Perturbed branches inside stock pipelines: batched, sequential and no guidance; windows; what cannot be told is refused."""

from __future__ import annotations

import functools
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import pytest
import tiny_pipes
import torch
from harness import flux, sd3
from torch import Tensor

import attnctrl as ac
from attnctrl.increments import saliency
from attnctrl.toybox.models.flux import tiny_pipeline

SIZE = {"height": 32, "width": 48, "output_type": "latent"}
CALLS: dict[str, dict[str, Any]] = {
    "flux": {"max_sequence_length": 16},
    "flux-true-cfg": {"max_sequence_length": 16, "negative_prompt": "green", "true_cfg_scale": 2.0},
    "sd3": {"max_sequence_length": 16, "guidance_scale": 3.0},
    "sd3-plain": {"max_sequence_length": 16, "guidance_scale": 1.0},
    "sd": {"guidance_scale": 3.0},
    "sd-plain": {"guidance_scale": 1.0},
}
LAYERS = {"flux": "single:0", "sd3": "joint:0", "sd": "mid.self"}


@functools.cache
def pipeline(family: str) -> Any:
    return tiny_pipeline() if family == "flux" else getattr(tiny_pipes, family)()


def generate(name: str, steps: int = 1) -> Tensor:
    pipe = pipeline(name.partition("-")[0])
    generator = torch.Generator().manual_seed(0)
    return pipe("a red circle", num_inference_steps=steps, generator=generator, **SIZE, **CALLS[name]).images


def perturb(name: str, **more: Any) -> ac.Perturb:
    return ac.Perturb("identity", **{"layers": LAYERS[name.partition("-")[0]], **more})


@contextmanager
def predictions(name: str) -> Iterator[list[Tensor]]:
    """What the model itself predicts at each forward."""
    pipe = pipeline(name.partition("-")[0])
    model = getattr(pipe, "unet", None) or pipe.transformer
    seen: list[Tensor] = []
    hook = model.register_forward_hook(lambda _m, _a, out: seen.append(out[0]))
    try:
        yield seen
    finally:
        hook.remove()


@pytest.mark.parametrize("name", CALLS)
@pytest.mark.parametrize("door", ["attach", "processors"])
def test_a_step_moves_by_the_increment_whatever_the_guidance(name: str, door: str) -> None:
    """One step is linear in the prediction: latents with and without the branch differ by k w (c - p)."""
    pipe = pipeline(name.partition("-")[0])
    with predictions(name) as plain:
        base = generate(name)
    if door == "attach":
        with ac.attach(pipe, perturb(name)), predictions(name) as seen:
            out = generate(name)
    else:
        model = getattr(pipe, "unet", None) or pipe.transformer
        originals = dict(model.attn_processors)
        model.set_attn_processor(ac.processors(pipe, perturb(name)))
        with predictions(name) as seen:
            out = generate(name)
        model.set_attn_processor(originals)
    # the prompt's forward, its rows alone once more, and then whatever follows
    assert [len(one) for one in seen] == [len(plain[0]), 1, *(len(one) for one in plain[1:])]
    assert all(torch.equal(a, b) for a, b in zip([seen[0], *seen[2:]], plain, strict=True))
    g = 3.0 * (seen[0][-1:] - seen[1])
    moved = out - base
    k = (moved * g).sum() / (g * g).sum()
    assert (moved - k * g).abs().max() < 1e-5 * moved.abs().max() + 1e-6
    assert moved.abs().max() > 1e-4
    if not name.startswith("sd-") and name != "sd":
        assert abs(k + 1) < 1e-4  # from sigma 1 to 0
    assert torch.equal(generate(name), base)


@pytest.mark.parametrize("mode", ["full", "snf"])
@pytest.mark.parametrize("name", ["sd", "sd3", "sd3-plain"])
def test_rescaled_by_what_the_pipelines_guidance_gives(name: str, mode: Any) -> None:
    """The latents of a step move by what the formula gives for u, c, p and the scale that the pipeline was told."""
    base = generate(name)
    moves = []
    for control in (perturb(name), perturb(name, rescale=0.75, rescale_mode=mode)):
        with ac.attach(pipeline(name.partition("-")[0]), control), predictions(name) as seen:
            moves.append(generate(name) - base)
    u, c, p = seen[0][0].double(), seen[0][-1].double(), seen[1][0].double()
    s = CALLS[name]["guidance_scale"]
    cfg, g = u + s * (c - u), 3 * (c - p)
    if mode == "full":
        change = g * c.std() / (cfg + g).std()
    elif name == "sd3-plain":
        change = g
    else:
        change = torch.where(saliency(g) > saliency(cfg - u), g - (cfg - u), 0.0)
    expected = 0.75 * change + 0.25 * g
    k = (moves[0] * g).sum() / (g * g).sum()
    assert (moves[1] - k * expected).abs().max() < 1e-4 * moves[1].abs().max()
    assert torch.equal(generate(name), base)


def test_guidance_that_is_not_known_in_time_is_refused() -> None:
    """Branches in forwards of their own come too late, and a bare model does not tell its scale."""
    for name in ("flux-true-cfg", "flux"):
        control = perturb(name, rescale=1.0, rescale_mode="full")
        with ac.attach(pipeline("flux"), control), pytest.raises(ac.ControlError, match="rescale_mode='partial'"):
            generate(name)
    setting = sd3(batch=2)
    control = ac.Perturb(layers="joint:0", rescale=1.0, rescale_mode="snf")
    with (
        ac.attach(setting.model, control, branches=("uncond", "cond")),
        pytest.raises(ac.ControlError, match="tells its guidance_scale"),
    ):
        setting.run()
    # without a share of it nothing has to be known
    with ac.attach(pipeline("flux"), perturb("flux", rescale_mode="snf")):
        generate("flux")


@pytest.mark.parametrize("control", [ac.Perturb, ac.Skip])
def test_modes_are_told_by_documents(control: Any) -> None:
    made = control(layers="joint:0", rescale=0.5, rescale_mode="snf")
    told = made.to_dict()
    assert told["rescale_mode"] == "snf"
    assert ac.Control.from_dict(told).guide == made.guide != control(layers="joint:0", rescale=0.5).guide
    with pytest.raises(ac.ControlError, match="rescale_mode must be one of partial, full, snf; found 'half'"):
        control(layers="joint:0", rescale_mode="half")


@pytest.mark.parametrize(("name", "plain"), [("flux", 1), ("flux-true-cfg", 2), ("sd3", 1), ("sd", 1)])
def test_forwards_in_and_out_of_the_window(name: str, plain: int) -> None:
    pipe = pipeline(name.partition("-")[0])
    for window, inside in (((0.0, 0.5), 2), ((0.75, 1.0), 1), ((0.0, 1.0), 4)):
        with ac.attach(pipe, perturb(name, window=window)) as handle, predictions(name) as seen:
            generate(name, steps=4)
        assert len(seen) == 4 * plain + inside
        # where no window asks for it, schedulers without an index of their own do not tell the step
        if window != (0.0, 1.0):
            assert len(handle.report().controls[0].steps) == inside
    base = generate(name, steps=4)
    with ac.attach(pipe, perturb(name, scale=0.0)), predictions(name) as seen:
        assert torch.equal(generate(name, steps=4), base)
    assert len(seen) == 4 * plain


def test_a_branch_before_the_prompts_is_refused() -> None:
    setting = flux()
    with ac.attach(setting.model, ac.Perturb(layers="single:0")):
        with pytest.raises(ac.ControlError, match="prompt's branch first"), setting.model.cache_context("uncond"):
            setting.run()
        with setting.model.cache_context("cond"):
            setting.run()
        other = setting.inputs["hidden_states"] + 1
        with pytest.raises(ac.ControlError, match="same latents"), setting.model.cache_context("uncond"):
            setting.run(hidden_states=other)
        with setting.model.cache_context("uncond"):
            setting.run()


def test_a_batch_that_is_not_named_is_refused() -> None:
    setting = sd3(batch=2)
    with (
        ac.attach(setting.model, ac.Perturb(layers="joint:0")),
        pytest.raises(ac.ControlError, match=r"branches=\('uncond', 'cond'\)"),
    ):
        setting.run()
