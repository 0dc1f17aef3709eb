"""Keys and values in a narrower dtype than they were computed in."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from ..errors import ControlError

__all__ = ["DTYPES", "Packed", "itemsize", "pack", "packed_bytes"]

DTYPES: dict[str, torch.dtype] = {
    "float32": torch.float32,
    "float16": torch.float16,
    "bfloat16": torch.bfloat16,
    "float8": torch.float8_e4m3fn,
}
"""What a bank can keep, by name. "float8" has 4 bits of exponent and 3 of mantissa, and a scale for each head."""


@dataclass(frozen=True, eq=False)
class Packed:
    """Keys and values of some tokens.

    Attributes:
        states: [2, heads, tokens, head_dim], keys and then values.
        scale: float32 [2, heads, 1, 1], by which float8 states are multiplied; None for the others.
    """

    states: Tensor
    scale: Tensor | None = None

    @property
    def nbytes(self) -> int:
        """Bytes of both tensors."""
        return self.states.nbytes + (0 if self.scale is None else self.scale.nbytes)

    def opened(self, like: Tensor) -> Tensor:
        """[2, heads, tokens, head_dim] in the dtype of `like`, where it is."""
        if self.scale is None:
            return self.states.to(like)
        states = self.states.to(like.device).float() * self.scale.to(like.device)
        return states.to(like.dtype)


def pack(key: Tensor, value: Tensor, name: str | None, device: torch.device | str | None) -> Packed:
    """Copies of key and value [heads, tokens, head_dim] in the dtype of this name; None leaves the model's.

    Raises:
        ControlError: when a number is too large for float16.
    """
    states = torch.stack([key.detach(), value.detach()])
    if name is None:
        return Packed(states.to(device or states.device))
    dtype = DTYPES[name]
    if name == "float8":
        largest = states.float().abs().amax(dim=(2, 3), keepdim=True)
        scale = (largest / torch.finfo(dtype).max).clamp_min(torch.finfo(torch.float32).tiny)
        states = (states.float() / scale).to(dtype)
        return Packed(states.to(device or states.device), scale.to(device or scale.device))
    narrow = states.to(dtype)
    if name == "float16" and states.dtype != dtype and not bool(narrow.isfinite().all()):
        raise ControlError(
            f"Keys or values of up to {float(states.abs().max()):.3g} do not fit into float16. Give the bank "
            "dtype='bfloat16', or None for the model's own."
        )
    return Packed(narrow.to(device or narrow.device))


def itemsize(name: str | None, own: torch.dtype) -> int:
    """Bytes of one number in the dtype of this name; None is the model's `own`."""
    return (own if name is None else DTYPES[name]).itemsize


def packed_bytes(tokens: int, channels: int, heads: int, name: str | None, own: torch.dtype) -> int:
    """What `Packed.nbytes` will be for so many tokens of `channels` = heads * head_dim."""
    return 2 * (tokens * channels * itemsize(name, own) + (4 * heads if name == "float8" else 0))
