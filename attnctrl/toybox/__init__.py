"""The embedded toy models and the world they were trained on."""

from __future__ import annotations

from pathlib import Path

from ..errors import AssetError

__all__ = ["model_path"]


def model_path(name: str) -> Path:
    """Folder of an embedded model in the stock Diffusers format, for example "toy-flux".

    Raises:
        AssetError: There is no embedded model of that name.
    """
    from attnctrl import assets

    folders = [Path(place) for place in assets.__path__]
    for folder in folders:
        if (folder / name / "model_index.json").is_file():
            return folder / name
    known = sorted(p.parent.name for folder in folders for p in folder.glob("toy-*/model_index.json"))
    raise AssetError(f"no embedded model '{name}'; there are: {', '.join(known) or 'none'}.")
