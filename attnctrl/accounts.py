"""What was due in a forward, and whom it is put down to once the forward has ended."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from .call import Row
from .schedule import Moment
from .stack import Acts, Seat
from .wraps import Wrapped

__all__ = ["Due"]


@dataclass(frozen=True, eq=False)
class Due:
    """What hangs on a model during one forward.

    Attributes:
        acts: by layer, what it does, and the numbers of the seats that act there.
        wraps: what is put around modules.
        moment: where the forward stands in the run.
        left_out: names of the layers whose acts are known to come to nothing.
        rows: of the batch, each with the numbers of its seats.
    """

    acts: Acts
    wraps: Sequence[Wrapped]
    moment: Moment
    left_out: frozenset[str]
    rows: Sequence[tuple[Row, tuple[int, ...]]]

    def credit(self, seats: Sequence[Seat], unmet: frozenset[str]) -> None:
        """Write down what each seat did, or that none of its layers ran; `unmet` are layers that called no kernel."""
        missed = self.left_out | unmet
        for number, seat in enumerate(seats):
            acts = {name: act for name, (act, on) in self.acts.items() if number in on}
            done = {name: act.explained for name, act in acts.items() if name not in missed}
            told = (one for one in self.wraps if one.seat == number and one.wrap.explain)
            told = (one for one in self.wraps if one.seat == number and one.wrap.explain)
            done |= {one.layer: frozenset([one.wrap.explain]) for one in told}
            if not done:
                seat.skipped += bool(acts)
                continue
            seat.forwards += 1
            seat.acted.update(done)
            seat.rows.update(row for row, on in self.rows if number in on)
            if self.moment.step is not None:
                seat.steps.add(self.moment.step)
            if not seat.control.observes:
                seat.plans.update(line for lines in done.values() for line in lines)
