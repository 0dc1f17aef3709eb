"""A cast and its shots: who is told of in which prompt, checked before anything is drawn."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace

from attnctrl.errors import SceneError
from attnctrl.scene import MAX_SEED

__all__ = ["Character", "Shot", "resolve", "told_by"]

Box = Sequence[float]
_NAME = re.compile(r"\{([^{}]*)\}")


@dataclass(frozen=True)
class Character:
    """Somebody or something that stays what it is.

    Attributes:
        name: as shots call it.
        description: the words for it in prompts.
    """

    name: str
    description: str


@dataclass(frozen=True)
class Shot:
    """One picture of a story.

    Attributes:
        prompt: in words; "{name}" stands for a character's description.
        who: names of the characters in it; None takes all that the prompt names or describes.
        boxes: by name, where characters are: (x0, y0, x1, y1) in [0, 1]; the others are found.
        seed: of its noise.
    """

    prompt: str
    who: Sequence[str] | None = None
    boxes: Mapping[str, Box] = field(default_factory=dict)
    seed: int | None = None


def resolve(cast: Sequence[Character], shots: Sequence[Shot], seed: int = 0, *, whole: bool = True) -> tuple[Shot, ...]:
    """The shots with descriptions in their prompts, the names of those in it, and seeds.

    Args:
        seed: of the first shot, from which those without one count up.
        whole: every character must be in some shot.

    Raises:
        SceneError: they do not fit together.
    """
    names = [one.name for one in cast]
    if not cast or not shots:
        raise SceneError(f"A story needs a cast and shots; found {len(cast)} characters, {len(shots)} shots; add some.")
    if twice := [name for name in names if names.count(name) > 1 or not name.strip()]:
        raise SceneError(f"cast: every character has a name of its own; found '{twice[0]}'; rename it.")
    if blank := [one.name for one in cast if not one.description.strip()]:
        raise SceneError(f"cast: '{blank[0]}' has no description; say in words what it is.")
    found = tuple(_resolved(cast, shot, f"shot {n}", seed + n) for n, shot in enumerate(shots))
    seen = {name for shot in found for name in shot.who or ()}
    if whole and (absent := [name for name in names if name not in seen]):
        raise SceneError(
            f"cast: no shot shows '{absent[0]}'; write {{{absent[0]}}} in the prompt of one, or leave it out."
        )
    return found


def _resolved(cast: Sequence[Character], shot: Shot, label: str, seed: int) -> Shot:
    known = {one.name: one for one in cast}
    marked = _NAME.findall(shot.prompt)
    for name in (*marked, *(shot.who or ()), *shot.boxes):
        if name not in known:
            raise SceneError(
                f"{label}: '{name}' is not in the cast, which is {', '.join(known)}; add it, or rename it."
            )
    prompt = _NAME.sub(lambda match: known[match[1]].description, shot.prompt)
    told = [name for name, one in known.items() if _tells(prompt, one.description)]
    who = told if shot.who is None else list(shot.who)
    for name in (*who, *shot.boxes):
        if name not in told:
            raise SceneError(
                f"{label}: the prompt '{prompt}' does not hold the words '{known[name].description}' of '{name}'; "
                f"write {{{name}}} where it is told of."
            )
    if lost := [name for name in shot.boxes if name not in who]:
        raise SceneError(f"{label}: a box for '{lost[0]}', who is not in it; add it to `who`, or leave the box out.")
    wanted = seed if shot.seed is None else shot.seed
    if not 0 <= wanted <= MAX_SEED:
        raise SceneError(f"{label}: seed must be in 0 .. {MAX_SEED}; found {wanted}; take another one.")
    return replace(shot, prompt=prompt, who=tuple(who), seed=wanted)


def _tells(prompt: str, words: str) -> bool:
    return re.search(rf"(?<!\w){re.escape(words.strip())}(?!\w)", prompt, re.IGNORECASE) is not None


_ARTICLE = re.compile(r"^(?:an?|the)\s+(?=\S)", re.IGNORECASE)


def told_by(cast: Sequence[Character], shots: Sequence[Shot]) -> dict[str, list[str | None]]:
    """By character, its words in each shot where it has to be found, as `attnctrl.maps.record` takes them: without a
    leading article, with which they are found worse (docs/maps.md)."""
    words = {one.name: _ARTICLE.sub("", one.description.strip()) for one in cast}
    found = {
        name: [told if name in (shot.who or ()) and name not in shot.boxes else None for shot in shots]
        for name, told in words.items()
    }
    return {name: told for name, told in found.items() if any(told)}
