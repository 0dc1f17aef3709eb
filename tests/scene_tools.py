"""Shared by the tests of scenes."""

from __future__ import annotations

import numpy as np
import pytest
import yaml
from PIL import Image

from attnctrl.errors import SceneError
from attnctrl.scene import Scene, load_scene

BASE = {"version": 1, "prompt": "a red circle and a blue square"}
LEFT = {"prompt": "a red circle", "box": [0.0, 0.25, 0.5, 0.75]}
RIGHT = {"prompt": "a blue square", "box": [0.5, 0.25, 1.0, 0.75]}


def write(folder, data, name="scene.yaml"):
    path = folder / name
    path.write_text(data if isinstance(data, str) else yaml.safe_dump(data))
    return path


def refusal(data, files=None):
    with pytest.raises(SceneError) as caught:
        Scene.from_dict(data, files)
    return str(caught.value)


def refused_file(path):
    with pytest.raises(SceneError) as caught:
        load_scene(path)
    return str(caught.value)


def save_mask(path, rows):
    Image.fromarray(np.array(rows, dtype=np.uint8)).save(path)
