"""The attention mass that queries give to groups of keys, read by the kernel itself: values that tell the groups apart.

With A the attention [Tq, Tk] of a head and E [Tk, c] the indicators of c groups, A E is the attention output for the
values E: exact, by whichever backend, with its scale and mask, and never Tq x Tk in memory.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial

import torch
from torch import Tensor

from ..act import Act, per_sample
from ..errors import PlanError
from ..execute import Kernel, as_bias, sdpa
from ..execute.tokens import add_bias
from ..output import mask_of
from ..region import Grid

__all__ = ["LayerProbe", "probe"]

Attend = Callable[[Tensor, Tensor, Tensor], Tensor]


def probe(
    query: Tensor,
    key: Tensor,
    groups: Tensor,
    *,
    mask: Tensor | None = None,
    scale: float | None = None,
    kernel: Kernel = sdpa,
) -> Tensor:
    """The attention mass [B, H, Tq, c] that each query gives to each group of keys; differentiable in query and key.

    Args:
        query: [B, H, Tq, D], after norm and rotation.
        key: [B, Hk, Tk, D]; heads may be fewer than the query's.
        groups: [Tk, c], or [B, Tk, c]: 1 where a key belongs to a group, or any number to weigh it with.
        mask: bool (True sees) or additive, broadcastable to [B, H, Tq, Tk].
        scale: of the scores; None means 1 / sqrt(D).
        kernel: what computes the attention.
    """
    bias = None if mask is None else as_bias(mask, query.dtype)
    return _mass(query, key, groups, lambda q, k, v: kernel(q, k, v, mask=bias, scale=scale))


def _mass(query: Tensor, key: Tensor, groups: Tensor, attend: Attend) -> Tensor:
    width = key.shape[-1]
    groups = groups.to(query.dtype).reshape(-1, *groups.shape[-2:])[:, None]
    parts = []
    for part in groups.split(width, dim=-1):
        # fused kernels want values as wide as queries
        padded = torch.nn.functional.pad(part, (0, width - part.shape[-1]))
        values = padded.expand(key.shape[0], key.shape[1], -1, -1)
        parts.append(attend(query, key, values)[..., : part.shape[-1]])
    return torch.cat(parts, dim=-1)


@dataclass(frozen=True, eq=False)
class LayerProbe:
    """Reads one layer's attention in one forward; the mean over heads of what image tokens give goes to `put`.

    Attributes:
        rows: of the batch.
        batch: number of all rows.
        tokens: numbers of (queries, keys).
        image: (start, stop) of the image among the queries, of each row.
        grid: of the image.
        groups: float32 [rows, keys, c].
        hidden: additive bias, broadcastable to [rows, heads, queries, keys], of keys that are not read; None reads all.
        act: what acts on these rows, numbered from 0; None reads the layer's own attention.
        put: called with float32 [rows, c, *grid].
    """

    rows: slice
    batch: int
    tokens: tuple[int, int]
    image: tuple[tuple[int, int], ...]
    grid: Grid
    groups: Tensor
    hidden: Tensor | None
    act: Act | None
    put: Callable[[Tensor], None]

    @torch.no_grad()
    def look(
        self, query: Tensor, key: Tensor, value: Tensor, mask: Tensor | None, kernel: Kernel, scale: float | None
    ) -> None:
        """Read one call.

        Raises:
            PlanError: when rows or tokens are others than the layout says.
        """
        found = (query.shape[0], query.shape[2], key.shape[2])
        if found != (self.batch, *self.tokens):
            raise PlanError(
                f"The record expects {self.batch} rows of {self.tokens[0]} queries and {self.tokens[1]} keys, but the "
                f"kernel got {found[0]} of {found[1]} and {found[2]}: another hook or processor splits the batch or "
                "changes the sequence inside the model. Leave this layer out of the record's `layers`."
            )
        if mask is not None:
            mask = as_bias(per_sample(mask, self.batch, self.tokens), query.dtype)
            mask = mask_of(mask, self.rows)
        if self.hidden is not None:
            mask = add_bias(mask, self.hidden.to(query.dtype))
        query, key = query[self.rows], key[self.rows]
        first = 0
        if self.act is not None and self.act.parts:
            run = partial(self.act.run, mask=mask, kernel=kernel, scale=scale)
            mass = _mass(query, key, self.groups, run)
        else:
            # only the image's queries are wanted; plans are made for all
            first, last = min(start for start, _ in self.image), max(stop for _, stop in self.image)
            query = query[:, :, first:last]
            mask = mask if mask is None or mask.shape[2] == 1 else mask[:, :, first:last]
            mass = probe(query, key, self.groups, mask=mask, scale=scale, kernel=kernel)
        mean = mass.float().mean(1)
        own = [row[start - first : stop - first] for row, (start, stop) in zip(mean, self.image, strict=True)]
        self.put(torch.stack(own).mT.reshape(len(own), -1, *self.grid))
