"""A stack of controls on one model: when each acts, the plans of one phase of the run. Knows no hooks."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from functools import partial
from math import prod
from typing import Any

import torch
from torch import Tensor

from .act import Act
from .bank import checked_branch
from .call import Blend, Row, Situation, build_plan
from .content import Content, RowContents, Standing
from .controls.base import Control
from .errors import ControlError
from .execute import ExecutionPlan, Host
from .execute.tokens import TokenSet
from .increments import Guide
from .layout import TokenRange
from .norms import Pooled
from .output import Contrasting, Output, RowOutputs
from .region import by
from .schedule import Moment, is_active, is_full
from .select import Layer, Presets
from .situations import Seat, Situations, make_room
from .sources import Move, Rows, Sources, Stored
from .variants import Line, Variant, row_set
from .visibility import Visibility

__all__ = ["Acts", "Presence", "Seat", "Stack", "placed"]

Acts = dict[str, tuple[Act, frozenset[int]]]
"""By layer: what it does, and the numbers of the seats that act there."""
Presence = tuple[frozenset[str] | None, ...]
"""By seat: the layers its processors sit on; None for all."""

Planned = tuple[ExecutionPlan | None, tuple[TokenSet, ...]]


class Stack(Situations):
    """Controls in list order on the layers of one model: when they act, and the plans and acts for each phase."""

    def __init__(
        self, controls: Sequence[Control], layers: Sequence[Layer], presets: Presets, standing: Standing | None = None
    ) -> None:
        super().__init__(controls, layers, presets, standing)
        self._plans: dict[tuple[Variant, str, tuple[int, ...], torch.device, Host, Control | None], Planned] = {}
        self._acts: dict[tuple[tuple[Variant, ...], torch.device, Presence, Host], Acts] = {}

    def active(self, moment: Moment, branch: str | None, observing: bool = False) -> tuple[int, ...]:
        """Numbers of the seats that act now; of those that only observe, if `observing`.

        Raises:
            ScheduleError: when a window needs a position that is unknown.
            ControlError: when a control asks for a branch and the branch of this forward is unknown.
        """
        chosen = []
        for number, seat in enumerate(self.seats):
            control = seat.control
            if control.observes is not observing:
                continue
            if control.branch != "all":
                if branch is None:
                    raise ControlError(
                        f"'{control.name}' acts in branch '{control.branch}', but which guidance branch this forward "
                        "is cannot be told: two texts came at one noise level, its name is unknown, or a batch may "
                        "hold several. Attach to the pipeline, name the branches of a batch with "
                        "attach(..., branches=('uncond', 'cond')), run each branch in "
                        "`with model.cache_context('cond'):` (or 'uncond'), or give the control branch='all'."
                    )
                # a branch that a pipeline perturbs by itself is not the one that a control opens
                if branch != control.branch or control.guide is not None:
                    continue
            if is_active(control.window, moment, control.name):
                chosen.append(number)
        controls = [self.seats[number].control for number in chosen]
        sharing = any(one.shares for one in controls)
        return tuple(n for n, one in zip(chosen, controls, strict=True) if sharing or not one.looks_ahead)

    def guides(self, moment: Moment) -> dict[Guide, tuple[int, ...]]:
        """The perturbed branches that run now, with the numbers of the seats that act in each beside those of "cond".

        Raises:
            ScheduleError: as of `active`.
        """
        asked = [(number, seat.control, seat.control.guide) for number, seat in enumerate(self.seats)]
        due = [(n, guide) for n, one, guide in asked if guide is not None and is_active(one.window, moment, one.name)]
        # other controls of that name act in all of them
        more = self.active(moment, "perturbed") if due else ()
        guides = dict.fromkeys(guide for _, guide in due)
        return {guide: tuple(sorted({*more, *(n for n, asked in due if asked == guide)})) for guide in guides}

    def needs_position(self) -> bool:
        """Some window depends on where in the run a forward stands, or somebody counts steps."""
        controls = [seat.control for seat in self.seats]
        counting = (one.observes or one.draws or one.names_branches or one.looks_ahead for one in controls)
        return any(counting) or not all(is_full(one.window) for one in controls)

    def needs_branches(self) -> bool:
        """Somebody must know of each row which guidance branch it is."""
        controls = [seat.control for seat in self.seats]
        return any(one.branch != "all" or one.names_branches for one in controls)

    def line(self, row: Row, active: tuple[int, ...], images: int, moment: Moment) -> Line:
        """What is told of a row of a branch of so many rows, in which these seats act."""
        acting = (self.seats[index].control for index in active)
        joint = [one for one in acting if one.shares or one.compares or one.recalls is not None]
        if not joint:
            return Line(row.sample, active)
        banks = tuple(one.recalls.version for one in joint if one.recalls is not None)
        stored = (checked_branch(row.branch), banks) if banks else None
        draw = 1 + (moment.step or 0) if any(one.draws for one in joint) else 0
        # rows that take in pictures of banks alone take in the same
        alike = all((one.shares or one.compares) and one.recalls is not None for one in joint)
        place = (0, 1) if alike else (row.image, images)
        if alike and any(one.draws_readers for one in joint):
            # behind those of the bank, as it would be in one batch with them
            kept = max(one.recalls.pictures for one in joint if one.recalls is not None)
            place = (kept + row.image, kept + images)
        return Line(row.sample, active, *place, draw, stored)

    def recalling(self, active: Sequence[int]) -> tuple[Control, ...]:
        """Those of these seats' controls that read banks."""
        found = (self.seats[index].control for index in active)
        return tuple(control for control in found if control.recalls is not None)

    def check_banks(
        self, acting: Sequence[tuple[Row, tuple[int, ...]]], moment: Moment, identity: Callable[[], Mapping[str, str]]
    ) -> bool:
        """Whether rows in which these seats act read banks; raises, as controls do, where they cannot be read.

        Args:
            identity: () -> which model this is, see `attnctrl.bank.identity`.
        """
        read = [
            (control, branch)
            for branch, seats in dict.fromkeys((row.branch, seats) for row, seats in acting)
            for control in self.recalling(seats)
        ]
        for control, branch in read:
            control.check_bank(identity(), moment, branch)
        return bool(read)

    def pooled(self, acting: Sequence[tuple[Row, tuple[int, ...]]]) -> tuple[Pooled, ...]:
        """Rows that are normalised together with others while these seats act, which is noted on the seats.

        Raises:
            ControlError: when two controls pool one row.
        """
        found: list[Pooled] = []
        for number, (row, seats) in enumerate(acting):
            controls = [(self.seats[i], self.seats[i].control.pools_with(row.image)) for i in seats]
            asked = [(seat, other) for seat, other in controls if other not in (None, row.image)]
            if len(asked) > 1:
                raise ControlError(
                    f"{' and '.join(seat.control.name for seat, _ in asked)} both share GroupNorms; leave that to one "
                    "of them, or give them windows or branches of their own."
                )
            for seat, other in asked:
                found.append(Pooled(number, number - row.image + int(other or 0), seat.control.strength))
                seat.plans.add(f"GroupNorms pooled with those of the picture {row.image - int(other or 0)} before")
        return tuple(found)

    def acting(self, variant: Variant, layer: Layer, present: Presence) -> tuple[int, ...]:
        """Of a variant's active seats, those that act in a layer's call."""
        calling = (i for i in variant.active if not self.seats[i].control.wraps)
        on = ((i, present[i]) for i in calling if layer.name in self.seats[i].layers)
        there = (i for i, layers in on if layers is None or layer.name in layers)
        return tuple(i for i in there if self.seats[i].control.opens(layer, variant.line.draw))

    def plan(
        self, variant: Variant, frame: str, acting: tuple[int, ...], device: torch.device, host: Host = Host()
    ) -> ExecutionPlan | None:
        """The plan of a layer in which the seats `acting` act; None when the layer has nothing to do. Built once."""
        return self._planned(variant, frame, acting, device, host)[0]

    def _planned(
        self,
        variant: Variant,
        frame: str,
        acting: tuple[int, ...],
        device: torch.device,
        host: Host,
        against: Control | None = None,
    ) -> Planned:
        """The plan, and which tokens of each picture that is read come behind the own keys; or the plan of the second
        execution, of which the control `against` says what is seen.
        """
        hidden = self.hidden(variant, acting)
        seen = variant.frames[frame]
        tucked = "text.pad" in seen or any(f"text.region{number}" in seen for number in hidden)
        if not acting and not tucked:
            return None, ()
        key = (variant, frame, acting, device, host, against)
        if key not in self._plans:
            make_room(self._plans)
            told = [(self.seats[i].control, self.own(self.seats[i].control, variant.scene)) for i in acting]
            controls = [(_Contrast(one) if one is against else one, own) for one, own in told]
            reads, sharing = self.reads(variant, frame, acting), self.sharing(acting)
            bank = sharing.recalls if reads and sharing is not None else None
            situation = self.situation(variant, frame, reads, bank)
            self._plans[key] = build_plan(situation, controls, hidden, device, host)
        return self._plans[key]

    def sources(
        self,
        variant: Variant,
        rows: Sequence[int],
        frame: str,
        acting: tuple[int, ...],
        device: torch.device,
        host: Host,
    ) -> Sources | None:
        """What the rows of a variant read of other pictures in a layer.

        Raises:
            ControlError: when keys of a bank would have to move on another grid than theirs.
        """
        tokens, sharing = self._planned(variant, frame, acting, device, host)[1], self.sharing(acting)
        if not tokens or sharing is None:
            return None
        reads, line, bank = self.reads(variant, frame, acting), variant.line, sharing.recalls
        situation = self.situation(variant, frame, reads, bank)
        made = [self._move(situation, other, acting) for other in reads]
        if bank is None:
            image = situation.frame.keys["image"]
            moves = tuple(
                None if move is None else move.to(device).of(mine, image)
                for move, mine in zip(made, tokens, strict=True)
            )
            at = torch.tensor([[row - line.image + other for other in reads] for row in rows], device=device)
            return Rows(tokens, moves, at)
        grid = situation.frame.grid
        for held, move in zip(bank.held(frame), made, strict=True):
            if move is not None and move.turn is not None and held.grid != grid:
                raise ControlError(
                    f"'{sharing.name}': pictures of the bank have a grid of {by(held.grid)} tokens and this one "
                    f"{by(grid or ())}, so their keys cannot be turned to places here. Leave positions='keep' and "
                    "Reposition out, or capture this size."
                )
        # where each token goes its own way, that is of the tokens which the bank holds
        moves = tuple(
            None if move is None else move.to(device).of(mine, TokenRange("image", 0, len(held.tokens)))
            for move, mine, held in zip(made, tokens, bank.held(frame), strict=True)
        )
        return Stored(tokens, moves, bank, line.stored[0] if line.stored else "")

    def _move(self, situation: Situation, other: int, acting: tuple[int, ...]) -> Move | None:
        controls = [self.seats[i].control for i in acting]
        rotary = self.standing.rotary
        made = [(one.name, move) for one in controls if (move := one.move(situation, other, rotary)) is not None]
        turned = [(name, move.turn) for name, move in made if move.turn is not None]
        if len(turned) > 1:
            raise ControlError(
                f"{' and '.join(name for name, _ in turned)} both say where other pictures' keys seem to stand in one "
                "layer; give Share positions='keep', or leave one of them out."
            )
        scale = prod(move.scale for _, move in made)
        return Move(turned[0][1] if turned else None, scale) if made else None

    def exchanged(self, variant: Variant, frame: str, acting: tuple[int, ...]) -> list[tuple[int, int, Tensor]]:
        """(seat, other picture, shift) of what becomes of other pictures of the batch before their first layer, for a
        variant's layers of a frame, see `Control.exchange`."""
        asked, sharing = [n for n in acting if self.seats[n].control.exchanges], self.sharing(acting)
        if not asked or sharing is None or sharing.recalls is not None:
            return []
        reads = self.reads(variant, frame, acting)
        situation = self.situation(variant, frame, reads)
        made = [(n, other, self.seats[n].control.exchange(situation, other)) for n in asked for other in reads]
        return [(n, other, shift) for n, other, shift in made if shift is not None]

    def outputs(
        self,
        variant: Variant,
        layer: Layer,
        acting: tuple[int, ...],
        device: torch.device = torch.device("cpu"),
        host: Host = Host(),
    ) -> tuple[Output, ...]:
        """What becomes of the executed calls of a layer in which the seats `acting` act."""
        controls = [self.seats[i].control for i in acting]
        asked = [control for control in controls if type(control).output is not Control.output]
        if not asked:
            return ()
        made = []
        for control in asked:
            told = self.told_to(control, variant, layer.frame)
            one = control.output(told, self.own(control, variant.scene), layer)
            if isinstance(one, Contrasting):
                one = one.under(self._planned(variant, layer.frame, acting, device, host, control)[0])
            made.append(one)
        return tuple(one for one in made if one is not None)

    def contents(
        self, variant: Variant, layer: Layer, acting: tuple[int, ...], device: torch.device
    ) -> tuple[Content, ...]:
        """What becomes of queries, keys and values of a layer in which the seats `acting` act."""
        controls = [self.seats[i].control for i in acting]
        asked = [control for control in controls if type(control).content is not Control.content]
        if not asked:
            return ()
        situation = self.situation(variant, layer.frame)
        places = partial(self.standing.places, variant.frames, layer.frame, device)
        return tuple(one for control in asked for one in control.content(situation, layer, places))

    def hidden(self, variant: Variant, acting: tuple[int, ...]) -> frozenset[int]:
        """Regions whose text is in the sequence while no control of a layer shows it."""
        shown = {number for number, _ in self.texts(variant.scene, acting)}
        return frozenset(number for number, _ in self.texts(variant.scene, variant.active) if number not in shown)

    def acts(self, variants: Sequence[Variant], device: torch.device, present: Presence, host: Host = Host()) -> Acts:
        """The acts of all layers that have something to do, for one variant per row of the batch. Built once."""
        key = (tuple(variants), device, present, host)
        if key not in self._acts:
            make_room(self._acts)
            self._acts[key] = self._build_acts(key[0], device, present, host)
        return self._acts[key]

    def _build_acts(self, variants: tuple[Variant, ...], device: torch.device, present: Presence, host: Host) -> Acts:
        rows = {variant: [i for i, v in enumerate(variants) if v == variant] for variant in dict.fromkeys(variants)}
        made: dict[tuple[Any, ...], tuple[Act, frozenset[int]] | None] = {}
        acts: Acts = {}
        for layer in self.layers:
            acting = tuple(self.acting(variant, layer, present) for variant in rows)
            pairs = list(zip(rows, acting, strict=True))
            outputs = tuple(self.outputs(variant, layer, own, device, host) for variant, own in pairs)
            contents = tuple(self.contents(variant, layer, own, device) for variant, own in pairs)
            key = (acting, outputs, contents, layer.frame, layer.call)
            if key not in made:
                made[key] = self._act(rows, acting, outputs, contents, layer, device, host)
            found = made[key]
            if found is not None:
                acts[layer.name] = found
        return acts

    def _act(
        self,
        rows: Mapping[Variant, list[int]],
        acting: tuple[tuple[int, ...], ...],
        outputs: tuple[tuple[Output, ...], ...],
        contents: tuple[tuple[Content, ...], ...],
        layer: Layer,
        device: torch.device,
        host: Host,
    ) -> tuple[Act, frozenset[int]] | None:
        plans = [self.plan(variant, layer.frame, own, device, host) for variant, own in zip(rows, acting, strict=True)]
        unplanned, unedited, unchanged = all(plan is None for plan in plans), not any(outputs), not any(contents)
        if unplanned and unedited and unchanged:
            return None
        mine = [None if len(rows) == 1 else row_set(one, device) for one in rows.values()]
        # without a plan all rows are one call
        parts = [(None, None)] if unplanned else list(zip(mine, plans, strict=True))
        sources = [
            self.sources(variant, own, layer.frame, seats, device, host)
            for (variant, own), seats in zip(rows.items(), acting, strict=True)
        ]
        edits: Sequence[RowOutputs] = () if unedited else list(zip(mine, plans, sources, outputs, strict=True))
        changes: Sequence[RowContents] = () if unchanged else list(zip(mine, contents, strict=True))
        tokens = next(iter(rows)).frames[layer.frame].tokens
        act = Act(parts, tokens, layer.call, edits, () if unplanned else sources, changes)
        return act, frozenset(i for numbers in acting for i in numbers)


class _Contrast:
    """Stands for a control in its second execution."""

    def __init__(self, control: Control) -> None:
        self.control = control

    def visibility(self, situation: Situation, own: frozenset[int]) -> Visibility | None:
        return self.control.contrast(situation, own)

    def blends(self, situation: Situation, own: frozenset[int]) -> Sequence[Blend]:
        return ()


def placed(acts: Acts, moment: Moment) -> Acts:
    """The acts with what they read of banks at this moment."""
    return {name: (act.at(name, moment) if act.stored else act, seats) for name, (act, seats) in acts.items()}
