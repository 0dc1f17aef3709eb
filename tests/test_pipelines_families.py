"""Scenes on tiny Stable Diffusion, XL and SD3 pipelines of the real classes, and what their outlines tell."""

from __future__ import annotations

import json

import numpy as np
import pytest
import tiny_pipes
import torch
from attnctrl.pipelines import ScenePipeline
from attnctrl.pipelines.models import find_model
from attnctrl.pipelines.outline import Outline
from PIL import Image
from shell import SCENE

from attnctrl.errors import SceneError
from attnctrl.scene import load_scene
from attnctrl.schedule import run_levels


def pixels(picture):
    return np.asarray(picture.image)


@pytest.fixture(scope="module", params=["sd", "sdxl", "sd3"])
def other(request, tmp_path_factory):
    """A folder with a tiny model of another family."""
    folder = tmp_path_factory.mktemp(request.param)
    made = getattr(tiny_pipes, request.param)()
    made.save_pretrained(folder / "tiny")
    settings = {"size": [32, 32], "steps": 2, "guidance_scale": 3.0, "max_sequence_length": 40}
    (folder / "tiny" / "attnctrl.json").write_text(json.dumps(settings))
    (folder / "pair.yaml").write_text(SCENE)
    Image.new("RGB", (24, 16)).save(folder / "cat.png")
    return folder


def test_other_families_run_scenes_and_equal_plain_diffusers(other):
    scene, pipe = load_scene(other / "pair.yaml"), ScenePipeline.from_pretrained(str(other / "tiny"), device="cpu")
    ours = pipe(scene, [5], controlled=False)[0]
    arguments = {"max_sequence_length": 40} if "3" in type(pipe.pipe).__name__ else {}
    plain = pipe.pipe(
        scene.prompt, negative_prompt="", width=32, height=32, num_inference_steps=2, guidance_scale=3.0,
        generator=torch.Generator().manual_seed(5), **arguments,
    ).images[0]  # fmt: skip
    assert (pixels(ours) == np.asarray(plain)).all()
    controlled = pipe(scene, [5])[0]
    assert (pixels(controlled) != pixels(ours)).mean() > 0.2
    regions, isolate = controlled.record["report"]["controls"]
    assert (regions["rows"], regions["steps"], isolate["steps"]) == ([("cond", 0)], [0, 1], [0])
    assert controlled.record["pipeline"] == type(pipe.pipe).__name__
    assert controlled.record["settings"]["true_cfg_scale"] is None


def test_the_outline_of_other_families_tells_what_the_pipeline_does(other):
    scene, pipe = load_scene(other / "pair.yaml"), ScenePipeline.from_pretrained(str(other / "tiny"), device="cpu")
    outline = Outline.of(find_model(str(other / "tiny")))
    settings = outline.settings(scene)
    assert settings == pipe.settings(scene)
    pipe(scene, controlled=False)
    assert outline.sigmas(settings) == pytest.approx(list(run_levels(pipe.pipe.scheduler)[1]), rel=1e-6)
    told = outline.explain(scene).to_dict()
    assert [(one["name"], one["steps"]) for one in told["controls"]] == [("regions", "0-1"), ("isolate", "0")]
    tokens = told["scenes"][0][0]["tokens"]
    assert tokens["text.global"] == outline.text_tokens(settings) == (80 if "sd3" in str(other) else 40)
    # a token of SD3 is two by two latents
    assert tokens["image"] == (4 * 4 if "sd3" in str(other) else 8 * 8)


def test_what_other_families_do_not_have_is_named(other):
    pipe = ScenePipeline.from_pretrained(str(other / "tiny"), device="cpu")
    scene = load_scene(other / "pair.yaml")
    with pytest.raises(
        SceneError, match=r"true_cfg_scale: StableDiffusion.*Pipeline has none; found 2; its guidance_scale"
    ):
        pipe(scene.replace(true_cfg_scale=2.0))
    with pytest.raises(SceneError, match=r"StableDiffusion.*Pipeline follows no reference picture"):
        pipe(scene.replace(subjects=[{"prompt": "a red circle", "box": [0, 0, 0.5, 1], "reference": "cat.png"}]))
