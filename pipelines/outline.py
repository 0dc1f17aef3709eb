"""A pipeline without weights: configurations and vocabularies, enough to explain what controls would do."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from attnctrl.pipelines.base import PIPELINES
from attnctrl.pipelines.models import Model
from attnctrl.pipelines.settings import Canvas, Settings, settings_of

from attnctrl.errors import AssetError, UnsupportedModelError
from attnctrl.scene import Scene

if TYPE_CHECKING:
    from attnctrl.explain import Explanation

_OWN_SIZES = {"FluxTransformer2DModel": 128}
"""Latents a side that a pipeline takes where its denoiser's configuration names none."""


@dataclass(frozen=True)
class Outline:
    """What `attnctrl.explain` reads of a pipeline. Its parts are attributes, as on the pipeline itself.

    Attributes:
        canvas: what the model draws on.
        parts: the denoiser on the meta device, tokenizers, the scheduler, and what a pipeline knows of them.
        defaults: contents of the model folder's attnctrl.json.
    """

    canvas: Canvas
    parts: dict[str, Any]
    defaults: dict[str, Any]

    def __getattr__(self, name: str) -> Any:
        if name.startswith("_") or name not in self.parts:
            raise AttributeError(f"this outline has no {name}")
        return self.parts[name]

    @classmethod
    def of(cls, model: Model) -> Outline:
        """The outline of `model`.

        Raises:
            AssetError: Its configurations cannot be read.
            UnsupportedModelError: Its pipeline is none that scenes run on.
        """
        import diffusers

        try:
            index = diffusers.DiffusionPipeline.load_config(model.source)
            kind = str(index["_class_name"])
            if kind not in PIPELINES:
                raise UnsupportedModelError(f"scenes run on {', '.join(PIPELINES)}; model '{model.name}' is a {kind}.")
            parts = _parts(model.source, index)
            vae = diffusers.AutoencoderKL.load_config(model.source, subfolder="vae")
        except (OSError, ValueError, KeyError) as error:
            raise AssetError(f"the configuration of model '{model.name}' cannot be read: {error}") from error
        denoiser: Any = parts.get("transformer", parts.get("unet"))
        factor = 2 ** (len(vae["block_out_channels"]) - 1)
        side = _OWN_SIZES.get(type(denoiser).__name__) or denoiser.config.sample_size
        parts["vae_scale_factor"] = factor
        return cls(Canvas(getattr(diffusers, kind), factor, side * factor), parts, model.defaults)

    def settings(self, scene: Scene) -> Settings:
        """The values with which `scene` runs. Raises `SceneError` if its size does not fit."""
        return settings_of(scene, self.defaults, self.canvas)

    def explain(self, scene: Scene, branch: str = "cond") -> Explanation:
        """What the scene's controls would do in a guidance branch.

        Raises:
            AttnCtrlError: as `attach` and the first forward would.
        """
        import attnctrl

        settings = self.settings(scene)
        return attnctrl.explain(
            self,
            scene.build_controls(scene.regions_on(self, settings.max_sequence_length)),
            width=settings.width,
            height=settings.height,
            steps=settings.steps,
            sigmas=self.sigmas(settings),
            text_tokens=self.text_tokens(settings),
            references=self.references(scene, settings),
            branch=branch,
        )

    def text_tokens(self, settings: Settings) -> int:
        """Tokens of the encoded prompt: T5's, CLIP's, or one after the other in SD3."""
        clip = int(self.parts["tokenizer"].model_max_length)
        if settings.max_sequence_length is None:
            return clip
        return settings.max_sequence_length + (clip if "tokenizer_3" in self.parts else 0)

    def sigmas(self, settings: Settings) -> list[float]:
        """Noise levels of a run, as the pipeline would set them."""
        import numpy as np
        from diffusers.pipelines.flux.pipeline_flux import calculate_shift

        from attnctrl.schedule import run_levels

        scheduler = type(self.parts["scheduler"]).from_config(self.parts["scheduler"].config)
        config = scheduler.config
        given: dict[str, Any] = {}
        if config.get("use_dynamic_shifting"):
            token = 2 * self.canvas.vae_scale_factor
            tokens = (settings.height // token) * (settings.width // token)
            given["mu"] = calculate_shift(
                tokens, config.base_image_seq_len, config.max_image_seq_len, config.base_shift, config.max_shift
            )
        if self.canvas.pipeline.__name__.startswith("Flux"):
            scheduler.set_timesteps(sigmas=np.linspace(1.0, 1 / settings.steps, settings.steps), **given)
        else:
            scheduler.set_timesteps(settings.steps, **given)
        return list(run_levels(scheduler)[1])

    def references(self, scene: Scene, settings: Settings) -> list[tuple[int, int]]:
        """(rows, columns) of tokens of the scene's reference pictures, as Kontext would resize them."""
        from attnctrl.pipelines.references import MAX_PIXELS, reference_size

        token = 2 * self.canvas.vae_scale_factor
        sizes = [
            reference_size(
                picture.size, token, scene.reference_pixels or MAX_PIXELS, settings.auto_resize, f"reference {k}"
            )
            for k, picture in enumerate(scene.references())
        ]
        return [(height // token, width // token) for width, height in sizes]


def _parts(source: str, index: dict[str, Any]) -> dict[str, Any]:
    """The denoiser without weights, the scheduler and the tokenizers that a pipeline's index names."""
    import diffusers
    import torch
    from transformers import AutoTokenizer

    parts: dict[str, Any] = {}
    for name, entry in index.items():
        if not (isinstance(entry, (list, tuple)) and len(entry) == 2 and all(entry)):
            continue
        kind = str(entry[1])
        if name in ("transformer", "unet"):
            made: Any = getattr(diffusers, kind)
            with torch.device("meta"):
                parts[name] = made.from_config(made.load_config(source, subfolder=name))
        elif name == "scheduler":
            parts[name] = getattr(diffusers, kind).from_pretrained(source, subfolder=name)
        elif name.startswith("tokenizer"):
            parts[name] = AutoTokenizer.from_pretrained(source, subfolder=name)
        elif name.startswith("text_encoder"):
            # families only ask whether there is one
            parts[name] = kind
    if "tokenizer" in parts:
        parts["tokenizer_max_length"] = parts["tokenizer"].model_max_length
    return parts
