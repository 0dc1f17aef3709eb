"""Perturbed attention maps in closed form: what a layer gives out when its map A is replaced, without any map.

O = A v is the untouched output of query [B, H, N, D] over key, value [B, Hk, Tk, D]. A function here gives the output
of another map, and `blend` mixes it with O by a strength u that broadcasts to [B, H, N, 1]: ((1 - u) A + u A') v. After
PAG (arXiv 2403.17377), SEG (2408.00760) and HeadHunter (2506.10978).

    own_value          A' = I                          the value itself
    uniform            A' = softmax(M)                 attention of a query of zeros
    mean_query         A' = softmax(mean(q) k)         attention of one query
    blur_query         A' = softmax((G q) k)           attention of blurred queries
    strongest_value    A' = one-hot at the largest     rows in chunks
    own_or_outside     A' over {itself} and the keys outside of a set
    geodesic_strength  u of `blend` with I that is Fisher-Rao interpolation of A to I

A temperature is a smaller scale of the scores, and needs no function.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from math import ceil, prod

import torch
from torch import Tensor
from torch.nn.functional import conv1d, pad

__all__ = [
    "Picture",
    "blend",
    "blur_query",
    "blurred",
    "exact",
    "geodesic_strength",
    "mean_query",
    "own_or_outside",
    "own_value",
    "strongest_value",
]

Picture = tuple[int, tuple[int, ...]]
"""A picture or film in raster order: its first token, and its grid ([frames,] rows, columns)."""

_CHUNK = 1 << 22
"""Scores that are held at once."""


def exact(x: Tensor) -> Tensor:
    """The tensor in float32 at least: what is mixed and averaged is rounded once."""
    return x.to(torch.promote_types(x.dtype, torch.float32))


def blend(out: Tensor, other: Tensor, strength: Tensor | float) -> Tensor:
    """(1 - u) out + u other, in out's dtype; `out` itself where u = 0 and `other` where u = 1, to the bit."""
    if isinstance(strength, Tensor):
        strength = strength.to(exact(out).dtype)
    return torch.lerp(exact(out), exact(other).expand_as(out), strength).to(out.dtype)


