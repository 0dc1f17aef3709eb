"""Scenes on Stable Diffusion, SD3 and FLUX: text to picture, and on FLUX picture to picture (Kontext) with a reference.

pipe = ScenePipeline.from_pretrained("toy-flux")
picture = pipe(load_scene("scene.yaml"))[0]
picture.save("out/scene.png")
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from contextlib import nullcontext
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from attnctrl.pipelines.models import Model, find_model, load_pipeline, read_defaults
from attnctrl.pipelines.settings import Canvas, Settings, settings_of

from attnctrl import files, provenance
from attnctrl.errors import LayoutError, SceneError, UnsupportedModelError
from attnctrl.scene import MAX_SEED, Scene, is_model_name

if TYPE_CHECKING:
    import torch
    from PIL import Image

PIPELINES = (
    "FluxPipeline",
    "FluxKontextPipeline",
    "StableDiffusionPipeline",
    "StableDiffusionXLPipeline",
    "StableDiffusion3Pipeline",
)
Progress = Callable[[int, int], None]
"""Called after every denoising step with (steps done, steps in all)."""


@dataclass(frozen=True)
class ScenePicture:
    """One picture of a scene, with everything needed to make it again.

    Attributes:
        image: the picture.
        seed: of its starting noise.
        controlled: whether the scene's controls acted.
        record: provenance, see `attnctrl.provenance`.
        report: what acted where, empty without controls.
    """

    image: Image.Image
    seed: int
    controlled: bool
    record: dict[str, Any]
    report: str = ""
    files: Mapping[str, bytes] = field(default_factory=dict, repr=False)

    def save(self, path: str | Path) -> Path:
        """Write a PNG that carries the record; whole or not at all."""
        return files.write_png(path, self.image, provenance.to_text(self.record, self.files))


class ScenePipeline:
    """Runs scenes on a pipeline, the user's own or one loaded by name. The pipeline stays what it is."""

    def __init__(self, pipe: Any, identity: Mapping[str, str], defaults: Mapping[str, Any] | None = None) -> None:
        self.pipe = _checked(pipe)
        self.identity = dict(identity)
        self.defaults = dict(defaults or {})

    @classmethod
    def from_pretrained(
        cls, model: str | Model = "toy-flux", *, device: str | None = None, dtype: torch.dtype | None = None
    ) -> ScenePipeline:
        """Load a model: "toy-flux" and its kin, a folder, or a hub id.

        Args:
            model: Its name, or what `find_model` gave for it.
            device: "cpu", "cuda", ...; the best one of the machine if left out.
            dtype: Of weights and arithmetic; float32 on the CPU and bfloat16 elsewhere if left out.

        Raises:
            AssetError: There is no such model, or it cannot be loaded.
            UnsupportedModelError: Its pipeline is none of `PIPELINES`.
        """
        import torch

        found = find_model(model) if isinstance(model, str) else model
        device = device or best_device()
        dtype = dtype or (torch.float32 if device == "cpu" else torch.bfloat16)
        return cls(load_pipeline(found, dtype, device), found.identity(), found.defaults)

    @classmethod
    def from_pipe(cls, pipe: Any, name: str | None = None) -> ScenePipeline:
        """Wrap a pipeline that the caller loaded; LoRA, offload and quantisation stay as they are.

        Args:
            pipe: One of `PIPELINES`.
            name: What provenance calls the model; where it was loaded from if left out.

        Raises:
            UnsupportedModelError: It is another pipeline.
        """
        origin = str(_checked(pipe).name_or_path or "")
        if origin and Path(origin).is_dir():
            identity = {"name": name or Path(origin).name, "fingerprint": provenance.fingerprint(origin)}
            return cls(pipe, identity, read_defaults(Path(origin)))
        return cls(pipe, {"name": name or origin or type(pipe).__name__})

    def __call__(
        self,
        scene: Scene,
        seeds: Sequence[int] | None = None,
        controlled: bool = True,
        progress: Progress | None = None,
    ) -> list[ScenePicture]:
        """Pictures of `scene`, one for each seed; each has its own generator and does not depend on the others.

        Args:
            scene: What to show, see `attnctrl.scene`.
            seeds: Of the starting noise; the scene's own seed if left out.
            controlled: False leaves the controls out and changes nothing else.
            progress: Called after every step of every picture.

        Raises:
            SceneError: The scene asks for what the model cannot do.
        """
        wanted = [scene.seed] if seeds is None else list(seeds)
        if wrong := [seed for seed in wanted if not 0 <= seed <= MAX_SEED]:
            raise SceneError(f"seed: must be in 0 .. {MAX_SEED}; found {wrong[0]}; take another one.")
        return [self._picture(scene, seed, controlled, progress) for seed in wanted]

    def settings(self, scene: Scene) -> Settings:
        """The values with which `scene` runs on this model. Raises `SceneError` if the size does not fit its grid."""
        return settings_of(scene, self.defaults, canvas_of(self.pipe))

    def _picture(self, scene: Scene, seed: int, controlled: bool, progress: Progress | None) -> ScenePicture:
        import torch

        import attnctrl

        settings = self.settings(scene)
        reference = scene.reference()
        pipe = self.pipe if reference is None else self._following(reference, settings)
        controls = scene.build_controls() if controlled else []
        arguments = _arguments(pipe, scene, settings)
        if progress is not None:
            arguments["callback_on_step_end"] = _callback(progress, settings.steps)
        generator = torch.Generator("cpu").manual_seed(seed)
        with attnctrl.attach(pipe, controls) if controls else nullcontext() as handle:
            image = pipe(**arguments, generator=generator).images[0]
            report = handle.report() if handle is not None else None
        names = scene.file_names()
        return ScenePicture(
            image=image,
            seed=seed,
            controlled=bool(controls),
            record={
                **self._record(pipe, scene, settings, seed, controlled),
                "report": report.to_dict() if report is not None else None,
            },
            report="" if report is None else str(report),
            files={name: scene.read_file(name) for name in names},
        )

    def _following(self, reference: Image.Image, settings: Settings) -> Any:
        """The same modules, as a pipeline that follows a reference picture."""
        from attnctrl.pipelines.references import with_references

        try:
            return with_references(self.pipe, [reference], auto_resize=settings.auto_resize)
        except (LayoutError, UnsupportedModelError) as error:
            raise SceneError(f"reference: {error}") from error

    def _record(self, pipe: Any, scene: Scene, settings: Settings, seed: int, controlled: bool) -> dict[str, Any]:
        filled = {key: value for key, value in asdict(settings).items() if key in type(scene).model_fields}
        name = self.identity["name"]
        scheduler = {key: value for key, value in pipe.scheduler.config.items() if not key.startswith("_")}
        return {
            "scene": {**scene.to_dict(), **filled, "model": name if is_model_name(name) else f"./{name}", "seed": seed},
            "seed": seed,
            "controlled": controlled,
            "model": self.identity,
            "pipeline": stock_name(pipe),
            "scheduler": {"class": type(pipe.scheduler).__name__, "config": _plain(scheduler)},
            "settings": asdict(settings),
            "device": str(pipe._execution_device),
            "dtype": str(_denoiser(pipe).dtype).removeprefix("torch."),
            "versions": provenance.versions(),
        }


