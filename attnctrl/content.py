"""The content stage of a call: what controls make of queries, keys and values before anybody attends.

Controls give a `Content` for the rows of a layer that they act in; several follow each other in list order. It reads
the whole batch as the model made it, and so do sources: what others have of a row is never edited. The kernel gets
queries and keys that have been rotated; `Places` turns those of image tokens back, and on again.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any, NamedTuple, Protocol

import torch
from torch import Tensor

from .errors import UnsupportedModelError
from .layout import Frames
from .region import Grid
from .rotary import Rotary, Trig
from .variants import RowSet, put_rows, row_numbers

__all__ = [
    "Content",
    "Moments",
    "Places",
    "RowContents",
    "Standing",
    "States",
    "adain",
    "changed",
    "followed",
    "matched",
    "moments",
    "moments_before",
    "of_rows",
    "places_of",
]

_EPSILON = 1e-5


class States(NamedTuple):
    """Query, key and value [B, heads, tokens, head_dim] of some rows, or of the whole batch."""

    query: Tensor
    key: Tensor
    value: Tensor


class Content(Protocol):
    """What becomes of the states of some rows. Equal ones do the same, so that layers share them.

    It writes to nothing that it is given.
    """

    def __call__(self, own: States, batch: States, rows: Tensor) -> States:
        """The new states; what is left alone is the same object.

        Args:
            own: of these rows, as earlier contents have made them.
            batch: of all rows, as the model made them.
            rows: int64 [n], which rows these are.
        """

    def explain(self) -> str:
        """One line for reports."""


RowContents = tuple[RowSet, tuple[Content, ...]]
"""(rows, their contents in list order)."""


def of_rows(batch: States, rows: RowSet) -> States:
    """The states of some rows."""
    return batch if rows is None else States(*(states[rows] for states in batch))


def followed(edits: Sequence[Content], own: States, batch: States, rows: RowSet) -> States:
    """The states `own` of some rows after these contents in list order."""
    if edits:
        numbers = row_numbers(rows, batch.query)
        for edit in edits:
            own = edit(own, batch, numbers)
    return own


def changed(contents: Sequence[RowContents], batch: States) -> States:
    """The states after the contents of their rows; rows without one keep theirs to the bit.

    What nobody edits is the same object; of each of the others one copy is made, however many the sets of rows are.
    """
    found = batch
    for rows, edits in contents:
        if edits:
            before = of_rows(batch, rows)
            after = followed(edits, before, batch, rows)
            found = States(
                *(
                    whole if new is old else put_rows(whole, given, rows, new)
                    for whole, given, new, old in zip(found, batch, after, before, strict=True)
                )
            )
    return found


@dataclass(frozen=True, eq=False)
class Places:
    """Where the image tokens of a layer stand: `positions` float64 [tokens, axes] in steps of `rotary`."""

    rotary: Rotary
    positions: Tensor
    _trig: Trig = field(init=False, repr=False)

    def __post_init__(self) -> None:
        object.__setattr__(self, "_trig", self.rotary.trig(self.positions))

    def undone(self, states: Tensor) -> Tensor:
        """Rotated states [..., tokens, head_dim] as they were before, float32."""
        cos, sin = self._trig
        return self.rotary.turned(states.float(), (cos, -sin))

    def done(self, states: Tensor) -> Tensor:
        """States [..., tokens, head_dim] rotated as the model does."""
        return self.rotary.turned(states, self._trig)


class Standing:
    """How the image tokens of a model turn with their places.

    Args:
        rotary: None where they do not, or not in steps of whole tokens.
        corner: frames of a forward -> where its first image token stands, see `Family.corner`; None where that is not
            known.
    """

    def __init__(
        self, rotary: Rotary | None = None, corner: Callable[[Frames], tuple[float, ...]] | None = None
    ) -> None:
        self.rotary = rotary
        self.corner = corner
        self._places: tuple[Any, Places] | None = None

    def places(self, frames: Frames, frame: str, device: torch.device) -> Places | None:
        """Where the image tokens of a frame stand, None where they do not turn; the last ones are kept.

        Raises:
            UnsupportedModelError: when it is not known.
        """
        if self.corner is None:
            raise UnsupportedModelError(
                "Queries and keys are edited as they were before their rotary positions, and how these are laid out is "
                "not known for this model. Leave out what edits them (of ShareStyle: match=())."
            )
        corner, grid = self.corner(frames), frames[frame].grid
        if not corner or self.rotary is None or grid is None:
            return None
        key = (corner, grid, device)
        if self._places is None or self._places[0] != key:
            self._places = key, places_of(self.rotary, corner, grid, device)
        return self._places[1]


def places_of(rotary: Rotary, corner: Sequence[float], grid: Grid, device: torch.device) -> Places:
    """The places of a picture (y, x) or film (frame, y, x) in raster order whose first token stands at `corner`."""
    names = ("frame", "y", "x")[-len(grid) :]
    steps = torch.cartesian_prod(*(torch.arange(float(size), dtype=torch.float64) for size in grid))
    positions = torch.tensor(corner, dtype=torch.float64).repeat(len(steps), 1)
    positions[:, [rotary.axes.index(name) for name in names]] += steps
    return Places(rotary, positions.to(device))


Moments = tuple[Tensor, Tensor]
"""Mean and standard deviation [..., 1, D] of the tokens of states."""


def moments(states: Tensor) -> Moments:
    """Mean and standard deviation [..., 1, D] over the tokens of [..., T, D], unbiased, with 1e-5 under the root."""
    exact = states.to(torch.promote_types(states.dtype, torch.float32))
    # a single token has no spread
    variance = exact.var(dim=-2, keepdim=True, correction=min(1, states.shape[-2] - 1))
    return exact.mean(dim=-2, keepdim=True), (variance + _EPSILON).sqrt()


def moments_before(states: Tensor, places: Places | None) -> Moments:
    """The moments of image tokens [..., T, D] as they were before positions; None where they have not turned."""
    return moments(states if places is None else places.undone(states))


def adain(states: Tensor, model: Tensor, strength: float = 1.0) -> Tensor:
    """`states` [..., T, D] with the mean and standard deviation that `model` [..., Tm, D] has per channel.

    AdaIN(x, y) = (x - mean(x)) / std(x) * std(y) + mean(y), the way there by `strength`; statistics in float32 or
    better, the result in the dtype of `states`.
    """
    return matched(states, moments(model), strength)


def matched(states: Tensor, model: Moments, strength: float = 1.0) -> Tensor:
    """`states` [..., T, D] with these moments, which broadcast; as `adain`."""
    (mean, std), (aim, spread) = moments(states), model
    # written to in place: of the tokens of a large picture one copy in float32 and not four
    made = (states - mean).div_(std).mul_(spread).add_(aim)
    return (made if strength == 1 else torch.lerp(states.to(made.dtype), made, strength)).to(states.dtype)
