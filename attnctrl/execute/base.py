"""What all lowerings share: the kernel they call, the passes they are given, the plan they are."""

from __future__ import annotations

from abc import ABC, abstractmethod
from dataclasses import dataclass
from typing import Any, Protocol

import torch
from torch import Tensor

from ..visibility import Visibility
from .tokens import as_bias


class Kernel(Protocol):
    """A function that computes the attention of q [B, H, Tq, D] over k, v [B, Hk, Tk, D] -> [B, H, Tq, D].

    `mask` is an additive bias in q's dtype that broadcasts to [B, H, Tq, Tk], or None, where any backend will do.
    `scale` None means 1 / sqrt(D).
    """

    def __call__(
        self, q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None = None, scale: float | None = None
    ) -> Tensor:
        """Compute the attention."""


def sdpa(q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None = None, scale: float | None = None) -> Tensor:
    """PyTorch's scaled_dot_product_attention as a `Kernel`; key heads may be fewer than query heads (GQA)."""
    # enable_gqa narrows the choice of backends, so it is passed only where heads differ
    extra: dict[str, Any] = {"enable_gqa": True} if q.shape[1] != k.shape[1] else {}
    return torch.nn.functional.scaled_dot_product_attention(q, k, v, attn_mask=mask, scale=scale, **extra)


@dataclass(frozen=True, eq=False)
class Pass:
    """One attention among several whose outputs are mixed.

    Attributes:
        visibility: what this pass sees.
        weight: float [Gq] in [0, 1], the share of this pass in the output of each query atom of `visibility`; None
            means 1. An atom of weight 0 is not computed in this pass and needs no key there.
    """

    visibility: Visibility
    weight: Tensor | None = None


@dataclass(frozen=True)
class Host:
    """What a plan may count on where it runs. Neither can be found out when a plan is made, nor change it when it runs.

    Attributes:
        own_kernels: torch's own kernels may stand in for the given one, so packed and block-sparse calls and merged
            levels can be chosen; False where the user has selected another attention backend.
        compiling: the plan runs inside torch.compile, where FlexAttention is a fused kernel.
    """

    own_kernels: bool = False
    compiling: bool = False


class ExecutionPlan(ABC):
    """A visibility (or a mix of passes) made ready to run.

    Attributes:
        executor: "untouched", "grouped", "varlen", "flex", "xformers" or "dense".
        density: score pairs computed by exact grouping over Tq x Tk; above 1 only if passes repeat work.
        classes: number of distinct mask rows (a token may belong to one per pass).
        reason: why this executor was chosen.
    """

    executor: str

    def __init__(self, *, density: float, classes: int, tokens: tuple[int, int], reason: str) -> None:
        self.density = density
        self.classes = classes
        self.tokens = tokens
        self.reason = reason

    @property
    @abstractmethod
    def nbytes(self) -> int:
        """Bytes the plan holds between calls, O(T + G^2); a mask cached by the dense executor is not counted here."""

    @property
    def needs_mask(self) -> bool:
        """A kernel call of an ordinary run gets an additive bias."""
        return False

    def run(
        self,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        *,
        kernel: Kernel,
        scale: float | None = None,
        mask: Tensor | None = None,
    ) -> Tensor:
        """Attention output [B, H, Tq, D] of query [B, H, Tq, D] over key, value [B, Hk, Tk, D] (views allowed).

        Args:
            kernel: what computes calls of [B, H, T, D] tensors; packed and block-sparse executors bring their own.
            scale: of the scores; None means 1 / sqrt(D).
            mask: the model's own mask, bool (True sees) or additive, broadcastable to [B, H, Tq, Tk]; it is added to
                the plan's. It is data, so nothing checks that it leaves a key to every query.
        """
        return self._attend(query, key, value, kernel, scale, None if mask is None else as_bias(mask, query.dtype))

    @abstractmethod
    def _attend(
        self, query: Tensor, key: Tensor, value: Tensor, kernel: Kernel, scale: float | None, bias: Tensor | None
    ) -> Tensor:
        """`run` with the model's mask as an additive bias in the query's dtype, 4D, broadcastable to [B, H, Tq, Tk]."""

    @abstractmethod
    def to(self, device: torch.device | str) -> ExecutionPlan:
        """The same plan with its index tensors on `device`."""

    def explain(self) -> str:
        """One line: which executor, how dense, how many classes, and why."""
        queries, keys = self.tokens
        size = f"{queries} tokens" if queries == keys else f"{queries} queries x {keys} keys"
        return f"{self.executor}: {size}, density {self.density:.2f}, {self.classes} classes; {self.reason}"
