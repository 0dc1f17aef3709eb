"""How commands find a model and load it: the options, and a picture's record for what they leave out."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from enum import Enum
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

if TYPE_CHECKING:
    from attnctrl.pipelines.models import Model
    from attnctrl.pipelines.setup import Setup
    from attnctrl.scene import Scene

__all__ = [
    "DeviceOption",
    "Dtype",
    "DtypeOption",
    "Loading",
    "ModelOption",
    "QuickModel",
    "check_device",
    "check_preset",
    "load",
    "model_for",
    "named_model",
]

_PANEL = "Model"


class Dtype(str, Enum):
    """Number formats of weights and arithmetic."""

    float32 = "float32"
    bfloat16 = "bfloat16"
    float16 = "float16"


class Offload(str, Enum):
    """What is kept in CPU memory while it does not run; see `attnctrl.pipelines.setup.OFFLOADS`."""

    model = "model"
    sequential = "sequential"
    group = "group"


def _embedded(incomplete: str) -> list[str]:
    """For the shell: names of embedded models; it completes folders by itself."""
    from attnctrl.toybox import model_names

    return [name for name in model_names() if name.startswith(incomplete)]


ModelOption = Annotated[
    str | None,
    typer.Option(
        "--model",
        "-m",
        help="toy-flux, a folder, or a hub id; otherwise the scene's.",
        rich_help_panel=_PANEL,
        autocompletion=_embedded,
    ),
]
QuickModel = Annotated[
    str,
    typer.Option(
        "--model",
        "-m",
        help="toy-flux, a folder, or a hub id.",
        rich_help_panel=_PANEL,
        autocompletion=_embedded,
    ),
]
DeviceOption = Annotated[
    str | None,
    typer.Option("--device", help="cpu, cuda, cuda:1, mps; otherwise the best there is.", rich_help_panel=_PANEL),
]
DtypeOption = Annotated[
    Dtype | None,
    typer.Option("--dtype", help="Else float32 on the CPU, bfloat16 elsewhere.", rich_help_panel=_PANEL),
]


@dataclass(frozen=True)
class Loading:
    """How a model is loaded. What is None, empty or False is as a picture's record says, else as Diffusers has it."""

    device: DeviceOption = None
    dtype: DtypeOption = None
    lora: Annotated[
        list[str] | None,
        typer.Option(
            "--lora",
            metavar="PATH[:SCALE]",
            help="A LoRA, a safetensors file or a hub id; once for each.",
            rich_help_panel=_PANEL,
        ),
    ] = None
    cpu_offload: Annotated[
        Offload | None,
        typer.Option(
            "--cpu-offload",
            help="Keep in CPU memory what does not run: models, groups of layers, or every layer (sequential: slow).",
            rich_help_panel=_PANEL,
        ),
    ] = None
    attention_backend: Annotated[
        str | None,
        typer.Option(
            "--attention-backend",
            help="Of the denoiser, by its name in Diffusers, such as flash or _native_cudnn.",
            rich_help_panel=_PANEL,
        ),
    ] = None
    compile: Annotated[
        bool,
        typer.Option("--compile", help="Run the denoiser compiled: the first picture waits.", rich_help_panel=_PANEL),
    ] = False

    def dtype_of(self, record: Mapping[str, Any] | None = None) -> str | None:
        """The number format asked for, else the one that a picture was made in; None lets the device choose."""
        recorded = (record or {}).get("dtype")
        return self.dtype.value if self.dtype else recorded if recorded in Dtype.__members__ else None

    def setup(self, record: Mapping[str, Any] | None = None, folder: Path | None = None) -> Setup:
        """What is done to the pipeline; checked before a model is loaded.

        Args:
            record: of the picture that is made again, which says what the options leave open.
            folder: of that picture, where files of recorded LoRAs are looked for.

        Raises:
            typer.BadParameter: for an option that cannot work.
            AssetError: for a recorded LoRA that is not there.
            SceneError: for a record that is damaged.
        """
        from attnctrl.errors import AttnCtrlError
        from attnctrl.pipelines.setup import Lora, Setup

        told, listed = _recorded(record or {})
        known = {one["sha256"]: one["scale"] for one in listed}
        try:
            loras = [Lora.of(text, known) for text in self.lora or ()]
        except AttnCtrlError as error:
            raise typer.BadParameter(str(error), param_hint="--lora") from error
        if not self.lora:
            loras = [Lora.recorded(one, folder or Path()) for one in listed]
        backend = self.attention_backend or told.get("attention_backend")
        # it saves memory and changes no values, and a CPU has nothing to save
        offload = self.cpu_offload.value if self.cpu_offload else None if self._on_cpu() else told.get("cpu_offload")
        try:
            return Setup(offload, backend, tuple(loras), self.compile or bool(told.get("compile", False)))
        except AttnCtrlError as error:
            raise typer.BadParameter(str(error), param_hint="--attention-backend") from error

    def _on_cpu(self) -> bool:
        from attnctrl.pipelines.base import best_device

        return (self.device or best_device()) == "cpu"


