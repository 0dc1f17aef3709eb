"""What the wrapper pipelines share: a pipeline with its identity and defaults, one call for scenes, their records."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from contextlib import nullcontext
from dataclasses import asdict, dataclass, field
from inspect import signature
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar

from attnctrl.pipelines.models import Model, find_model, load_pipeline, read_defaults
from attnctrl.pipelines.settings import Canvas, Settings, settings_of
from attnctrl.pipelines.setup import Setup

from attnctrl import files, provenance
from attnctrl.errors import LayoutError, SceneError, UnsupportedModelError
from attnctrl.scene import MAX_SEED, Scene, is_model_name
from attnctrl.versions import versions

if TYPE_CHECKING:
    import torch
    from PIL import Image
    from typing_extensions import Self

    from attnctrl.controls import Control
    from attnctrl.region import Region

PIPELINES = (
    "FluxPipeline",
    "FluxKontextPipeline",
    "StableDiffusionPipeline",
    "StableDiffusionXLPipeline",
    "StableDiffusion3Pipeline",
)
NATIVE = ("Flux2Pipeline", "Flux2KleinPipeline", "QwenImageEditPlusPipeline")
"""Pipelines whose own call takes several references."""
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


class Wrapper:
    """A pipeline, the user's own or one loaded by name, that draws scenes. It stays what it is.

    Attributes:
        runs_on: class names of the pipelines that can be wrapped.
    """

    runs_on: ClassVar[tuple[str, ...]] = PIPELINES

    def __init__(
        self,
        pipe: Any,
        identity: Mapping[str, str],
        defaults: Mapping[str, Any] | None = None,
        setup: Setup | None = None,
    ) -> None:
        self.pipe = self._checked(pipe)
        self.identity = dict(identity)
        self.defaults = dict(defaults or {})
        self.setup = setup or Setup()

    @classmethod
    def from_pretrained(
        cls,
        model: str | Model = "toy-flux",
        *,
        device: str | None = None,
        dtype: torch.dtype | None = None,
        setup: Setup | None = None,
    ) -> Self:
        """Load a model: "toy-flux" and its kin, a folder, or a hub id.

        Args:
            model: Its name, or what `find_model` gave for it.
            device: "cpu", "cuda", ...; the best one of the machine if left out.
            dtype: Of weights and arithmetic; float32 on the CPU and bfloat16 elsewhere if left out.
            setup: LoRAs, offloading, attention backend, compilation; records tell of it.

        Raises:
            AssetError: There is no such model, or it or a LoRA cannot be loaded.
            UnsupportedModelError: Its pipeline is none of `runs_on`, or it cannot be set up so.
        """
        import torch

        found = find_model(model) if isinstance(model, str) else model
        device = device or best_device()
        dtype = dtype or (torch.float32 if device == "cpu" else torch.bfloat16)
        return cls(load_pipeline(found, dtype, device, setup), found.identity(), found.defaults, setup)

    @classmethod
    def from_pipe(cls, pipe: Any, name: str | None = None) -> Self:
        """Wrap a pipeline that the caller loaded; LoRA, offload and quantisation stay as they are.

        Args:
            pipe: One of `runs_on`.
            name: What provenance calls the model; where it was loaded from if left out.

        Raises:
            UnsupportedModelError: It is another pipeline.
        """
        origin = str(cls._checked(pipe).name_or_path or "")
        if origin and Path(origin).is_dir():
            identity = {"name": name or Path(origin).name, "fingerprint": provenance.fingerprint(origin)}
            return cls(pipe, identity, read_defaults(Path(origin)))
        return cls(pipe, {"name": name or origin or type(pipe).__name__})

    @classmethod
    def _checked(cls, pipe: Any) -> Any:
        if not any(base.__name__ in cls.runs_on for base in type(pipe).__mro__):
            raise UnsupportedModelError(
                f"{cls.__name__} runs on {', '.join(cls.runs_on)}; found {type(pipe).__name__}; load one of these."
            )
        return pipe

    def settings(self, scene: Scene) -> Settings:
        """The values with which `scene` runs on this model. Raises `SceneError` if the size does not fit its grid."""
        return settings_of(scene, self.defaults, canvas_of(self.pipe))

    def regions(self, scene: Scene) -> list[Region]:
        """The regions of `scene` with their texts as it asks for them. Raises `SceneError` if this model cannot."""
        return scene.regions_on(self.pipe, self.settings(scene).max_sequence_length)

    def check_texts(self, scenes: Sequence[Scene], called: str = "layout") -> None:
        """Raises `SceneError` for texts that the model would cut off; `called`: what each scene is."""
        from attnctrl.attach import parts_of
        from attnctrl.families import family_of

        if stock_name(self.pipe, PIPELINES) is None:
            return  # texts in chat templates are cut by the pipelines' own rules
        family = family_of(parts_of(self.pipe)[0])
        found = [getattr(self.pipe, reader.tokenizer, None) for reader in family.readers]
        tokenizer = next(one for one in reversed(found) if one is not None)
        limit = min(self.settings(scenes[0]).max_sequence_length or MAX_SEED, int(tokenizer.model_max_length))
        for i, scene in enumerate(scenes):
            texts = [scene.prompt, scene.negative_prompt, *(region.prompt for region in scene.regions())]
            for text in texts:
                tokens = len(tokenizer(text).input_ids)
                if tokens > limit:
                    raise SceneError(
                        f"{called} {i}: '{text[:60]}' has {tokens} tokens, and this model reads {limit}; shorten it."
                    )

    def draw(
        self,
        scenes: Sequence[Scene],
        seeds: Sequence[Sequence[int]],
        controls: Sequence[Control],
        controlled: bool,
        progress: Progress | None,
    ) -> list[ScenePicture]:
        """Pictures of scenes that differ in texts, places and references alone, in one call of the pipeline.

        Args:
            scenes: at least one.
            seeds: of each scene, as many for all; each picture has a generator of its own.
            controls: what acts, on one set of regions per scene.
            controlled: what the records say of it.
            progress: called after every step.

        Raises:
            SceneError: the scenes ask for what the model cannot do.
        """
        import torch

        import attnctrl

        settings = self.settings(scenes[0])
        if not settings.guided and any(one.negative_prompt for scene in scenes for one in scene.subjects):
            raise SceneError(
                "negative_prompt: without guidance nothing reads what subjects are to keep away from; leave it out, or "
                "raise true_cfg_scale (guidance_scale where there is none) above 1."
            )
        pipe, given = self._following(scenes, settings)
        arguments = {**_arguments(pipe, scenes, settings, len(seeds[0])), **given}
        if progress is not None:
            arguments["callback_on_step_end"] = _callback(progress, settings.steps)
        generators = [torch.Generator("cpu").manual_seed(seed) for own in seeds for seed in own]
        with attnctrl.attach(pipe, controls) if controls else nullcontext() as handle:
            images = pipe(**arguments, generator=generators).images
            report = handle.report() if handle is not None else None
        told = {"report": report.to_dict() if report is not None else None}
        return [
            ScenePicture(
                image=image,
                seed=seed,
                controlled=bool(controls),
                record={**self._record(pipe, scene, settings, seed, controlled), **told},
                report="" if report is None else str(report),
                files=scene.files(),
            )
            for image, (scene, seed) in zip(
                images, ((s, seed) for s, own in zip(scenes, seeds, strict=True) for seed in own), strict=True
            )
        ]

    def record(self, scene: Scene, seed: int, controlled: bool) -> dict[str, Any]:
        """What a picture of `scene` would carry, but for what acted; without drawing it. Raises `SceneError`."""
        pipe, _ = self._following([scene], self.settings(scene))
        return self._record(pipe, scene, self.settings(scene), seed, controlled)

    def _following(self, scenes: Sequence[Scene], settings: Settings) -> tuple[Any, dict[str, Any]]:
        """The pipeline that follows the scenes' references, on the same modules, and what it is called with for it."""
        pictures = [scene.references() for scene in scenes]
        if not any(pictures):
            return self.pipe, {}
        if stock_name(self.pipe, NATIVE) is not None:
            if len(scenes) > 1:
                raise SceneError(
                    f"reference: {type(self.pipe).__name__} gives all samples of a batch the same references; run "
                    "layouts with references one by one."
                )
            if scenes[0].reference_positions != "corner" or scenes[0].reference_pixels is not None:
                raise SceneError(
                    f"reference: {type(self.pipe).__name__} places and sizes references by itself; leave "
                    "reference_positions and reference_pixels out."
                )
            return self.pipe, {"image": pictures[0]}
        from attnctrl.pipelines.references import MAX_PIXELS, with_references

        try:
            made = with_references(
                self.pipe,
                pictures if len(scenes) > 1 else pictures[0],
                positions=scenes[0].reference_positions,
                regions=[scene.regions() for scene in scenes],
                max_pixels=scenes[0].reference_pixels or MAX_PIXELS,
                auto_resize=settings.auto_resize,
            )
        except (LayoutError, UnsupportedModelError) as error:
            raise SceneError(f"reference: {error}") from error
        return made, {}

    def _record(self, pipe: Any, scene: Scene, settings: Settings, seed: int, controlled: bool) -> dict[str, Any]:
        filled = {key: value for key, value in asdict(settings).items() if key in type(scene).model_fields}
        name = self.identity["name"]
        return {
            "scene": {**scene.to_dict(), **filled, "model": name if is_model_name(name) else f"./{name}", "seed": seed},
            "seed": seed,
            "controlled": controlled,
            "settings": asdict(settings),
            **self.stage(pipe),
        }

    def stage(self, pipe: Any) -> dict[str, Any]:
        """What every record tells of the pipeline and the machine."""
        import torch

        scheduler = {key: value for key, value in pipe.scheduler.config.items() if not key.startswith("_")}
        return {
            "model": self.identity,
            "pipeline": stock_name(pipe, self.runs_on),
            "scheduler": {"class": type(pipe.scheduler).__name__, "config": _plain(scheduler)},
            "device": str(device := pipe._execution_device),
            # sums round otherwise with another number of them
            **({"threads": torch.get_num_threads()} if device.type == "cpu" else {}),
            "dtype": str(_denoiser(pipe).dtype).removeprefix("torch."),
            "versions": versions(),
            **({"setup": told} if (told := self.setup.record()) else {}),
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


def stock_name(pipe: Any, known: Sequence[str]) -> str | None:
    """The one of `known` pipelines that a pipeline is, or is made of; None where it is none."""
    return next((base.__name__ for base in type(pipe).__mro__ if base.__name__ in known), None)


def _denoiser(pipe: Any) -> Any:
    return getattr(pipe, "transformer", None) or pipe.unet


def _arguments(pipe: Any, scenes: Sequence[Scene], settings: Settings, images: int) -> dict[str, Any]:
    from diffusers import FluxKontextPipeline

    prompts, negatives = [scene.prompt for scene in scenes], [scene.negative_prompt for scene in scenes]
    arguments: dict[str, Any] = {
        "prompt": prompts if len(scenes) > 1 else prompts[0],
        "width": settings.width,
        "height": settings.height,
        "num_inference_steps": settings.steps,
        "guidance_scale": settings.guidance_scale,
        "true_cfg_scale": settings.true_cfg_scale,
        "max_sequence_length": settings.max_sequence_length,
    }
    arguments = {name: value for name, value in arguments.items() if value is not None}
    arguments["num_images_per_prompt"] = images
    if settings.guided and "negative_prompt" in signature(pipe.__call__).parameters:
        arguments["negative_prompt"] = negatives if len(scenes) > 1 else negatives[0]
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
