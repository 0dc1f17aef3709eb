"""Maps of many steps in the room of one: a running value for each layer and group, whatever the number of steps."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Literal

import torch
from torch import Tensor

from ..errors import LayoutError
from ..region import Grid

__all__ = ["Over", "Store", "Track", "resized"]

Over = Literal["mean", "last"] | float
"""How steps are put together: their mean, the last one, or a moving mean that keeps this share of the past."""


@dataclass(eq=False)
class Track:
    """One group in one layer: the latest step's map, the value of the steps before, and the mass of each step.

    A step that comes again takes the place of what it had.
    """

    step: int
    latest: Tensor
    past: Tensor | None = None
    count: int = 0
    masses: dict[int, Tensor] = field(default_factory=dict)

    def value(self, over: Over) -> Tensor:
        """float32 [rows, c, *grid]: all steps so far."""
        if self.past is None:
            return self.latest
        kept = {"mean": self.count / (self.count + 1), "last": 0.0}[over] if isinstance(over, str) else over
        return torch.lerp(self.latest, self.past, kept)

    def put(self, step: int, latest: Tensor, over: Over) -> None:
        """Add a step."""
        if latest.shape != self.latest.shape:
            raise LayoutError(
                f"The maps of a record were {tuple(self.latest.shape)} and now are {tuple(latest.shape)}: the batch or "
                "the size of the picture has changed. Make a record for each."
            )
        if step != self.step:
            self.past, self.count = self.value(over), self.count + 1
        self.step, self.latest = step, latest


class Store:
    """What was read, by layer and group: O(layers x groups x h x w), whatever the number of steps.

    Attributes:
        over: how steps are put together.
        tracks: by (layer, group).
        steps: those that were read, in order.
    """

    def __init__(self, over: Over = "mean") -> None:
        self.over = over
        self.tracks: dict[tuple[str, str], Track] = {}
        self.steps: list[int] = []

    def begin(self, step: int | None) -> None:
        """A forward begins; one of an earlier step begins a new run, and what was read is forgotten.

        Args:
            step: number of the step; None, where it is unknown, counts forwards.
        """
        last = self.steps[-1] if self.steps else -1
        step = last + 1 if step is None else step
        if step < last:
            self.tracks.clear()
            self.steps.clear()
        if step != last or not self.steps:
            self.steps.append(step)

    def put(self, layer: str, group: str, maps: Tensor) -> None:
        """What a layer gave to a group in the present forward: float32 [rows, c, *grid]."""
        step, key = self.steps[-1], (layer, group)
        if key in self.tracks:
            self.tracks[key].put(step, maps, self.over)
        else:
            self.tracks[key] = Track(step, maps)
        self.tracks[key].masses[step] = maps.sum(1).flatten(1).mean(1)

    def value(self, layer: str, group: str) -> Tensor:
        """float32 [rows, c, *grid] of one layer, at its own size."""
        return self.tracks[layer, group].value(self.over)

    def layers(self, group: str) -> tuple[str, ...]:
        """The layers in which a group was read."""
        return tuple(layer for layer, name in self.tracks if name == group)

    @property
    def grid(self) -> Grid:
        """The finest grid of the layers that were read."""
        sizes = (tuple(track.latest.shape[2:]) for track in self.tracks.values())
        return max(sizes, key=lambda size: size[-2] * size[-1])

    def mean(self, group: str, grid: Grid) -> Tensor:
        """float32 [rows, c, *grid]: the mean over layers, each resized."""
        return torch.stack([resized(self.value(layer, group), grid) for layer in self.layers(group)]).mean(0)

    def masses(self, group: str) -> Tensor:
        """float32 [steps, rows]: what a token of the image gives to a group, mean over tokens and layers; NaN where a
        step did not read it.
        """
        tracks = [self.tracks[layer, group] for layer in self.layers(group)]
        blank = torch.full_like(next(iter(tracks[0].masses.values())), float("nan"))
        told = [[track.masses[step] for track in tracks if step in track.masses] for step in self.steps]
        return torch.stack([torch.stack(found).mean(0) if found else blank for found in told])


def resized(maps: Tensor, grid: Grid) -> Tensor:
    """Maps [..., h, w] at the size of a grid (its last two sides): bilinear, antialiased when they shrink."""
    if tuple(maps.shape[-2:]) == tuple(grid[-2:]):
        return maps
    flat = maps.reshape(1, -1, *maps.shape[-2:])
    sized = torch.nn.functional.interpolate(flat, grid[-2:], mode="bilinear", antialias=True)
    return sized.reshape(*maps.shape[:-2], *grid[-2:])
