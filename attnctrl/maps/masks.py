"""Masks from maps: thresholds, Otsu's, the largest share. A map that tells nothing gives an empty mask, and says so."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from ..errors import ControlError

__all__ = ["Masks", "argmax", "decided", "minmax", "otsu", "share", "threshold"]

_BINS = 256
_TINY = 1e-12


class Masks(NamedTuple):
    """Masks, each as `Region(mask=...)` takes it, and which of them say nothing.

    Attributes:
        masks: bool [..., h, w].
        undecided: bool [...]: the mask is empty because the map is constant, or lost everywhere; use a box, or none.
    """

    masks: Tensor
    undecided: Tensor


def minmax(maps: Tensor) -> Tensor:
    """Each map [..., h, w] stretched to [0, 1]; a constant one becomes 0."""
    maps = maps.float()
    low, high = maps.amin((-2, -1), keepdim=True), maps.amax((-2, -1), keepdim=True)
    span = high - low
    return torch.where(span > 0, (maps - low) / span.clamp(min=torch.finfo(torch.float32).tiny), 0.0)


def share(maps: Tensor) -> Tensor:
    """Of maps [groups, ..., h, w], the share of each group in the sum of all; 0 where all are 0."""
    maps = maps.float()
    return maps / maps.sum(0, keepdim=True).clamp(min=_TINY)


def threshold(maps: Tensor, level: float = 0.5) -> Masks:
    """Tokens whose stretched map is above `level`.

    Raises:
        ControlError: when the level is not in [0, 1).
    """
    if not 0 <= level < 1:
        raise ControlError(f"threshold: the level must be in [0, 1); found {level}. Maps are stretched to [0, 1].")
    return decided(minmax(maps) > level)


def otsu(maps: Tensor, times: int = 1, apart: float = 0.3) -> Masks:
    """Otsu's threshold of each map [..., h, w]: the one of 256 that parts it into the two most distant classes.

    Args:
        times: so often, each time with all levelled that is below the threshold before. A map that falls off slowly
            around what it shows has three classes: inside, around, elsewhere; the second threshold leaves the first.
        apart: a further threshold stands where the means on its sides differ by this share of what those of the one
            before do, or more: what is even inside is not parted.

    Raises:
        ControlError: when it is not to be parted once.
    """
    if times < 1:
        raise ControlError(f"otsu parts maps once or more; found times={times}.")
    maps = maps.float()
    found, before = _parted(maps), torch.ones_like(maps, dtype=torch.bool)
    for _ in range(times - 1):
        low = maps.masked_fill(~found, float("inf")).amin((-2, -1), keepdim=True).nan_to_num(posinf=0.0)
        inner = _parted(torch.where(found, maps, low))
        further = _difference(maps, inner, found & ~inner) >= apart * _difference(maps, found, before & ~found)
        # one value cannot be parted
        further &= inner.flatten(-2).any(-1)[..., None, None]
        found, before = torch.where(further, inner, found), torch.where(further, found, before)
    return decided(found)


def _difference(maps: Tensor, above: Tensor, below: Tensor) -> Tensor:
    """[..., 1, 1]: by how much the means of two classes differ."""
    high, low = ((maps * one).sum((-2, -1), keepdim=True) / one.sum((-2, -1), keepdim=True) for one in (above, below))
    return high - low


def _parted(maps: Tensor) -> Tensor:
    """bool [..., h, w]: above Otsu's threshold."""
    stretched = minmax(maps)
    values = stretched.flatten(-2)
    bins = (values * _BINS).long().clamp(max=_BINS - 1)
    counts = values.new_zeros(*values.shape[:-1], _BINS, dtype=torch.float64)
    counts.scatter_add_(-1, bins, torch.ones_like(values, dtype=torch.float64))
    number = torch.arange(_BINS, device=values.device, dtype=torch.float64)
    below, weighted = counts.cumsum(-1), (counts * number).cumsum(-1)
    all_of, total = below[..., -1:], weighted[..., -1:]
    above = all_of - below
    # (share below) x (share above) x (difference of means)^2, times the square of the number of tokens
    between = (weighted * all_of - total * below).square() / (below * above).clamp(min=1)
    best = torch.where(below * above > 0, between, -1.0).argmax(-1, keepdim=True)
    return (bins > best).unflatten(-1, maps.shape[-2:]) & (stretched > 0)


def argmax(maps: Tensor, *, sinks: int = 0, floor: float = 0.0, margin: float = 0.0) -> Masks:
    """Each token to the group with the largest share: masks that do not overlap; tokens of none are background.

    Args:
        maps: [groups, ..., h, w], masses of groups that are compared.
        sinks: the last groups compete and have no mask, such as padding or a word for the background.
        floor: a smaller share is background.
        margin: so is a share that leads the next one by less.

    Returns:
        Masks [groups - sinks, ..., h, w].

    Raises:
        ControlError: when there are not two groups to compare, or no group is left.
    """
    if len(maps) < 2 or not 0 <= sinks < len(maps):
        raise ControlError(f"argmax compares two groups at least, not all of them sinks; found {len(maps)}, {sinks}.")
    shares = share(maps)
    top, winner = shares.topk(2, dim=0)
    # equal shares have no winner, whatever the margin
    clear = (top[0] >= floor) & (top[0] > top[1]) & (top[0] - top[1] >= margin)
    numbers = torch.arange(len(maps) - sinks, device=maps.device).reshape(-1, *[1] * (maps.ndim - 1))
    constant = (shares == shares[..., :1, :1]).all(0, keepdim=True).flatten(-2).all(-1)[..., None, None]
    return decided((winner[0] == numbers) & clear & ~constant)


def decided(masks: Tensor) -> Masks:
    """Masks [..., h, w] with the empty ones called undecided."""
    return Masks(masks, ~masks.flatten(-2).any(-1))
