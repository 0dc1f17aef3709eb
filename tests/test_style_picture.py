"""A real picture as the anchor of a set: what the model meets in its row, who depends on it, records, bad pictures."""

from __future__ import annotations

import io
import json
import struct
import zlib
from math import exp

import numpy as np
import pytest
import tiny_pipes
import torch
from attnctrl.pipelines import StylePipeline
from attnctrl.pipelines.canvas import pinned_pictures
from attnctrl.pipelines.latents import ADAPTERS, encode
from diffusers import FluxKontextPipeline
from PIL import Image, ImageOps

import attnctrl as ac
from attnctrl import provenance
from attnctrl.attach import parts_of
from attnctrl.errors import (
    AssetError,
    AttnCtrlError,
    ControlError,
    LayoutError,
    SceneError,
    SelectionError,
    UnsupportedModelError,
)
from attnctrl.families import family_of
from attnctrl.toybox.models.flux import tiny_pipeline

PIPES = {"flux": tiny_pipeline, "sd3": tiny_pipes.sd3, "sd": tiny_pipes.sd, "sdxl": tiny_pipes.sdxl}
PROMPTS = ["a red circle", "a blue square", "a star"]
FAST = {"width": 64, "height": 32, "num_inference_steps": 2}
TOLD = {"picture_prompt": "two cats", "picture_seed": 5}


def noise_picture(seed=0, size=(64, 32)):
    return Image.fromarray(np.random.default_rng(seed).integers(0, 256, (size[1], size[0], 3), dtype=np.uint8))


def guided(pipe, scale=2.0):
    """Guidance in two forwards on FLUX, in one on the others."""
    return {"true_cfg_scale" if type(pipe.pipe).__name__ == "FluxPipeline" else "guidance_scale": scale}


def gap(one, two):
    return np.abs(np.asarray(one.image).astype(int) - np.asarray(two.image).astype(int)).max()


def head_of_png(side):
    """A PNG file of a square that lacks its pixels."""
    parts = ((b"IHDR", struct.pack(">IIBBBBB", side, side, 8, 2, 0, 0, 0)), (b"IDAT", b""), (b"IEND", b""))
    chunks = (
        struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data)) for kind, data in parts
    )
    return b"\x89PNG\r\n\x1a\n" + b"".join(chunks)


def wrapped(make):
    """Around a tiny pipeline whose weights are large enough for attention to matter."""
    pipe, generator = make(), torch.Generator().manual_seed(0)
    for weight in parts_of(pipe)[0].parameters():
        if weight.ndim == 2:
            weight.data.normal_(std=1.5 / weight.shape[1] ** 0.5, generator=generator)
    return StylePipeline.from_pipe(pipe)


@pytest.fixture(params=PIPES, scope="module")
def pipe(request):
    return wrapped(PIPES[request.param])


@pytest.fixture(scope="module")
def sd():
    return wrapped(tiny_pipes.sd)


def met(pipe, call):
    """Pictures, and the latents of each forward, branch by branch [branches, pictures, ...]."""
    model, seen = parts_of(pipe.pipe)[0], []
    hidden = family_of(model).hidden
    hook = model.register_forward_pre_hook(lambda _m, args, named: seen.append(named[hidden]), with_kwargs=True)
    try:
        pictures = call()
    finally:
        hook.remove()
    return pictures, [latents.unflatten(0, (-1, 1 + len(pictures))) for latents in seen]


