"""Keys and values in a narrower dtype than they were computed in."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from ..content import Moments
from ..errors import ControlError

__all__ = ["DTYPES", "Packed", "itemsize", "joined", "moments_bytes", "pack", "packed_bytes"]

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
        moments: float32 or better [2, heads of queries, keys and values one after the other, head_dim], mean and
            standard deviation of all image tokens before their positions; None where they are not kept.
    """

    states: Tensor
    scale: Tensor | None = None
    moments: Tensor | None = None

    @property
    def nbytes(self) -> int:
        """Bytes of all tensors."""
        return sum(one.nbytes for one in (self.states, self.scale, self.moments) if one is not None)

    def moments_of(self, name: str, device: torch.device) -> Moments:
        """Mean and standard deviation [heads, 1, head_dim] of the picture's "query", "key" or "value".

        Raises:
            ControlError: when they are not kept.
        """
        if self.moments is None:
            raise ControlError(
                "The bank keeps keys and values, but no moments, which AdaIN matches queries and keys to. Capture it "
                "with Keep(moments=True), or share keys alone: of ShareStyle, match=()."
            )
        kept = self.states.shape[1]
        parts = self.moments.split([self.moments.shape[1] - 2 * kept, kept, kept], dim=1)
        mean, std = parts[("query", "key", "value").index(name)].to(device).unsqueeze(2)
        return mean, std

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


def joined(found: Sequence[Moments]) -> Tensor:
    """`Packed.moments` of the moments [heads, 1, head_dim] of queries, keys and values."""
    means, deviations = zip(*found, strict=True)
    return torch.stack([torch.cat(means), torch.cat(deviations)]).squeeze(2)


def itemsize(name: str | None, own: torch.dtype) -> int:
    """Bytes of one number in the dtype of this name; None is the model's `own`."""
    return (own if name is None else DTYPES[name]).itemsize


def packed_bytes(tokens: int, channels: int, heads: int, name: str | None, own: torch.dtype) -> int:
    """What `Packed.nbytes` will be for so many tokens of `channels` = heads * head_dim."""
    return 2 * (tokens * channels * itemsize(name, own) + (4 * heads if name == "float8" else 0))


def moments_bytes(channels: int, queries: int, own: torch.dtype) -> int:
    """What the moments of keys and values of so many channels each, and of queries of as many as said, will take."""
    return 2 * (queries + 2 * channels) * max(4, own.itemsize)
