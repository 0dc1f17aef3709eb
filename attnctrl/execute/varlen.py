"""The packed lowering on flash attention's kernels of variable length: torch's own, or flash-attn when installed.

On a device without such a kernel the same packs go through scaled_dot_product_attention segment by segment. That is
exact and no faster than grouped calls, so the planner never chooses it; it is what `executor="varlen"` gets on a CPU.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import lru_cache
from importlib import import_module
from importlib.util import find_spec
from inspect import signature
from typing import Any

import torch
from torch import Tensor

from .base import sdpa
from .lse import sdpa_lse, serves_lse
from .packed import PackedKernel, PackedPlan, Packing

# flash attention's limits
_MAX_HEAD_DIM = 256
_CAPABILITY = (8, 0)


class SegmentLoop:
    """The reference: one call of torch's own kernels per segment.

    Args:
        device: named in reports.
        soft: segments have log-weights, so that their log-sum-exps are needed.
    """

    def __init__(self, device: torch.device, soft: bool) -> None:
        self.name = f"{device.type} has no kernel of variable length: segment by segment"
        self._soft = soft

    def serves(self, query: Tensor, key: Tensor, value: Tensor) -> bool:
        """See `PackedKernel.serves`."""
        return not self._soft or serves_lse(query, key, value)

    def __call__(
        self, query: Tensor, key: Tensor, value: Tensor, packing: Packing, scale: float | None
    ) -> tuple[Tensor, Tensor | None]:
        """See `PackedKernel`."""
        sizes = [list(side) for side in zip(*packing.lengths, strict=True)]
        parts = zip(query.split(sizes[0], 1), key.split(sizes[1], 1), value.split(sizes[1], 1), strict=True)
        segments = [[x.transpose(1, 2) for x in part] for part in parts]
        if not self._soft:
            return torch.cat([sdpa(q, k, v, scale=scale) for q, k, v in segments], 2).transpose(1, 2), None
        outputs, lses = zip(*(sdpa_lse(q, k, v, scale) for q, k, v in segments), strict=True)
        return torch.cat(outputs, 2).transpose(1, 2), torch.cat(lses, 2).transpose(1, 2)


class TorchVarlen:
    """torch.nn.attention.varlen."""

    name = "one call of torch's varlen_attn"

    def __init__(self) -> None:
        self._module = import_module("torch.nn.attention.varlen")

    def serves(self, query: Tensor, key: Tensor, value: Tensor) -> bool:
        """See `PackedKernel.serves`."""
        return _flash_serves(query, value)

    def __call__(
        self, query: Tensor, key: Tensor, value: Tensor, packing: Packing, scale: float | None
    ) -> tuple[Tensor, Tensor | None]:
        """See `PackedKernel`."""
        packs = (x.flatten(0, 1) for x in (query, key, value))
        starts, longest, grouped = packing.starts(len(query)), packing.longest, query.shape[2] != key.shape[2]
        if packing.log_weight is None:
            out = self._module.varlen_attn(*packs, *starts, *longest, scale=scale, enable_gqa=grouped)
            return out.view_as(query), None
        wanted = self._module.AuxRequest(lse=True)
        out, lse = self._module.varlen_attn(
            *packs, *starts, *longest, scale=scale, enable_gqa=grouped, return_aux=wanted
        )
        # the kernel returns [H, B * n], whatever its documentation says
        return out.view_as(query), lse.transpose(0, 1).reshape(query.shape[:3])


class FlashVarlen:
    """The flash-attn package. Its log-sum-exps differ in shape between releases, so it is not used for soft rows."""

    name = "one call of flash_attn_varlen_func"

    def __init__(self, function: Callable[..., Any]) -> None:
        self._function = function

    def serves(self, query: Tensor, key: Tensor, value: Tensor) -> bool:
        """See `PackedKernel.serves`."""
        return _flash_serves(query, value)

    def __call__(
        self, query: Tensor, key: Tensor, value: Tensor, packing: Packing, scale: float | None
    ) -> tuple[Tensor, Tensor | None]:
        """See `PackedKernel`."""
        packs = (x.flatten(0, 1) for x in (query, key, value))
        out = self._function(*packs, *packing.starts(len(query)), *packing.longest, softmax_scale=scale)
        return out.view_as(query), None


class VarlenPlan(PackedPlan):
    """See the module."""

    executor = "varlen"

    def _find_kernel(self, device: torch.device, soft: bool) -> PackedKernel:
        return find_kernel(device, soft=soft) or SegmentLoop(device, soft)


def find_kernel(device: torch.device | str, *, soft: bool) -> PackedKernel | None:
    """The fastest kernel of variable length for a device, with log-sum-exps when `soft`; None when there is none."""
    device = torch.device(device)
    if device.type != "cuda" or not torch.cuda.is_available():
        return None
    if torch.cuda.get_device_capability(device) < _CAPABILITY:
        return None
    if _has_torch_varlen():
        return TorchVarlen()
    function = None if soft else _flash_attn()
    return None if function is None else FlashVarlen(function)


def _flash_serves(query: Tensor, value: Tensor) -> bool:
    head_dim = query.shape[-1]
    fits = head_dim == value.shape[-1] and head_dim <= _MAX_HEAD_DIM and head_dim % 8 == 0
    return fits and query.dtype in (torch.float16, torch.bfloat16)


@lru_cache(maxsize=1)
def _has_torch_varlen() -> bool:
    """Whether torch has varlen_attn with a scale and grouped heads; its first releases had neither."""
    try:
        found = import_module("torch.nn.attention.varlen").varlen_attn
    except (ImportError, AttributeError):
        return False
    return {"scale", "enable_gqa", "return_aux"} <= set(signature(found).parameters)


@lru_cache(maxsize=1)
def _flash_attn() -> Callable[..., Any] | None:
    """flash_attn_varlen_func, or None when flash-attn is missing or was built for another torch."""
    if find_spec("flash_attn") is None:
        return None
    try:
        return import_module("flash_attn").flash_attn_varlen_func
    except (ImportError, OSError, RuntimeError, AttributeError):
        return None
