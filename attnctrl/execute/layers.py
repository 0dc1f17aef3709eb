"""Mixed passes as layers: in each, a query has one mask row and one share, so one masked call computes the layer."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from .terms import Terms
from .tokens import TokenSet, tensor_bytes, token_set


@dataclass(frozen=True, eq=False)
class Layer:
    """The n-th class of every query that has at least n: `row_of` int64 [count], `weight` float32 [count]."""

    queries: TokenSet
    row_of: Tensor
    weight: Tensor

    @property
    def nbytes(self) -> int:
        """Bytes held by the layer."""
        return self.queries.nbytes + tensor_bytes([self.row_of, self.weight])

    def to(self, device: torch.device | str) -> Layer:
        """The same layer on `device`."""
        return Layer(self.queries.to(device), self.row_of.to(device), self.weight.to(device))


def deal(terms: Terms, *, by_row: bool = False) -> tuple[Layer, ...]:
    """Deal the classes of each query out to layers: as many as the query with the most classes has.

    Args:
        by_row: queries of one row follow each other; else they keep the order of the tokens.
    """
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
        if by_row:
            queries = queries[torch.argsort(row_of[queries], stable=True)]
        layers.append(Layer(token_set(queries), row_of[queries], weight[queries]))
    return tuple(layers)


def run_layers(layers: Sequence[Layer], query: Tensor, width: int, attend: Callable[[int, Tensor], Tensor]) -> Tensor:
    """The sum of all layers, [B, H, Tq, width] in the query's dtype.

    Args:
        attend: from a layer's number and its queries [B, H, count, D] to their output [B, H, count, width].
    """
    batch, heads, tokens, _ = query.shape
    shape = (batch, tokens, heads, width)
    if len(layers) == 1:
        queries = layers[0].queries
        if queries.is_leading:
            return attend(0, query)
        out = query.new_empty(shape).transpose(1, 2)
        queries.put(out, attend(0, queries.take(query)))
        return out
    # shares are added up in float32 or better and cast once
    out = query.new_zeros(shape, dtype=torch.promote_types(query.dtype, torch.float32)).transpose(1, 2)
    for number, layer in enumerate(layers):
        part = attend(number, layer.queries.take(query))
        layer.queries.put(out, part.to(out.dtype) * layer.weight[:, None], add=True)
    return out.to(query.dtype)
