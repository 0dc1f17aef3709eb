"""A cast in a bank: what later pictures read of a story's first ones, without drawing those again.

Kept is what the controls of the story share and take in, in their layers, steps and branches; what the pictures that
read the bank look like is what they look like beside the story's, to rounding.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import TYPE_CHECKING, Any

from attnctrl.controls import Harmonize, Keep, Reposition, Share
from attnctrl.errors import ControlError

if TYPE_CHECKING:
    from attnctrl.bank import Bank
    from attnctrl.controls import Control
    from attnctrl.region import Region
    from attnctrl.schedule import Window

__all__ = ["keeps", "reading", "same_bank"]


def keeps(acting: Sequence[Control], regions: Sequence[Sequence[Region]], pictures: int, bank: Bank) -> list[Keep]:
    """What keeps, beside these controls, all that a story's first pictures are read for.

    Args:
        acting: the story's controls.
        regions: of each picture of the batch.
        pictures: so many of the first are kept.
        bank: an empty one.

    Raises:
        ControlError: the bank holds something, or later pictures could not do without those in the batch.
    """
    if bank.entries:
        raise ControlError(f"The bank is not empty ({bank!r}); give a new one, or clear() it.")
    harmonies = [one for one in acting if isinstance(one, Harmonize)]
    told: dict[str, Any] = {"bank": bank, "pictures": pictures, "outputs": _harmonized(acting)}
    told["queries"] = any(one.features == "query" for one in harmonies)
    scenes = [list(own) for own in regions]
    return [
        Keep(
            scenes,
            tokens=one.tokens,
            overlap=one.overlap,
            layers=one.layers,
            window=one.window,
            branch=one.branch,
            **told,
        )
        for one in _sharing(acting)
    ]


def reading(acting: Sequence[Control], bank: Bank, pictures: int) -> list[Control]:
    """The same controls for pictures that read a bank of so many pictures in place of others of the batch.

    Raises:
        ControlError: the bank holds others, or one of the controls needs the pictures themselves.
    """
    harmonies = [one for one in acting if isinstance(one, Harmonize)]
    sharing: list[Control] = [*_sharing(acting), *harmonies]
    if bank.pictures != pictures:
        raise ControlError(
            f"New pictures of this story read {pictures} of its pictures, and the bank holds {bank.pictures} "
            f"({bank!r}). Fill one with keep(story, bank), or with perform(..., bank=bank)."
        )
    if harmonies and not any(packed.output is not None for packed in bank.entries.values()):
        raise ControlError(
            f"'{harmonies[0].name}' takes in outputs of attention, and the bank holds keys and values alone "
            f"({bank!r}). Fill one with keep(story, bank), or with perform(..., bank=bank), of this story."
        )
    alone: dict[str, Any] = {"bank": bank, "readers": Share.readers, "anchors": Share.anchors, "group": None}
    # where nobody is in any picture, there is nobody to read as
    idle = [one for one in sharing if getattr(one, "queries", "same") != "all" and not any(one.scenes)]
    left = [one for one in acting if one not in idle and not (one.follows and len(idle) == len(sharing))]
    return [replace(one, **alone) if one in sharing else one for one in left]


def same_bank(digest: str, bank: Bank | None) -> Bank:
    """The bank that a record names. Raises `ControlError` where it is missing or another one."""
    from attnctrl.bank.identity import digest_of

    if bank is None or digest_of(bank) != digest:
        raise ControlError(
            f"What this picture reads is in a bank (sha256 {digest[:16]}...), and "
            f"{'none was given' if bank is None else 'the one that was given is another'}. Give bank=Bank.load(path)."
        )
    return bank


def _harmonized(acting: Sequence[Control]) -> Window | None:
    """When outputs are taken in.

    Raises:
        ControlError: at several windows, or where nothing of these subjects is shared, and so nothing is kept.
    """
    harmonies, sharing = [one for one in acting if isinstance(one, Harmonize)], _sharing(acting)
    if len({one.window for one in harmonies}) > 1:
        raise ControlError("Outputs are taken in at two windows, and a bank keeps them at one. Leave one Harmonize.")
    for one in harmonies:
        if not any(_covers(other, one) for other in sharing):
            raise ControlError(
                f"'{one.name}' takes in outputs in the window {one.window} of the layers {one.layers!r}, and a bank "
                f"holds what is shared: {', '.join(f'{other.window} of {other.layers!r}' for other in sharing)}. Share "
                "subjects in all of that, or go on without a bank."
            )
    return next((one.window for one in harmonies), None)


def _covers(sharing: Share, harmony: Harmonize) -> bool:
    """All that is taken in is among what is shared."""
    wide, narrow = sharing.window, harmony.window
    inside = wide == narrow or (
        isinstance(wide, tuple) and isinstance(narrow, tuple) and wide[0] <= narrow[0] and narrow[1] <= wide[1]
    )
    same = sharing.layers in (None, harmony.layers) and sharing.branch in ("all", harmony.branch)
    return inside and same and sharing.tokens != "background"


def _sharing(acting: Sequence[Control]) -> list[Share]:
    """The controls by which pictures are shared. Raises `ControlError` where some need more than a bank holds."""
    if any(isinstance(one, Reposition) and one.exchanges for one in acting):
        raise ControlError(
            "'reposition' with mode='table' draws the story's pictures with subjects at other places for each that "
            "reads them, and those of a bank are drawn. Draw the story without it (preset 'subjects': options "
            "reposition=None), or go on without a bank."
        )
    found = [one for one in acting if isinstance(one, Share)]
    if not found:
        raise ControlError("No control of this story shares pictures, so there is nothing to keep in a bank.")
    return found
