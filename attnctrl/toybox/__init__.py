"""The embedded toy models and the world they were trained on."""

from __future__ import annotations

import importlib
from pathlib import Path

from ..errors import AssetError

__all__ = ["model_names", "model_path"]

_PACKAGES = ("attnctrl.assets", "attnctrl_models")


def model_names() -> list[str]:
    """Names of the embedded models that are there."""
    return sorted({path.parent.name for folder in _folders() for path in folder.glob("toy-*/model_index.json")})


def model_path(name: str) -> Path:
    """Folder of an embedded model in the stock Diffusers format, for example "toy-flux".

    A clone of the repository has them all; attnctrl's wheel brings some, the package attnctrl-models the others.

    Raises:
        AssetError: There is no embedded model of that name.
    """
    for folder in _folders():
        if (folder / name / "model_index.json").is_file():
            return folder / name
    raise AssetError(
        f"no embedded model '{name}'; there are: {', '.join(model_names()) or 'none'}. More come with the package "
        "attnctrl-models, which the folder assets/ of attnctrl's repository makes: pip install ./assets"
    )


def _folders() -> list[Path]:
    return [Path(place) for package in _PACKAGES for place in _places(package)]


def _places(package: str) -> list[str]:
    """Folders of a package, none where it is not installed."""
    try:
        return list(importlib.import_module(package).__path__)
    except ModuleNotFoundError:
        return []
