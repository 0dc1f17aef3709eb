"""What controls put around whole modules of a model for one forward: blocks and attentions that are left out.

A wrap stands where a module has its `forward`, from the beginning of a forward of the model to its end, around whatever
stands there already. The module's own hooks run as ever.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, NamedTuple

from torch import nn

from .errors import ControlError, UnsupportedModelError
from .select import Layer
from .tap import is_compiled

if TYPE_CHECKING:
    from .families import Family
    from .stack import Presence, Seat

__all__ = ["Site", "Wrap", "Wrapped", "Wraps"]


@dataclass(frozen=True, eq=False)
class Site:
    """Where an attention layer sits, as a control that goes around modules is told of it.

    Attributes:
        layer: the layer.
        block: the module that it is a part of.
        inside: names of all attention layers of that block.
        returns: of the arguments of the block's forward, those that have the form of what it returns, in its order.
        fused: the attention module holds the block's feed-forward as well.
    """

    layer: Layer
    block: nn.Module
    inside: frozenset[str]
    returns: tuple[str, ...]
    fused: bool


class Wrap(NamedTuple):
    """What goes around a module.

    Attributes:
        module: the module.
        function: (its forward, *arguments) -> what it returns.
        over: names of the layers that what other controls do in them is lost of.
        explain: one line for reports.
    """

    module: nn.Module
    function: Callable[..., Any]
    over: frozenset[str]
    explain: str


class Wrapped(NamedTuple):
    """A wrap that is in place: by the number of its seat and the name of its layer."""

    seat: int
    layer: str
    wrap: Wrap


class Wraps:
    """Everything that is put around modules of one model.

    Args:
        family: of the model.
        model: the denoiser.
        layers: its attention layers.
    """

    def __init__(self, family: Family, model: nn.Module, layers: Sequence[Layer]) -> None:
        self.model = model
        blocks = {layer.name: layer.name.rpartition(".")[0] for layer in layers}
        self._sites = {
            layer.name: Site(
                layer,
                model.get_submodule(blocks[layer.name]),
                frozenset(name for name, block in blocks.items() if block == blocks[layer.name]),
                family.returns.get(layer.stack, ("hidden_states",)),
                layer.stack in family.fused,
            )
            for layer in layers
        }
        self._placed: list[tuple[nn.Module, Any, Any]] = []

    def put(self, seats: Sequence[Seat], acting: Sequence[Sequence[int]], present: Presence) -> list[Wrapped]:
        """Put what seats want around modules in the forward that begins, until `take`.

        Args:
            seats: of the stack.
            acting: of each row, the numbers of the seats that act.
            present: by seat, the layers that its processors sit on; None for all.

        Raises:
            ControlError: when one acts in some rows of the batch alone.
            UnsupportedModelError: when the model is compiled.
        """
        numbers = [n for n in dict.fromkeys(n for seats_of in acting for n in seats_of) if seats[n].control.wraps]
        found = [one for number in numbers for one in self._asked(number, seats[number], acting, present[number])]
        if found and is_compiled(self.model):
            raise UnsupportedModelError(
                f"'{seats[found[0].seat].control.name}' goes around whole modules, and compiled code does not see it. "
                "Use it before the model or its blocks are compiled, or on a copy that is not."
            )
        for one in found:
            self._place(one.wrap)
        return found

    def _asked(
        self, number: int, seat: Seat, acting: Sequence[Sequence[int]], there: frozenset[str] | None
    ) -> list[Wrapped]:
        rows = [number in seats for seats in acting]
        if not all(rows):
            raise ControlError(
                f"'{seat.control.name}' goes around whole modules, and acts in {sum(rows)} of {len(rows)} rows of this "
                f"batch alone (branch '{seat.control.branch}'). Give it branch='all', or a branch of its own."
            )
        met: dict[nn.Module, Wrapped] = {}
        for name, site in self._sites.items():
            if name in seat.layers and (there is None or name in there):
                wrap = seat.control.wrap(site)
                if wrap is not None:
                    met.setdefault(wrap.module, Wrapped(number, name, wrap))
        return list(met.values())

    def _place(self, wrap: Wrap) -> None:
        module, forward = wrap.module, wrap.module.forward

        def around(*args: Any, **kwargs: Any) -> Any:
            return wrap.function(forward, *args, **kwargs)

        self._placed.append((module, around, module.__dict__.get("forward")))
        module.__dict__["forward"] = around

    def take(self) -> None:
        """Leave all modules as they were, also after an exception."""
        for module, around, before in reversed(self._placed):
            if module.__dict__.get("forward") is not around:
                continue
            if before is None:
                del module.__dict__["forward"]
            else:
                module.__dict__["forward"] = before
        self._placed = []
