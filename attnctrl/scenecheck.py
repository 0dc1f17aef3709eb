"""What is wrong with a scene, in words: pydantic's findings, the parameters of controls, the nearest known name."""

from __future__ import annotations

import dataclasses
import difflib
from collections.abc import Iterable, Mapping, Sequence
from typing import TYPE_CHECKING, Any, Literal, get_args, get_origin, get_type_hints

from pydantic import BaseModel, ConfigDict, TypeAdapter, ValidationError

from attnctrl.errors import AttnCtrlError
from attnctrl.scenefile import Problem, scene_error, short

if TYPE_CHECKING:
    from attnctrl.controls import Control
    from attnctrl.region import Region

REGIONS = "regions"  # the parameter of controls that a scene fills with its own subjects
_AS_WRITTEN: dict[str, Any] = {
    "window": list[float] | dict[str, list[float]],
    "layers": str | list[str] | None,
    # of every layer, by layer, or a set of heads as its file has it
    "heads": list[int] | dict[str, Any] | list[dict[str, Any]] | None,
}
"""Parameters whose form in a document differs from their Python type."""


def nearest(word: str, known: Iterable[str]) -> str:
    """A remedy: the known word closest to `word`, or all of them when none is close."""
    words = sorted(known)
    close = difflib.get_close_matches(word, words, n=1, cutoff=0.5)
    return f"did you mean '{close[0]}'?" if close else f"known here: {', '.join(words)}"


def key_path(location: Sequence[int | str]) -> str:
    """('subjects', 0, 'box') as 'subjects[0].box'."""
    text = ""
    for part in location:
        text += f"[{part}]" if isinstance(part, int) else f".{part}" if text else str(part)
    return text


Parts = Mapping[str, type[BaseModel]]
"""By key: the class of the documents in its list."""


def problems_of(error: ValidationError, model: type[BaseModel], parts: Parts) -> list[Problem]:
    """Every finding of pydantic on a document of class `model`, as problems with key paths and remedies."""
    problems: list[Problem] = []
    for finding in error.errors(include_url=False):
        context = finding.get("ctx", {})
        if finding["type"] == "problems":
            problems += context["problems"]
        elif finding["type"] == "issue":
            problems.append(Problem(key_path(finding["loc"]), finding["msg"], context["found"], context["remedy"]))
        else:
            problems.append(_plain_problem(finding, model, parts))
    return problems


def _plain_problem(finding: Mapping[str, Any], model: type[BaseModel], parts: Parts) -> Problem:
    location = finding["loc"]
    # under subjects[i] a key is a subject's
    owner = parts.get(str(location[0]), model) if len(location) > 2 else model
    if finding["type"] == "extra_forbidden":
        return Problem(
            key_path(location), "unknown key", short(finding["input"]), nearest(str(location[-1]), owner.model_fields)
        )
    if finding["type"] == "missing":
        remedy = "add 'version: 1'" if location[-1] == "version" else f"add '{location[-1]}: ...'"
        return Problem(key_path(location), "this key is required", "nothing", remedy)
    keys = [part for part in location if part in owner.model_fields]
    described = owner.model_fields[str(keys[-1])].description if keys else None
    remedy = f"expected: {described}" if described else "write it as in examples/"
    message = finding["msg"][:1].lower() + finding["msg"][1:]
    return Problem(key_path(location), message, short(finding["input"]), remedy)


def control_problems(entries: Sequence[Mapping[str, Any]], placed: bool) -> list[Problem]:
    """What is wrong with the `controls` of a scene; `placed` says whether anything in it has a box or a mask."""
    return [
        problem
        for index, entry in enumerate(entries)
        for problem in _entry_problems(entry, f"controls[{index}]", placed)
    ]


