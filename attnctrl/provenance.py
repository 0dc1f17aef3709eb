"""What a picture needs to be made again, kept in the picture itself.

A PNG of attnctrl carries one text chunk `attnctrl` with a JSON record (scene with every open value filled in, seed,
model and fingerprint of its weights, scheduler, versions, device, dtype) and chunks with the mask and reference files.
No times and no paths of the machine are recorded, so that equal runs give equal bytes.
"""

from __future__ import annotations

import base64
import binascii
import hashlib
import io
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from attnctrl.errors import SceneError
from attnctrl.scene import Scene
from attnctrl.scenefile import FileRefused, Problem, SceneFolder, SceneMemory, read_bounded, scene_error

KEY = "attnctrl"
FORMAT = 1
MAX_EMBEDDED_BYTES = 4 * 1024 * 1024  # a larger file is recorded by its digest only,
MAX_EMBEDDED_TOTAL = 16 * 1024 * 1024  # and so are those that would bring all of them above this
MAX_PNG_BYTES = 256 * 1024 * 1024
_PART = 512 * 1024  # readers refuse text chunks above 1 MiB
_WHOLE_HASH_BYTES = 2 * 1024**3
_SAMPLE = 1024 * 1024
_WEIGHTS = (".safetensors",)
_CONFIGS = (".json", ".txt", ".model")
_IGNORED = ("attnctrl.json",)  # its values are in the scene of the record


