"""A style that is kept and drawn with later: without the anchor in the batch, in another process, and what is refused."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import tiny_pipes
import torch
from PIL import Image
from test_style_picture import wrapped

import attnctrl as ac
from attnctrl import provenance
from attnctrl.errors import AttnCtrlError, ControlError, ScheduleError
from attnctrl.toybox.models.flux import tiny_pipeline

PIPES = {"flux": tiny_pipeline, "sd3": tiny_pipes.sd3, "sd": tiny_pipes.sd}
PROMPTS = ["a red circle", "a blue square", "a star"]
FAST = {"width": 64, "height": 32, "num_inference_steps": 2}
STYLED = {**FAST, "preset": "style-aligned"}
AGAIN = """
import sys
sys.path[:0] = {path!r}
import numpy as np
import attnctrl as ac
from test_style_saved import PIPES, PROMPTS, STYLED, wrapped
pipe = wrapped(PIPES["flux"])
drawn = pipe(PROMPTS[1:], "in ink", seeds=[2, 3], bank=ac.Bank.load({file!r}, pipe.pipe), **STYLED)
np.save({out!r}, np.stack([np.asarray(one.image) for one in drawn]))
"""


def pixels(pictures):
    return np.stack([np.asarray(one.image).astype(int) for one in pictures])


def guided(pipe, scale=2.0):
    return {"true_cfg_scale" if type(pipe.pipe).__name__ == "FluxPipeline" else "guidance_scale": scale}


@pytest.fixture(scope="module")
def flux():
    return wrapped(tiny_pipeline)


@pytest.fixture(scope="module")
def bank(flux):
    bank = ac.Bank()
    flux.keep(bank, "a red circle, in ink", seed=1, **STYLED)
    return bank


@pytest.mark.parametrize("name", PIPES)
def test_pictures_of_a_bank_are_those_beside_the_anchor(name):
    """In both branches of guidance; the anchor is the plain picture, and its size is told before."""
    pipe = wrapped(PIPES[name])
    told = {**STYLED, **guided(pipe), "window": (0.0, 0.6)}
    joint = pipe(PROMPTS, "in ink", "fog", seeds=[1, 2, 3], **told)
    bank = ac.Bank()
    need = ac.Keep(bank=bank, moments=True, window=(0.0, 0.6)).predict(pipe.pipe, width=64, height=32, steps=2)
    (anchor,) = pipe.keep(bank, "a red circle, in ink", "fog", seed=1, **told)
    assert need.nbytes == bank.nbytes > 0
    assert np.abs(pixels([anchor]) - pixels(joint[:1])).max() <= 1
    saved = pipe(PROMPTS[1:], "in ink", "fog", seeds=[2, 3], bank=bank, **told)
    plain = pipe(PROMPTS, "in ink", "fog", seeds=[1, 2, 3], controls=[], **FAST, **guided(pipe))[1:]
    assert np.abs(pixels(saved) - pixels(joint[1:])).max() <= 1
    assert np.abs(pixels(saved) - pixels(plain)).max() > 8


def test_another_process_draws_the_same_to_the_bit(flux, bank, tmp_path):
    file = bank.save(tmp_path / "ink.safetensors")
    here = flux(PROMPTS[1:], "in ink", seeds=[2, 3], bank=bank, **STYLED)
    script = AGAIN.format(path=[str(Path(__file__).parent)], file=str(file), out=str(tmp_path / "out.npy"))
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert np.array_equal(np.load(tmp_path / "out.npy").astype(int), pixels(here))


def test_batches_and_records(flux, bank, tmp_path):
    ticks = []
    whole = flux(PROMPTS, "in ink", seeds=5, bank=bank, **STYLED)
    parts = flux(PROMPTS, "in ink", seeds=5, bank=bank, batch=1, progress=lambda *x: ticks.append(x), **STYLED)
    assert np.abs(pixels(whole) - pixels(parts)).max() <= 1
    assert ticks == [(n, 6) for n in range(1, 7)]
    record = provenance.read(parts[1].save(tmp_path / "a.png"))
    assert record["set"].keys() == {"prompts", "negative_prompts", "seeds", "bank"}
    assert record["set"]["prompts"] == ["a blue square, in ink"]
    again = flux.again(record, bank=ac.Bank.load(bank.save(tmp_path / "ink.safetensors")))
    assert np.array_equal(pixels([again]), pixels(parts[1:2]))
    assert again.record["set"] == record["set"]
    with pytest.raises(ControlError, match="none was given"):
        flux.again(record)
    other = ac.Bank()
    flux.keep(other, "a red circle, in ink", seed=2, **STYLED)
    with pytest.raises(ControlError, match="is another"):
        flux.again(record, bank=other)


def test_a_real_picture_is_kept_as_it_is_met_in_a_row(flux):
    picture = Image.fromarray(np.random.default_rng(0).integers(0, 256, (32, 64, 3), dtype=np.uint8))
    told = {"picture": picture, "cleaner": 0.5}
    joint = flux(PROMPTS[1:], picture_prompt="two cats", seeds=[2, 3], **told, **STYLED)
    bank = ac.Bank()
    assert flux.keep(bank, "two cats", **told, **STYLED) == []
    saved = flux(PROMPTS[1:], seeds=[2, 3], bank=bank, **STYLED)
    assert np.abs(pixels(saved) - pixels(joint)).max() <= 1


def test_what_cannot_be_is_refused(flux, bank):
    refused = [
        (lambda: flux.keep(bank, "a star", **STYLED), ControlError, "not empty"),
        (lambda: flux.keep(ac.Bank(), " ", **STYLED), ControlError, "Prompt 0 is empty"),
        (lambda: flux.keep(ac.Bank(), "a star", controls=[], **FAST), ControlError, "found 0 of them"),
        (lambda: flux.keep(ac.Bank(), "a star", cleaner=1.0, **STYLED), ControlError, "cleaner is of a picture"),
        (lambda: flux(PROMPTS, bank=bank, picture="a.png", picture_prompt="a", **STYLED), ControlError, "one of them"),
        (
            lambda: flux(PROMPTS, bank=bank, controls=[ac.Perturb(layers="single")], **FAST),
            ControlError,
            "found 0 of them",
        ),
        (lambda: flux(PROMPTS, bank=bank, batch=0, **STYLED), ControlError, "batch must be 1 or more"),
        (lambda: flux([], bank=bank, **STYLED), ControlError, "no prompts"),
        (lambda: flux(PROMPTS, bank=bank, **{**STYLED, "num_inference_steps": 3}), ScheduleError, "bank is of a run"),
    ]
    for call, error, message in refused:
        assert issubclass(error, AttnCtrlError)
        with pytest.raises(error, match=message):
            call()


def test_narrow_banks_stay_near(flux, bank):
    """bfloat16 keys, float32 moments: far less than what the style changes."""
    narrow = ac.Bank("bfloat16", "cpu")
    flux.keep(narrow, "a red circle, in ink", seed=1, **STYLED)
    assert narrow.nbytes < 0.75 * bank.nbytes
    assert {one.moments.dtype for one in narrow.entries.values()} == {torch.float32}
    exact, near = (pixels(flux(PROMPTS[1:], "in ink", seeds=[2, 3], bank=one, **STYLED)) for one in (bank, narrow))
    plain = pixels(flux(PROMPTS, "in ink", seeds=[1, 2, 3], controls=[], **FAST)[1:])
    assert np.abs(near - exact).mean() < 0.1 * np.abs(plain - exact).mean()
