"""The latents of a run at each noise level, kept for those who read or replay it."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save
from torch import Tensor

from .. import files
from ..errors import AssetError, ScheduleError

__all__ = ["FORMAT", "Trajectory"]

FORMAT = 1
_KEY = "attnctrl.trajectory"
# schedulers keep their levels in float32
_TOLERANCE = 1e-4


@dataclass(frozen=True, eq=False)
class Trajectory:
    """A path between noise and picture.

    Attributes:
        latents: float32 [levels, B, ...] in the form that the pipeline's own `latents` argument has, noisiest first, so
            that latents[0] is where generation begins.
        sigmas: noise level of each, descending, in the unit of `attnctrl.schedule.run_levels`; infinite where a
            diffusion model begins without signal.
        record: JSON data: the model's identity under "model", what made the path under "settings", "size" in pixels.
    """

    latents: Tensor
    sigmas: tuple[float, ...]
    record: Mapping[str, Any] = field(default_factory=dict)

    def __post_init__(self) -> None:
        if len(self.latents) != len(self.sigmas) or list(self.sigmas) != sorted(set(self.sigmas), reverse=True):
            raise ScheduleError(
                f"A trajectory has latents at falling sigmas, one for each; found {len(self.latents)} latents and "
                f"{len(self.sigmas)} sigmas {[round(one, 4) for one in self.sigmas[:4]]}...; put the noisiest first."
            )

    @property
    def noisiest(self) -> Tensor:
        """[B, ...], where generation begins."""
        return self.latents[0]

    @property
    def clean(self) -> Tensor:
        """[B, ...], the picture."""
        return self.latents[-1]

    def at(self, sigma: float) -> Tensor:
        """The latents [B, ...] at a noise level of the path. Raises `ScheduleError` where there are none."""
        for level, latents in zip(self.sigmas, self.latents, strict=True):
            if level == sigma or math.isclose(level, sigma, rel_tol=_TOLERANCE, abs_tol=_TOLERANCE**2):
                return latents
        near = min(self.sigmas, key=lambda level: abs(level - sigma) if math.isfinite(level) else math.inf)
        raise ScheduleError(
            f"The trajectory has no latents at sigma {sigma:.4g}; the nearest of its {len(self.sigmas)} levels is "
            f"{near:.4g}; run with the number of steps and the size that it was made with."
        )

    def save(self, path: str | Path) -> Path:
        """Write a safetensors file whose header holds the record as JSON; whole or not at all."""
        tensors = {
            "latents": self.latents.detach().to("cpu", torch.float32).contiguous(),
            "sigmas": torch.tensor(self.sigmas, dtype=torch.float64),
        }
        told = json.dumps({"format": FORMAT, **self.record}, sort_keys=True, ensure_ascii=False, allow_nan=False)
        return files.write_bytes(path, save(tensors, metadata={_KEY: told}))

    @classmethod
    def load(cls, path: str | Path, model: Mapping[str, str] | None = None) -> Trajectory:
        """The trajectory in a file, on the CPU.

        Args:
            path: of a file that `save` wrote.
            model: identity of the model it is meant for, as `Wrapper.identity`; None takes any.

        Raises:
            AssetError: the file is missing or no such file, or the trajectory is of another model.
        """
        path = Path(path)
        try:
            with safe_open(str(path), framework="pt") as file:
                told = json.loads((file.metadata() or {})[_KEY])
                latents, sigmas = file.get_tensor("latents"), tuple(file.get_tensor("sigmas").tolist())
        except (OSError, SafetensorError, KeyError, ValueError) as error:
            raise AssetError(
                f"{path} is no trajectory of attnctrl ({type(error).__name__}: {error}); name a file that "
                "`attnctrl invert` or Trajectory.save wrote."
            ) from error
        if told.pop("format", None) != FORMAT:
            raise AssetError(f"{path} has another format than {FORMAT}; make it again with this version of attnctrl.")
        made = cls(latents, sigmas, told)
        if model is not None:
            made.check_model(model)
        return made

    def check_model(self, model: Mapping[str, str]) -> None:
        """Raises `AssetError` if the trajectory is of another model than the one of this identity."""
        found = self.record.get("model", {})
        if not _same_model(model, found):
            raise AssetError(
                f"The trajectory belongs to {_named(found)}, but the model here is {_named(model)}: latents of one "
                "model mean nothing to another; load that model, or invert the picture again."
            )


def _same_model(one: Mapping[str, str], other: Mapping[str, str]) -> bool:
    """Equal fingerprints where there are any, since folders are renamed; else equal names."""
    key = "fingerprint" if "fingerprint" in one or "fingerprint" in other else "name"
    return one.get(key) == other.get(key)


def _named(model: Mapping[str, str]) -> str:
    return f"{model.get('name', 'an unnamed model')} ({model.get('fingerprint', 'no fingerprint')})"
