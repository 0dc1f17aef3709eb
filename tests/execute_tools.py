"""Inputs, layouts and the dense formula that tests of the executors share."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from attnctrl.execute import Pass, sdpa
from attnctrl.visibility import Visibility

INF = float("inf")
EXACT = ("grouped", "dense", "auto")


def inputs(
    queries: int,
    keys: int | None = None,
    *,
    batch: int = 2,
    heads: int = 2,
    dim: int = 8,
    seed: int = 0,
    dtype: Any = torch.float64,
) -> list[Tensor]:
    """q, k, v [B, H, T, D] as views of [B, T, H, D] memory."""
    generator = torch.Generator().manual_seed(seed)
    sizes = (queries, keys or queries, keys or queries)
    return [
        torch.randn(batch, t, heads, dim, generator=generator, dtype=torch.float64).to(dtype).transpose(1, 2)
        for t in sizes
    ]


def formula(passes: Visibility | Sequence[Pass], q: Tensor, k: Tensor, v: Tensor, scale: float | None = None) -> Tensor:
    """sum_p w_p * softmax(q k^T * scale + W_p) v, dense, in float64."""
    total = torch.zeros_like(q, dtype=torch.float64)
    for one in [Pass(passes)] if isinstance(passes, Visibility) else passes:
        scores = q.double() @ k.double().transpose(-1, -2) * (scale or q.shape[-1] ** -0.5)
        out = (scores + one.visibility.dense(torch.float64)).softmax(-1) @ v.double()
        if one.weight is None:
            total += out
        else:
            weight = one.weight.double()[one.visibility.query_atom][:, None]
            total += torch.where(weight > 0, out * weight, 0.0)
    return total


def random_visibility(
    queries: int,
    keys: int,
    query_groups: int,
    key_groups: int,
    seed: int,
    *,
    soft: bool,
    joint: bool,
    blocked: float = 0.4,
) -> Visibility:
    """Random atoms (some may be empty, some have one token) where every query sees a key."""
    generator = torch.Generator().manual_seed(seed)
    query_atom = torch.randint(query_groups, (queries,), generator=generator)
    key_atom = query_atom if joint else torch.randint(key_groups, (keys,), generator=generator)
    columns = query_groups if joint else key_groups
    table = torch.randn(query_groups, columns, generator=generator) if soft else torch.zeros(query_groups, columns)
    table[torch.rand(table.shape, generator=generator) < blocked] = -INF
    table[:, key_atom[int(torch.randint(key_atom.numel(), (1,), generator=generator))]] = 0
    rows, cols = [f"q{g}" for g in range(query_groups)], [f"k{g}" for g in range(columns)]
    return Visibility(query_atom, key_atom, table, tuple(rows), tuple(rows if joint else cols))


def hard(atom: Sequence[int], sees: Sequence[Sequence[int]]) -> Visibility:
    table = torch.where(torch.tensor(sees) > 0, 0.0, -INF)
    return Visibility.joint(torch.tensor(atom), table, [f"atom {g}" for g in range(len(sees))])


class Spy:
    """The kernel, with a record of what it was given."""

    def __init__(self) -> None:
        self.calls: list[tuple[Tensor, Tensor, Tensor, Tensor | None, float | None]] = []

    def __call__(
        self, q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None = None, scale: float | None = None
    ) -> Tensor:
        self.calls.append((q, k, v, mask, scale))
        return sdpa(q, k, v, mask, scale)


class LargestTensor(TorchDispatchMode):
    """Remembers the largest tensor that any operation makes."""

    def __init__(self) -> None:
        super().__init__()
        self.numel = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = func(*args, **(kwargs or {}))
        for one in out if isinstance(out, (tuple, list)) else (out,):
            if isinstance(one, Tensor):
                self.numel = max(self.numel, one.numel())
        return out
