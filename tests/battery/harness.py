"""What the battery needs of a family, of a door, and the dense formula that everything is compared with."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import tiny
import torch
from diffusers.models.attention_dispatch import _AttentionBackendRegistry
from torch import Tensor, nn

import attnctrl as ac


@dataclass
class Setting:
    """A model, the inputs of one forward, and who stands where in its sequence."""

    model: nn.Module
    inputs: dict[str, Any]
    grid: tuple[int, int]
    text: int
    references: int = 0

    def run(self, **changes: Any) -> Tensor:
        return self.model(**{**self.inputs, **changes})[0]


def flux(seed: int = 0, *, batch: int = 1, dtype: torch.dtype = torch.float32, references: int = 0) -> Setting:
    grid, text = (4, 6), 5
    inputs = tiny.flux_inputs(seed, batch=batch, grid=grid, text=text, references=((2, 3),) * references, dtype=dtype)
    return Setting(tiny.flux(dtype=dtype), inputs, grid, text, references)


FAMILIES: dict[str, Callable[..., Setting]] = {"flux": flux}


@contextmanager
def by_attach(model: Any, controls: Any) -> Iterator[None]:
    with ac.attach(model, controls):
        yield


@contextmanager
def by_processors(model: Any, controls: Any) -> Iterator[None]:
    before = dict(model.attn_processors)
    model.set_attn_processor(ac.processors(model, controls))
    try:
        yield
    finally:
        model.set_attn_processor(before)


DOORS = {"attach": by_attach, "processors": by_processors}


def regions(*, overlap: bool = False, channels: Callable[[int], Tensor] = lambda r: tiny.embeds(r, 2 + r)) -> list[Any]:
    """Three regions on the 4 x 6 grid: left third, a middle block (overlapping or not), one token; the rest is uncovered."""
    left = (0.0, 0.0, 2 / 6, 1.0)
    middle = ((1 / 6 if overlap else 2 / 6), 0.25, 4 / 6, 0.75)
    corner = (5 / 6, 3 / 4, 1.0, 1.0)
    boxes = (left, middle, corner)
    return [ac.Region(f"r{r}", box=box, prompt_embeds=channels(r)) for r, box in enumerate(boxes)]


@dataclass(frozen=True)
class Token:
    """One token of the sequence as the oracle knows it: kind ("global", "text", "image", "reference"), owner, regions."""

    kind: str
    owner: int = -1
    members: frozenset[int] = field(default_factory=frozenset)


def tokens(setting: Setting, scene: Sequence[Any], *, texts: bool, overlap: str = "union") -> list[Token]:
    """The sequence spelled out token by token, by the centres of tokens in boxes (boxes end on token borders here)."""
    row = [Token("global")] * setting.text
    for r, region in enumerate(scene if texts else ()):
        row += [Token("text", r, frozenset([r]))] * len(region.prompt_embeds)
    height, width = setting.grid
    for y in range(height):
        for x in range(width):
            inside = [r for r, region in enumerate(scene) if _holds(region.box, (x + 0.5) / width, (y + 0.5) / height)]
            if len(inside) > 1:
                inside = {"union": inside, "priority": inside[-1:], "background": []}[overlap]
            row.append(Token("image", -1, frozenset(inside)))
    for k in range(setting.references):
        bound = frozenset(r for r, region in enumerate(scene) if region.reference == k)
        row += [Token("reference", k, bound)] * 6
    return row


def _holds(box: tuple[float, float, float, float] | None, x: float, y: float) -> bool:
    return box is None or (box[0] < x < box[2] and box[1] < y < box[3])


def weights(row: Sequence[Token], *rules: Callable[[Token, Token], float]) -> Tensor:
    """float64 [T, T]: the product of all rules' weights, token by token."""
    table = torch.ones(len(row), len(row), dtype=torch.float64)
    for rule in rules:
        table *= torch.tensor([[rule(q, k) for k in row] for q in row], dtype=torch.float64)
    return table


def dense(query: Tensor, key: Tensor, value: Tensor, *passes: tuple[Tensor, Tensor | None]) -> Tensor:
    """The formula in float64: sum over passes (weights [T, T], share [T] or None) of share * softmax(q k / sqrt(D) + log w) v."""
    q, k, v = (x.double() for x in (query, key, value))
    scores = torch.einsum("bqhd,bkhd->bhqk", q, k) / q.shape[-1] ** 0.5
    out = torch.zeros(q.shape, dtype=torch.float64)
    for table, share in passes:
        attention = torch.nan_to_num((scores + table.log()).softmax(-1))
        part = torch.einsum("bhqk,bkhd->bqhd", attention, v)
        out += part if share is None else part * share.double()[:, None, None]
    return out


@dataclass
class Kernel:
    """One kernel call as the attention processor sees it, [B, T, H, D]."""

    query: Tensor
    key: Tensor
    value: Tensor
    out: Tensor


@contextmanager
def probe(*, grad: bool = False) -> Iterator[list[Kernel]]:
    """Record what processors give to the native backend and get back, around whatever has wrapped it."""
    registry = _AttentionBackendRegistry._backends
    native = next(key for key in registry if key.value == "native")
    inner = registry[native]
    calls: list[Kernel] = []

    def outer(**call: Any) -> Tensor:
        if grad:
            call["value"] = call["value"].detach().requires_grad_()
        out = inner(**call)
        calls.append(Kernel(call["query"], call["key"], call["value"], out))
        return out

    outer._attnctrl_original = inner
    registry[native] = outer
    try:
        yield calls
    finally:
        registry[native] = inner


def traces(model: nn.Module) -> list[Any]:
    """Everything that attaching may touch, for comparison before and after."""
    registry = _AttentionBackendRegistry._backends
    per_module = [
        (
            name,
            sorted(module.__dict__),
            len(module._forward_hooks),
            len(module._forward_pre_hooks),
            len(module._forward_hooks_with_kwargs),
            len(module._forward_hooks_always_called),
            len(module._forward_pre_hooks_with_kwargs),
            id(getattr(module, "processor", None)),
        )
        for name, module in model.named_modules()
    ]
    return [per_module, list(model.state_dict()), {key: id(function) for key, function in registry.items()}]
