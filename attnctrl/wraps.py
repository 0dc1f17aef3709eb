"""What controls put around whole modules of a model for one forward: what is left out, and outputs that are kept.

A wrap stands where a module has its `forward`, from the beginning of a forward of the model to its end, around whatever
stands there already. The module's own hooks run as ever.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from itertools import groupby
from typing import TYPE_CHECKING, Any, NamedTuple

from torch import nn

from .call import Row
from .errors import ControlError, UnsupportedModelError
from .layout import Frames
from .reuse import Kept, Part
from .schedule import Moment
from .select import Layer
from .standin import standing_in
from .tappable import is_compiled

if TYPE_CHECKING:
    from .families import Family
    from .stack import Acts, Presence, Seat, Stack
    from .variants import Variant

__all__ = ["Now", "Site", "Wrap", "Wrapped", "Wraps"]


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


@dataclass(frozen=True, eq=False)
class Now:
    """A forward that begins, as controls that go around modules are told of it.

    Attributes:
        moment: where it stands in the run.
        timestep: the same in the scheduler's unit.
        run: the same object for all forwards of one run.
        parts: its batch by guidance branch.
        frames: token ranges of the first row.
        watched: names of the layers that are recorded.
        kept: outputs of earlier steps.
    """

    moment: Moment
    timestep: float
    run: Any
    parts: tuple[Part, ...]
    frames: Frames
    watched: frozenset[str]
    kept: Kept


class Wrap(NamedTuple):
    """What goes around a module.

    Attributes:
        module: the module.
        function: (its forward, *arguments) -> what it returns.
        over: names of the layers that what other controls do in them is lost of.
        explain: one line for reports; "" for what changes nothing in this forward.
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
        shares: () -> whether a cache of diffusers keeps outputs of attention for all guidance branches alike.

    Attributes:
        kept: outputs of earlier steps.
    """

    def __init__(
        self, family: Family, model: nn.Module, layers: Sequence[Layer], shares: Callable[[], bool] = lambda: False
    ) -> None:
        self.family = family
        self.model = model
        self.kept = Kept()
        self._shares = shares
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
        self._placed = ExitStack()

    def put(
        self,
        stack: Stack,
        acting: Sequence[tuple[Row, tuple[int, ...]]],
        variants: Sequence[Variant],
        acts: Acts,
        arguments: Mapping[str, Any],
        moment: Moment,
        run: Any,
        present: Presence,
    ) -> list[Wrapped]:
        """Put what seats want around modules in the forward that begins, until `take`.

        Args:
            stack: of controls on the model.
            acting: rows of the batch, each with the numbers of its seats.
            variants: of each row.
            acts: by layer, what hangs there.
            arguments: of the forward.
            moment: where it stands in the run, which `run` stands for.
            present: by seat, the layers that its processors sit on; None for all.

        Raises:
            ControlError: when one acts in some rows of the batch alone, or two keep outputs of one layer.
            UnsupportedModelError: when the model is compiled.
        """
        due = dict.fromkeys(n for _, on in acting for n in on if stack.seats[n].control.wraps)
        if not due:
            return []
        numbers = sorted(due, key=lambda n: stack.seats[n].control.keeps)
        first = stack.seats[numbers[0]].control.name
        if is_compiled(self.model):
            raise UnsupportedModelError(
                f"'{first}' goes around whole modules, and compiled code does not see it. Use it before the model or "
                "its blocks are compiled, or on a copy that is not."
            )
        latents = arguments[self.family.hidden][0]
        now = Now(
            moment,
            float(self.family.timestep(dict(arguments)).reshape(-1)[0]),
            run,
            _parts(stack, [row for row, _ in acting], variants, (latents.dtype, latents.device)),
            variants[0].frames,
            frozenset(name for name, (act, _) in acts.items() if act.probes),
            self.kept,
        )
        found: list[Wrapped] = []
        for number in numbers:
            found += self._asked(number, stack.seats[number], acting, present[number], now, found)
        self._placed.enter_context(standing_in((one.wrap.module, one.wrap.function) for one in found))
        return found

    def _asked(
        self,
        number: int,
        seat: Seat,
        acting: Sequence[tuple[Row, tuple[int, ...]]],
        there: frozenset[str] | None,
        now: Now,
        before: Sequence[Wrapped],
    ) -> list[Wrapped]:
        control, rows = seat.control, [number in on for _, on in acting]
        if not all(rows):
            raise ControlError(
                f"'{control.name}' goes around whole modules, and acts in {sum(rows)} of {len(rows)} rows of this "
                f"batch alone (branch '{control.branch}'). Give it branch='all', or a branch of its own."
            )
        if control.keeps and self._shares():
            raise ControlError(
                f"'{control.name}' keeps outputs of attention, and so does a cache of diffusers on this model (pyramid "
                "attention broadcast or FasterCache), which takes those of one guidance branch for another's. Call "
                "model.disable_cache()."
            )
        over = frozenset(name for one in before for name in one.wrap.over) if control.keeps else frozenset()
        kept = {one.wrap.module for one in before if control.keeps}
        met: dict[nn.Module, Wrapped] = {}
        for name, site in self._sites.items():
            if name not in seat.layers or name in over or not (there is None or name in there):
                continue
            wrap = control.wrap(site, now)
            if wrap is not None and wrap.module in kept:
                raise ControlError(f"Two '{control.name}' keep outputs of {name}; give them layers of their own.")
            if wrap is not None:
                met.setdefault(wrap.module, Wrapped(number, name, wrap))
        return list(met.values())

    def take(self, finished: bool) -> None:
        """Leave all modules as they were; when a forward was not `finished`, nothing is kept of its run."""
        if not finished:
            self.kept.clear()
        self._placed.close()


def _parts(stack: Stack, rows: Sequence[Row], variants: Sequence[Variant], kind: tuple[Any, ...]) -> tuple[Part, ...]:
    """A batch by guidance branch; rows of one branch follow each other."""
    parts = []
    for branch, numbers in groupby(range(len(rows)), key=lambda number: rows[number].branch):
        mine = list(numbers)
        own = tuple(variants[number] for number in mine)
        guides = tuple(n for n in own[0].active if stack.seats[n].control.guide is not None)
        parts.append(Part(branch, guides, slice(mine[0], mine[-1] + 1), (own, kind)))
    return tuple(parts)
