"""The values a scene runs with: its own, else the model folder's, else those of the pipeline's own call."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from inspect import signature
from typing import Any

from attnctrl.errors import SceneError
from attnctrl.scene import Scene

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
