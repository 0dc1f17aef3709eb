"""Keys and values in a narrower dtype than they were computed in."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

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
        states: [2, heads, tokens, head_dim], keys and then values; image tokens, and behind them those of texts where
            they are kept.
        scale: float32 [2, heads, 1, 1], by which float8 states are multiplied; None for the others.
        moments: float32 or better [2, heads of queries, keys and values one after the other, head_dim], mean and
            standard deviation of all image tokens before their positions; None where they are not kept.
        query, query_scale: [1, heads of queries, tokens, head_dim] and [1, heads of queries, 1, 1], as states and scale
            of the same tokens; None where they are not kept.
        output, output_scale: [1, heads of queries, image tokens, head_dim] and its scale, what attention gave out at
            the image tokens; None where it is not kept.
    """

    states: Tensor
    scale: Tensor | None = None
    moments: Tensor | None = None
    query: Tensor | None = None
    query_scale: Tensor | None = None
    output: Tensor | None = None
    output_scale: Tensor | None = None

    @property
    def tensors(self) -> tuple[Tensor, ...]:
        """Those that are there."""
        held = (
            *(self.states, self.scale, self.moments),
            *(self.query, self.query_scale, self.output, self.output_scale),
        )
        return tuple(one for one in held if one is not None)

    @property
    def nbytes(self) -> int:
        """Bytes of all tensors."""
        return sum(one.nbytes for one in self.tensors)

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
        return _opened(self.states, self.scale, like)

    def opened_query(self, like: Tensor) -> Tensor:
        """[heads of queries, tokens, head_dim] in the dtype of `like`, where it is.

        Raises:
            ControlError: when they are not kept.
        """
        if self.query is None:
            raise ControlError(
                "The bank keeps keys and values, but no queries. Capture it with Keep(queries=True), or take other "
                "states (Inject) or features (Harmonize)."
            )
        return _opened(self.query, self.query_scale, like)[0]

    def opened_output(self, like: Tensor) -> Tensor:
        """[heads of queries, image tokens, head_dim] in the dtype of `like`, where it is.

        Raises:
            ControlError: when they are not kept.
        """
        return _opened(self.check_outputs(), self.output_scale, like)[0]

    def check_outputs(self) -> Tensor:
        """The outputs as they are kept. Raises `ControlError` when they are not."""
        if self.output is None:
            raise ControlError(
                "The bank keeps keys and values, but no outputs of attention at this step, which Harmonize takes in. "
                "Capture it with Keep(outputs=...) of the window in which it is read."
            )
        return self.output

    def with_output(self, output: Tensor, name: str | None, device: torch.device | str | None) -> Packed:
        """The same with what attention gave out [heads, image tokens, head_dim], in the dtype of this name."""
        states, scale = _narrowed([output], name, device)
        return replace(self, output=states, output_scale=scale)


def _opened(states: Tensor, scale: Tensor | None, like: Tensor) -> Tensor:
    if scale is None:
        return states.to(like)
    return (states.to(like.device).float() * scale.to(like.device)).to(like.dtype)


def pack(
    key: Tensor, value: Tensor, name: str | None, device: torch.device | str | None, query: Tensor | None = None
) -> Packed:
    """Copies of key and value, and maybe query, [heads, tokens, head_dim] each, in the dtype of this name; None leaves
    the model's.

    Raises:
        ControlError: when a number is too large for float16.
    """
    states = _narrowed([key, value], name, device)
    return Packed(*states, None, *(() if query is None else _narrowed([query], name, device)))


def _narrowed(
    given: Sequence[Tensor], name: str | None, device: torch.device | str | None
) -> tuple[Tensor, Tensor | None]:
    """[n, heads, tokens, head_dim] in the dtype of this name, and the scale of float8."""
    states = torch.stack([one.detach() for one in given])
    if name is None:
        return states.to(device or states.device), None
    dtype = DTYPES[name]
    if name == "float8":
        largest = states.float().abs().amax(dim=(2, 3), keepdim=True)
        scale = (largest / torch.finfo(dtype).max).clamp_min(torch.finfo(torch.float32).tiny)
        states = (states.float() / scale).to(dtype)
        return states.to(device or states.device), scale.to(device or scale.device)
    narrow = states.to(dtype)
    if name == "float16" and states.dtype != dtype and not bool(narrow.isfinite().all()):
        raise ControlError(
            f"States of up to {float(states.abs().max()):.3g} do not fit into float16. Give the bank "
            "dtype='bfloat16', or None for the model's own."
        )
    return narrow.to(device or narrow.device), None


def joined(found: Sequence[Moments]) -> Tensor:
    """`Packed.moments` of the moments [heads, 1, head_dim] of queries, keys and values."""
    means, deviations = zip(*found, strict=True)
    return torch.stack([torch.cat(means), torch.cat(deviations)]).squeeze(2)


def itemsize(name: str | None, own: torch.dtype) -> int:
    """Bytes of one number in the dtype of this name; None is the model's `own`."""
    return (own if name is None else DTYPES[name]).itemsize


def packed_bytes(tokens: int, channels: int, heads: int, name: str | None, own: torch.dtype) -> int:
    """What one state of so many tokens of `channels` = heads * head_dim will take."""
    return tokens * channels * itemsize(name, own) + (4 * heads if name == "float8" else 0)


def moments_bytes(channels: int, queries: int, own: torch.dtype) -> int:
    """What the moments of keys and values of so many channels each, and of queries of as many as said, will take."""
    return 2 * (queries + 2 * channels) * max(4, own.itemsize)
