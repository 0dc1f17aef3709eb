"""Which versions of what made something."""

from __future__ import annotations

import platform
from importlib import metadata

__all__ = ["version_of", "versions"]

LIBRARIES = ("attnctrl", "torch", "diffusers", "transformers", "accelerate", "numpy", "pillow")


def versions() -> dict[str, str]:
    """Versions of Python, attnctrl and the libraries that shape a picture."""
    return {"python": platform.python_version(), **{name: version_of(name) for name in LIBRARIES}}


def version_of(package: str) -> str:
    """Installed version of `package`, 'not installed' without one."""
    try:
        return metadata.version(package)
    except metadata.PackageNotFoundError:
        return "not installed"
