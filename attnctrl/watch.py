"""Observing seats: what they are told of a forward that begins, and their probes on the acts of its layers."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch

from .act import Act
from .call import Row
from .content import Places
from .errors import ControlError
from .layout import Frames
from .schedule import Moment
from .select import Layer

if TYPE_CHECKING:
    from .situations import Holders
    from .stack import Acts, Seat, Stack
    from .variants import Variant

__all__ = ["View", "watched"]


@dataclass(frozen=True, eq=False)
class View:
    """One forward, as an observing control is told of it.

    Attributes:
        layers: those that it selected, in forward order.
        rows: its rows of the batch, which stand in a row.
        told: of each of its rows, the guidance branch and the picture.
        batch: number of all rows.
        frames: the token ranges of each of its rows.
        acts: () -> by layer, what acts on these rows, numbered from 0; layers that are not named run untouched.
        moment: where the forward stands in the run.
        device: where the model computes.
        identity: () -> which model this is, see `attnctrl.bank.identity`.
        holders: (number of one of its rows, frame) -> the regions of its scene, and who of them holds each token.
        places: (number of one of its rows, frame) -> where its image tokens stand, see `Standing.places`.
    """

    layers: tuple[Layer, ...]
    rows: slice
    told: tuple[Row, ...]
    batch: int
    frames: tuple[Frames, ...]
    acts: Callable[[], Mapping[str, Act]]
    moment: Moment
    device: torch.device
    identity: Callable[[], Mapping[str, str]]
    holders: Callable[[int, str], Holders]
    places: Callable[[int, str], Places | None]


def watched(
    acts: Acts,
    stack: Stack,
    rows: Sequence[Row],
    variants: Sequence[Variant],
    watching: Sequence[tuple[int, ...]],
    acts_of: Callable[[Sequence[Variant]], Acts],
    moment: Moment,
    device: torch.device,
    identity: Callable[[], Mapping[str, str]],
) -> Acts:
    """`acts` with the probes of all observing seats.

    Args:
        acts: by layer, of all rows.
        stack: of controls on the model.
        rows: of the batch.
        variants: of each row.
        watching: numbers of the seats that observe each row.
        acts_of: variants of some rows -> their acts.
        moment: where the forward stands.
        device: where the model computes.
        identity: see `View`.
    """
    result = dict(acts)
    calls = {layer.name: layer for layer in stack.layers}
    for number in sorted({number for eyes in watching for number in eyes}):
        seat = stack.seats[number]
        mine = [row for row, eyes in enumerate(watching) if number in eyes]
        own = [variants[row] for row in mine]

        def named(own: Sequence[Variant] = own, seat: Seat = seat) -> dict[str, Act]:
            made = {name: act for name, (act, _) in acts_of(own).items()}
            if any(made[name].attended for name in seat.layers & made.keys()):
                raise ControlError(
                    "Attention cannot be read with when='post' where pictures read a bank, whose keys belong to no "
                    "token of the batch, or ask with queries of another forward. Read it with when='pre', or in other "
                    "layers."
                )
            return made

        def holders(row: int, frame: str, own: Sequence[Variant] = own) -> Holders:
            return stack.holders(own[row], frame)

        def places(row: int, frame: str, own: Sequence[Variant] = own) -> Places | None:
            return stack.standing.places(own[row].frames, frame, device)

        view = View(
            layers=tuple(layer for layer in stack.layers if layer.name in seat.layers),
            rows=slice(mine[0], mine[-1] + 1),
            told=tuple(rows[row] for row in mine),
            batch=len(variants),
            frames=tuple(variant.frames for variant in own),
            acts=named,
            moment=moment,
            device=device,
            identity=identity,
            holders=holders,
            places=places,
        )
        for name, probe in seat.control.probes(view).items():
            act, numbers = result.get(name) or _bare(calls[name], own[0])
            result[name] = act.watched([probe]), numbers | {number}
    return result


def _bare(layer: Layer, variant: Variant) -> tuple[Act, frozenset[int]]:
    """An act that leaves the layer's own call as it is."""
    return Act((), variant.frames[layer.frame].tokens, layer.call), frozenset()
