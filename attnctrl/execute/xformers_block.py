"""The packed lowering on xformers' block-diagonal attention. Optional: asked for by name, never chosen.

xformers is looked for when a plan asks for it, and never imported before: a build for another torch imports and fails
at its first call, so one tiny call on the plan's device decides.
"""

from __future__ import annotations

from functools import lru_cache
from importlib import import_module
from importlib.util import find_spec
from typing import Any

import torch
from torch import Tensor

from ..errors import PlanError
from .lse import records_gradients
from .packed import PackedKernel, PackedPlan, Packing


class XformersKernel:
    """memory_efficient_attention with a BlockDiagonalMask."""

    name = "one block-diagonal call of xformers"

    def __init__(self) -> None:
        self._attend = import_module("xformers.ops").memory_efficient_attention
        self._make_bias = import_module("xformers.ops.fmha.attn_bias").BlockDiagonalMask.from_seqlens
        self._biases: dict[tuple[int, torch.device], Any] = {}

    def serves(self, query: Tensor, key: Tensor, value: Tensor) -> bool:
        """See `PackedKernel.serves`. Grouped heads are forward only in xformers."""
        if query.shape[1] != key.shape[1] and records_gradients(query, key, value):
            return False
        sizes = (query.shape[-1], value.shape[-1])
        return query.dtype != torch.float64 and all(size % 8 == 0 for size in sizes)

    def __call__(
        self, query: Tensor, key: Tensor, value: Tensor, packing: Packing, scale: float | None
    ) -> tuple[Tensor, Tensor | None]:
        """See `PackedKernel`."""
        batch, count, heads, _ = query.shape
        query, key, value = (x.flatten(0, 1)[None] for x in (query, key, value))
        groups = key.shape[2]
        if groups != heads:
            query = query.unflatten(2, (groups, heads // groups))
            key, value = (x[:, :, :, None].expand(-1, -1, -1, heads // groups, -1) for x in (key, value))
        out = self._attend(query, key, value, attn_bias=self._bias(packing, batch, query.device), scale=scale)
        return out.reshape(batch, count, heads, value.shape[-1]), None

    def _bias(self, packing: Packing, batch: int, device: torch.device) -> Any:
        """The block-diagonal bias of a batch, made at its first call."""
        if (batch, device) not in self._biases:
            queries, keys = sequence_lengths(packing, batch)
            self._biases[batch, device] = self._make_bias(queries, keys, device=device)
        return self._biases[batch, device]


class XformersPlan(PackedPlan):
    """See the module.

    Raises:
        PlanError: when xformers is missing or does not work on the device, or when there are soft rows.
    """

    executor = "xformers"

    def _find_kernel(self, device: torch.device, soft: bool) -> PackedKernel:
        if soft:
            raise PlanError(
                "Executor 'xformers' was asked for, but rows have several log-weights, which block-diagonal attention "
                "cannot express; use executor 'auto', 'grouped', 'varlen' or 'flex'."
            )
        fault = find_fault(device.type)
        if fault is not None:
            raise PlanError(
                f"Executor 'xformers' was asked for on {device.type}, but {fault}. Use executor 'auto', or install a "
                "build for this torch and device: pip install 'attnctrl[xformers]'."
            )
        return XformersKernel()


def sequence_lengths(packing: Packing, batch: int) -> tuple[list[int], list[int]]:
    """Lengths of all segments of a batch: (queries, keys), entry after entry."""
    return [queries for queries, _ in packing.lengths] * batch, [keys for _, keys in packing.lengths] * batch


@lru_cache
def find_fault(device: str) -> str | None:
    """Why xformers cannot be used on a type of device, in words; None when a tiny call works there."""
    if find_spec("xformers") is None:
        return "xformers is not installed"
    try:
        make = import_module("xformers.ops.fmha.attn_bias").BlockDiagonalMask.from_seqlens
        attend = import_module("xformers.ops").memory_efficient_attention
    except (ImportError, OSError, RuntimeError, AttributeError) as error:
        return f"xformers cannot be imported: {_first_line(error)}"
    try:
        x = torch.zeros(1, 16, 1, 32, device=device, dtype=torch.float16)
        attend(x, x, x, attn_bias=make([8, 8], [8, 8], device=torch.device(device)))
    except (NotImplementedError, RuntimeError, ValueError, AssertionError) as error:
        return f"a tiny call of xformers fails there: {_first_line(error)}"
    return None


def _first_line(error: Exception) -> str:
    return (str(error).splitlines() or [type(error).__name__])[0].rstrip(".: ")
