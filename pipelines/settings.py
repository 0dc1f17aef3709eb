"""The values a scene runs with: its own, else the model folder's, else those of the pipeline's own call."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from inspect import signature
from typing import TYPE_CHECKING, Any

from attnctrl.errors import ControlError, SceneError
from attnctrl.scene import MAX_SEED, Scene

if TYPE_CHECKING:
    from attnctrl.controls import Control

_OPTIONAL = ("guidance_scale", "true_cfg_scale", "max_sequence_length")


@dataclass(frozen=True)
class Settings:
    """The values of one run; None where the pipeline has no such thing.

    Attributes:
        width, height: pixels.
        steps: denoising steps.
        guidance_scale: of guidance-distilled models (those that have a true_cfg_scale too), else classifier-free
            guidance, with a second forward above 1.
        true_cfg_scale: classifier-free guidance of guidance-distilled models.
        max_sequence_length: tokens of the prompt, padded.
        auto_resize: references are brought to Kontext's preferred resolutions.
    """

    width: int
    height: int
    steps: int
    guidance_scale: float | None
    true_cfg_scale: float | None
    max_sequence_length: int | None
    auto_resize: bool

    @property
    def guided(self) -> bool:
        """The run has a second forward, or half of the batch, for the negative prompt."""
        return ((self.guidance_scale if self.true_cfg_scale is None else self.true_cfg_scale) or 0.0) > 1


@dataclass(frozen=True)
class Canvas:
    """What a model draws on: its pipeline's class, pixels a latent covers in each direction, its own side in pixels."""

    pipeline: Any
    vae_scale_factor: int
    own: int

    @property
    def multiple(self) -> int:
        """Pixels of which width and height are multiples: a token's, or the eight that UNet pipelines ask for."""
        return 2 * self.vae_scale_factor if "transformer" in signature(self.pipeline).parameters else 8


def settings_of(scene: Scene, defaults: Mapping[str, Any], canvas: Canvas) -> Settings:
    """The values with which `scene` runs on a model.

    Args:
        scene: What it leaves open comes from the model.
        defaults: Contents of the model folder's attnctrl.json.
        canvas: Of the model.

    Raises:
        SceneError: The size is no multiple of a token's, or the scene asks for guidance the pipeline does not have.
    """
    call = signature(canvas.pipeline.__call__).parameters
    known = {
        "steps": call["num_inference_steps"].default,
        **{key: call[key].default for key in _OPTIONAL if key in call},
        "auto_resize": True,
        **defaults,
    }
    if scene.true_cfg_scale is not None and "true_cfg_scale" not in call:
        raise SceneError(
            f"true_cfg_scale: {canvas.pipeline.__name__} has none; found {scene.true_cfg_scale:g}; its guidance_scale "
            "is the classifier-free guidance."
        )
    width, height = known.get("size", (canvas.own, canvas.own))
    true_cfg = _first(scene.true_cfg_scale, known["true_cfg_scale"]) if "true_cfg_scale" in call else None
    settings = Settings(
        width=scene.width or int(width),
        height=scene.height or int(height),
        steps=scene.steps or int(known["steps"]),
        guidance_scale=_first(scene.guidance_scale, known["guidance_scale"]),
        true_cfg_scale=true_cfg,
        max_sequence_length=int(known["max_sequence_length"]) if "max_sequence_length" in call else None,
        auto_resize=bool(known["auto_resize"]),
    )
    multiple = canvas.multiple
    for side, value in (("width", settings.width), ("height", settings.height)):
        if value % multiple:
            lower = max(multiple, value // multiple * multiple)
            raise SceneError(f"{side} must be a multiple of {multiple} for this model; found {value}; try {lower}.")
    return settings


def _first(value: float | None, default: float | None) -> float | None:
    if value is not None:
        return value
    return None if default is None else float(default)


def entries_of(acting: Sequence[Control]) -> list[dict[str, Any]]:
    """Controls as a scene writes them, whose regions are the scene's own."""
    return [{key: value for key, value in one.to_dict().items() if key != "regions"} for one in acting]


def keys_of(
    width: int | None,
    height: int | None,
    num_inference_steps: int | None,
    guidance_scale: float | None,
    true_cfg_scale: float | None,
) -> dict[str, Any]:
    """Arguments of a wrapper's call, named as in Diffusers, as the keys of a scene."""
    return {
        "version": 1,
        "width": width,
        "height": height,
        "steps": num_inference_steps,
        "guidance_scale": guidance_scale,
        "true_cfg_scale": true_cfg_scale,
    }


def seeds_of(seeds: Any, generator: Any, prompts: int, images: int) -> list[list[int]]:
    """Of each picture, prompt by prompt.

    Args:
        seeds: the first, from which they count up (0 where it is None), or all of them.
        generator: gives them instead; a list gives one of each.

    Raises:
        ControlError: both are given, or their number is not that of the pictures.
        SceneError: a seed that no scene could hold.
    """
    import torch

    count = prompts * images
    if count < 1:
        raise ControlError(f"num_images_per_prompt must be at least 1; found {images}.")
    if seeds is not None and generator is not None:
        raise ControlError("Give seeds or a generator, not both.")
    if generator is not None:
        sources = [generator] * count if isinstance(generator, torch.Generator) else list(generator)
        found = [int(torch.randint(MAX_SEED, (1,), generator=one, device=one.device)) for one in sources]
    elif seeds is None or isinstance(seeds, int):
        found = [(seeds or 0) + i for i in range(count)]
    else:
        found = [int(seed) for seed in seeds]
    if len(found) != count:
        raise ControlError(f"{prompts} prompts with {images} pictures each need {count} seeds; found {len(found)}.")
    if wrong := [seed for seed in found if not 0 <= seed <= MAX_SEED]:
        raise SceneError(f"seed: must be in 0 .. {MAX_SEED}; found {wrong[0]}; take another one.")
    return [found[i * images : (i + 1) * images] for i in range(prompts)]


def per_text(value: Any, count: int, name: str) -> list[Any]:
    """One text for each prompt, from one for all or a list. Raises `ControlError` where numbers differ."""
    texts = [value] * count if value is None or isinstance(value, str) else list(value)
    if len(texts) != count:
        raise ControlError(f"{name}: {count} prompts need one text, or {count}; found {len(texts)}.")
    return texts
