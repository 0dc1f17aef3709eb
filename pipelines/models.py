"""Finding a model by its name: an embedded toy model, a folder, or a hub id; and what the folder says about itself."""

from __future__ import annotations

import json
import re
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from attnctrl.pipelines.setup import Setup

from attnctrl.errors import AssetError, SceneError
from attnctrl.provenance import fingerprint

if TYPE_CHECKING:
    import torch
    from diffusers import DiffusionPipeline

DEFAULTS_FILE = "attnctrl.json"
_HUB_ID = re.compile(r"[A-Za-z0-9][\w.-]*/[\w.-]+")


@dataclass(frozen=True)
class Model:
    """A model that can be loaded.

    Attributes:
        name: as it was asked for.
        source: what Diffusers loads: a folder's path or a hub id.
        folder: the local folder, None for a hub id.
        defaults: contents of the folder's attnctrl.json (size, steps, guidance, ...), empty without one.
    """

    name: str
    source: str
    folder: Path | None = None
    defaults: dict[str, Any] = field(default_factory=dict)

    def identity(self) -> dict[str, str]:
        """What provenance records: the name, without a folder's path, and the fingerprint of a folder's weights."""
        if self.folder is None:
            return {"name": self.name}
        return {"name": Path(self.name).name, "fingerprint": fingerprint(self.folder)}


def find_model(name: str) -> Model:
    """The model called `name`: "toy-...", the path of a Diffusers folder, or a hub id "owner/name".

    Raises:
        AssetError: None of these.
    """
    if name.startswith("toy-"):
        from attnctrl.toybox import model_path

        return _local(name, Path(model_path(name)))
    if Path(name).is_dir():
        return _local(name, Path(name))
    if is_hub_id(name):
        return Model(name, name)
    raise AssetError(f"no model '{name}': it is neither a folder nor a hub id; name toy-flux, a folder, or owner/name.")


def is_hub_id(name: str) -> bool:
    """Whether a name is written as the hub writes its ids: owner/name."""
    return _HUB_ID.fullmatch(name) is not None


def find_scene_model(name: str, folder: Path | None) -> Model:
    """The model that a scene names; unlike a user's own, a folder must be written ./so and lie in the scene's folder.

    Raises:
        AssetError: There is no such model.
        SceneError: The folder lies outside the scene's folder.
    """
    if not name.startswith("./"):
        return find_model(name) if name.startswith("toy-") else Model(name, name)
    root = (folder or Path.cwd()).resolve()
    path = (root / name).resolve()
    if not path.is_relative_to(root):
        raise SceneError(
            f"model: the folder must lie in the scene's folder {root}; found {path}; use --model to name it."
        )
    return _local(name, path)


def load_pipeline(model: Model, dtype: torch.dtype, device: str, setup: Setup | None = None) -> DiffusionPipeline:
    """The pipeline of `model`, from safetensors only, without the models' own code, on a device and set up.

    Raises:
        AssetError: It, or a LoRA, cannot be loaded.
        UnsupportedModelError: The model or the machine does not allow what `setup` asks for.
    """
    from diffusers import DiffusionPipeline

    try:
        pipe = DiffusionPipeline.from_pretrained(model.source, dtype=dtype, use_safetensors=True)
    except (OSError, ValueError) as error:
        raise AssetError(f"model '{model.name}' cannot be loaded from {model.source}: {error}") from error
    pipe.set_progress_bar_config(disable=True)
    return (setup or Setup()).applied(pipe, device)


def _local(name: str, folder: Path) -> Model:
    if not (folder / "model_index.json").is_file():
        raise AssetError(f"model '{name}': {folder} is no Diffusers folder (it has no model_index.json).")
    return Model(name, str(folder), folder, read_defaults(folder))


def read_defaults(folder: Path) -> dict[str, Any]:
    """Contents of the folder's attnctrl.json, {} without one. Raises `AssetError` if it is not a JSON object."""
    path = folder / DEFAULTS_FILE
    if not path.is_file():
        return {}
    try:
        defaults = json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:
        raise AssetError(f"{path} is not JSON: {error}") from error
    if not isinstance(defaults, dict):
        raise AssetError(f"{path} must hold a JSON object; found {type(defaults).__name__}.")
    return defaults