def build_controls(entries: Sequence[Mapping[str, Any]], regions: Sequence[Region], label: str) -> list[Control]:
    """The controls of checked entries.

    The scene's regions go to the controls that bring them, with their texts; the others act on those. When no control
    does, the first that needs regions gets them. Where subjects have negative prompts, these are the texts of their
    regions in the branch of the scene's negative prompt.

    Raises:
        SceneError: An entry does not make a control.
    """
    from attnctrl.controls import CONTROLS, Control
    from attnctrl.presets import against

    classes = [CONTROLS[str(entry["name"])] for entry in entries]
    owners = [i for i, cls in enumerate(classes) if cls.brings_regions]
    owners = owners or [i for i, cls in enumerate(classes) if cls.needs_regions][:1]
    try:
        made = [
            Control.from_dict({**entry, REGIONS: list(regions)} if index in owners else entry)
            for index, entry in enumerate(entries)
        ]
        return [*made, *against([regions])] if made else []
    except AttnCtrlError as error:
        raise scene_error(
            label, [Problem("controls", str(error), short(list(entries)), "correct the entry")]
        ) from error


def control_schema() -> dict[str, Any]:
    """JSON Schema of one entry of `controls`."""
    from attnctrl.controls import CONTROLS

    return {"oneOf": [_schema_of(name, cls) for name, cls in sorted(CONTROLS.items())]}


def _entry_problems(entry: Mapping[str, Any], place: str, placed: bool) -> list[Problem]:
    from attnctrl.controls import CONTROLS, Control

    if "name" not in entry:
        return [
            Problem(place, "a control needs a name", short(dict(entry)), f"add 'name: ...', {nearest('', CONTROLS)}")
        ]
    name = entry["name"]
    if not isinstance(name, str) or name not in CONTROLS:
        return [Problem(f"{place}.name", "unknown control", short(name), nearest(str(name), CONTROLS))]
    cls, types = CONTROLS[name], _parameters(CONTROLS[name])
    problems = []
    for key, value in entry.items():
        if key == REGIONS and key not in types:
            problems.append(
                Problem(f"{place}.{key}", "the regions are the scene's subjects", short(value), "leave it out")
            )
        elif key != "name" and key not in types:
            problems.append(
                Problem(f"{place}.{key}", f"'{name}' has no such parameter", short(value), nearest(str(key), types))
            )
        elif key != "name":
            problems += _type_problems(types[key], value, f"{place}.{key}")
    if cls.needs_regions and not placed:
        found = "no subject with a place"
        problems.append(
            Problem(place, f"'{name}' needs a box or a mask to act on", found, "add 'box: [x0, y0, x1, y1]'")
        )
    if problems:
        return problems
    try:
        Control.from_dict(entry)
    except (AttnCtrlError, TypeError, ValueError) as error:
        return [Problem(place, str(error).rstrip("."), short(dict(entry)), "correct the value")]
    return []


def _parameters(cls: type[Control]) -> dict[str, Any]:
    """Name and type of every parameter that a scene may give to a control."""
    from attnctrl.controls.base import CODE_ONLY

    hints = get_type_hints(cls)
    return {
        item.name: _AS_WRITTEN.get(item.name, hints[item.name])
        for item in dataclasses.fields(cls)
        if item.name != REGIONS and CODE_ONLY not in item.metadata
    }


def _type_problems(expected: Any, value: Any, place: str) -> list[Problem]:
    if get_origin(expected) is Literal:
        choices = get_args(expected)
        remedy = nearest(str(value), choices)
        return (
            [] if value in choices else [Problem(place, f"must be one of {', '.join(choices)}", short(value), remedy)]
        )
    try:
        TypeAdapter(expected, config=ConfigDict(strict=True, allow_inf_nan=False)).validate_python(value)
    except ValidationError as error:
        reasons = " or ".join(
            dict.fromkeys(finding["msg"][:1].lower() + finding["msg"][1:] for finding in error.errors())
        )
        return [Problem(place, reasons, short(value), "write a value of that kind")]
    return []


def _schema_of(name: str, cls: type[Control]) -> dict[str, Any]:
    from attnctrl.controls.base import default_of

    properties: dict[str, Any] = {"name": {"const": name}}
    defaults = {item.name: default_of(item) for item in dataclasses.fields(cls)}
    for key, kind in _parameters(cls).items():
        properties[key] = {**TypeAdapter(kind).json_schema(), "default": defaults[key]}
    summary = (cls.__doc__ or name).strip().splitlines()[0]
    return {
        "type": "object",
        "description": summary,
        "properties": properties,
        "required": ["name"],
        "additionalProperties": False,
    }