def fingerprint(folder: str | Path) -> str:
    """Short digest of a model folder: names and contents of its weights, configurations and vocabularies.

    Folders above 2 GiB are digested from each file's size and its first, middle and last MiB; the prefix says which:
    `sha256:` or `sha256-sampled:`, then 16 hex digits.
    """
    folder = Path(folder)
    files = sorted(
        (path.relative_to(folder).as_posix(), path)
        for path in folder.rglob("*")
        if path.suffix in (*_WEIGHTS, *_CONFIGS) and path.name not in _IGNORED and path.is_file()
    )
    sampled = sum(path.stat().st_size for _, path in files) > _WHOLE_HASH_BYTES
    digest = hashlib.sha256()
    for name, path in files:
        size = path.stat().st_size
        digest.update(f"{name}\0{size}\0".encode())
        with path.open("rb") as file:
            if sampled and size > 3 * _SAMPLE:
                for start in (0, (size - _SAMPLE) // 2, size - _SAMPLE):
                    file.seek(start)
                    digest.update(file.read(_SAMPLE))
            else:
                while block := file.read(_SAMPLE):
                    digest.update(block)
    return f"{'sha256-sampled' if sampled else 'sha256'}:{digest.hexdigest()[:16]}"


def to_text(record: Mapping[str, Any], files: Mapping[str, bytes] | None = None) -> dict[str, str]:
    """PNG text chunks for `record` and the scene's `files`. Raises `TypeError` if the record is not JSON data."""
    chunks: dict[str, str] = {}
    listed: dict[str, dict[str, Any]] = {}
    room = MAX_EMBEDDED_TOTAL
    for index, (name, data) in enumerate(sorted((files or {}).items())):
        embedded = len(data) <= min(MAX_EMBEDDED_BYTES, room)
        room -= len(data) if embedded else 0
        text = base64.b64encode(data).decode("ascii") if embedded else ""
        parts = [text[start : start + _PART] for start in range(0, len(text), _PART)]
        keys = [f"{KEY}.{index}.{part}" for part in range(len(parts))]
        listed[name] = {"sha256": hashlib.sha256(data).hexdigest(), "chunks": keys}
        chunks.update(zip(keys, parts, strict=True))
    whole = {"format": FORMAT, **record, **({"files": listed} if listed else {})}
    return {KEY: json.dumps(whole, sort_keys=True, ensure_ascii=False, allow_nan=False), **chunks}


def read(path: str | Path) -> dict[str, Any]:
    """The record in the PNG at `path`.

    Raises:
        SceneError: No PNG, no record of attnctrl in it, or one of another format.
    """
    return _record(_chunks(path), str(path))


def restore(path: str | Path) -> tuple[Scene, dict[str, Any]]:
    """The scene of the PNG at `path`, its seed set to that of the picture, and the record.

    Files too large to be embedded are looked for in the PNG's folder and must be the same to the byte.

    Raises:
        SceneError: As `read`; or a file of the scene is missing or another one.
    """
    chunks, label = _chunks(path), str(path)
    record = _record(chunks, label)
    if "edit" in record:
        problem, remedy = (
            "the picture was edited from another one, which it does not carry",
            "run `attnctrl edit` again",
        )
        raise scene_error(label, [Problem("", problem, f"settings {sorted(record.get('settings', {}))}", remedy)])
    files = _files(record, chunks, Path(path))
    try:
        scene = dict(record["scene"])
        seed = record["seed"]
    except (AttributeError, KeyError, TypeError, ValueError) as error:
        raise _damaged(label, f"{type(error).__name__}: {error}") from error
    return Scene.from_dict({**scene, "seed": seed}, SceneMemory(files), label), record


def carried(path: str | Path) -> dict[str, bytes]:
    """The files with which the PNG at `path` was made, by their names; found and checked as by `restore`.

    Raises:
        SceneError: As `restore`.
    """
    chunks = _chunks(path)
    return _files(_record(chunks, str(path)), chunks, Path(path))


def same_run(path: str | Path, record: Mapping[str, Any], files: Mapping[str, bytes]) -> dict[str, Any] | None:
    """The record of the picture at `path` if it came from a run like that of `record` with these files of the scene.

    What acted (`report`) and a CPU's threads are not compared. None where there is no such picture, or not the whole of
    it.
    """
    from PIL import Image

    try:
        then = read(path)
        with Image.open(path, formats=["PNG"]) as image:
            image.load()
    except (SceneError, OSError, SyntaxError, ValueError):
        return None
    now = json.loads(to_text(record, files)[KEY])
    aside = {"report": None, "threads": None}
    return then if {**then, **aside} == {**now, **aside} else None


def differences(then: Mapping[str, Any], now: Mapping[str, Any]) -> list[str]:
    """What was not the same in the records of two runs, one line each: settings, model, libraries, device.

    Scenes and seeds are not compared.
    """
    keys = ("settings", "model", "setup", "pipeline", "scheduler", "dtype", "device", "threads", "versions")
    before, after = ({key: value for part in keys for key, value in _flat(part, run.get(part))} for run in (then, now))
    return [
        f"{key}: {before.get(key)} then, {after.get(key)} now"
        for key in sorted(before.keys() | after.keys())
        if before.get(key) != after.get(key)
    ]


def _flat(name: str, value: Any) -> list[tuple[str, Any]]:
    if isinstance(value, Mapping):
        return [item for key, inner in value.items() for item in _flat(f"{name}.{key}", inner)]
    return [(name, value)]


def _chunks(path: str | Path) -> dict[str, str]:
    from PIL import Image

    path = Path(path)
    try:
        with Image.open(io.BytesIO(read_bounded(path, MAX_PNG_BYTES)), formats=["PNG"]) as image:
            return {key: str(value) for key, value in image.info.items() if isinstance(key, str)}
    except FileRefused as error:
        raise scene_error(str(path), [Problem("", str(error), "", error.remedy)]) from error
    except Exception as error:  # damaged files make the decoder raise errors of any class
        raise scene_error(
            str(path), [Problem("", "not a readable PNG", f"{type(error).__name__}", "name a picture of attnctrl")]
        ) from error


def _record(chunks: Mapping[str, str], label: str) -> dict[str, Any]:
    if KEY not in chunks:
        found = f"text chunks {sorted(chunks)}" if chunks else "no text chunks"
        remedy = "name a PNG as attnctrl wrote it (other programs drop its metadata)"
        raise scene_error(label, [Problem("", "the picture carries no record of attnctrl", found, remedy)])
    try:
        record = json.loads(chunks[KEY])
    except (ValueError, RecursionError) as error:
        raise _damaged(label, type(error).__name__) from error
    if not isinstance(record, dict) or record.get("format") != FORMAT:
        found = repr(record.get("format")) if isinstance(record, dict) else f"a {type(record).__name__}"
        remedy = "use the attnctrl that wrote it"
        raise scene_error(label, [Problem("", f"this attnctrl reads records of format {FORMAT}", found, remedy)])
    return record


def _files(record: Mapping[str, Any], chunks: Mapping[str, str], path: Path) -> dict[str, bytes]:
    folder, label = SceneFolder(path.parent), str(path)
    try:
        return {name: _file(name, entry, chunks, folder, label) for name, entry in record.get("files", {}).items()}
    except SceneError:
        raise
    except (AttributeError, KeyError, TypeError, ValueError) as error:
        raise _damaged(label, f"{type(error).__name__}: {error}") from error


def _file(name: str, entry: Mapping[str, Any], chunks: Mapping[str, str], folder: SceneFolder, label: str) -> bytes:
    if entry["chunks"]:
        try:
            data = base64.b64decode("".join(chunks[key] for key in entry["chunks"]), validate=True)
        except binascii.Error as error:
            raise _damaged(label, f"'{name}': {error}") from error
    else:
        try:
            data = folder.read(name)
        except FileRefused as error:
            problem = f"'{name}' is too large to be in the picture and not beside it"
            raise scene_error(label, [Problem("", problem, str(error), "put the file there")]) from error
    if hashlib.sha256(data).hexdigest() != entry["sha256"]:
        problem = f"'{name}' is not the file the picture was made with"
        raise scene_error(label, [Problem("", problem, "another sha256", "bring back the original file")])
    return data


def _damaged(label: str, found: str) -> SceneError:
    return scene_error(label, [Problem("", "the record in the picture is damaged", found, "name an unchanged picture")])
