"""A pipeline without weights: configurations and vocabularies, enough to explain what controls would do."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from attnctrl.pipelines.models import Model
from attnctrl.pipelines.settings import Settings, settings_of

from attnctrl.errors import AssetError
from attnctrl.scene import Scene

if TYPE_CHECKING:
    from attnctrl.explain import Explanation

_SAMPLE_SIZE = 128  # FluxPipeline's own default


@dataclass(frozen=True)
class Outline:
    """What `attnctrl.explain` reads of a FLUX pipeline; the transformer is on the meta device.

    Attributes:
        transformer: without weights.
        tokenizer_2: T5's, which counts the tokens of region texts.
        scheduler: for the noise levels of a run.
        vae_scale_factor: pixels a latent covers in each direction.
        defaults: contents of the model folder's attnctrl.json.
    """

    transformer: Any
    tokenizer_2: Any
    scheduler: Any
    vae_scale_factor: int
    defaults: dict[str, Any]

    @classmethod
    def of(cls, model: Model) -> Outline:
        """The outline of `model`. Raises `AssetError` if its configurations cannot be read."""
        import torch
        from diffusers import AutoencoderKL, FlowMatchEulerDiscreteScheduler, FluxTransformer2DModel
        from transformers import AutoTokenizer

        try:
            config = FluxTransformer2DModel.load_config(model.source, subfolder="transformer")
            vae = AutoencoderKL.load_config(model.source, subfolder="vae")
            scheduler = FlowMatchEulerDiscreteScheduler.from_pretrained(model.source, subfolder="scheduler")
            tokenizer = AutoTokenizer.from_pretrained(model.source, subfolder="tokenizer_2")
        except (OSError, ValueError) as error:
            raise AssetError(f"the configuration of model '{model.name}' cannot be read: {error}") from error
        with torch.device("meta"):
            transformer = FluxTransformer2DModel.from_config(config)
        factor = 2 ** (len(vae["block_out_channels"]) - 1)
        return cls(transformer, tokenizer, scheduler, factor, model.defaults)

    def settings(self, scene: Scene) -> Settings:
        """The values with which `scene` runs. Raises `SceneError` if its size does not fit."""
        return settings_of(scene, self.defaults, self.vae_scale_factor, _SAMPLE_SIZE)

    def explain(self, scene: Scene) -> Explanation:
        """What the scene's controls would do. Raises `AttnCtrlError` as `attach` and the first forward would."""
        import attnctrl

        settings = self.settings(scene)
        return attnctrl.explain(
            self,
            scene.build_controls(),
            width=settings.width,
            height=settings.height,
            steps=settings.steps,
            sigmas=self.sigmas(settings),
            text_tokens=settings.max_sequence_length,
            references=self.references(scene, settings),
        )

    def sigmas(self, settings: Settings) -> list[float]:
        """Noise levels of a run, as the pipeline would set them."""
        import numpy as np
        from diffusers.pipelines.flux.pipeline_flux import calculate_shift

        scheduler = type(self.scheduler).from_config(self.scheduler.config)
        config = scheduler.config
        token = 2 * self.vae_scale_factor
        tokens = (settings.height // token) * (settings.width // token)
        shift = calculate_shift(
            tokens, config.base_image_seq_len, config.max_image_seq_len, config.base_shift, config.max_shift
        )
        even = np.linspace(1.0, 1 / settings.steps, settings.steps)
        scheduler.set_timesteps(sigmas=even, mu=shift if config.use_dynamic_shifting else None)
        return [float(sigma) for sigma in scheduler.sigmas[: settings.steps]]

    def references(self, scene: Scene, settings: Settings) -> list[tuple[int, int]]:
        """(rows, columns) of tokens of the scene's reference picture, as Kontext would resize it."""
        from diffusers.pipelines.flux.pipeline_flux_kontext import PREFERRED_KONTEXT_RESOLUTIONS

        picture = scene.reference()
        if picture is None:
            return []
        width, height = picture.size
        if settings.auto_resize:
            proportion = width / height
            _, width, height = min((abs(proportion - w / h), w, h) for w, h in PREFERRED_KONTEXT_RESOLUTIONS)
        token = 2 * self.vae_scale_factor
        return [(height // token, width // token)]
