"""What is done to a pipeline once it is loaded: LoRAs, offloading, another attention backend, compilation.

setup = Setup(loras=(Lora.of("ink.safetensors:0.8"),), cpu_offload="model")
pipe = LayoutPipeline.from_pretrained("black-forest-labs/FLUX.1-dev", setup=setup)
"""

from __future__ import annotations

import hashlib
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from attnctrl.errors import AssetError, ControlError, UnsupportedModelError

__all__ = ["OFFLOADS", "Lora", "Setup"]

OFFLOADS = ("model", "sequential", "group")
"""Ways to keep in CPU memory what does not run: whole models, every layer by itself, groups of layers."""
_SAID, _BLOCK = 300, 1024 * 1024


@dataclass(frozen=True)
class Lora:
    """Low-rank weights that are added to a pipeline's.

    Attributes:
        source: path of a safetensors file, or a hub id "owner/name".
        scale: by which they are multiplied.
        sha256: of the file; None for a hub id.
    """

    source: str
    scale: float = 1.0
    sha256: str | None = None

    @classmethod
    def of(cls, text: str, known: Mapping[str, float] | None = None) -> Lora:
        """The LoRA that PATH or PATH:SCALE names.

        Args:
            text: what was written.
            known: scales by sha256, for a file that is written without one; 1 where it is not among them.

        Raises:
            AssetError: There is no such file, or it is not a safetensors file.
        """
        from attnctrl.pipelines.models import is_hub_id

        source, scale = _parted(text)
        path = Path(source)
        if path.is_file():
            if path.suffix != ".safetensors":
                raise AssetError(f"LoRA '{source}' is no safetensors file; other formats can hold code, convert it.")
            digest = _digest(path)
            return cls(source, (known or {}).get(digest, 1.0) if scale is None else scale, digest)
        if not path.exists() and is_hub_id(source):
            return cls(source, 1.0 if scale is None else scale)
        found = "a folder" if path.is_dir() else "no such file"
        raise AssetError(f"LoRA '{source}': {found}; name a safetensors file, as PATH or PATH:SCALE, or owner/name.")

    @classmethod
    def recorded(cls, told: Mapping[str, Any], folder: Path) -> Lora:
        """The LoRA of a record, whose file is in `folder`. Raises `AssetError` where the very file is not there."""
        from attnctrl.pipelines.models import is_hub_id

        name, scale, digest = told["name"], told["scale"], told.get("sha256")
        if digest is None and is_hub_id(name):
            return cls(name, scale)
        path = folder / Path(name).name
        found = _digest(path) if path.is_file() else None
        if found is not None and found == digest:
            return cls(str(path), scale, found)
        state = "is not there" if found is None else f"is another file (sha256 {found[:12]}...)"
        raise AssetError(
            f"The picture was drawn with the LoRA '{name}' (sha256 {str(digest)[:12]}..., scale {scale:g}); {path} "
            f"{state}; put the file there, or give it as --lora PATH."
        )

    def record(self) -> dict[str, Any]:
        """What records say of it: no folder of this machine."""
        if self.sha256 is None:
            return {"name": self.source, "scale": self.scale}
        return {"name": Path(self.source).name, "scale": self.scale, "sha256": self.sha256}


@dataclass(frozen=True)
class Setup:
    """How a pipeline is set up; what is left out stays as Diffusers has it.

    Attributes:
        cpu_offload: one of `OFFLOADS`.
        attention_backend: of the denoiser, by its name in Diffusers.
        loras: added together.
        compile: the denoiser's blocks run compiled (the whole of it where Diffusers names no blocks).

    Raises:
        ControlError: a name that is none of these.
    """

    cpu_offload: str | None = None
    attention_backend: str | None = None
    loras: tuple[Lora, ...] = ()
    compile: bool = False

    def __post_init__(self) -> None:
        if self.cpu_offload not in (None, *OFFLOADS):
            raise ControlError(f"cpu_offload is one of {', '.join(OFFLOADS)}; found '{self.cpu_offload}'.")
        if self.attention_backend is not None and self.attention_backend not in (known := attention_backends()):
            raise ControlError(f"No attention backend '{self.attention_backend}'; take one of {', '.join(known)}.")

    def applied(self, pipe: Any, device: str) -> Any:
        """The pipeline itself, set up for a device; it comes from the CPU.

        Raises:
            AssetError: a LoRA that cannot be loaded.
            UnsupportedModelError: the model or the machine has no such offloading or backend.
        """
        if self.loras:
            _add(pipe, self.loras)
        if self.cpu_offload is None:
            pipe = pipe.to(device)
        else:
            _offload(pipe, self.cpu_offload, device)
        denoiser = getattr(pipe, "transformer", None) or pipe.unet
        if self.attention_backend is not None:
            _choose(denoiser, self.attention_backend)
        if self.compile:
            compiled = "compile_repeated_blocks" if getattr(denoiser, "_repeated_blocks", None) else "compile"
            getattr(denoiser, compiled)()
        return pipe

    def record(self) -> dict[str, Any]:
        """What records say of it: {} where nothing was done."""
        told = {**asdict(self), "loras": [one.record() for one in self.loras]}
        return {name: value for name, value in told.items() if value}


