"""What the battery needs of a family, of a door, and the dense formula that everything is compared with."""

from __future__ import annotations

import sys
import types
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from math import prod
from typing import Any

import settings_mmdit as mmdit
import settings_video as video
import tiny
import torch
from diffusers.models import attention_processor
from diffusers.models.attention_dispatch import _AttentionBackendRegistry
from setting import Kinds, Setting
from torch import Tensor, nn

import attnctrl as ac


def flux(seed: int = 0, *, batch: int = 1, dtype: torch.dtype = torch.float32, references: int = 0) -> Setting:
    inputs = tiny.flux_inputs(seed, batch=batch, references=((2, 3),) * references, dtype=dtype)
    sequence = "text image references"
    return Setting(tiny.flux(dtype=dtype), inputs, [Kinds(sequence, sequence)] * 4, references=references)


def sd3(seed: int = 0, *, batch: int = 1, dtype: torch.dtype = torch.float32) -> Setting:
    joint, dual = Kinds("image text", "image text"), Kinds("image", "image")
    inputs = tiny.sd_inputs(seed, batch=batch, pooled=True, dtype=dtype)
    return Setting(tiny.sd3(dtype=dtype), inputs, [joint, dual, joint])


def unet(seed: int = 0, *, batch: int = 1, dtype: torch.dtype = torch.float32) -> Setting:
    fine, coarse = (8, 12), (4, 6)
    inputs = tiny.sd_inputs(seed, batch=batch, grid=fine, dtype=dtype)
    grids = [fine, coarse, coarse, coarse, coarse, fine, fine]
    calls = [Kinds("image", keys, grid) for grid in grids for keys in ("image", "text")]
    return Setting(tiny.unet(dtype=dtype), inputs, calls, grid=fine)


FAMILIES: dict[str, Callable[..., Setting]] = {
    "flux": flux,
    "sd3": sd3,
    "unet": unet,
    **mmdit.FAMILIES,
    **video.FAMILIES,
}
WITH_REFERENCES = ("flux", *mmdit.WITH_REFERENCES)
BRANCHES = {
    "SD3Transformer2DModel": ("cond",),
    "UNet2DConditionModel": ("cond",),
    **mmdit.BRANCHES,
    **video.BRANCHES,
}
"""Families that batch their branches: what a batch of a bare model holds has to be said."""


@contextmanager
def by_attach(model: Any, controls: Any) -> Iterator[None]:
    with ac.attach(model, controls, branches=branches(model)):
        yield


@contextmanager
def by_processors(model: Any, controls: Any) -> Iterator[None]:
    before = {f"{name}.processor": x.processor for name, x in model.named_modules() if hasattr(x, "processor")}
    ac.set_processors(model, ac.processors(model, controls, branches=branches(model)))
    try:
        yield
    finally:
        ac.set_processors(model, before)


def branches(model: Any) -> tuple[str, ...]:
    return BRANCHES.get(type(model).__name__, ())


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
    """One token as the oracle knows it: kind ("global", "text", "image", "reference", "register"), owner, regions."""

    kind: str
    owner: int = -1
    members: frozenset[int] = field(default_factory=frozenset)


def tokens(
    setting: Setting, scene: Sequence[Any], *, texts: bool, overlap: str = "union", kinds: str = "", grid: Any = None
) -> list[Token]:
    """A sequence spelled out token by token, by the centres of tokens in boxes (boxes end on token borders here)."""
    *frames, height, width = grid or setting.grid
    own = [
        Token("text", r, frozenset([r]))
        for r, region in enumerate(scene)
        for _ in (region.prompt_embeds if texts else ())
    ]
    prompt = [Token("global")] * (setting.text - setting.fixed * len(own))
    fill = {kind: [Token("register")] * setting.registers.get(kind, 0) for kind in ("text", "image", "registers")}
    parts: dict[str, list[Token]] = {
        "text": prompt + fill["text"] + own,
        "glyphs": [Token("global")] * setting.glyphs,
        "image": [],
        "references": [],
        "registers": fill["registers"],
    }
    for y in range(height):
        for x in range(width):
            inside = [r for r, region in enumerate(scene) if _holds(region.box, (x + 0.5) / width, (y + 0.5) / height)]
            if len(inside) > 1:
                inside = {"union": inside, "priority": inside[-1:], "background": []}[overlap]
            parts["image"].append(Token("image", -1, frozenset(inside)))
    parts["image"] = parts["image"] * prod(frames) + fill["image"]
    for k in range(setting.references):
        bound = frozenset(r for r, region in enumerate(scene) if region.reference == k)
        parts["references"] += [Token("reference", k, bound)] * 6
    return [token for kind in (kinds or setting.calls[0].queries).split() for token in parts[kind]]


