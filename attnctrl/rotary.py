"""Rotary position embedding: how queries and keys turn with their positions, and how to turn them further.

A rotation by p + d is one by p and then one by d, so keys that a model has rotated already can be moved exactly, by
fractions of a token as well, without knowing where they stood.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from .errors import LayoutError

__all__ = ["Rotary", "Trig"]

Trig = tuple[Tensor, Tensor]
"""Cosines and sines float32 [..., head_dim / 2] of a turn."""


@dataclass(frozen=True)
class Rotary:
    """Channels (2i, 2i + 1) of an axis with d channels turn by position * theta ** (-2i / d).

    RoFormer (arXiv 2104.09864, eq. 15), an axis for each coordinate of a token's position as in FLUX and its kin.

    Attributes:
        axes: names of the coordinates in the order of the channels: "picture" or "frame", "y", "x", ...; one step is
            one token, or one picture.
        channels: of a head for each axis, even numbers; their sum is head_dim.
        theta: base of the frequencies.
    """

    axes: tuple[str, ...]
    channels: tuple[int, ...]
    theta: float = 10000.0

    def shift(self, **by: float) -> Tensor:
        """A step of the given size on the named axes, none on the others: float64 [axes].

        Raises:
            LayoutError: for an axis that these positions do not have.
        """
        strange = sorted(set(by) - set(self.axes))
        if strange:
            raise LayoutError(
                f"Positions of this model have the axes {', '.join(self.axes)}; found {', '.join(strange)}."
            )
        return torch.tensor([by.get(axis, 0.0) for axis in self.axes], dtype=torch.float64)

    def angles(self, positions: Tensor) -> Tensor:
        """Angles in radians, float64 [..., head_dim / 2], of positions [..., axes]."""
        places = positions.to(torch.float64).unsqueeze(-1)
        parts = []
        for axis, count in enumerate(self.channels):
            steps = torch.arange(0, count, 2, dtype=torch.float64, device=positions.device)
            parts.append(places[..., axis, :] * self.theta ** (-steps / count))
        return torch.cat(parts, dim=-1)

    def turn(self, states: Tensor, shift: Tensor) -> Tensor:
        """Queries or keys as if they stood `shift` further on: `turned` by the `trig` of a shift.

        Args:
            states: [..., T, head_dim], rotated by the model or not.
            shift: [axes] for all tokens alike, or [T, axes].
        """
        return self.turned(states, self.trig(shift.to(states.device)))

    def trig(self, shift: Tensor) -> Trig:
        """What `turned` needs of a shift [axes] or [T, axes]; the same for all layers and steps."""
        angles = self.angles(shift)
        return angles.cos().float(), angles.sin().float()

    def turned(self, states: Tensor, trig: Trig) -> Tensor:
        """States [..., T, head_dim] turned.

        Returns:
            A new tensor of the same shape and dtype; computed in float32.

        Raises:
            LayoutError: when head_dim is not that of these positions.
        """
        if states.shape[-1] != sum(self.channels):
            raise LayoutError(
                f"Rotary positions of {sum(self.channels)} channels ({', '.join(map(str, self.channels))}) cannot turn "
                f"heads of {states.shape[-1]}."
            )
        cos, sin = trig
        even, odd = states.float().unflatten(-1, (-1, 2)).unbind(-1)
        turned = torch.stack([even * cos - odd * sin, even * sin + odd * cos], dim=-1)
        return turned.flatten(-2).to(states.dtype)
