"""`attnctrl models`: the embedded models, and the model families that can be controlled."""

from __future__ import annotations

import json
from collections.abc import Mapping
from functools import partial
from inspect import signature
from typing import TYPE_CHECKING, Any

from attnctrl.cli.output import Format, FormatOption, emit, hush

if TYPE_CHECKING:
    from attnctrl.families import Family

_WORKS = {
    "words": "regions by words of the prompt",
    "moves": "positions can be moved",
    "guided together": "both guidance branches in one batch",
}


def models(form: FormatOption = Format.human) -> None:
    """List the embedded models and the families: which denoisers, which wrapper pipelines, what works on them.

    Any Diffusers folder or hub id of a family's class can be given to --model; controls attach to all of them.

    Example:

      attnctrl models --format json
    """
    hush()
    from attnctrl.families import all_families

    embedded, families = embedded_models(), [described(family) for family in all_families()]
    data = {"command": "models", "models": embedded, "families": families}
    emit(form, data, partial(_tables, data), [one["name"] for one in embedded])


def embedded_models() -> list[dict[str, Any]]:
    """Name, pipeline, size, steps and guidance of each embedded model."""
    from attnctrl.pipelines.models import find_model
    from attnctrl.toybox import model_names

    found = [find_model(name) for name in model_names()]
    return [
        {
            "name": model.name,
            "pipeline": json.loads((model.folder / "model_index.json").read_text("utf-8"))["_class_name"],
            "fingerprint": model.identity()["fingerprint"],
            **{key: model.defaults.get(key) for key in ("size", "steps", "guidance_scale", "true_cfg_scale")},
        }
        for model in found
        if model.folder is not None
    ]


def described(family: Family) -> dict[str, Any]:
    """What a family's data says: denoisers, wrapper pipelines that run on them, layers by name, what works."""
    works = {
        "words": bool(family.readers),
        "moves": family.rotary is not None,
        "guided together": bool(family.batch),
    }
    return {
        "family": family.name,
        "models": list(family.models),
        "pipelines": _wrappers(family),
        "layers": sorted(family.presets),
        "works": [name for name, holds in works.items() if holds],
    }


def _wrappers(family: Family) -> dict[str, list[str]]:
    """By wrapper pipeline, the pipelines of Diffusers with a denoiser of the family that it runs on."""
    from attnctrl import pipelines

    kinds = (
        pipelines.ScenePipeline,
        pipelines.LayoutPipeline,
        pipelines.MultiSubjectPipeline,
        pipelines.StylePipeline,
    )
    found = {kind.__name__: [name for name in kind.runs_on if _denoiser(name) in family.models] for kind in kinds}
    return {name: able for name, able in found.items() if able}


def _denoiser(pipeline: str) -> str:
    """Class name of the denoiser that a pipeline of Diffusers takes."""
    import diffusers

    told = signature(getattr(diffusers, pipeline).__init__, eval_str=True).parameters
    return str(getattr((told.get("transformer") or told["unet"]).annotation, "__name__", ""))


def _tables(data: Mapping[str, Any]) -> Any:
    from rich.console import Group
    from rich.table import Table

    embedded = Table("model", "pipeline", "size", "steps", "guidance", title="embedded", title_justify="left")
    for one in data["models"]:
        guidance = one["true_cfg_scale"] or one["guidance_scale"]
        size = " x ".join(map(str, one["size"]))
        embedded.add_row(one["name"], one["pipeline"], size, str(one["steps"]), f"{guidance:g}")
    families = Table(title="families", title_justify="left")
    for column in ("family", "denoisers", "commands", "named layers", "works"):
        families.add_column(column, overflow="fold")
    for one in data["families"]:
        commands = ", ".join(_COMMANDS[name] for name in one["pipelines"]) or "attach in Python"
        families.add_row(
            one["family"], ", ".join(one["models"]), commands, ", ".join(one["layers"]), ", ".join(one["works"])
        )
    return Group(embedded, families, *(f"{name}: {meaning}" for name, meaning in _WORKS.items()))


_COMMANDS = {
    "ScenePipeline": "generate",
    "LayoutPipeline": "layout",
    "MultiSubjectPipeline": "subjects",
    "StylePipeline": "style",
}
"""By wrapper pipeline, the command that runs it."""
