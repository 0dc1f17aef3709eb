"""The table of outputs: each way to perturb a map as a row, with the map itself spelled out."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import torch
from harness import Kernel, Kinds, Setting, tokens
from torch import Tensor

import attnctrl as ac
from attnctrl.families import family_of


@dataclass(frozen=True)
class Call:
    """A kernel call in float64: scores without a mask and the mask [B, H, Tq, Tk], values [B, H, Tk, D], image tokens."""

    raw: Tensor
    bias: Tensor
    value: Tensor
    query: Tensor
    key: Tensor
    image: Tensor
    grid: tuple[int, ...]

    @classmethod
    def of(cls, setting: Setting, kinds: Kinds, call: Kernel) -> Call:
        q, k, v = (x.double().transpose(1, 2) for x in (call.query, call.key, call.value))
        k, v = (x.repeat_interleave(q.shape[1] // x.shape[1], 1) for x in (k, v))
        raw = q @ k.mT / q.shape[-1] ** 0.5
        bias = torch.zeros(1, 1, 1, 1, dtype=torch.float64)
        if call.mask is not None:
            mask = call.mask if call.mask.ndim == 4 else call.mask[:, None, None]
            hidden = torch.zeros(mask.shape, dtype=torch.float64)
            bias = hidden.masked_fill(~mask, -torch.inf) if mask.dtype == torch.bool else mask.double()
        who = tokens(setting, [], texts=False, kinds=kinds.queries, grid=kinds.grid)
        image = torch.tensor([token.kind == "image" for token in who])
        return cls(raw, bias.expand(raw.shape), v, q, k, image, kinds.grid)

    @property
    def plain(self) -> Tensor:
        return (self.raw + self.bias).softmax(-1)

    @property
    def eye(self) -> Tensor:
        return torch.eye(self.raw.shape[-1], dtype=torch.float64).expand_as(self.raw)

    def of_query(self, query: Tensor) -> Tensor:
        return (query.expand_as(self.query) @ self.key.mT / query.shape[-1] ** 0.5 + self.bias).softmax(-1)


def axis(size: int, sigma: float) -> Tensor:
    """Gaussian weights [size, size], weight by weight; places beyond an edge are reflected."""
    reach = min(int(-(-6 * sigma // 1)) // 2, size // 2, size - 1)
    steps = range(-reach, reach + 1)
    weights = torch.exp(-(torch.tensor(steps, dtype=torch.float64) ** 2) / (2 * sigma**2))
    table = torch.zeros(size, size, dtype=torch.float64)
    for row in range(size):
        for step, weight in zip(steps, weights / weights.sum(), strict=True):
            column = abs(row + step)
            table[row, column if column < size else 2 * (size - 1) - column] += weight
    return table


def blurred(call: Call) -> Tensor:
    *frames, height, width = call.grid
    smooth = torch.kron(axis(height, 0.8), axis(width, 0.8))
    query = call.query.clone()
    query[:, :, call.image] = torch.kron(torch.eye(*(frames * 2 or (1, 1))).double(), smooth) @ query[:, :, call.image]
    return call.of_query(query)


def within(call: Call) -> Tensor:
    bias = call.bias.clone()
    block = call.image[:, None] & call.image
    bias[..., block] = -torch.inf
    bias = torch.where(torch.eye(len(block), dtype=torch.bool) & block, 0.0, bias)
    return (call.raw + bias).softmax(-1)


def halfway(call: Call) -> Tensor:
    """The middle of the arc from the plain map to the identity."""
    root = call.plain.sqrt()
    angle = (root * call.eye).sum(-1, keepdim=True).clamp(max=1).acos().clamp(min=1e-9)
    return (((angle / 2).sin() / angle.sin()) * (root + call.eye)) ** 2


@dataclass(frozen=True)
class Case:
    """One way to perturb: the fields of the control and the map, in full."""

    fields: dict[str, Any]
    table: Callable[[Call], Tensor]
    strength: float = 1.0
    own: bool = False
    rows: str = field(default="all")

    def layers(self, setting: Setting) -> list[str]:
        """The layers that it is defined in."""
        layers = family_of(setting.model).layers(setting.model)
        kinds = [one for one in setting.calls if one is not None]
        pairs = zip((layer for layer in layers if not layer.linear), kinds, strict=True)
        return [layer.name for layer, kind in pairs if self.suits(kind)]

    def suits(self, kinds: Kinds) -> bool:
        return (not self.own or kinds.queries == kinds.keys) and (self.rows == "all" or "image" in kinds.queries)

    def control(self, setting: Setting, **more: Any) -> ac.Perturb:
        return ac.Perturb(**{**self.fields, "layers": self.layers(setting), **more})

    def expected(self, call: Call) -> Tensor:
        """[B, H, Tq, D], in full."""
        table = call.plain + self.strength * (self.table(call) - call.plain)
        if self.rows == "image":
            table = torch.where(call.image[:, None], table, call.plain)
        return table @ call.value


CASES = {
    "identity": Case({"kind": "identity"}, lambda call: call.eye, own=True),
    "identity-soft": Case({"kind": "identity", "strength": 0.4}, lambda call: call.eye, 0.4, own=True),
    "identity-image": Case({"kind": "identity", "rows": "image"}, lambda call: call.eye, own=True, rows="image"),
    "identity-within": Case({"kind": "identity", "rows": "image", "block": "within"}, within, own=True, rows="image"),
    "uniform": Case({"kind": "uniform"}, lambda call: call.bias.softmax(-1)),
    "mean-query": Case({"kind": "mean_query"}, lambda call: call.of_query(call.query.mean(2, keepdim=True))),
    "blur": Case({"kind": "blur", "sigma": 0.8, "rows": "image"}, blurred, rows="image"),
    "temperature": Case(
        {"kind": "temperature", "temperature": 3.0}, lambda call: (call.raw / 3 + call.bias).softmax(-1)
    ),
    "max": Case(
        {"kind": "max"},
        lambda call: torch.nn.functional.one_hot((call.raw + call.bias).argmax(-1), call.raw.shape[-1]).double(),
    ),
    "slerp": Case({"kind": "slerp", "strength": 0.5}, halfway, own=True),
}
