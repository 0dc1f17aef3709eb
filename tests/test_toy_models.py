"""The embedded models are pipelines of stock Diffusers, small, and take controls through their own families."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
from attnctrl.pipelines import ScenePipeline

from attnctrl.scene import Scene
from attnctrl.toybox import model_path

MODELS = ("toy-flux", "toy-sd", "toy-sd3")


@pytest.mark.parametrize("name", MODELS)
def test_stock_diffusers_loads_and_runs_it_and_its_scenes_are_controlled(name: str) -> None:
    folder = Path(model_path(name))
    assert sum(file.stat().st_size for file in folder.rglob("*") if file.is_file()) < 20e6
    index = json.loads((folder / "model_index.json").read_text())
    assert not any("attnctrl" in str(part) for part in index.values())
    pipe = ScenePipeline.from_pretrained(name, device="cpu")
    assert type(pipe.pipe).__module__.startswith("diffusers.")
    scene = Scene.from_dict(
        {
            "version": 1,
            "model": name,
            "prompt": "a red circle left, a blue square right",
            "steps": 2,
            "subjects": [{"prompt": "a red circle left", "box": [0, 0, 0.5, 1]}],
        }
    )
    plain, steered = (np.asarray(pipe(scene, controlled=on)[0].image) for on in (False, True))
    assert plain.shape == (64, 64, 3)
    assert plain.std() > 5
    assert (plain != steered).any()
