"""Rows held on a path in stock pipelines, and canvases: exact values against the schedulers' own noise and pixels."""

from __future__ import annotations

import numpy as np
import pytest
import tiny_pipes
import torch
from attnctrl.pipelines.canvas import Cutout, canvas, pinned_pictures
from attnctrl.pipelines.latents import ADAPTERS, encode
from diffusers import EulerDiscreteScheduler
from PIL import Image

import attnctrl as ac
from attnctrl.attach import parts_of
from attnctrl.errors import ControlError, LayoutError, ScheduleError, UnsupportedModelError
from attnctrl.families import family_of
from attnctrl.inversion import Trajectory
from attnctrl.pinned import still
from attnctrl.toybox.models import flux

PIPES = {"flux": flux.tiny_pipeline, "sd3": tiny_pipes.sd3, "sd": tiny_pipes.sd, "sdxl": tiny_pipes.sdxl}
SIZE = (32, 16)
PROMPTS = ["a red circle", "a blue star", "a green heart"]


def picture(seed=0, size=SIZE):
    pixels = np.random.default_rng(seed).integers(0, 256, (size[1], size[0], 3), dtype=np.uint8)
    return Image.fromarray(pixels)


def call(pipe, prompts=PROMPTS, seed=5, **more):
    """The pipeline's pictures with guidance, and the latents of each forward, one row of (branch, picture) after the other."""
    guidance = {"true_cfg_scale": 2.0} if type(pipe).__name__ == "FluxPipeline" else {"guidance_scale": 2.0}
    generators = [torch.Generator().manual_seed(seed + n) for n in range(len(prompts))]
    seen, model = [], parts_of(pipe)[0]
    hidden = family_of(model).hidden

    def keep(_module, given, named):
        seen.append((given[0] if given else named[hidden]).clone())

    hook = model.register_forward_pre_hook(keep, with_kwargs=True)
    try:
        pictures = pipe(
            prompts, negative_prompt=["blurry"] * len(prompts), width=SIZE[0], height=SIZE[1], num_inference_steps=3,
            generator=generators, output_type="np", **{**guidance, **more},
        ).images  # fmt: skip
    finally:
        hook.remove()
    return pictures, seen


@pytest.fixture(params=PIPES, scope="module")
def pipe(request):
    return PIPES[request.param]()


def by_branch(latents):
    """[branches, pictures, ...] of one forward; SD runs both branches in one."""
    return latents.unflatten(0, (-1, len(PROMPTS)))


