"""Reading what a scene names. Scene files come from strangers: every read is bounded, typed and kept in its folder."""

from __future__ import annotations

import io
import reprlib
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from pathlib import Path, PurePosixPath, PureWindowsPath
from typing import TYPE_CHECKING, Any, Protocol

import yaml

from attnctrl.errors import SceneError

if TYPE_CHECKING:
    import numpy as np
    from PIL import Image

MAX_SCENE_BYTES = 256 * 1024
MAX_PICTURE_BYTES = 32 * 1024 * 1024
MAX_PICTURE_PIXELS = 4096 * 4096
PICTURE_FORMATS = ("PNG", "JPEG", "WEBP")
MASK_THRESHOLD = 128

_SHORT = reprlib.Repr()
_SHORT.maxlevel = 3
_SHORT.maxstring = _SHORT.maxother = _SHORT.maxlong = 60


@dataclass(frozen=True)
class Problem:
    """One thing wrong with a scene: where (key path or ''), what, what was found (or ''), what to do."""

    key: str
    problem: str
    found: str
    remedy: str

    def __str__(self) -> str:
        place = f"{self.key}: " if self.key else ""
        found = f"; found {self.found}" if self.found else ""
        return f"{place}{self.problem}{found}; {self.remedy}"


def scene_error(label: str, problems: Iterable[Problem]) -> SceneError:
    """The error that lists all `problems` of the scene file called `label`."""
    lines = [str(problem) for problem in problems]
    if len(lines) == 1:
        return SceneError(f"{label}: {lines[0]}")
    return SceneError("\n".join([f"{label}: {len(lines)} problems", *(f"  {line}" for line in lines)]))


def short(value: object) -> str:
    """`value` as Python text of bounded length and depth, for messages."""
    return _SHORT.repr(value)


class SceneFiles(Protocol):
    """Where the files that a scene names come from."""

    def read(self, name: str) -> bytes:
        """The whole file called `name`. Raises `FileRefused` with the reason and the remedy."""
        ...


class FileRefused(Exception):
    """A file that a scene names cannot be had; `remedy` says what to do."""

    def __init__(self, problem: str, remedy: str) -> None:
        super().__init__(problem)
        self.remedy = remedy


@dataclass(frozen=True)
class SceneFolder:
    """Files inside the folder `root`; nothing outside it, whatever the name or the links say."""

    root: Path

    def __post_init__(self) -> None:
        object.__setattr__(self, "root", Path(self.root).resolve())

    def read(self, name: str) -> bytes:
        """The file at the relative path `name`, after links are followed still inside the folder."""
        path = (self.root / inside_name(name)).resolve()
        if not path.is_relative_to(self.root):
            raise FileRefused("the path leaves the scene's folder through a link", "put the file beside the scene")
        if not path.exists():
            raise FileRefused(f"there is no such file in {self.root}", "paths are relative to the scene's folder")
        return read_bounded(path, MAX_PICTURE_BYTES)


@dataclass(frozen=True)
class SceneMemory:
    """Files held in memory, as a picture's provenance brings them."""

    files: Mapping[str, bytes] = field(default_factory=dict)

    def read(self, name: str) -> bytes:
        """The file called `name`."""
        if name in self.files:
            return self.files[name]
        raise FileRefused("the scene has no folder to read files from", "load the scene from its file with load_scene")


def inside_name(name: str) -> PurePosixPath:
    """`name` as a relative path that cannot climb: no root, drive, backslash, '..' or NUL. Raises `FileRefused`."""
    path = PurePosixPath(name)
    if not name or "\\" in name or "\0" in name or path.is_absolute() or PureWindowsPath(name).drive:
        raise FileRefused("the path must be relative, with forward slashes", "write it relative to the scene's folder")
    if ".." in path.parts:
        raise FileRefused("the path leaves the scene's folder ('..')", "put the file beside the scene")
    return path


def read_bounded(path: Path, limit: int) -> bytes:
    """All bytes of the regular file `path` if they are at most `limit`. Raises `FileRefused`."""
    if not path.is_file():
        raise FileRefused(f"'{path.name}' is missing or not a regular file", "name an existing file")
    try:
        with path.open("rb") as file:
            data = file.read(limit + 1)
    except OSError as error:
        raise FileRefused(f"'{path.name}' cannot be read: {error.strerror}", "check its permissions") from error
    if len(data) > limit:
        raise FileRefused(f"'{path.name}' is larger than {limit // 1024} KiB", "use a smaller file")
    return data


def decode_picture(data: bytes) -> Image.Image:
    """The first frame of a PNG, JPEG or WebP, see `as_rgb`. The size is checked before any pixel is decoded."""
    return as_rgb(_open(data))


