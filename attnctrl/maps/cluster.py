"""Masks that use what image tokens attend to in the image: clusters of them, and affinities that spread a word's map.

Features are maps of `Cells`: [m, h, w], what each image token gives to each of m cells of the picture.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from ..errors import ControlError
from .masks import Masks, decided, minmax, otsu

__all__ = ["affinity", "attended", "cluster", "kmeans", "propagate", "spread_by"]

_ROUNDS = 100
_TINY = 1e-12


def kmeans(points: Tensor, clusters: int) -> Tensor:
    """int64 [N]: the cluster of each point [N, d]; the same points give the same clusters.

    Centres begin far apart: the point farthest from the mean, then each time the one farthest from all chosen. There
    are fewer clusters where there are fewer different points.

    Raises:
        ControlError: when there are no points, or no clusters.
    """
    if clusters < 1 or points.ndim != 2 or len(points) == 0:
        raise ControlError(f"kmeans parts points [N, d] into one cluster or more; found {tuple(points.shape)}.")
    points = points.double()
    chosen = [points[_distances(points, points.mean(0, keepdim=True))[:, 0].argmax()]]
    for _ in range(clusters - 1):
        distance = _distances(points, torch.stack(chosen)).amin(1)
        if float(distance.max()) == 0:
            break
        chosen.append(points[distance.argmax()])
    centres = torch.stack(chosen)
    label = _distances(points, centres).argmin(1)
    for _ in range(_ROUNDS):
        member = torch.nn.functional.one_hot(label, len(centres)).double()
        count = member.sum(0)[:, None]
        # a cluster that lost all its points keeps its centre
        centres = torch.where(count > 0, member.T @ points / count.clamp(min=1), centres)
        before, label = label, _distances(points, centres).argmin(1)
        if torch.equal(before, label):
            break
    return label


def _distances(points: Tensor, centres: Tensor) -> Tensor:
    """[N, K]; 0 between equal points, which products of matrices would not give."""
    return torch.cdist(points, centres, compute_mode="donot_use_mm_for_euclid_dist")


def cluster(features: Tensor, maps: Tensor, *, clusters: int | None = None, floor: float = 0.2) -> Masks:
    """Clusters of image tokens, each given to the group whose map covers it best (Bounded Attention, section 4).

    Args:
        features: [m, h, w], such as the maps of `Cells`.
        maps: [n, h, w] of n groups.
        clusters: their number; None takes 3 n.
        floor: a cluster on which no stretched map has this mean is background.

    Returns:
        Masks [n, h, w] that do not overlap.
    """
    groups, height, width = maps.shape
    label = kmeans(features.flatten(1).T, clusters or 3 * groups)
    member = torch.nn.functional.one_hot(label).float()
    # the overlap coefficient of a soft map with a cluster that is smaller than it
    overlap = minmax(maps).flatten(1) @ member / member.sum(0).clamp(min=1)
    best, owner = overlap.max(0)
    owner = torch.where(best >= floor, owner, -1)
    owned = owner[label].reshape(height, width) == torch.arange(groups, device=maps.device)[:, None, None]
    # a constant map stretches to 0, so that with a floor of 0 it could own what nobody else covers
    return decided(owned & (minmax(maps).amax((-2, -1), keepdim=True) > 0))


def affinity(features: Tensor, grid: tuple[int, int]) -> Callable[[Tensor], Tensor]:
    """The step of `propagate` that features allow: a token takes the mean of the cells that it attends to.

    P = (features, rows normalised to sum 1) x (means of cells) is row-stochastic and of rank m; P c is computed as two
    products of [h w, m], and P itself is never made.

    Args:
        features: [rows * columns, h, w], maps of `Cells(rows, columns)` of one picture.
        grid: (rows, columns) of the cells.

    Raises:
        ControlError: when the number of cells is another.
    """
    cells, height, width = features.shape
    if cells != grid[0] * grid[1]:
        raise ControlError(f"affinity: {cells} features are not those of {grid[0]} x {grid[1]} cells.")
    row_of = torch.arange(height, device=features.device) * grid[0] // height
    column_of = torch.arange(width, device=features.device) * grid[1] // width
    inside = torch.nn.functional.one_hot((row_of[:, None] * grid[1] + column_of).flatten(), cells).float()
    pool = inside.T / inside.sum(0)[:, None]
    # a token that gives nothing to the image takes the mean of all cells
    given = features.float().flatten(1).T + _TINY
    spread = given / given.sum(1, keepdim=True)
    return lambda values: spread @ (pool @ values)


def propagate(spread: Callable[[Tensor], Tensor], maps: Tensor, power: int = 4, margin: float = 0.1) -> Masks:
    """Masks of P^power C (after AttenCraft, arXiv 2405.17965): maps spread along affinities, then compared.

    Args:
        spread: [tokens, n] -> [tokens, n], one product with a row-stochastic P; from `affinity`, or made of `probe`.
        maps: [n, h, w].
        power: number of products.
        margin: a token belongs to a group whose stretched map exceeds all others by more; the rest is background.

    Returns:
        Masks [n, h, w] that do not overlap.
    """
    stretched = minmax(spread_by(spread, maps, power))
    return decided(stretched > _best_other(stretched) + margin)


def attended(maps: Tensor, features: Tensor | None = None, grid: tuple[int, int] = (8, 8)) -> Masks:
    """Ours: where groups such as subjects stand, from maps of their words.

    In joint attention words of one subject draw all subjects, weakly and with a halo. So maps are spread along
    affinities, as in `propagate`; where there are several, each counts times its lead over all others (the lead alone
    would be all ground that nobody's words draw); that is spread once more, and Otsu's threshold taken twice, which
    leaves the halo out. A token in several masks is that of the greatest.

    Args:
        maps: [n, h, w].
        features: [m, h, w], maps of `Cells` of the picture, see `affinity`; None spreads nothing.
        grid: (rows, columns) of the cells.

    Returns:
        Masks [n, h, w] that do not overlap.

    Raises:
        ControlError: when the number of cells is another.
    """
    step = None if features is None else affinity(features, grid)

    def stretched(values: Tensor) -> Tensor:
        return minmax(values if step is None else spread_by(step, values, 1))

    compared = stretched(minmax(maps))
    lead = (compared - _best_other(compared)).clamp(min=0) if len(maps) > 1 else 1.0
    grown = stretched(compared * lead)
    strongest = grown.argmax(0) == torch.arange(len(grown), device=grown.device)[:, None, None]
    return decided(otsu(grown, times=2).masks & strongest)


def _best_other(maps: Tensor) -> Tensor:
    """[n, h, w]: of each group the greatest of all others, and 0 where there is none."""
    nobody = torch.zeros_like(maps[:1])
    best = [torch.cat([maps[:g], maps[g + 1 :], nobody]).amax(0) for g in range(len(maps))]
    return torch.stack(best)


def spread_by(spread: Callable[[Tensor], Tensor], maps: Tensor, power: int) -> Tensor:
    """P^power C by repeated products: float32 [n, h, w]."""
    values = maps.float().flatten(1).T
    for _ in range(power):
        values = spread(values)
    return values.T.reshape(maps.shape)
