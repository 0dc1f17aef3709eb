"""FLUX Kontext with any number of reference pictures; made by `with_references`."""

from __future__ import annotations

from typing import Any

import torch
from attnctrl.pipelines.references import References, raster_ids
from diffusers import FluxKontextPipeline
from torch import Tensor

from attnctrl.errors import ControlError


class FluxKontextReferences(FluxKontextPipeline):
    """Kontext whose picture tokens are followed by those of several references. It differs in `prepare_latents` alone.

    Attributes:
        source: the pipeline whose modules it runs, and whose offloading brings them back after a call.
        references: what to follow.
    """

    source: Any
    references: References

    def prepare_latents(
        self,
        image: Tensor | None,
        batch_size: int,
        num_channels_latents: int,
        height: int,
        width: int,
        dtype: torch.dtype,
        device: torch.device,
        generator: torch.Generator | list[torch.Generator] | None = None,
        latents: Tensor | None = None,
    ) -> tuple[Tensor, Tensor | None, Tensor, Tensor | None]:
        """The latents, and the references' latents and ids in the place of one picture's.

        Raises:
            ControlError: an image is given besides the references, or samples do not divide the batch.
        """
        if image is not None:
            raise ControlError(
                f"This pipeline follows {len(self.references.sizes)} references of its own; leave `image` out, or call "
                "with_references with that picture too."
            )
        samples = len(self.references.pictures)
        if batch_size % samples:
            raise ControlError(
                f"There are references for {samples} samples, but the batch has {batch_size} rows; give one list of "
                "pictures per prompt, or one list for all."
            )
        latents, _, latent_ids, _ = super().prepare_latents(
            None, batch_size, num_channels_latents, height, width, dtype, device, generator, latents
        )
        if not self.references.sizes:
            return latents, None, latent_ids, None
        rows = [
            torch.cat(
                [self._encoded(picture, size, dtype, device, generator) for picture, size in self._sized(sample)], 1
            )
            for sample in range(samples)
        ]
        token = self.references.token
        ids = self._ids((height // token, width // token), dtype, device)
        # pipelines repeat each prompt num_images_per_prompt times in a row
        return latents, torch.cat(rows).repeat_interleave(batch_size // samples, 0), latent_ids, ids

    def _sized(self, sample: int) -> Any:
        return zip(self.references.pictures[sample], self.references.sizes, strict=True)

    def _encoded(
        self, picture: Any, size: tuple[int, int], dtype: torch.dtype, device: torch.device, generator: Any
    ) -> Tensor:
        """Packed latents [1, tokens, channels] of one picture, encoded by itself so that batches change nothing."""
        width, height = size
        pixels = self.image_processor.preprocess(picture, height, width).to(device=device, dtype=dtype)
        latents = self._encode_vae_image(pixels, generator)
        return self._pack_latents(latents, 1, *latents.shape[1:])

    def _ids(self, grid: tuple[int, int], dtype: torch.dtype, device: torch.device) -> Tensor:
        ids = raster_ids(self.references.grids, self.references.corners(grid))
        # whole numbers go as Kontext's own do; fractions would be lost in half precision
        return ids.to(device=device, dtype=torch.float32 if self.references.positions == "region" else dtype)

    def maybe_free_model_hooks(self) -> None:
        """After a call, offloading is put back as the source pipeline set it up."""
        self.source.maybe_free_model_hooks()
