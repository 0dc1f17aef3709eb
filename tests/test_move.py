"""Subjects that move: one picture on toy-flux, read back by the scorer; what cannot be moved is refused."""

from __future__ import annotations

import numpy as np
import pytest
import tiny_pipes
import torch
from attnctrl.pipelines.moving import move
from diffusers import FluxPipeline

import attnctrl as ac
from attnctrl.errors import ControlError, UnsupportedModelError
from attnctrl.toybox import model_path
from attnctrl.toybox.models.flux import tiny_pipeline
from attnctrl.toybox.scorer import read_picture

CIRCLE = ac.Region("a solid red circle", box=(0, 0.125, 0.625, 0.875))
CALL = {"width": 64, "height": 64, "num_inference_steps": 2}


def test_a_circle_goes_where_it_is_told_and_leaves_nothing_behind():
    """Near the new place, of its shape and colour, alone; what neither place covers stays."""
    pipe = FluxPipeline.from_pretrained(model_path("toy-flux"))
    pipe.set_progress_bar_config(disable=True)
    prompts = ("a solid red circle left, white background", "a solid red circle, white background")
    call = {**CALL, "num_inference_steps": 8, "max_sequence_length": 40}
    found = move(pipe, prompts, CIRCLE, (0.375, 0.0), seed=1, call=call)
    source, moved = (read_picture(np.asarray(image)).subjects for image in (found.source, found.moved))
    assert [(one.shape, one.color) for one in source] == [("circle", "red")]
    assert [(one.shape, one.color) for one in moved] == [("circle", "red")]
    (x, y), (new_x, new_y) = source[0].center, moved[0].center
    assert abs(new_x - x - 0.375) < 0.06
    assert abs(new_y - y) < 0.06
    assert found.box == (0.375, 0.125, 1.0, 0.875)
    assert "matched by place" in found.report
    with torch.no_grad():
        plain = pipe(prompts[0], generator=torch.Generator().manual_seed(1), **call).images[0]
    assert np.abs(np.asarray(plain).astype(int) - np.asarray(found.source)).max() <= 1


@pytest.mark.parametrize("make", [tiny_pipes.sd3, tiny_pipes.sd, tiny_pipeline])
def test_it_runs_on_every_kind_of_pipeline(make):
    """Latents of all forms; the source is the plain picture, and without the ground's latents it is another one."""
    pipe = make()
    small = ac.Region(name="cat", box=(0, 0, 0.25, 0.5))
    one, other = (move(pipe, "a cat", small, (0.5, 0.0), keep_ground=keep, call=CALL) for keep in (True, False))
    first, second = (np.asarray(found.source).astype(int) for found in (one, other))
    assert np.abs(first - second).max() <= 1
    assert np.abs(np.asarray(one.moved).astype(int) - np.asarray(other.moved)).max() > 0


def test_what_cannot_be_moved_is_refused():
    pipe = tiny_pipeline()
    refused = [
        (ac.Region(name="cat"), (0.1, 0), {}, "has no box"),
        (CIRCLE, (0.5, 0), {}, "is not on the picture"),
        (CIRCLE, (0.5,), {}, "shares \\(x, y\\) to move by"),
        (CIRCLE, (0.1, 0), {"hurry": 1}, "no options hurry"),
    ]
    for subject, to, options, message in refused:
        with pytest.raises(ControlError, match=message):
            move(pipe, "a cat", subject, to, call=CALL, **options)
    with pytest.raises(ControlError, match="found 3 prompts"):
        move(pipe, ["a", "b", "c"], CIRCLE, (0.1, 0), call=CALL)
    with pytest.raises(UnsupportedModelError, match="found object"):
        move(object(), "a cat", CIRCLE, (0.1, 0))