def best_device() -> str:
    """The fastest device of this machine: "cuda", "mps" or "cpu"."""
    import torch

    if torch.cuda.is_available():
        return "cuda"
    return "mps" if torch.backends.mps.is_available() else "cpu"


def canvas_of(pipe: Any) -> Canvas:
    """What a pipeline draws on."""
    sample = getattr(_denoiser(pipe).config, "sample_size", None)
    # FLUX's transformer has no size of its own, its pipeline has
    own = int(getattr(pipe, "default_sample_size", None) or sample or 0)
    return Canvas(type(pipe), pipe.vae_scale_factor, own * pipe.vae_scale_factor)


def stock_name(pipe: Any) -> str:
    """The one of `PIPELINES` that a pipeline is, or is made of."""
    return next(base.__name__ for base in type(pipe).__mro__ if base.__name__ in PIPELINES)


def _denoiser(pipe: Any) -> Any:
    return getattr(pipe, "transformer", None) or pipe.unet


def _checked(pipe: Any) -> Any:
    if not any(base.__name__ in PIPELINES for base in type(pipe).__mro__):
        raise UnsupportedModelError(
            f"scenes run on {', '.join(PIPELINES)}; found {type(pipe).__name__}; load one of these."
        )
    return pipe


def _arguments(pipe: Any, scene: Scene, settings: Settings) -> dict[str, Any]:
    from diffusers import FluxKontextPipeline

    arguments: dict[str, Any] = {
        "prompt": scene.prompt,
        "negative_prompt": scene.negative_prompt if settings.guided else None,
        "width": settings.width,
        "height": settings.height,
        "num_inference_steps": settings.steps,
        "guidance_scale": settings.guidance_scale,
        "true_cfg_scale": settings.true_cfg_scale,
        "max_sequence_length": settings.max_sequence_length,
    }
    arguments = {name: value for name, value in arguments.items() if value is not None or name == "negative_prompt"}
    if isinstance(pipe, FluxKontextPipeline):
        # Kontext derives the size from an area and the proportions; this area gives exactly the size asked for.
        arguments["max_area"] = settings.width * settings.height
    return arguments


def _callback(progress: Progress, steps: int) -> Callable[..., dict[str, Any]]:
    def on_step_end(_pipe: Any, index: int, _timestep: Any, tensors: dict[str, Any]) -> dict[str, Any]:
        progress(index + 1, steps)
        return tensors

    return on_step_end


def _plain(value: Any) -> Any:
    """`value` as JSON data; what JSON has no form for becomes text."""
    if isinstance(value, Mapping):
        return {str(key): _plain(item) for key, item in value.items()}
    if isinstance(value, (list, tuple)):
        return [_plain(item) for item in value]
    if isinstance(value, float):
        return value if math.isfinite(value) else str(value)
    return value if value is None or isinstance(value, (bool, int, str)) else str(value)
