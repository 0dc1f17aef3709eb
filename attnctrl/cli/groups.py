"""Options that commands share, alone or as dataclasses: each stands in one place and means the same everywhere."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, fields, is_dataclass
from functools import wraps
from inspect import Parameter, Signature, signature
from typing import Annotated, Any, get_type_hints

import typer

__all__ = ["FileSeed", "NegativePrompt", "Num", "Sampling", "Seed", "Size", "folder", "preset_like", "with_groups"]

_PANEL = "Sampling"


def _seed(otherwise: str) -> Any:
    return typer.Option("--seed", min=0, max=2**63 - 1, help=f"Of the first picture; else {otherwise}.")


def folder(of: str) -> Any:
    """`--output`, a folder."""
    return typer.Option("--output", "-o", help=f"Folder for {of}.")


def preset_like(example: str, otherwise: str = "what suits the model") -> Any:
    """`--preset`, with the name of one."""
    return typer.Option("--preset", help=f"Such as {example}; else {otherwise}.")


Seed = Annotated[int | None, _seed("0")]
FileSeed = Annotated[int | None, _seed("the file's")]
Num = Annotated[int, typer.Option("--num", "-n", min=1, max=10_000, help="Pictures, of each scene; seeds count up.")]
NegativePrompt = Annotated[str, typer.Option("--negative-prompt", help="What guidance moves away from.")]


@dataclass(frozen=True)
class Sampling:
    """How pictures are drawn; what is None is the scene's, else the model's."""

    steps: Annotated[
        int | None, typer.Option("--steps", min=1, max=500, help="Denoising steps.", rich_help_panel=_PANEL)
    ] = None
    guidance_scale: Annotated[
        float | None,
        typer.Option(
            "--guidance-scale", min=0, max=100, help="Classifier-free, or FLUX's distilled one.", rich_help_panel=_PANEL
        ),
    ] = None
    true_cfg_scale: Annotated[
        float | None,
        typer.Option("--true-cfg-scale", min=0, max=100, help="FLUX's classifier-free one.", rich_help_panel=_PANEL),
    ] = None

    def changes(self) -> dict[str, Any]:
        """What was asked for, by the keys of scenes and stories."""
        return {key: value for key, value in vars(self).items() if value is not None}

    def arguments(self) -> dict[str, Any]:
        """The same, by the names that the wrapper pipelines' calls have for it."""
        return {"num_inference_steps" if key == "steps" else key: value for key, value in self.changes().items()}


@dataclass(frozen=True)
class Size:
    """Of the picture; what is None is the model's own."""

    width: Annotated[int | None, typer.Option("--width", min=8, max=4096, help="Pixels.", rich_help_panel=_PANEL)] = (
        None
    )
    height: Annotated[int | None, typer.Option("--height", min=8, max=4096, help="Pixels.", rich_help_panel=_PANEL)] = (
        None
    )


def with_groups(command: Callable[..., None]) -> Callable[..., None]:
    """A command as typer takes it: each parameter whose type is a dataclass of options becomes these options."""
    hints = get_type_hints(command, include_extras=True)
    groups: dict[str, Any] = {name: kind for name, kind in hints.items() if is_dataclass(kind)}
    told: list[Parameter] = []
    for name, parameter in signature(command).parameters.items():
        if name in groups:
            kinds = get_type_hints(groups[name], include_extras=True)
            told += [
                Parameter(one.name, Parameter.KEYWORD_ONLY, default=one.default, annotation=kinds[one.name])
                for one in fields(groups[name])
            ]
        else:
            told.append(parameter.replace(kind=Parameter.KEYWORD_ONLY, annotation=hints[name]))

    @wraps(command)
    def run(**given: Any) -> None:
        made = {name: kind(**{one.name: given.pop(one.name) for one in fields(kind)}) for name, kind in groups.items()}
        command(**given, **made)

    del run.__wrapped__  # typer would read the command's own parameters
    run.__signature__ = Signature(told)  # type: ignore[attr-defined]
    run.__annotations__ = {one.name: one.annotation for one in told}
    return run