def own_value(value: Tensor, heads: int) -> Tensor:
    """The value of each query's own position [B, heads, N, D]; value heads are shared by heads in a row (GQA)."""
    return value if value.shape[1] == heads else value.repeat_interleave(heads // value.shape[1], 1)


def mean_query(query: Tensor, tokens: slice | Tensor = slice(None)) -> Tensor:
    """The mean [B, H, 1, D] of the queries of some tokens."""
    return exact(query[:, :, tokens]).mean(2, keepdim=True).to(query.dtype)


def blur_query(query: Tensor, pictures: Sequence[Picture], sigma: float) -> Tensor:
    """Queries smoothed over the grid of each picture by a Gaussian of `sigma` tokens, edges reflected; others stay.

    Blurs the scores along the queries, as they are linear in them. Frames of a film are blurred one by one.
    """
    parts, end = [], 0
    for start, grid in pictures:
        stop = start + prod(grid)
        parts += [query[:, :, end:start], _over_grid(query[:, :, start:stop], grid, sigma)]
        end = stop
    return torch.cat([*parts, query[:, :, end:]], 2)


def _over_grid(x: Tensor, grid: tuple[int, ...], sigma: float) -> Tensor:
    rows, columns = grid[-2:]
    lines = exact(x).unflatten(2, (-1, rows, columns)).movedim(-1, 2)
    return blurred(lines, sigma, ceil(6 * sigma) // 2).movedim(2, -1).reshape(x.shape).to(x.dtype)


def blurred(x: Tensor, sigma: float, reach: int) -> Tensor:
    """Grids [..., rows, columns] smoothed by a Gaussian of `sigma` elements that reaches so far, edges reflected."""
    return _smooth(_smooth(x, sigma, reach).mT, sigma, reach).mT


def _smooth(x: Tensor, sigma: float, reach: int) -> Tensor:
    """Along the last axis, with a window that is not longer than the axis, but for its parity."""
    size = x.shape[-1]
    reach = min(reach, size // 2, size - 1)
    place = torch.arange(-reach, reach + 1, device=x.device, dtype=x.dtype)
    window = torch.softmax(-((place / sigma) ** 2) / 2, 0)
    lines = pad(x.reshape(-1, 1, size), (reach, reach), mode="reflect") if reach else x.reshape(-1, 1, size)
    return conv1d(lines, window[None, None]).reshape(x.shape)


def strongest_value(query: Tensor, key: Tensor, value: Tensor, bias: Tensor | None, scale: float | None) -> Tensor:
    """The value [B, H, N, D] of the key with the largest score.

    Args:
        bias: additive mask that broadcasts to [B, H, N, Tk], or None.
        scale: of the scores; None means 1 / sqrt(D).
    """
    every = own_value(value, query.shape[1])
    found = [scores.argmax(-1) for _, scores in _scores(query, key, bias, scale)]
    where = torch.cat(found, 2)[..., None].expand(*query.shape[:3], value.shape[-1])
    return every.gather(2, where)


def geodesic_strength(
    query: Tensor, key: Tensor, bias: Tensor | None, scale: float | None, strength: Tensor | float
) -> Tensor:
    """The strength [B, H, N, 1] at which `blend` with the own value walks the share u of the way from A to I.

    The way is the arc between square roots of distributions (Fisher-Rao), whose angle is acos(sqrt(A_ii)).
    """
    own = []
    for rows, scores in _scores(query, key, bias, scale):
        diagonal = scores.diagonal(rows.start, -2, -1)
        own.append((diagonal - scores.logsumexp(-1)).exp())
    angle = torch.cat(own, 2)[..., None].clamp(max=1).sqrt().acos()
    left = 1 - (strength.to(angle.dtype) if isinstance(strength, Tensor) else strength)
    # near A = I the arc is straight
    ratio = torch.where(angle < 1e-6, left, (left * angle).sin() / angle.sin().clamp(min=1e-12))
    return 1 - ratio**2


def own_or_outside(
    query: Tensor, key: Tensor, value: Tensor, bias: Tensor | None, scale: float | None, tokens: Tensor
) -> Tensor:
    """Attention [B, H, n, D] of the queries `tokens` int64 [n] over their own key and all but those of `tokens`."""
    heads = query.shape[1]
    key, value = own_value(key, heads), own_value(value, heads)
    outside = torch.ones(key.shape[2], dtype=torch.bool, device=key.device).index_fill(0, tokens, False)
    q, k, v = query[:, :, tokens], exact(key[:, :, tokens]), exact(value[:, :, tokens])
    others = exact(value[:, :, outside])
    if bias is not None:
        bias = bias if bias.shape[2] == 1 else bias[:, :, tokens]
        bias = bias if bias.shape[3] == 1 else bias[..., outside]
    factor = query.shape[-1] ** -0.5 if scale is None else scale
    parts = []
    for rows, scores in _scores(q, key[:, :, outside], bias, scale):
        mine = (exact(q[:, :, rows]) * k[:, :, rows]).sum(-1, keepdim=True) * factor
        share = torch.cat([mine, scores], -1).softmax(-1)
        parts.append(share[..., :1] * v[:, :, rows] + share[..., 1:] @ others)
    return torch.cat(parts, 2).to(query.dtype)


def _scores(query: Tensor, key: Tensor, bias: Tensor | None, scale: float | None) -> Iterator[tuple[slice, Tensor]]:
    """(rows, scores [B, H, rows, Tk] with the mask) of a few rows after each other, in float32 at least."""
    batch, heads, tokens, width = query.shape
    keys = exact(own_value(key, heads)).mT
    factor = width**-0.5 if scale is None else scale
    step = max(1, _CHUNK // max(1, batch * heads * key.shape[2]))
    for start in range(0, tokens, step):
        rows = slice(start, min(tokens, start + step))
        scores = exact(query[:, :, rows]) @ keys * factor
        if bias is not None:
            scores = scores + (bias if bias.shape[2] == 1 else bias[:, :, rows])
        yield rows, scores
