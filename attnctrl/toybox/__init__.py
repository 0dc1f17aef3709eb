"""The embedded toy models and the world they were trained on."""

from __future__ import annotations

from pathlib import Path

from ..errors import AssetError

__all__ = ["model_names", "model_path"]


def model_names() -> list[str]:
    """Names of the embedded models."""
    return sorted({path.parent.name for folder in _folders() for path in folder.glob("toy-*/model_index.json")})


def model_path(name: str) -> Path:
    """Folder of an embedded model in the stock Diffusers format, for example "toy-flux".

    Raises:
        AssetError: There is no embedded model of that name.
    """
    for folder in _folders():
        if (folder / name / "model_index.json").is_file():
            return folder / name
    raise AssetError(f"no embedded model '{name}'; there are: {', '.join(model_names()) or 'none'}.")


def _folders() -> list[Path]:
    from attnctrl import assets

    return [Path(place) for place in assets.__path__]
