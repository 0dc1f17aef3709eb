"""Write a trained toy pipeline in the stock Diffusers format: fp16 safetensors plus the settings the model wants."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import torch
from diffusers import DiffusionPipeline


def export(pipeline: DiffusionPipeline, folder: Path, settings: dict[str, Any], facts: dict[str, Any]) -> Path:
    """Save an fp16 copy of `pipeline` as `folder` (whole or not at all), with its settings and facts in attnctrl.json.

    The live weights are not changed. A model card already in `folder` is kept.
    """
    folder = Path(folder)
    temporary = folder.with_name(folder.name + ".tmp")
    shutil.rmtree(temporary, ignore_errors=True)
    modules = [m for m in pipeline.components.values() if isinstance(m, torch.nn.Module)]
    kept = [{k: v.detach().clone() for k, v in m.state_dict().items()} for m in modules]
    try:
        for module in modules:
            module.to(torch.float16)
        pipeline.save_pretrained(temporary, safe_serialization=True)
    finally:
        for module, weights in zip(modules, kept, strict=True):
            module.to(torch.float32)
            module.load_state_dict(weights)
    for config in temporary.glob("text_encoder*/config.json"):
        _load_as_float32(config)
    (temporary / "attnctrl.json").write_text(json.dumps({**settings, "training": facts}, indent=2) + "\n")
    for name in ("README.md", "samples.png"):
        if (folder / name).exists():
            shutil.copy(folder / name, temporary / name)
    if folder.exists():
        shutil.rmtree(folder)
    temporary.rename(folder)
    return folder


def _load_as_float32(path: Path) -> None:
    """transformers loads in the dtype that the config names, diffusers in float32; both must be the same by default."""
    config = json.loads(path.read_text())
    config["dtype"] = "float32"
    path.write_text(json.dumps(config, indent=2) + "\n")