@pytest.mark.parametrize("mu", [0.0, 0.6])
def test_the_model_meets_the_picture_as_noisy_as_told(pipe, mu):
    call = {**FAST, **guided(pipe), **TOLD, "controls": [], "negative_prompt": "blurry", "seeds": 1}
    # twice as large, and more to the sides: the middle of it at the size that is drawn
    large = noise_picture(size=(200, 64))
    pictures, seen = met(pipe, lambda: pipe(PROMPTS, picture=large, cleaner=mu, **call))
    assert len(pictures) == 3
    adapter = ADAPTERS[type(pipe.pipe).__name__]
    shown = ImageOps.fit(large, (64, 32), Image.Resampling.LANCZOS)
    clean = encode(pipe.pipe, adapter, [shown])[0].double()
    channels = pipe.pipe.vae.config.latent_channels
    grid = (1, channels, 32 // pipe.pipe.vae_scale_factor, 64 // pipe.pipe.vae_scale_factor)
    noise = adapter.pack(pipe.pipe, torch.randn(grid, generator=torch.Generator().manual_seed(5)))[0].double()
    times = pipe.pipe.scheduler.timesteps
    each = len(seen) // len(times)
    assert each * seen[0].shape[0] == 2
    for number, latents in enumerate(seen):
        time = times[number // each]
        kept = None if adapter.flow else float(pipe.pipe.scheduler.alphas_cumprod[int(time)])
        odds = float(time / 1000) / (1 - float(time / 1000) or 1e-12) if kept is None else ((1 - kept) / kept) ** 0.5
        odds *= exp(-2 * mu)
        expected = (clean + odds * noise) / (1 + odds if adapter.flow else (1 + odds * odds) ** 0.5)
        for branch in latents:
            assert (branch[0] - expected).abs().max() < 1e-5
            assert (branch[1] - expected).abs().max() > 0.1
    assert not parts_of(pipe.pipe)[0]._forward_pre_hooks


def test_it_is_the_set_whose_anchor_is_held(pipe):
    """The pictures are those of the batch with the picture as its first row, whatever the size of batches."""
    call = {**FAST, **guided(pipe), **TOLD, "seeds": 1, "controls": [ac.ShareStyle(weight=2.0)]}
    drawn = pipe(PROMPTS, "in ink", picture=noise_picture(), cleaner=1.5, **call)
    told = [TOLD["picture_prompt"], *(f"{text}, in ink" for text in PROMPTS)]
    same = {key: value for key, value in call.items() if key not in ("seeds", *TOLD)}
    cleaner = ac.inversion.odds_map(1.5)
    with pinned_pictures(pipe.pipe, {0: noise_picture()}, {0: 5}, cleaner=cleaner):
        wanted = pipe(told, seeds=[5, 1, 2, 3], **same)[1:]
    assert [gap(*pair) for pair in zip(drawn, wanted, strict=True)] == [0, 0, 0]
    parts = pipe(PROMPTS, "in ink", picture=noise_picture(), cleaner=1.5, batch=2, **call)
    assert max(gap(*pair) for pair in zip(drawn, parts, strict=True)) <= 1
    other = pipe(PROMPTS, "in ink", picture=Image.new("RGB", (64, 32), "red"), cleaner=1.5, **call)
    # equal runs are equal to the bit, as above
    assert min(gap(*pair) for pair in zip(drawn, other, strict=True)) > 0
    plain = pipe(PROMPTS, "in ink", picture=noise_picture(), **{**call, "controls": []})
    alone = pipe([f"{text}, in ink" for text in PROMPTS], **{**same, "seeds": 1, "controls": []})
    assert max(gap(*pair) for pair in zip(plain, alone, strict=True)) <= 1
    assert [one.seed for one in drawn] == [1, 2, 3]
    assert "AdaIN" in drawn[0].report


@pytest.mark.parametrize("make", [tiny_pipeline, tiny_pipes.sd3], ids=["flux", "sd3"])
def test_at_the_first_level_of_flows_only_its_noise_is_seen(make):
    """There a picture is the drawn anchor of the same words and seed: an independent way to the same numbers."""
    pipe = wrapped(make)
    call = {**FAST, "num_inference_steps": 1, "preset": "style-aligned"}
    drawn = pipe(PROMPTS, picture=noise_picture(), seeds=[1, 2, 3], **TOLD, **call)
    wanted = pipe(["two cats", *PROMPTS], seeds=[5, 1, 2, 3], **call)[1:]
    assert max(gap(*pair) for pair in zip(drawn, wanted, strict=True)) <= 1
    for change in ({"picture_seed": 6}, {"picture_prompt": "a fog"}):
        other = pipe(PROMPTS, picture=noise_picture(), seeds=[1, 2, 3], **{**TOLD, **change}, **call)
        assert min(gap(*pair) for pair in zip(drawn, other, strict=True)) > 1


def test_a_picture_is_made_again_from_its_file(sd, tmp_path, monkeypatch):
    call = {**FAST, "guidance_scale": 2.0, "negative_prompt": ["fog", "", ""], "seeds": 1, "weight": 2.0}
    drawn = sd(PROMPTS, picture=noise_picture(size=(99, 70)), cleaner=0.4, **TOLD, **call)
    path = drawn[0].save(tmp_path / "0.png")
    record, files = provenance.read(path), provenance.carried(path)
    assert record["set"]["picture"] == {"file": "anchor.png", "cleaner": 0.4}
    assert record["set"]["prompts"] == ["two cats", "a red circle"]
    assert record["set"]["negative_prompts"] == ["", "fog"]
    assert record["set"]["seeds"] == [5, 1]
    again = sd.again(record, files=files)
    assert gap(again, drawn[0]) <= 1
    assert (again.record["set"], again.files, again.seed) == (record["set"], drawn[0].files, 1)
    with pytest.raises(ControlError, match=r"anchor.png.*stands beside the record.*provenance.carried"):
        sd.again(record)
    # a picture that is too large to be embedded is looked for beside the PNG
    monkeypatch.setattr(provenance, "MAX_EMBEDDED_BYTES", 100)
    path = drawn[1].save(tmp_path / "1.png")
    with pytest.raises(SceneError, match="too large to be in the picture and not beside it"):
        provenance.carried(path)
    (tmp_path / "anchor.png").write_bytes(drawn[1].files["anchor.png"])
    assert provenance.carried(path) == dict(drawn[1].files)


def test_the_shell_makes_it_again(call, tmp_path):
    from shell import save_tiny

    folder = save_tiny(tmp_path)
    pipe = StylePipeline.from_pretrained(str(folder / "tiny"), device="cpu")
    drawn = pipe(PROMPTS[:1], picture=noise_picture(), seeds=1, **{**FAST, "height": 64}, **TOLD)
    code, out, _ = call("replay", drawn[0].save(folder / "0.png"), "--format", "json", "--device", "cpu")
    assert (code, json.loads(out)["equal"]) == (0, True)


@pytest.mark.parametrize(
    ("prompts", "options", "error", "message"),
    [
        ([], {}, ControlError, "There are no prompts"),
        (["a cat", " "], {}, ControlError, "Prompt 1 is empty"),
        (PROMPTS, {"picture": None}, ControlError, "give picture="),
        (PROMPTS, {"picture_prompt": " "}, ControlError, "give picture_prompt"),
        (PROMPTS, {"picture_prompt": "a cat " * 300}, SceneError, "picture 0: .*shorten it"),
        (PROMPTS, {"picture_seed": -1}, SceneError, "seed: must be in"),
        (PROMPTS, {"cleaner": -0.1}, ControlError, r"cleaner must be in \[0, 5\]"),
        (PROMPTS, {"cleaner": float("nan")}, ControlError, r"cleaner must be in \[0, 5\]"),
        (PROMPTS, {"batch": 1}, ControlError, "batch must be 2 or more"),
        (PROMPTS, {"seeds": [1, 2]}, ControlError, "3 prompts with 1 pictures each need 3 seeds"),
        (PROMPTS, {"layers": "upp.self"}, SelectionError, "Did you mean"),
        (PROMPTS, {"picture": np.zeros((32, 64, 3))}, AssetError, "picture: give a PIL picture or a path; found ndarray"),
        (PROMPTS, {"picture": __file__}, AssetError, r"picture \(.*\.py\): the picture cannot be decoded .*use a PNG"),
        (PROMPTS, {"picture": "nowhere.png"}, AssetError, r"picture \(nowhere.png\): .* missing"),
        (PROMPTS, {"picture": Image.new("RGB", (1, 1))}, LayoutError, "picture: a side must have 8 .*found 1 x 1"),
        (PROMPTS, {"picture": Image.new("RGB", (20000, 20))}, LayoutError, "to 4096 pixels; found 20000 x 20"),
    ],
)  # fmt: skip
def test_errors_say_what_to_do(sd, prompts, options, error, message):
    assert issubclass(error, AttnCtrlError)
    with pytest.raises(error, match=message):
        sd(prompts, **{**FAST, **TOLD, "picture": noise_picture(), **options})
    assert not sd.pipe.unet._forward_pre_hooks


def test_pictures_that_are_too_large_are_refused_by_their_heads(sd, tmp_path):
    """Files of a few bytes, without the pixels that they announce."""
    (tmp_path / "huge.png").write_bytes(head_of_png(20000))
    opened = Image.open(io.BytesIO(head_of_png(9000)))
    for picture, found in ((tmp_path / "huge.png", "more than"), (opened, "9000 x 9000 pixels, more than")):
        with pytest.raises(AssetError, match=f"picture.*: the picture has {found} .*; make it smaller"):
            sd(PROMPTS, picture=picture, **FAST, **TOLD)


def test_pipelines_without_a_place_for_it_say_so():
    kontext = StylePipeline.from_pipe(FluxKontextPipeline(**tiny_pipeline().components))
    with pytest.raises(UnsupportedModelError, match="found FluxKontextPipeline"):
        kontext(PROMPTS, picture=noise_picture(), **FAST, **TOLD)
