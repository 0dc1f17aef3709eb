"""Which model keys belong to: its class, its configuration, and a digest of some of its weights."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping

import torch
from torch import nn

__all__ = ["differing", "identity_of"]

_PARAMETERS = 16
_NUMBERS = 256


def identity_of(model: nn.Module) -> dict[str, str]:
    """The model's class, dtype, and digests of its configuration and weights.

    Weights are told by the names and shapes of all parameters and the first 256 numbers of 16 of them; "" where they
    are not in memory, as under sequential offloading. A LoRA that is not fused adds parameters: another model.
    """
    config = {name: value for name, value in dict(getattr(model, "config", {})).items() if not name.startswith("_")}
    told = json.dumps(config, sort_keys=True, default=str)
    found = dict(sorted(model.named_parameters()))
    dtype = next((str(one.dtype).removeprefix("torch.") for one in found.values()), "none")
    return {"class": type(model).__name__, "dtype": dtype, "config": _digest(told.encode()), "weights": _weights(found)}


def differing(one: Mapping[str, str], other: Mapping[str, str]) -> list[str]:
    """What two identities differ in; weights are not compared where either's are not known."""
    names = [name for name in one if one[name] != other.get(name)]
    return [name for name in names if name != "weights" or (one[name] and other.get(name))]


def _weights(parameters: Mapping[str, torch.Tensor]) -> str:
    if not parameters or any(one.is_meta for one in parameters.values()):
        return ""
    digest = hashlib.sha256("\n".join(f"{name} {tuple(one.shape)}" for name, one in parameters.items()).encode())
    for one in list(parameters.values())[:: max(1, len(parameters) // _PARAMETERS)]:
        digest.update(one.detach().flatten()[:_NUMBERS].cpu().contiguous().view(torch.uint8).numpy().tobytes())
    return digest.hexdigest()[:16]


def _digest(data: bytes) -> str:
    return hashlib.sha256(data).hexdigest()[:16]
