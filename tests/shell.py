"""What the tests of scenes, pipelines and the command line share: a tiny model folder and scenes for it."""

from __future__ import annotations

import json
from pathlib import Path

SIZE = 64
DEFAULTS = {
    "size": [SIZE, SIZE], "steps": 2, "guidance_scale": 1.0, "true_cfg_scale": 3.0, "max_sequence_length": 40, "auto_resize": False,
}  # fmt: skip
SCENE = """\
version: 1
model: ./tiny
prompt: a red circle and a blue square
subjects:
  - {name: circle, prompt: a red circle, box: [0, 0, 0.5, 1]}
  - {name: square, prompt: a blue square, box: [0.5, 0, 1, 1]}
controls:
  - {name: regions}
  - {name: isolate, window: [0, 0.5]}
seed: 5
"""


def save_tiny(folder: Path) -> Path:
    """A folder of scenes with one scene and a tiny random model in it."""
    import torch

    from attnctrl.toybox.models.flux import tiny_pipeline

    pipe = tiny_pipeline()
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        for parameter in pipe.transformer.parameters():
            if parameter.ndim > 1:  # large enough for attention to matter
                torch.nn.init.normal_(parameter, std=1.5 / parameter.shape[1] ** 0.5)
    pipe.save_pretrained(folder / "tiny")
    (folder / "tiny" / "attnctrl.json").write_text(json.dumps(DEFAULTS))
    (folder / "pair.yaml").write_text(SCENE)
    return folder