def _recorded(record: Mapping[str, Any]) -> tuple[dict[str, Any], list[dict[str, Any]]]:
    """What a picture's record says of its setup, and of the LoRAs in it. Raises `SceneError`."""
    from attnctrl.errors import SceneError

    try:
        told = dict(record.get("setup", {}))
        listed = [
            {"name": str(one["name"]), "scale": float(one["scale"]), "sha256": one.get("sha256")}
            for one in told.get("loras", ())
        ]
    except (AttributeError, KeyError, TypeError, ValueError) as error:
        found = f"{type(error).__name__}: {error}"
        raise SceneError(f"The record's setup is damaged ({found}); name an unchanged picture.") from error
    return told, listed


def load(model: Model, loading: Loading, kind: Any, dtype: str | None = None, setup: Setup | None = None) -> Any:
    """The pipeline of a model, of a `kind` of `attnctrl.pipelines`.

    Args:
        dtype: number format, if not the one of `loading`.
        setup: what is done to it, if it was found before.

    Raises:
        typer.BadParameter: for a device that is not there, or an option that cannot work.
    """
    import torch

    checked, dtype = check_device(loading.device), dtype or loading.dtype_of()
    setup = loading.setup() if setup is None else setup
    return kind.from_pretrained(model, device=checked, dtype=getattr(torch, dtype) if dtype else None, setup=setup)


def model_for(scene: Scene, source: Path, option: str | None) -> Model:
    """The model that --model names, else the scene's own. Raises `typer.BadParameter`, `AssetError`, `SceneError`."""
    from attnctrl.pipelines.models import find_scene_model

    return named_model(option) if option is not None else find_scene_model(scene.model, scene.folder or source.parent)


def named_model(option: str) -> Model:
    """The model that --model names. Raises `typer.BadParameter`."""
    from attnctrl.errors import AssetError
    from attnctrl.pipelines.models import find_model

    try:
        return find_model(option)
    except AssetError as error:
        raise typer.BadParameter(str(error), param_hint="--model") from error


def check_device(device: str | None) -> str | None:
    """`device` if this machine has it, as torch writes it. Raises `typer.BadParameter`."""
    import torch

    if device is None:
        return None
    try:
        torch.empty(1, device=device)
    except (RuntimeError, AssertionError, NotImplementedError) as error:
        reason = str(error).strip().splitlines()[0]
        raise typer.BadParameter(f"'{device}' cannot be used here: {reason}", param_hint="--device") from error
    return device


def check_preset(name: str | None, known: Mapping[str, Any] | None = None) -> None:
    """Raises `typer.BadParameter` for a stack of controls that there is not among those that are known, which are all
    presets; None is the model's own."""
    from attnctrl.presets import PRESETS
    from attnctrl.scenecheck import nearest

    known = PRESETS if known is None else known
    if name is not None and name not in known:
        raise typer.BadParameter(f"no preset '{name}'; {nearest(name, known)}", param_hint="--preset")
