"""The lowering of unmasked attention: the kernel gets the very tensors that were given."""

from __future__ import annotations

import torch
from torch import Tensor

from .base import ExecutionPlan, Kernel
from .terms import Terms


class UntouchedPlan(ExecutionPlan):
    """Calls the kernel once with the same objects, so the output is bit-equal to vanilla."""

    executor = "untouched"

    def __init__(self, terms: Terms, reason: str) -> None:
        super().__init__(density=terms.density, classes=len(terms.classes), tokens=terms.tokens, reason=reason)

    @property
    def nbytes(self) -> int:
        """Nothing is held."""
        return 0

    def _attend(
        self, query: Tensor, key: Tensor, value: Tensor, kernel: Kernel, scale: float | None, bias: Tensor | None
    ) -> Tensor:
        return kernel(query, key, value, mask=bias, scale=scale)

    def to(self, device: torch.device | str) -> UntouchedPlan:
        """Nothing to move."""
        return self
