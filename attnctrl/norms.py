"""GroupNorms that normalise a picture of a batch together with another one, for one forward at a time.

The shared normalisation of StyleAligned (arXiv 2312.02133): its code puts both pictures side by side, normalises and
cuts them apart again. Statistics of two pictures of one size are told from those of each, so nothing is put together.
Its shared LayerNorm normalises each token by itself, so it does nothing, and is not here.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from .errors import PlanError, UnsupportedModelError

__all__ = ["Norms", "Pooled", "pooled"]


class Pooled(NamedTuple):
    """A row of the batch that is normalised together with another one, the way there by `strength`."""

    row: int
    other: int
    strength: float


class Norms:
    """The GroupNorms of a model; hooks sit on them from `put` to `take`."""

    def __init__(self, model: nn.Module) -> None:
        self._model = model
        self._handles: list[Any] = []

    def put(self, rows: Sequence[Pooled], batch: int) -> None:
        """Let rows of a batch of so many be normalised together in the forward that begins.

        Raises:
            UnsupportedModelError: the model has no GroupNorms, or it is compiled.
        """
        from .tappable import is_compiled

        if not rows:
            return
        found = [module for module in self._model.modules() if isinstance(module, nn.GroupNorm)]
        if not found:
            raise UnsupportedModelError(
                f"{type(self._model).__name__} has no GroupNorms whose statistics could be shared; UNets have. Leave "
                "out norms=True."
            )
        if is_compiled(self._model):
            raise UnsupportedModelError(
                "GroupNorms cannot be shared inside compiled code. Run the model uncompiled, or leave out norms=True."
            )
        mine, others = (torch.tensor([one[i] for one in rows]) for i in (0, 1))
        hook = partial(_together, mine, others, torch.tensor([one.strength for one in rows]), batch)
        self._handles = [module.register_forward_hook(hook) for module in found]

    def take(self) -> None:
        """Take the hooks off."""
        for handle in self._handles:
            handle.remove()
        self._handles = []


def _together(
    rows: Tensor,
    others: Tensor,
    strength: Tensor,
    batch: int,
    module: nn.GroupNorm,
    inputs: tuple[Tensor, ...],
    output: Tensor,
) -> Tensor:
    """A hook: the output of a GroupNorm, some rows of which are normalised with others; the rest stays to the bit."""
    states = inputs[0]
    if len(states) != batch:
        raise PlanError(
            f"GroupNorms are to be shared in a batch of {batch} rows, but one got {len(states)}: another hook splits "
            "the batch. Leave out norms=True."
        )
    rows, others = rows.to(states.device), others.to(states.device)
    own = output[rows].to(torch.promote_types(output.dtype, torch.float32))
    way = strength.to(own).view(-1, *(1,) * (own.ndim - 1))
    mixed = torch.lerp(own, pooled(states[rows], states[others], module).to(own), way)
    return output.index_copy(0, rows, mixed.to(output.dtype))


def pooled(states: Tensor, others: Tensor, norm: nn.GroupNorm) -> Tensor:
    """`states` [n, C, ...] as `norm` makes them, with the statistics that each has together with its other one:

        m = (m_i + m_r) / 2,    v = (v_i + v_r) / 2 + (m_i - m_r)^2 / 4

    In float32 or better.
    """
    grouped, theirs = (_grouped(one, norm.num_groups) for one in (states, others))
    (variance, mean), (other_variance, other_mean) = (
        torch.var_mean(one, dim=2, correction=0, keepdim=True) for one in (grouped, theirs)
    )
    middle = (mean + other_mean) / 2
    spread = (variance + other_variance) / 2 + (mean - other_mean).square() / 4
    found = ((grouped - middle) * (spread + norm.eps).rsqrt()).view(states.shape)
    if norm.weight is None:
        return found
    channels = (1, -1, *(1,) * (states.ndim - 2))
    return found * norm.weight.to(found).view(channels) + norm.bias.to(found).view(channels)


def _grouped(states: Tensor, groups: int) -> Tensor:
    """[n, groups, numbers of a group], float32 or better."""
    exact = states.to(torch.promote_types(states.dtype, torch.float32))
    return exact.reshape(len(states), groups, -1)
