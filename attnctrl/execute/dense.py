"""The lowering with a dense additive mask: one kernel call per pass. Takes Tq x Tk memory while it runs."""

from __future__ import annotations

import copy

import torch
from torch import Tensor

from .base import ExecutionPlan, Kernel
from .layers import deal, run_layers
from .terms import Terms
from .tokens import row_bias, take_bias, tensor_bytes


class DensePlan(ExecutionPlan):
    """Looks the mask up from atoms at the first call of a (device, dtype) and keeps it, except while compiling."""

    executor = "dense"

    def __init__(self, terms: Terms, reason: str) -> None:
        super().__init__(density=terms.density, classes=len(terms.classes), tokens=terms.tokens, reason=reason)
        self._rows = torch.stack([c.row for c in terms.classes])
        self._key_atom = terms.key_atom
        self._layers = deal(terms)
        self._masks: dict[tuple[int, torch.device, torch.dtype], Tensor] = {}

    @property
    def nbytes(self) -> int:
        """Bytes of atoms, rows and weights; the masks cached after a run come on top."""
        return tensor_bytes([self._rows, self._key_atom]) + sum(layer.nbytes for layer in self._layers)

    def to(self, device: torch.device | str) -> DensePlan:
        """The same plan on `device`, with an empty mask cache."""
        moved = copy.copy(self)
        moved._rows = self._rows.to(device)
        moved._key_atom = self._key_atom.to(device)
        moved._layers = tuple(layer.to(device) for layer in self._layers)
        moved._masks = {}
        return moved

    @property
    def needs_mask(self) -> bool:
        """See `ExecutionPlan.needs_mask`."""
        return True

    def _attend(
        self, query: Tensor, key: Tensor, value: Tensor, kernel: Kernel, scale: float | None, bias: Tensor | None
    ) -> Tensor:
        def attend(number: int, part: Tensor) -> Tensor:
            mask = self._mask(number, query.dtype)
            if bias is not None:
                mask = mask + take_bias(bias, self._layers[number].queries, 2)
            return kernel(part, key, value, mask=mask, scale=scale)

        return run_layers(self._layers, query, value.shape[-1], attend)

    def _mask(self, number: int, dtype: torch.dtype) -> Tensor:
        """The additive bias [1, 1, count, Tk] of a layer."""
        known = (number, self._key_atom.device, dtype)
        if known in self._masks:
            return self._masks[known]
        # a tensor of a traced graph must not outlive the trace
        if torch.compiler.is_compiling():
            return row_bias(self._rows, self._layers[number].row_of, self._key_atom, dtype)
        # an inference tensor could not serve a later run with gradients
        with torch.inference_mode(False), torch.no_grad():
            self._masks[known] = row_bias(self._rows, self._layers[number].row_of, self._key_atom, dtype)
        return self._masks[known]
