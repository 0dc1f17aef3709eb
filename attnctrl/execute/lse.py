"""Soft rows without a mask: one unmasked call per distinct log-weight, merged by their log-sum-exps.

    out = sum_i exp(lse_i + w_i) out_i / sum_i exp(lse_i + w_i)

out_i and lse_i are the attention over the keys of log-weight w_i alone and the logarithm of its softmax denominator.
Kernels that return the log-sum-exp differentiate the output only, so none of this runs where gradients are recorded.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

# what torch's own flash kernel takes; wider or odd heads go to the efficient kernel
_FLASH_HEAD_DIM = 256


def split_levels(row: Tensor) -> list[tuple[float, Tensor]]:
    """The distinct finite log-weights of a row float32 [G], ascending, each with its atoms as bool [G]."""
    return [(level, row == level) for level in torch.unique(row[row.isfinite()]).tolist()]


def merge(outputs: Sequence[Tensor], lses: Sequence[Tensor], log_weight: Tensor) -> Tensor:
    """One attention out of several over disjoint keys.

    Args:
        outputs: L tensors [..., D].
        lses: L tensors [...], their natural log-sum-exps.
        log_weight: float [L].

    Returns:
        [..., D] in float32, or in float64 when a log-sum-exp is.
    """
    scores = torch.stack([lse + weight for lse, weight in zip(lses, log_weight, strict=True)])
    shares = scores.to(torch.promote_types(scores.dtype, torch.float32)).softmax(0)
    parts = [out.to(shares.dtype) * share[..., None] for out, share in zip(outputs, shares, strict=True)]
    return torch.stack(parts).sum(0)


def records_gradients(*tensors: Tensor) -> bool:
    """Autograd follows what is computed from these tensors."""
    return torch.is_grad_enabled() and any(one.requires_grad for one in tensors)


def serves_lse(query: Tensor, key: Tensor, value: Tensor) -> bool:
    """`sdpa_lse` can compute this attention, and nobody asks for its gradients."""
    if records_gradients(query, key, value) or query.device.type not in ("cpu", "cuda"):
        return False
    # the CPU kernel and flash take one head size for all and read heads as contiguous memory
    return query.shape[-1] == value.shape[-1] and all(x.stride(-1) == 1 for x in (query, key, value))


def sdpa_lse(query: Tensor, key: Tensor, value: Tensor, scale: float | None = None) -> tuple[Tensor, Tensor]:
    """Unmasked attention and its natural log-sum-exp, without gradients.

    Args:
        query, key, value: [B, H, Tq, D], [B, Hk, Tk, D], [B, Hk, Tk, D] for which `serves_lse`.
        scale: of the scores; None means 1 / sqrt(D).

    Returns:
        (output [B, H, Tq, D], lse [B, H, Tq] in float32, or in float64 for float64 inputs).
    """
    if query.device.type == "cpu":
        return torch.ops.aten._scaled_dot_product_flash_attention_for_cpu(query, key, value, scale=scale)
    if _takes_flash(query):
        return torch.ops.aten._scaled_dot_product_flash_attention(query, key, value, scale=scale)[:2]
    if key.shape[1] != query.shape[1]:
        repeats = query.shape[1] // key.shape[1]
        key, value = key.repeat_interleave(repeats, 1), value.repeat_interleave(repeats, 1)
    out, lse, *_ = torch.ops.aten._scaled_dot_product_efficient_attention(query, key, value, None, True, scale=scale)
    # the efficient kernel pads its rows
    return out, lse[..., : query.shape[2]]


def _takes_flash(query: Tensor) -> bool:
    head_dim = query.shape[-1]
    return (
        query.dtype in (torch.float16, torch.bfloat16)
        and head_dim % 8 == 0
        and head_dim <= _FLASH_HEAD_DIM
        and torch.cuda.get_device_capability(query.device) >= (8, 0)
    )
