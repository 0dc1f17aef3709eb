"""A plain forward ahead of one in which pictures share: the same rows and latents, and nothing read of other pictures.

Controls with `looks_ahead` ask for it, watch it (`Control.probes`) and use in the forward that follows what they kept;
as soon as that one has ended, they `forget`.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import replace
from typing import Any

from .errors import ControlError, UnsupportedModelError
from .families import Arguments
from .guidance import Step
from .stack import Stack

__all__ = ["Ahead"]


class Ahead:
    """The plain forwards of one model.

    Attributes:
        step: where the plain forward that runs at present stands, and what acts there; None in all others.
        watching: by guidance branch, numbers of the seats that watch it.
    """

    def __init__(self) -> None:
        self.step: Step | None = None
        self.watching: Mapping[str | None, tuple[int, ...]] = {}

    @contextmanager
    def of(
        self,
        stack: Stack,
        step: Step,
        hindrance: Callable[[], str],
        forward: Callable[[Arguments], Any],
        arguments: Arguments,
    ) -> Iterator[None]:
        """Run the plain forward of a step, if somebody looks ahead; what is kept of it is forgotten in the end.

        Args:
            stack: of controls on the model.
            step: of the forward that follows, and what acts in it.
            hindrance: () -> why the model cannot run once more at a step, and what to do; "" when it can.
            forward: runs the model.

        Raises:
            UnsupportedModelError: where something is in the way.
            ControlError: with perturbed branches in the same step.
        """
        found = {name: tuple(n for n in on if _control(stack, n).looks_ahead) for name, on in step.active.items()}
        looking = [_control(stack, n) for n in dict.fromkeys(n for on in found.values() for n in on)]
        if not looking:
            yield
            return
        name = looking[0].name
        if reason := hindrance():
            raise UnsupportedModelError(
                f"'{name}' runs the model once more at a step and keeps its queries, and {reason}, or leave '{name}' "
                "out (preset 'consistory': plain=(0, 0))."
            )
        if guides := stack.guides(step.moment):
            opening = next(one.name for g, on in guides.items() for n in on if (one := _control(stack, n)).guide == g)
            raise ControlError(
                f"'{name}' and '{opening}' both add forwards to this step, and a perturbed one has none ahead of it. "
                f"Give them windows of their own, such as {opening}'s from where that of '{name}' ends."
            )
        plain = {one: tuple(n for n in on if _is_plain(stack, n)) for one, on in step.active.items()}
        try:
            self.step, self.watching = replace(step, active=plain), found
            forward(arguments)
            self.step = None
            yield
        finally:
            self.step, self.watching = None, {}
            for control in looking:
                control.forget()


def _control(stack: Stack, number: int) -> Any:
    return stack.seats[number].control


def _is_plain(stack: Stack, number: int) -> bool:
    """Whether a control acts in plain forwards: it takes nothing of other pictures, and keeps nothing for later."""
    one = _control(stack, number)
    return not (one.shares or one.follows or one.compares or one.keeps)
