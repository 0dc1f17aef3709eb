"""The lowering with a dense additive mask: one kernel call per pass. Takes Tq x Tk memory while it runs."""

from __future__ import annotations

import copy
from dataclasses import dataclass

import torch
from torch import Tensor

from .base import ExecutionPlan, Kernel
from .terms import Terms
from .tokens import TokenSet, row_bias, tensor_bytes, token_set


@dataclass(frozen=True, eq=False)
class Layer:
    """The n-th class of every query that has at least n: `row_of` int64 [count], `weight` float32 [count]."""

    queries: TokenSet
    row_of: Tensor
    weight: Tensor

    def to(self, device: torch.device | str) -> Layer:
        """The same layer on `device`."""
        return Layer(self.queries.to(device), self.row_of.to(device), self.weight.to(device))


class DensePlan(ExecutionPlan):
    """Looks the mask up from atoms at the first call of a (device, dtype) and keeps it, except while compiling."""

    executor = "dense"

    def __init__(self, terms: Terms, reason: str) -> None:
        super().__init__(density=terms.density, classes=len(terms.classes), tokens=terms.tokens, reason=reason)
        self._rows = torch.stack([c.row for c in terms.classes])
        self._key_atom = terms.key_atom
        self._layers = _layers(terms)
        self._masks: dict[tuple[int, torch.device, torch.dtype], Tensor] = {}

    @property
    def nbytes(self) -> int:
        """Bytes of atoms, rows and weights; the masks cached after a run come on top."""
        parts = [self._rows, self._key_atom]
        for layer in self._layers:
            parts += [layer.row_of, layer.weight]
        return tensor_bytes(parts) + sum(layer.queries.nbytes for layer in self._layers)

    def to(self, device: torch.device | str) -> DensePlan:
        """The same plan on `device`, with an empty mask cache."""
        moved = copy.copy(self)
        moved._rows = self._rows.to(device)
        moved._key_atom = self._key_atom.to(device)
        moved._layers = tuple(layer.to(device) for layer in self._layers)
        moved._masks = {}
        return moved

    def run(self, query: Tensor, key: Tensor, value: Tensor, *, kernel: Kernel, scale: float | None = None) -> Tensor:
        """See `ExecutionPlan.run`."""
        if len(self._layers) == 1:
            return kernel(query, key, value, mask=self._mask(0, query.dtype), scale=scale)
        batch, heads, tokens, _ = query.shape
        dtype = torch.promote_types(query.dtype, torch.float32)
        out = query.new_zeros(batch, tokens, heads, value.shape[-1], dtype=dtype).transpose(1, 2)
        for number, layer in enumerate(self._layers):
            part = kernel(layer.queries.take(query), key, value, mask=self._mask(number, query.dtype), scale=scale)
            layer.queries.put(out, part.to(dtype) * layer.weight[:, None], add=True)
        return out.to(query.dtype)

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


def _layers(terms: Terms) -> tuple[Layer, ...]:
    """Deal the classes of each query out to layers: as many as the query with the most classes has."""
    rank = torch.zeros(terms.tokens[0], dtype=torch.int64)
    dealt: list[tuple[Tensor, Tensor]] = []
    for row, one in enumerate(terms.classes):
        mine = rank[one.queries]
        weight = torch.ones(len(mine)) if one.weight is None else one.weight
        while len(dealt) <= int(mine.max()):
            dealt.append((torch.full((terms.tokens[0],), -1), torch.zeros(terms.tokens[0])))
        for number in range(int(mine.min()), int(mine.max()) + 1):
            here = mine == number
            dealt[number][0][one.queries[here]] = row
            dealt[number][1][one.queries[here]] = weight[here]
        rank[one.queries] += 1
    layers = []
    for row_of, weight in dealt:
        queries = (row_of >= 0).nonzero().flatten()
        layers.append(Layer(token_set(queries), row_of[queries], weight[queries]))
    return tuple(layers)