def attention_backends() -> list[str]:
    """Names of the attention backends that Diffusers knows; not all run on every machine."""
    from diffusers.models.attention_dispatch import AttentionBackendName

    return sorted(one.value for one in AttentionBackendName)


def _parted(text: str) -> tuple[str, float | None]:
    source, colon, scale = text.rpartition(":")
    try:
        return (source, float(scale)) if colon and source else (text, None)
    except ValueError:
        return text, None


def _digest(path: Path) -> str:
    digest = hashlib.sha256()
    with path.open("rb") as file:
        while block := file.read(_BLOCK):
            digest.update(block)
    return digest.hexdigest()


def _add(pipe: Any, loras: tuple[Lora, ...]) -> None:
    if find_spec("peft") is None:
        raise AssetError("LoRAs need the package peft, which is not installed; run: pip install 'attnctrl[lora]'")
    if not hasattr(pipe, "load_lora_weights"):
        raise UnsupportedModelError(f"{type(pipe).__name__} loads no LoRAs; leave --lora out.")
    names = [f"lora{number}" for number in range(len(loras))]
    for name, lora in zip(names, loras, strict=True):
        path = Path(lora.source)
        where, file = (str(path.parent), {"weight_name": path.name}) if lora.sha256 is not None else (lora.source, {})
        try:
            pipe.load_lora_weights(where, adapter_name=name, use_safetensors=True, **file)
        except Exception as error:  # readers of foreign files raise errors of any class
            raise AssetError(f"LoRA '{lora.source}' cannot be loaded: {str(error)[:_SAID]}") from error
        # of weights that fit nowhere diffusers only logs a line
        if not any(name in found for found in pipe.get_list_adapters().values()):
            raise AssetError(
                f"LoRA '{lora.source}' has no weights for {type(pipe).__name__}: no name in it is that of a layer; "
                "name one that was made for this model."
            )
    pipe.set_adapters(names, [lora.scale for lora in loras])


def _offload(pipe: Any, how: str, device: str) -> None:
    import torch

    where = torch.device(device)
    if where.type == "cpu":
        raise UnsupportedModelError(
            f"cpu_offload '{how}' keeps in CPU memory what does not run on a GPU; this run is on the CPU, where all of "
            "it is already; leave it out."
        )
    try:
        if how == "group":
            pipe.enable_group_offload(onload_device=where, offload_type="leaf_level")
        else:
            getattr(pipe, f"enable_{how}_cpu_offload")(device=device)
    except (RuntimeError, ValueError, ImportError) as error:
        raise UnsupportedModelError(
            f"cpu_offload '{how}' cannot be used on {device}: {str(error)[:_SAID]}; name another one, or leave it out."
        ) from error


def _choose(denoiser: Any, backend: str) -> None:
    from diffusers.models.attention_dispatch import attention_backend

    layers = [one for one in denoiser.modules() if hasattr(getattr(one, "processor", None), "_attention_backend")]
    if not layers:
        raise UnsupportedModelError(
            f"attention_backend '{backend}': the processors of {type(denoiser).__name__} call PyTorch's kernel "
            "themselves and take no other; leave it out."
        )
    try:
        # diffusers makes it that of all other models too, until this block ends
        with attention_backend():
            denoiser.set_attention_backend(backend)
    except (RuntimeError, ValueError, ImportError) as error:
        raise UnsupportedModelError(
            f"attention_backend '{backend}' cannot be used here: {str(error)[:_SAID]}; `attnctrl env` lists what is "
            "installed."
        ) from error