def as_rgb(image: Image.Image) -> Image.Image:
    """What viewers show of a picture, as RGB: upright as EXIF says, over white where it is transparent, 16 bits as 8.

    Raises `FileRefused`, before any pixel is decoded if it is too large.
    """
    import numpy as np
    from PIL import Image

    shown = _upright(image)
    if shown.mode.startswith("I"):  # 16 bits a pixel, which Pillow's own conversion cuts off at 255
        shown = Image.fromarray((np.asarray(shown).clip(0, 65535) // 256).astype(np.uint8))
    if shown.has_transparency_data:
        layer = shown.convert("RGBA")
        shown = Image.alpha_composite(Image.new("RGBA", layer.size, (255, 255, 255, 255)), layer)
    return shown.convert("RGB")


def decode_mask(data: bytes) -> np.ndarray:
    """A picture as bool [height, width]: True where it is lighter than half (transparent counts as black)."""
    import numpy as np
    from PIL import Image

    image = _upright(_open(data))
    if image.mode.startswith("I"):  # 16 bits a pixel
        return np.asarray(image) >= MASK_THRESHOLD * 256
    if image.has_transparency_data:
        layer = image.convert("RGBA")
        image = Image.alpha_composite(Image.new("RGBA", layer.size, (0, 0, 0, 255)), layer)
    return np.asarray(image.convert("L")) >= MASK_THRESHOLD


def _open(data: bytes) -> Image.Image:
    """A picture of which only the head has been read."""
    from PIL import Image

    try:
        return Image.open(io.BytesIO(data), formats=PICTURE_FORMATS)
    except Image.DecompressionBombError as error:
        raise FileRefused(f"the picture has more than {MAX_PICTURE_PIXELS} pixels", "make it smaller") from error
    except Exception as error:  # damaged files make the decoders raise errors of any class
        raise _undecodable(error) from error


def _upright(image: Image.Image) -> Image.Image:
    """A picture with its pixels, turned as its EXIF data says."""
    from PIL import ImageOps

    try:
        if image.width * image.height > MAX_PICTURE_PIXELS:
            raise FileRefused(
                f"the picture has {image.width} x {image.height} pixels, more than {MAX_PICTURE_PIXELS}",
                "make it smaller",
            )
        image.load()
        return ImageOps.exif_transpose(image)
    except FileRefused:
        raise
    except Exception as error:
        raise _undecodable(error) from error


def _undecodable(error: Exception) -> FileRefused:
    remedy = f"use a {', '.join(PICTURE_FORMATS[:-1])} or {PICTURE_FORMATS[-1]} picture"
    return FileRefused(f"the picture cannot be decoded ({type(error).__name__})", remedy)


class _StrictLoader(yaml.SafeLoader):
    """Plain data only: no anchors (a few lines of them can stand for gigabytes) and no key given twice."""

    def compose_node(self, parent: Any, index: Any) -> Any:
        event = self.peek_event()
        if isinstance(event, yaml.AliasEvent) or getattr(event, "anchor", None):
            raise yaml.MarkedYAMLError(problem="anchors and aliases are not allowed", problem_mark=event.start_mark)
        return super().compose_node(parent, index)

    def construct_mapping(self, node: Any, deep: bool = False) -> dict[Any, Any]:
        seen: set[str] = set()
        for key, _ in node.value:
            if not isinstance(key.value, str):
                raise yaml.MarkedYAMLError(problem="a key must be a plain word", problem_mark=key.start_mark)
            if key.value in seen:
                raise yaml.MarkedYAMLError(problem=f"the key '{key.value}' is given twice", problem_mark=key.start_mark)
            seen.add(key.value)
        return super().construct_mapping(node, deep=deep)


def read_document(path: Path) -> dict[str, Any]:
    """The mapping in a YAML or JSON file.

    Raises:
        SceneError: it cannot be read, or as of `parse_yaml`.
    """
    try:
        text = read_bounded(path, MAX_SCENE_BYTES).decode("utf-8-sig")
    except FileRefused as error:
        raise scene_error(str(path), [Problem("", str(error), "", error.remedy)]) from error
    except UnicodeDecodeError as error:
        found = f"byte {error.start} is not UTF-8"
        raise scene_error(str(path), [Problem("", "not a text file", found, "save it as UTF-8")]) from error
    return parse_yaml(text, str(path))


def parse_yaml(text: str, label: str) -> dict[str, Any]:
    """The mapping in a YAML (or JSON) text, plain values only.

    Raises:
        SceneError: Not YAML, not a mapping, an anchor or alias, a key given twice, nested too deep.
    """
    try:
        data = yaml.load(text, Loader=_StrictLoader)
    except yaml.MarkedYAMLError as error:
        line = f"line {error.problem_mark.line + 1}" if error.problem_mark else "no line"
        raise scene_error(
            label, [Problem("", "not plain YAML", f"{line}: {error.problem}", "correct that line")]
        ) from error
    except (yaml.YAMLError, ValueError, OverflowError, RecursionError) as error:
        found = f"{type(error).__name__}: {str(error)[:100]}"
        raise scene_error(label, [Problem("", "not plain YAML", found, "write the scene as in examples/")]) from error
    if not isinstance(data, dict):
        found = f"{type(data).__name__} {short(data)}"
        raise scene_error(label, [Problem("", "a scene is a mapping of keys", found, "start with 'version: 1'")])
    return data
