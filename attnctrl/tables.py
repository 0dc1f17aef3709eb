"""Tables of positions: what some models add once to each image token, exchanged in rows of a batch for one forward.

Where attention is told of positions by the tokens alone (SD3, PixArt, AuraFlow), a token stands where the entry says
that was added to it: x - pos(p) + pos(p') stands at p'. For Reposition Attention, see `attnctrl.controls.reposition`.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from functools import partial
from math import prod
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from .errors import ControlError, PlanError, UnsupportedModelError
from .region import Grid

if TYPE_CHECKING:
    from .stack import Presence, Stack
    from .variants import Variant

__all__ = ["Tables", "entries", "exchanges"]


class Tables:
    """The table of one model; a hook sits on the module that adds it from `put` to `take`.

    Args:
        model: the denoiser.
        name: of the module that makes tokens of latents and adds the table's entries; "" where no table is added.
    """

    def __init__(self, model: nn.Module, name: str) -> None:
        self._model = model
        self._name = name
        self._handles: list[Any] = []
        self._found: tuple[Any, dict[int, Tensor]] | None = None

    def put(self, stack: Stack, variants: Sequence[Variant], present: Presence) -> None:
        """Let image tokens stand elsewhere in the forward that begins, where controls ask for it.

        Args:
            stack: of controls on the model.
            variants: of each row of the batch.
            present: by seat, the layers that its processors sit on; None for all.

        Raises:
            UnsupportedModelError: the model adds no table, or it is compiled.
            ControlError: as of `exchanges`.
        """
        from .tappable import is_compiled

        if not any(stack.seats[n].control.exchanges for one in variants for n in one.active):
            return
        if not self._name:
            raise UnsupportedModelError(
                f"{type(self._model).__name__} adds no table of positions to its image tokens, so no entries of one "
                "can be exchanged; SD3, PixArt and AuraFlow do. Use another `mode` of Reposition, or a canvas "
                "(attnctrl.pipelines.canvas)."
            )
        if is_compiled(self._model):
            raise UnsupportedModelError(
                "Entries of a table of positions cannot be exchanged inside compiled code. Run the model uncompiled, "
                "or use a canvas (attnctrl.pipelines.canvas)."
            )
        shifts = {row: one for row, one in self._shifts(stack, tuple(variants), present).items() if bool(one.any())}
        if shifts:
            hook = partial(_exchanged, shifts, variants[0].frames.main.queries.grid, len(variants))
            self._handles = [self._model.get_submodule(self._name).register_forward_hook(hook)]

    def _shifts(self, stack: Stack, variants: tuple[Variant, ...], present: Presence) -> dict[int, Tensor]:
        """As of `exchanges`; steps of one phase ask for the same."""
        key = (stack, variants, present)
        if self._found is None or self._found[0] != key:
            self._found = key, exchanges(stack, variants, present)
        return self._found[1]

    def take(self) -> None:
        """Take the hook off."""
        for handle in self._handles:
            handle.remove()
        self._handles = []


def entries(table: Tensor, places: Tensor) -> Tensor:
    """A table [rows, columns, D] read at places float64 [n, 2] (y, x) in tokens, bilinear: [n, D].

    At whole numbers these are its entries; beyond its edges those at the edge.
    """
    last = torch.tensor(table.shape[:2], device=places.device) - 1
    inside = places.clamp(min=torch.zeros_like(places)).minimum(last.to(places))
    low = inside.floor()
    share = (inside - low).to(table)
    (top, left), (bottom, right) = low.long().unbind(-1), (low.long() + 1).minimum(last).unbind(-1)
    down, across = share[:, :1], share[:, 1:]
    upper = torch.lerp(table[top, left], table[top, right], across)
    return torch.lerp(upper, torch.lerp(table[bottom, left], table[bottom, right], across), down)


def exchanges(stack: Stack, variants: Sequence[Variant], present: Presence) -> dict[int, Tensor]:
    """By row, how far its image tokens go for those who read it, see `Control.exchange`; noted on the seats.

    Args:
        variants: of each row of the batch.
        present: by seat, the layers that its processors sit on; None for all.

    Raises:
        ControlError: two readers want a row at different places, or one that is moved moves others.
    """
    shifts: dict[int, Tensor] = {}
    readers: dict[int, int] = {}
    wanting: set[int] = set()
    for number, variant in enumerate(variants):
        kinds = dict.fromkeys((layer.frame, stack.acting(variant, layer, present)) for layer in stack.layers)
        for frame, acting in kinds:
            for n, other, shift in stack.exchanged(variant, frame, acting):
                row = number - variant.line.image + other
                if row in shifts and not torch.equal(shifts[row], shift):
                    raise ControlError(
                        f"'{stack.seats[n].control.name}': rows {readers[row]} and {number} of the batch both read row "
                        f"{row} and want its subjects at different places, but with mode='table' it runs with one. "
                        "Give each picture a row of its own to read, in turn with it, and Share group=2."
                    )
                shifts[row], readers[row] = shift, number
                wanting.add(number)
                stack.seats[n].plans.add(f"picture {other} runs with its subjects at picture {variant.line.image}'s")
    if both := sorted(row for row in wanting & set(shifts) if bool(shifts[row].any())):
        raise ControlError(
            f"Row {both[0]} of the batch is moved at its input for row {readers[both[0]]}, and wants others moved to "
            "places of its own, where it is then no more. With mode='table' let pictures be read that read nobody: "
            "Share(readers='anchors', anchors=1)."
        )
    return shifts


def _exchanged(
    shifts: Mapping[int, Tensor], grid: Grid, batch: int, module: nn.Module, inputs: tuple[Tensor, ...], output: Tensor
) -> Tensor:
    """A hook: the tokens [B, T, D] that a module made, in some rows with other entries; the rest stays to the bit."""
    if output.shape[:2] != (batch, prod(grid)):
        raise PlanError(
            f"Entries of a table are to be exchanged in {batch} rows of {prod(grid)} tokens, but its module gave "
            f"{' x '.join(map(str, output.shape[:2]))}: another hook splits the batch. Leave out mode='table'."
        )
    # what it makes of nothing is its bias and the table; the bias is the same in all entries
    table = module.forward(torch.zeros_like(inputs[0][:1]))[0]
    table = table.to(torch.promote_types(table.dtype, torch.float32)).unflatten(0, grid)
    cells = torch.cartesian_prod(*map(torch.arange, grid)).to(torch.float64)
    made = output.clone()
    for row, shift in shifts.items():
        there = shift.any(-1).nonzero().flatten()
        here, goal = (places.to(table.device) for places in (cells[there], (cells + shift)[there]))
        states, there = output[row].to(table.dtype), there.to(output.device)
        new = states[there] - entries(table, here) + entries(table, goal)
        made[row, there] = new.to(output.dtype)
    return made
