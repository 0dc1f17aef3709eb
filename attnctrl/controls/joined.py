"""Controls in which pictures of a batch take part in each other: who reads whom."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from ..bank import Bank
from ..errors import ControlError
from .regional import Regional

__all__ = ["Joined", "Readers"]

Readers = Literal["all", "anchors"]


@dataclass(frozen=True, eq=False)
class Joined(Regional):
    """Base of controls by which pictures read others of the batch, within a guidance branch and a group.

    Attributes:
        readers: "all" read each other; with "anchors" the first `anchors` pictures of each group read each other, and
            all others read them alone.
        anchors: how many pictures are read, with readers="anchors".
        group: so many pictures that follow each other in the batch are a group; None makes one group of the batch.
    """

    readers: Readers = "all"
    anchors: int = 2
    group: int | None = None

    def __post_init__(self) -> None:
        super().__post_init__()
        self._check_choice("readers", Readers)
        for name, least in (("anchors", 1), ("group", 2)):
            value = getattr(self, name)
            if value is not None and (not isinstance(value, int) or value < least):
                raise ControlError(f"'{self.name}': {name} must be a whole number from {least} on; found {value!r}.")

    def _check_alone(self, bank: Bank | None) -> None:
        """Raises `ControlError` when somebody of the batch is named to be read besides a bank."""
        if bank is not None and (self.readers, self.group) != (type(self).readers, None):
            raise ControlError(
                f"'{self.name}': with a bank its pictures are read in place of others of the batch, so readers and "
                "group say nothing. Leave them out."
            )

    def first(self, image: int) -> int:
        """The first picture of the group of a picture."""
        return 0 if self.group is None else image // self.group * self.group

    def reads(self, image: int, images: int) -> tuple[int, ...]:
        first = self.first(image)
        last = images if self.group is None else min(images, first + self.group)
        if self.readers == "anchors":
            last = min(last, first + self.anchors)
        return tuple(other for other in range(first, last) if other != image)