def sides_of(setting: Setting, kinds: Kinds, scene: Sequence[Any]) -> tuple[list[Token], list[Token]]:
    """Queries and keys of a call without appended texts, token by token."""
    queries, keys = (
        tokens(setting, scene, texts=False, kinds=side, grid=kinds.grid) for side in (kinds.queries, kinds.keys)
    )
    return queries, keys


def _holds(box: tuple[float, float, float, float] | None, x: float, y: float) -> bool:
    return box is None or (box[0] < x < box[2] and box[1] < y < box[3])


def weights(rows: Sequence[Token], columns: Sequence[Token], *rules: Callable[[Token, Token], float]) -> Tensor:
    """float64 [rows, columns]: the product of all rules' weights, token by token."""
    table = torch.ones(len(rows), len(columns), dtype=torch.float64)
    for rule in rules:
        table *= torch.tensor([[rule(q, k) for k in columns] for q in rows], dtype=torch.float64)
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
    """One kernel call as the attention processor sees it, [B, T, H, D], and the mask that it brings."""

    query: Tensor
    key: Tensor
    value: Tensor
    out: Tensor
    mask: Tensor | None = None

    def plain(self) -> Tensor:
        """What the call asks for when nobody controls it, in float64."""
        mask = self.mask.double() if self.mask is not None and self.mask.is_floating_point() else self.mask
        parts = (x.double().transpose(1, 2) for x in (self.query, self.key, self.value))
        return torch.nn.functional.scaled_dot_product_attention(*parts, attn_mask=mask).transpose(1, 2)

    def error(self, expected: Tensor) -> float:
        """How far the output is from what was expected of it, in units of the largest value (at least 1): attention
        averages values, and float32 rounds them by their size."""
        return float((expected - self.out).abs().max() / self.value.double().abs().max().clamp(min=1))


_TRANSFORMERS = "diffusers.models.transformers."


@contextmanager
def probe(*, grad: bool = False, backend: str = "native") -> Iterator[list[Kernel]]:
    """Record what processors give to a backend or to PyTorch and get back, around whatever has wrapped it."""
    registry = _AttentionBackendRegistry._backends
    native = next(key for key in registry if key.value == backend)
    dispatched = registry[native]
    # processors that call PyTorch's kernel live here and in the files of single models
    homes = [attention_processor, *(m for n, m in list(sys.modules.items()) if n.startswith(_TRANSFORMERS))]
    functional = [(vars(home), vars(home)["F"]) for home in homes if "F" in vars(home)]
    calls: list[Kernel] = []

    def value_of(value: Tensor) -> Tensor:
        return value.detach().requires_grad_() if grad else value

    def outer(**call: Any) -> Tensor:
        call["value"] = value_of(call["value"])
        out = dispatched(**call)
        calls.append(Kernel(call["query"], call["key"], call["value"], out, call.get("attn_mask")))
        return out

    def around(before: Any) -> Any:
        def attention(query: Tensor, key: Tensor, value: Tensor, **call: Any) -> Tensor:
            value = value_of(value.transpose(1, 2))
            out = before.scaled_dot_product_attention(query, key, value.transpose(1, 2), **call)
            mask = call.get("attn_mask")
            calls.append(Kernel(query.transpose(1, 2), key.transpose(1, 2), value, out.transpose(1, 2), mask))
            return out

        return types.SimpleNamespace(**{**vars(before), "scaled_dot_product_attention": attention})

    outer._attnctrl_original = dispatched
    registry[native] = outer
    for name, before in functional:
        name["F"] = around(before)
    try:
        yield calls
    finally:
        registry[native] = dispatched
        for name, before in functional:
            name["F"] = before


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
    kernels = {key: id(function) for key, function in registry.items()}
    return [per_module, list(model.state_dict()), kernels, id(attention_processor.F)]
