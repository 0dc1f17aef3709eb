"""The values a scene runs with: its own, else the model folder's, else those of the FLUX pipelines."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from attnctrl.errors import SceneError
from attnctrl.scene import Scene

FLUX_DEFAULTS: dict[str, Any] = {
    "steps": 28,
    "guidance_scale": 3.5,
    "true_cfg_scale": 1.0,
    "max_sequence_length": 512,
    "auto_resize": True,
}
"""What `FluxPipeline` and `FluxKontextPipeline` use when a model folder has no attnctrl.json."""


@dataclass(frozen=True)
class Settings:
    """The values of one run.

    Attributes:
        width, height: pixels.
        steps: denoising steps.
        guidance_scale: for guidance-distilled models.
        true_cfg_scale: classifier-free guidance, with a second forward above 1.
        max_sequence_length: tokens of the prompt, padded.
        auto_resize: references are brought to Kontext's preferred resolutions.
    """

    width: int
    height: int
    steps: int
    guidance_scale: float
    true_cfg_scale: float
    max_sequence_length: int
    auto_resize: bool


def settings_of(scene: Scene, defaults: Mapping[str, Any], vae_scale_factor: int, default_sample_size: int) -> Settings:
    """The values with which `scene` runs on a model.

    Args:
        scene: What it leaves open comes from the model.
        defaults: Contents of the model folder's attnctrl.json.
        vae_scale_factor: Pixels a latent covers in each direction; a token covers two by two latents.
        default_sample_size: Latents in each direction when neither scene nor folder gives a size.

    Raises:
        SceneError: The size is no multiple of a token's.
    """
    known = {**FLUX_DEFAULTS, **defaults}
    own = default_sample_size * vae_scale_factor
    width, height = known.get("size", (own, own))
    settings = Settings(
        width=scene.width or int(width),
        height=scene.height or int(height),
        steps=scene.steps or int(known["steps"]),
        guidance_scale=_first(scene.guidance_scale, known["guidance_scale"]),
        true_cfg_scale=_first(scene.true_cfg_scale, known["true_cfg_scale"]),
        max_sequence_length=int(known["max_sequence_length"]),
        auto_resize=bool(known["auto_resize"]),
    )
    multiple = 2 * vae_scale_factor
    for side, value in (("width", settings.width), ("height", settings.height)):
        if value % multiple:
            lower = max(multiple, value // multiple * multiple)
            raise SceneError(f"{side} must be a multiple of {multiple} for this model; found {value}; try {lower}.")
    return settings


def _first(value: float | None, default: Any) -> float:
    return float(default) if value is None else value
