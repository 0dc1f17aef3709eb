"""Files are written whole or not at all: a temporary name in the same folder, then one rename."""

from __future__ import annotations

import io
import os
import secrets
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from PIL import Image

_NEW_FILE_MODE = 0o666  # before the process's umask


def write_file(path: str | Path, write: Callable[[Path], object]) -> Path:
    """Let `write` fill a file that then stands at `path`, making the folders above it.

    A reader sees the old file or the whole new one, never a part; after a failure the old file is untouched and no
    temporary file stays. An existing file keeps its permissions.

    Args:
        path: Of the file.
        write: Called with the path of an empty file in the same folder.

    Returns:
        The path written.

    Raises:
        OSError: The folder or file cannot be written.
    """
    # Through a link, the file it points at is replaced and the link stays.
    path = Path(os.path.realpath(path))
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f".{path.name[:40]}.{secrets.token_hex(8)}.part")
    os.close(os.open(temporary, os.O_WRONLY | os.O_CREAT | os.O_EXCL, _NEW_FILE_MODE))
    try:
        write(temporary)
        with temporary.open("rb+") as file:
            os.fsync(file.fileno())
        if path.exists():
            temporary.chmod(path.stat().st_mode & 0o7777)
        temporary.replace(path)
    except BaseException:
        temporary.unlink(missing_ok=True)
        raise
    return path


def write_bytes(path: str | Path, data: bytes) -> Path:
    """Put `data` at `path`; whole or not at all, see `write_file`."""
    return write_file(path, lambda temporary: temporary.write_bytes(data))


def write_text(path: str | Path, text: str) -> Path:
    """Put `text` at `path` as UTF-8 with the line ends as given; whole or not at all, see `write_bytes`."""
    return write_bytes(path, text.encode("utf-8"))


def png_bytes(image: Image.Image, text: Mapping[str, str] | None = None) -> bytes:
    """PNG of `image` with `text` (keyword to value) as compressed UTF-8 text chunks; equal input gives equal bytes."""
    from PIL.PngImagePlugin import PngInfo

    info = PngInfo()
    for keyword, value in (text or {}).items():
        info.add_itxt(keyword, value, zip=True)
    buffer = io.BytesIO()
    image.save(buffer, format="PNG", pnginfo=info)
    return buffer.getvalue()


def write_png(path: str | Path, image: Image.Image, text: Mapping[str, str] | None = None) -> Path:
    """Save `image` as a PNG with text chunks; whole or not at all, see `write_bytes`."""
    return write_bytes(path, png_bytes(image, text))
