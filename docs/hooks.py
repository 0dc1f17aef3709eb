"""What the site is told beyond mkdocs.yml: pictures of assets/gallery/ belong to it, though they lie beside docs/."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from mkdocs.structure.files import File

FOLDER = "../assets/gallery/"
"""As pages write it, so that it is right where they are read in the repository."""


def on_files(files: Any, config: Any) -> Any:
    """The gallery's pictures lie in gallery/ of the site."""
    assets = Path(config["docs_dir"]).parent / "assets"
    for path in sorted((assets / "gallery").glob("*.png")):
        files.append(File(f"gallery/{path.name}", str(assets), config["site_dir"], False))
    return files


def on_page_markdown(markdown: str, **_: Any) -> str:
    """Where pages of the site find them."""
    return markdown.replace(FOLDER, "gallery/")
