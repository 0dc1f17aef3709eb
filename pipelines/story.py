"""What a rehearsal of a cast found, and what became of it."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING, Any

from attnctrl.pipelines.base import ScenePicture
from attnctrl.pipelines.cast import Character, Shot

from attnctrl.errors import ControlError
from attnctrl.scene import Scene
from attnctrl.schedule import Window, window_from_json

if TYPE_CHECKING:
    from PIL import Image

    from attnctrl.region import Region
    from attnctrl.select import Selector

__all__ = ["Rehearsal", "Story", "told_in"]


def told_in(record: Mapping[str, Any], *keys: str) -> Mapping[str, Any]:
    """What a picture's record tells of its story, with these keys too. Raises `ControlError` where it is of none."""
    told = record.get("story")
    if not isinstance(told, Mapping) or not {"cast", "preset", "options", "reading", *keys} <= set(told):
        raise ControlError("The record is not that of a picture of a story; draw it with ScenePipeline.")
    return told


@dataclass(frozen=True, eq=False)
class Rehearsal:
    """The plain pictures of shots, and where their characters are.

    Attributes:
        cast: all characters.
        shots: with the characters' descriptions in their prompts, who is there and their seeds filled in.
        scenes: the shots as documents.
        pictures: drawn without control.
        regions: of each shot, named by characters; those whose place is not known are not there.
        reading: the layers and the window in which attention was read; None with a segmenter.
    """

    cast: tuple[Character, ...]
    shots: tuple[Shot, ...]
    scenes: tuple[Scene, ...] = field(repr=False)
    pictures: tuple[ScenePicture, ...] = field(repr=False)
    regions: tuple[tuple[Region, ...], ...]
    reading: tuple[Selector, Window] | None = None

    def sheet(self, side: int = 256) -> Image.Image:
        """The pictures with the outlines of the regions."""
        return _sheet(self, [("rehearsal", self.pictures)], side)


@dataclass(frozen=True, eq=False)
class Story:
    """What was drawn.

    Attributes:
        rehearsal: of the same shots.
        pictures: of each shot.
        preset: name of the stack that acted, and its `options`.
        anchors: how many of the first pictures others read; new shots read these.
        first: the rehearsal of the shots that are read: this story's own, or those of the one that it goes on with.
    """

    rehearsal: Rehearsal
    pictures: tuple[ScenePicture, ...] = field(repr=False)
    preset: str
    options: Mapping[str, Any]
    anchors: int
    first: Rehearsal = field(repr=False)

    @classmethod
    def of(cls, record: Mapping[str, Any]) -> Story:
        """The story of a picture's record (`attnctrl.provenance.read`), without pictures: a bank can go on with it.

        Raises:
            ControlError: the record is not one of a story.
        """
        told = told_in(record, "anchors")
        reading = told["reading"] and (told["reading"][0], window_from_json(told["reading"][1]))
        cast = tuple(Character(**one) for one in told["cast"])
        first = Rehearsal(cast, (), (Scene.from_dict(record["scene"]),), (), (), reading)
        return cls(first, (), told["preset"], told["options"], told["anchors"], first)

    @property
    def read(self) -> Rehearsal:
        """The rehearsal of the pictures that new shots read."""
        first, part = self.first, slice(0, self.anchors)
        cut = {name: getattr(first, name)[part] for name in ("shots", "scenes", "pictures", "regions")}
        return replace(first, **cut)

    def sheet(self, side: int = 256) -> Image.Image:
        """The rehearsal with the regions, and the pictures."""
        return _sheet(self.rehearsal, [("rehearsal", self.rehearsal.pictures), ("story", self.pictures)], side)


def _sheet(rehearsal: Rehearsal, columns: Sequence[tuple[str, Sequence[ScenePicture]]], side: int) -> Image.Image:
    from attnctrl.pictures import draw_regions, enlarge, grid

    def shown(number: int, column: int) -> Image.Image:
        image = enlarge(columns[column][1][number].image, side)
        return draw_regions(image, rehearsal.regions[number]) if column == 0 else image

    rows = [[shown(number, column) for column in range(len(columns))] for number in range(len(rehearsal.shots))]
    return grid(rows, [shot.prompt for shot in rehearsal.shots], [name for name, _ in columns], side=side)
