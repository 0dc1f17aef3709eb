"""A stack of controls on one model: whose regions, which layers, the plans of one phase of the run. Knows no hooks."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial
from math import prod
from typing import Any

import torch
from torch import Tensor

from .bank import Bank, checked_branch
from .call import Act, Row, Situation, build_plan
from .content import Content, RowContents, Standing
from .controls.base import Control
from .declared import Declared, nth
from .errors import ControlError, LayoutError, UnsupportedModelError
from .execute import ExecutionPlan, Host
from .execute.tokens import TokenSet
from .groups import Words
from .guidance import Guide
from .layout import Frames, Slots, Span
from .output import Output, RowOutputs
from .region import Region, by
from .schedule import Moment, is_active, is_full
from .select import Layer, Presets, describe, select
from .sources import Move, Rows, Sources, Stored
from .variants import Line, Variant, make_variants

__all__ = ["Acts", "Presence", "Seat", "Stack"]

Acts = dict[str, tuple[Act, frozenset[int]]]
"""By layer: what it does, and the numbers of the seats that act there."""
Presence = tuple[frozenset[str] | None, ...]
"""By seat: the layers its processors sit on; None for all."""

Planned = tuple[ExecutionPlan | None, tuple[TokenSet, ...]]

_CACHED_PLANS = 256


@dataclass(eq=False)
class Seat:
    """One control of a stack: the layers it selected, and what it has done so far.

    `skipped` counts the forwards in which it was due and none of its layers ran.
    """

    control: Control
    layers: frozenset[str]
    steps: set[int] = field(default_factory=set)
    rows: set[Row] = field(default_factory=set)
    acted: set[str] = field(default_factory=set)
    forwards: int = 0
    skipped: int = 0
    plans: set[str] = field(default_factory=set)


class Stack(Declared):
    """Controls in list order on the layers of one model.

    Args:
        controls: idle ones are left out.
        layers: all layers of the model.
        presets: the family's named selectors.
        standing: how queries and keys turn with their positions.

    Raises:
        SelectionError: when a control selects no layer.
        UnsupportedModelError: when it selects linear attention.
        ControlError: when a control needs regions and nobody declares any, or numbers of scenes disagree.
    """

    def __init__(
        self, controls: Sequence[Control], layers: Sequence[Layer], presets: Presets, standing: Standing | None = None
    ) -> None:
        super().__init__(controls)
        self.layers = tuple(layers)
        self.standing = standing or Standing()
        self.seats = [
            Seat(control, frozenset(layer.name for layer in _selected(layers, control, presets)))
            for control in controls
            if not control.is_idle
        ]
        for seat in self.seats:
            if seat.control.needs_regions and not seat.control.scenes and not self._text_declaring():
                raise ControlError(
                    f"'{seat.control.name}' needs regions, but it has none and no control of the stack declares any. "
                    "Give it regions=[...], or attach it together with Regions([...])."
                )
            if seat.control.follows and not any(one.control.shares and one.layers & seat.layers for one in self.seats):
                raise ControlError(
                    f"'{seat.control.name}' changes what pictures share, but no control of the stack shares anything "
                    "in its layers. Attach it together with Share(...)."
                )
        self._situations: dict[tuple[Variant, str, tuple[int, ...], Bank | None], Situation] = {}
        self._plans: dict[tuple[Variant, str, tuple[int, ...], torch.device, Host], Planned] = {}
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
        return tuple(chosen)

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
        return any(one.observes or one.draws or one.names_branches or not is_full(one.window) for one in controls)

    def needs_branches(self) -> bool:
        """Somebody must know of each row which guidance branch it is."""
        controls = [seat.control for seat in self.seats]
        return any(one.branch != "all" or one.names_branches for one in controls)

    def line(self, row: Row, active: tuple[int, ...], images: int, moment: Moment) -> Line:
        """What is told of a row of a branch of so many rows, in which these seats act."""
        joint = [one for index in active if (one := self.seats[index].control).shares or one.compares]
        if not joint:
            return Line(row.sample, active)
        banks = tuple(one.recalls.version for one in joint if one.recalls is not None)
        stored = (checked_branch(row.branch), banks) if banks else None
        draw = 1 + (moment.step or 0) if any(one.draws for one in joint) else 0
        # rows that read banks alone read the same
        place = (0, 1) if len(banks) == len(joint) else (row.image, images)
        return Line(row.sample, active, *place, draw, stored)

    def banks(self, active: Sequence[int]) -> tuple[Bank, ...]:
        """The banks that rows read in which these seats act."""
        found = (self.seats[index].control.recalls for index in active)
        return tuple(bank for bank in found if bank is not None)

    def texts(self, scene: int, active: Sequence[int]) -> list[tuple[int, Region]]:
        """(number, region) for which tokens are appended when these seats act; regions of strength 0 are not there."""
        regions, copies = self.regions(scene), self._copies(active)
        numbers = {
            number
            for index in active
            if self.seats[index].control.appends_text
            for number in self.own(self.seats[index].control, scene)
        }
        return [
            (number, regions[number])
            for number in sorted(numbers)
            if regions[number].strength > 0 and (copies or not regions[number].spans)
        ]

    def _copies(self, active: Sequence[int]) -> bool:
        return any(self.seats[index].control.copies_filling for index in active)

    def _told(self, scene: int, active: Sequence[int]) -> tuple[Span, ...]:
        """The prompt's tokens that are no padding, as far as a control tells."""
        controls = [self.seats[index].control for index in active]
        return next((spans for control in controls if (spans := nth(control.prompt_spans, scene))), ())

    def filling(self, scene: int, active: Sequence[int], tokens: int) -> list[int]:
        """Those of the prompt's tokens of which each region gets a copy behind its text: its padding, or none."""
        if not self._copies(active):
            return []
        words = {token for start, stop in self._told(scene, active) for token in range(start, stop)}
        return [token for token in range(tokens) if token not in words]

    def variants(
        self, frames: Sequence[Frames], lines: Sequence[Line], length: Callable[[Region], int], aligned: bool = False
    ) -> tuple[list[Variant], Slots]:
        """As `make_variants`, with the texts of these lines; `length` gives the tokens of a region's text."""
        prompt = len(frames[0].ranges["text.global"])
        texts: dict[Line, list[tuple[str, int]]] = {}
        for line in dict.fromkeys(lines):
            copies = len(self.filling(line.scene, line.active, prompt))
            texts[line] = [
                (f"text.region{number}", copies + (0 if region.spans else length(region)))
                for number, region in self.texts(line.scene, line.active)
            ]
        return make_variants(frames, lines, texts, aligned)

    def situation(
        self, variant: Variant, frame: str, reads: tuple[int, ...] = (), bank: Bank | None = None
    ) -> Situation:
        """What controls are told about a variant in the layers of a frame in which it reads the pictures `reads` of the
        batch, or of a bank; built once.

        Raises:
            LayoutError: when a region is bound to a reference that the forward does not hold.
            ControlError: when the bank holds nothing of the frame.
        """
        key = (variant, frame, reads, bank)
        if key not in self._situations:
            _make_room(self._situations)
            regions, line = self.regions(variant.scene), variant.line
            _check_references(regions, variant.frames)
            seen = variant.frames[frame]
            member = self.member(variant.scene, seen.grid)
            others: dict[int, tuple[Region, ...]] = {}
            if bank is None:
                scenes = {n: n * self.scenes // line.images for n in reads}
                shared = {n: self.of_other(variant.scene, scene, seen.grid) for n, scene in scenes.items()}
                others = {n: self.regions(scene) for n, scene in scenes.items()}
            else:
                held = bank.held(frame)
                shared = {n: self.of_names(variant.scene, held[n].names, held[n].member) for n in reads}
            whole = seen.with_shared({n: who.shape[1] for n, who in shared.items()}) if reads else seen
            words, stored = self._words(variant), bank is not None
            self._situations[key] = Situation(whole, regions, member, words, shared, others, stored, line)
        return self._situations[key]

    def reads(self, variant: Variant, frame: str, acting: Sequence[int]) -> tuple[int, ...]:
        """The other pictures that a variant reads in layers of a frame in which these seats act: numbers in the batch,
        or in the bank.

        Raises:
            ControlError: when two controls share pictures.
        """
        seen, line = variant.frames[frame], variant.line
        control = self._sharing(acting)
        if control is None or "image" not in seen.queries or "image" not in seen.keys:
            return ()
        if control.recalls is not None:
            return tuple(range(control.recalls.pictures)) if line.stored else ()
        return tuple(sorted(control.reads(line.image, line.images)))

    def _sharing(self, acting: Sequence[int]) -> Control | None:
        """The control by which pictures are shared in layers in which these seats act."""
        controls = [self.seats[i].control for i in acting if self.seats[i].control.shares]
        if len(controls) > 1:
            raise ControlError(
                f"{' and '.join(one.name for one in controls)} both share pictures in one layer; give them layers, "
                "windows or branches of their own, or keep one of them."
            )
        return controls[0] if controls else None

    def _words(self, variant: Variant) -> Words:
        """What the tokens of the prompt are to the controls that act; other branches may have another prompt."""
        controls = [self.seats[index].control for index in variant.active]
        regions = self.regions(variant.scene)
        numbers = sorted(frozenset().union(*(self.own(control, variant.scene) for control in controls)))
        phrases = {number: tuple(regions[number].spans) for number in numbers if regions[number].spans}
        return Words(phrases, self._told(variant.scene, variant.active))

    def acting(self, variant: Variant, layer: Layer, present: Presence) -> tuple[int, ...]:
        """Of a variant's active seats, those that act in a layer."""
        on = ((i, present[i]) for i in variant.active if layer.name in self.seats[i].layers)
        there = (i for i, layers in on if layers is None or layer.name in layers)
        return tuple(i for i in there if self.seats[i].control.opens(layer, variant.line.draw))

    def plan(
        self, variant: Variant, frame: str, acting: tuple[int, ...], device: torch.device, host: Host = Host()
    ) -> ExecutionPlan | None:
        """The plan of a layer in which the seats `acting` act; None when the layer has nothing to do. Built once."""
        return self._planned(variant, frame, acting, device, host)[0]

    def _planned(
        self, variant: Variant, frame: str, acting: tuple[int, ...], device: torch.device, host: Host
    ) -> Planned:
        """The plan, and which tokens of each picture that is read come behind the own keys."""
        hidden = self.hidden(variant, acting)
        seen = variant.frames[frame]
        tucked = "text.pad" in seen or any(f"text.region{number}" in seen for number in hidden)
        if not acting and not tucked:
            return None, ()
        key = (variant, frame, acting, device, host)
        if key not in self._plans:
            _make_room(self._plans)
            controls = [(self.seats[i].control, self.own(self.seats[i].control, variant.scene)) for i in acting]
            reads, sharing = self.reads(variant, frame, acting), self._sharing(acting)
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
        tokens, sharing = self._planned(variant, frame, acting, device, host)[1], self._sharing(acting)
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
            if move is not None and held.grid != grid:
                raise ControlError(
                    f"'{sharing.name}': pictures of the bank have a grid of {by(held.grid)} tokens and this one "
                    f"{by(grid or ())}, so they do not stand side by side. Leave positions='keep', or capture this "
                    "size."
                )
        moves = tuple(None if move is None else move.to(device) for move in made)
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

    def outputs(self, variant: Variant, layer: Layer, acting: tuple[int, ...]) -> tuple[Output, ...]:
        """What becomes of the executed calls of a layer in which the seats `acting` act."""
        controls = [self.seats[i].control for i in acting]
        asked = [control for control in controls if type(control).output is not Control.output]
        if not asked:
            return ()
        made = (
            control.output(self._told_to(control, variant, layer.frame), self.own(control, variant.scene), layer)
            for control in asked
        )
        return tuple(one for one in made if one is not None)

    def holders(self, variant: Variant, frame: str) -> tuple[tuple[str, ...], Tensor]:
        """(names of the regions of a variant's scene, bool [regions, image tokens]: who holds each token)."""
        names = tuple(region.label for region in self.regions(variant.scene))
        return names, self.member(variant.scene, variant.frames[frame].grid)

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
        made = (control.content(situation, layer, places) for control in asked)
        return tuple(one for one in made if one is not None)

    def _told_to(self, control: Control, variant: Variant, frame: str) -> Situation:
        """What a control is told for its output: of the other pictures too, where it compares them."""
        line, seen = variant.line, variant.frames[frame]
        apart = not control.compares or "image" not in seen.queries or "image" not in seen.keys
        return self.situation(variant, frame, () if apart else control.reads(line.image, line.images))

    def hidden(self, variant: Variant, acting: tuple[int, ...]) -> frozenset[int]:
        """Regions whose text is in the sequence while no control of a layer shows it."""
        shown = {number for number, _ in self.texts(variant.scene, acting)}
        return frozenset(number for number, _ in self.texts(variant.scene, variant.active) if number not in shown)

    def acts(self, variants: Sequence[Variant], device: torch.device, present: Presence, host: Host = Host()) -> Acts:
        """The acts of all layers that have something to do, for one variant per row of the batch. Built once."""
        key = (tuple(variants), device, present, host)
        if key not in self._acts:
            _make_room(self._acts)
            self._acts[key] = self._build_acts(key[0], device, present, host)
        return self._acts[key]

    def _build_acts(self, variants: tuple[Variant, ...], device: torch.device, present: Presence, host: Host) -> Acts:
        rows = {variant: [i for i, v in enumerate(variants) if v == variant] for variant in dict.fromkeys(variants)}
        made: dict[tuple[Any, ...], tuple[Act, frozenset[int]] | None] = {}
        acts: Acts = {}
        for layer in self.layers:
            acting = tuple(self.acting(variant, layer, present) for variant in rows)
            pairs = list(zip(rows, acting, strict=True))
            outputs = tuple(self.outputs(variant, layer, own) for variant, own in pairs)
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
        mine = [None if len(rows) == 1 else torch.tensor(one, device=device) for one in rows.values()]
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


def _selected(layers: Sequence[Layer], control: Control, presets: Presets) -> tuple[Layer, ...]:
    chosen = select(layers, control.layers, presets)
    linear = [layer for layer in chosen if layer.linear]
    if linear:
        others = dict.fromkeys(layer.stack for layer in layers if not layer.linear)
        raise UnsupportedModelError(
            f"'{control.name}' selects {describe(linear)} ({linear[0].name}, ...), which is linear attention: it "
            f"has no softmax whose keys could be hidden. Give the control layers={' or '.join(map(repr, others))}; "
            "image tokens cannot be parted from each other in this model."
        )
    return chosen


def _check_references(regions: Sequence[Region], frames: Frames) -> None:
    count = sum(name.startswith("reference.") for name in frames.ranges)
    for region in regions:
        if region.reference is not None and region.reference >= count:
            raise LayoutError(
                f"Region '{region.label}' is bound to reference {region.reference}, but this forward holds "
                f"{count} reference(s). Pass the picture to the pipeline, or leave `reference` unset."
            )


def _make_room(cache: dict) -> None:
    """Runs of many sizes must not pile up plans."""
    if len(cache) >= _CACHED_PLANS:
        cache.clear()