def test_the_model_meets_the_picture_at_every_level_in_every_branch(pipe):
    plain, before = call(pipe)
    adapter = ADAPTERS[type(pipe).__name__]
    with pinned_pictures(pipe, {1: picture()}, seeds={1: 6}) as pins:
        drawn, seen = call(pipe)
    model = parts_of(pipe)[0]
    assert pins.forwards == len(seen) == len(before)
    assert not model._forward_pre_hooks
    clean = encode(pipe, adapter, [picture()])
    # the noise is the very one that the pipeline draws from this seed, which the second row had
    noise = by_branch(before[0])[0, 1:2]
    each = len(seen) // len(pipe.scheduler.timesteps)
    for number, latents in enumerate(seen):
        timestep = pipe.scheduler.timesteps[number // each].reshape(1)
        if adapter.flow:
            sigma = timestep / 1000
            expected = (1 - sigma) * clean + sigma * noise
        else:
            expected = pipe.scheduler.add_noise(clean, noise, timestep.long())
        for branch in by_branch(latents):
            assert (branch[1] - expected[0]).abs().max() < 1e-5
            assert not torch.equal(branch[0], branch[1])
    # rows that read nothing of it are the plain ones
    kept = pins.kept(list(drawn))
    assert len(kept) == 2
    for found, wanted in zip(kept, (plain[0], plain[2]), strict=True):
        assert np.abs(found - wanted).max() < 1e-5
    again, _ = call(pipe)
    assert np.array_equal(again, plain)


def test_other_pictures_read_a_pinned_row(pipe):
    share = ac.Share(readers="anchors", anchors=1)
    found = []
    for shown in (0, 1):
        with pinned_pictures(pipe, {0: picture(shown)}), ac.attach(pipe, share) as handle:
            found.append(call(pipe)[0])
    assert np.abs(found[0][1:] - found[1][1:]).max() > 1e-4
    assert handle.report().forwards in (3, 6)


def test_a_scaled_scheduler_meets_the_same_inputs():
    """Euler's latents are larger by sqrt(1 + sigma^2), its model inputs are not."""
    pipe = tiny_pipes.sd()
    pipe.scheduler = EulerDiscreteScheduler.from_config(pipe.scheduler.config)
    with pinned_pictures(pipe, {0: picture()}):
        _, seen = call(pipe)
    clean = encode(pipe, ADAPTERS["StableDiffusionPipeline"], [picture()])
    noise = torch.randn(clean.shape, generator=torch.Generator().manual_seed(0))
    for latents, sigma in zip(seen, pipe.scheduler.sigmas.tolist(), strict=False):
        expected = (clean + sigma * noise) / (1 + sigma**2) ** 0.5
        assert (by_branch(latents)[:, 0] - expected).abs().max() < 1e-5


def test_a_trajectory_is_replayed_and_levels_that_it_lacks_are_named():
    pipe = tiny_pipes.sd3()
    _, seen = call(pipe)
    sigmas = tuple(pipe.scheduler.sigmas.tolist())
    path = torch.randn(len(sigmas), 1, *seen[0].shape[1:], generator=torch.Generator().manual_seed(1))
    trajectory = Trajectory(path, sigmas)
    with ac.pinned(pipe, {2: lambda sigma: trajectory.at(sigma)[0]}):
        _, seen = call(pipe)
    for number, latents in enumerate(seen):
        assert torch.equal(by_branch(latents)[:, 2], path[number].expand(2, *path.shape[2:]))
    with ac.pinned(pipe, {2: lambda sigma: trajectory.at(sigma)[0]}), pytest.raises(ScheduleError):
        pipe(PROMPTS, width=32, height=16, num_inference_steps=5)
    assert not parts_of(pipe)[0]._forward_pre_hooks


def test_what_does_not_fit_is_named():
    pipe = tiny_pipes.sd()
    clean = encode(pipe, ADAPTERS["StableDiffusionPipeline"], [picture()])[0]
    path = still(clean, clean, flow=False)
    with ac.pinned(pipe, {3: path}), pytest.raises(LayoutError, match=r"Row 3 is pinned.* holds 3 pictures"):
        call(pipe)
    with ac.pinned(pipe, {0: lambda sigma: clean[:, 1:]}), pytest.raises(LayoutError, match="denoiser gets rows of"):
        call(pipe)
    with pytest.raises(ControlError, match="give the pipeline"), ac.pinned(pipe.unet, {0: path}):
        pass
    with pytest.warns(UserWarning, match="did not run"), ac.pinned(pipe, {0: path}):
        pass
    with pytest.raises(LayoutError, match="multiples of"), pinned_pictures(pipe, {0: picture(size=(33, 17))}):
        pass
    wrong = type("OtherPipeline", (), {})()
    with pytest.raises(UnsupportedModelError, match="found OtherPipeline"), pinned_pictures(wrong, {0: picture()}):
        pass


def test_a_canvas_holds_subjects_at_their_places_pixel_by_pixel():
    shown = np.zeros((8, 12, 3), np.uint8) + np.uint8([10, 20, 30])
    shown[2:6, 1:5] = picture(1, (4, 4))
    cut = Cutout(Image.fromarray(shown), ac.Region(box=(1 / 12, 2 / 8, 5 / 12, 6 / 8)), ac.Region())
    moved = np.asarray(canvas([cut_to(cut, (8 / 16, 0, 12 / 16, 4 / 8))], (16, 8)))
    expected = np.zeros((8, 16, 3), np.uint8) + np.uint8([10, 20, 30])
    expected[0:4, 8:12] = shown[2:6, 1:5]
    assert np.array_equal(moved, expected)
    # a place twice as large; where proportions are kept, in the middle of it
    plain = np.zeros((8, 12, 3), np.uint8) + np.uint8([10, 20, 30])
    plain[2:6, 1:5] = (200, 0, 0)
    flat = Cutout(Image.fromarray(plain), cut.subject, ac.Region())
    wide = np.asarray(canvas([cut_to(flat, (0, 0, 8 / 16, 4 / 8))], (16, 8)))
    assert np.array_equal((wide == (200, 0, 0)).all(-1), mask_of(0, 2, 4, 6))
    filled = np.asarray(canvas([cut_to(flat, (0, 0, 8 / 16, 4 / 8), fit="stretch")], (16, 8)))
    assert np.array_equal((filled == (200, 0, 0)).all(-1), mask_of(0, 0, 4, 8))


def test_masks_cut_subjects_out_later_ones_lie_on_top_and_grounds_are_kept():
    red, blue = (Image.new("RGB", (8, 8), color) for color in ("red", "blue"))
    half = torch.zeros(8, 8)
    half[:4] = 1
    corner = half.clone()
    half[1, 6] = 0
    corner[:, 4:] = 0
    ground = picture(2, (8, 8))
    place = ac.Region(box=(0, 0, 1, 0.5))
    cuts = [
        Cutout(red, ac.Region(mask=half), place, "stretch"),
        Cutout(blue, ac.Region(mask=corner), ac.Region(box=(0, 0, 0.5, 0.5)), "stretch"),
    ]
    made = np.asarray(canvas(cuts, (8, 8), ground))
    assert (made[:4, :4] == (0, 0, 255)).all()
    assert np.array_equal((made[:4, 4:] == (255, 0, 0)).all(-1), (half[:4, 4:] == 1).numpy())
    assert np.array_equal(made[1, 6], np.asarray(ground)[1, 6])
    assert np.array_equal(made[4:], np.asarray(ground)[4:])
    with pytest.raises(ControlError, match="give `background`"):
        canvas([Cutout(red, ac.Region(), place)], (8, 8))


def cut_to(cut, box, fit="contain"):
    return Cutout(cut.picture, cut.subject, ac.Region(box=box), fit)


def mask_of(y0, x0, y1, x1):
    mask = np.zeros((8, 16), bool)
    mask[y0:y1, x0:x1] = True
    return mask
