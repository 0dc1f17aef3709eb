"""The controls of a stack and what each is told: whose regions and texts, which tokens, which other pictures."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import NamedTuple

from torch import Tensor

from .bank import Bank
from .call import Row, Situation
from .content import Standing
from .controls.base import Control
from .declared import Declared, nth
from .errors import ControlError, LayoutError, UnsupportedModelError
from .groups import Words
from .layout import Frames, Slots, Span
from .region import Region, extent
from .select import Layer, Presets, describe, select
from .variants import Line, Variant, make_variants

__all__ = ["Holders", "Seat", "Situations", "make_room"]

_CACHED = 256


class Holders(NamedTuple):
    """Who holds the image tokens of a picture.

    Attributes:
        names: of the declared regions of its scene.
        member: bool [regions, image tokens].
        boxes: (x0, y0, x1, y1) around each region, as shares of the picture.
    """

    names: tuple[str, ...]
    member: Tensor
    boxes: tuple[tuple[float, ...], ...]


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


class Situations(Declared):
    """Controls in list order on the layers of one model, each on a seat.

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
            make_room(self._situations)
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
            words, stored = self._words(variant), () if bank is None else bank.held(frame)
            self._situations[key] = Situation(whole, regions, member, words, shared, others, stored, line)
        return self._situations[key]

    def reads(self, variant: Variant, frame: str, acting: Sequence[int]) -> tuple[int, ...]:
        """The other pictures that a variant reads in layers of a frame in which these seats act: numbers in the batch,
        or in the bank.

        Raises:
            ControlError: when two controls share pictures.
        """
        seen, line = variant.frames[frame], variant.line
        control = self.sharing(acting)
        if control is None or "image" not in seen.queries or "image" not in seen.keys:
            return ()
        if control.recalls is not None:
            return tuple(range(control.recalls.pictures)) if line.stored else ()
        return tuple(sorted(control.reads(line.image, line.images)))

    def sharing(self, acting: Sequence[int]) -> Control | None:
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

    def holders(self, variant: Variant, frame: str) -> Holders:
        """The regions of a variant's scene, and who of them holds each image token."""
        regions, placed = self.regions(variant.scene), self.placed(variant.scene)
        member = self.member(variant.scene, variant.frames[frame].grid)
        own = [regions[number] for number in placed]
        return Holders(tuple(one.label for one in own), member[placed], tuple(map(extent, own)))

    def told_to(self, control: Control, variant: Variant, frame: str) -> Situation:
        """What a control is told for its output: of the other pictures too, where it compares them."""
        line, seen = variant.line, variant.frames[frame]
        if not control.compares or "image" not in seen.queries or "image" not in seen.keys:
            return self.situation(variant, frame)
        if control.recalls is not None:
            return self.situation(variant, frame, tuple(range(control.recalls.pictures)), control.recalls)
        return self.situation(variant, frame, control.reads(line.image, line.images))


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


def make_room(cache: dict) -> None:
    """Runs of many sizes must not pile up plans."""
    if len(cache) >= _CACHED:
        cache.clear()
