"""Which model keys belong to: class, configuration, a digest of some of its weights; and which bank is which."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from dataclasses import fields
from typing import TYPE_CHECKING

import torch
from torch import nn

if TYPE_CHECKING:
    from .store import Bank

__all__ = ["differing", "digest_of", "identity_of"]

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


def digest_of(bank: Bank) -> str:
    """sha256 of all that a bank holds: equal for a bank and the one that is loaded from its file."""
    how = (bank.sigmas, bank.every, bank.tokens, bank.queries, bank.texts, sorted(bank.model.items()))
    digest = hashlib.sha256(repr(how).encode())
    for place, held in sorted(bank.places.items()):
        digest.update(repr((place, held.grid, held.names, held.boxes)).encode())
        digest.update(_bytes(held.tokens) + _bytes(held.member))
    for entry, packed in sorted(bank.entries.items()):
        for part in fields(packed):
            one = getattr(packed, part.name)
            digest.update(repr((*entry, part.name, one is None)).encode())
            digest.update(b"" if one is None else _bytes(one))
    return digest.hexdigest()


def _weights(parameters: Mapping[str, torch.Tensor]) -> str:
    if not parameters or any(one.is_meta for one in parameters.values()):
        return ""
    digest = hashlib.sha256("\n".join(f"{name} {tuple(one.shape)}" for name, one in parameters.items()).encode())
    for one in list(parameters.values())[:: max(1, len(parameters) // _PARAMETERS)]:
        digest.update(_bytes(one.flatten()[:_NUMBERS]))
    return digest.hexdigest()[:16]


def _bytes(tensor: torch.Tensor) -> bytes:
    return tensor.detach().flatten().cpu().contiguous().view(torch.uint8).numpy().tobytes()


def _digest(data: bytes) -> str:
    return hashlib.sha256(data).hexdigest()[:16]
