"""Scores of candidates: objectives, and a file that keeps what is known, so that a search goes on where it stopped.

Every score has a key, a digest of all that it depends on. A line of the file holds those of one batch of pictures, so
that a batch is kept whole or not at all, and what is drawn again has the neighbours that it had.
"""

from __future__ import annotations

import hashlib
import json
import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from torch import Tensor

from ..errors import AssetError, AttnCtrlError, ControlError
from ..headset import HeadSet
from .sampler import Pair, Sampler

__all__ = ["BudgetSpentError", "Objective", "Scorer", "digest"]

Advance = Callable[[int, int], None]
"""Called with (pictures done, pictures in all)."""


class BudgetSpentError(AttnCtrlError, RuntimeError):
    """The next batch would cost more than is left; what was scored is kept."""


@dataclass(frozen=True)
class Objective:
    """What pictures should be good at.

    Attributes:
        name: under which its scores are kept; another one for another version.
        score: (images float32 [B, 3, h, w] in [0, 1], prompts of them) -> B numbers, higher is better.
        weight: in the sum with other objectives.
    """

    name: str
    score: Callable[[Tensor, Sequence[str]], Any]
    weight: float = 1.0

    def __post_init__(self) -> None:
        if not math.isfinite(self.weight):
            raise ControlError(f"The weight of objective '{self.name}' is a number; found {self.weight}.")

    def __call__(self, images: Tensor, prompts: Sequence[str], sets: Sequence[HeadSet]) -> list[float]:
        """The scores, checked.

        Raises:
            ControlError: for another number of scores than pictures, or one that is no number, naming the candidate.
        """
        found = self.score(images, prompts)
        values = [float(one) for one in (found.tolist() if isinstance(found, Tensor) else found)]
        if len(values) != len(sets):
            raise ControlError(
                f"Objective '{self.name}' gave {len(values)} scores for {len(sets)} pictures (the first of "
                f"{_told(sets[0])}). It is to give one for each."
            )
        wrong = [number for number, value in enumerate(values) if not math.isfinite(value)]
        if wrong:
            raise ControlError(
                f"Objective '{self.name}' gave {values[wrong[0]]} for the picture of {prompts[wrong[0]]!r} with "
                f"{_told(sets[wrong[0]])}. Scores are finite numbers: let it give a low one for pictures it cannot "
                "judge."
            )
        return values


@dataclass
class Scorer:
    """Scores of sets of heads on pairs, each drawn once.

    Attributes:
        sampler: draws.
        objectives: their weighted sum is the score.
        store: JSON lines of what is known; None keeps it in memory alone.
        budget: rows of the denoiser's forwards, see `attnctrl.heads.meter`; None for no bound.
        advance: told of pictures as they are scored.
        total: pictures in all, as far as is known beforehand.
    """

    sampler: Sampler
    objectives: Sequence[Objective]
    store: Path | None = None
    budget: int | None = None
    advance: Advance | None = None
    total: int = 0
    known: dict[str, Mapping[str, float]] = field(default_factory=dict)
    _done: int = 0
    _last: Pair | None = None
    _rows: list[int] = field(default_factory=list)
    _batch: dict[str, int] = field(default_factory=dict)
    _used: set[int] = field(default_factory=set)

    def __post_init__(self) -> None:
        names = [one.name for one in self.objectives]
        if not names or len(set(names)) < len(names):
            raise ControlError(f"A search has objectives, each of another name; found {names}.")
        self._context = digest(self.sampler.identity)
        for line in _lines(self.store) if self.store is not None else []:
            self._learn({key: one["values"] for key, one in line["scores"].items()}, line["rows"])

    @property
    def spent(self) -> int:
        """Rows that were run for the scores that were asked for so far, by this search or an earlier part of it."""
        return sum(self._rows[number] for number in self._used)

    def _learn(self, values: Mapping[str, Mapping[str, float]], rows: int) -> None:
        """Scores of a batch that took so many rows."""
        self.known.update(values)
        self._batch.update(dict.fromkeys(values, len(self._rows)))
        self._rows.append(rows)

    def key(self, one: HeadSet, pair: Pair) -> str:
        """Of all that a picture depends on; the order of heads is not among it."""
        shares = {layer: sorted(heads.items()) for layer, heads in sorted(one.shares.items())}
        # a picture without perturbation knows nothing of the perturbation
        how = [one.kind, one.scale, one.model_dump(mode="json")["window"]] if one.heads else None
        return digest([self._context, shares, how, pair.prompt, pair.seed])

    def scores(self, sets: Sequence[HeadSet], pair: Pair) -> list[float]:
        """The weighted sum for each set; those that are not known yet are drawn.

        Raises:
            BudgetSpentError: before a batch that costs more than is left.
            ControlError: for objectives that give no numbers.
        """
        names = {one.name for one in self.objectives}
        keys = [self.key(one, pair) for one in sets]
        missing = [n for n, key in enumerate(keys) if not names <= self.known.get(key, {}).keys()]
        new = set(missing)
        self._used.update(self._batch[key] for n, key in enumerate(keys) if n not in new)
        self._tell(len(sets) - len(missing))
        for part in _parts(missing, self.sampler.batch):
            self._draw([sets[n] for n in part], [keys[n] for n in part], pair)
            self._tell(len(part))
        return [math.fsum(one.weight * self.known[key][one.name] for one in self.objectives) for key in keys]

    def _draw(self, sets: Sequence[HeadSet], keys: Sequence[str], pair: Pair) -> None:
        price = self.sampler.price(sets, pair != self._last)
        if self.budget is not None and self.spent + price > self.budget:
            raise BudgetSpentError(
                f"The budget of {self.budget} forwards is spent: {self.spent} ran, and the next {len(sets)} pictures "
                f"take {price}. Give a larger budget; what was scored is kept."
            )
        before = self.sampler.cost.rows
        images = self.sampler.draw(pair, sets)
        self._last = pair
        prompts = [pair.prompt] * len(sets)
        columns = {one.name: one(images, prompts, sets) for one in self.objectives}
        values = {
            # scores under other objectives stay
            key: {**self.known.get(key, {}), **{name: columns[name][n] for name in columns}}
            for n, key in enumerate(keys)
        }
        rows = self.sampler.cost.rows - before
        if self.store is not None:
            scores = {key: {"heads": one.heads, "values": values[key]} for key, one in zip(keys, sets, strict=True)}
            _append(self.store, {"prompt": pair.prompt, "seed": pair.seed, "rows": rows, "scores": scores})
        self._learn(values, rows)
        self._used.add(len(self._rows) - 1)

    def _tell(self, more: int) -> None:
        self._done += more
        if self.advance is not None:
            self.advance(self._done, max(self.total, self._done))


def digest(data: Any) -> str:
    """Of JSON data."""
    text = json.dumps(data, sort_keys=True, default=str)
    return hashlib.sha256(text.encode()).hexdigest()[:24]


def _told(one: HeadSet) -> str:
    return " + ".join(f"head {head} of {layer}" for layer, head in one.heads[-3:]) or "no head perturbed"


def _parts(items: Sequence[int], most: int) -> Iterator[Sequence[int]]:
    for start in range(0, len(items), most):
        yield items[start : start + most]


def _lines(path: Path) -> list[Any]:
    """What a file of scores holds; a last line that was cut off is taken out of it.

    Raises:
        AssetError: it is damaged elsewhere.
    """
    if not path.exists():
        return []
    data = path.read_bytes()
    whole = data[: data.rfind(b"\n") + 1]
    if whole != data:
        with path.open("rb+") as file:
            file.truncate(len(whole))
    found = []
    for number, line in enumerate(whole.splitlines(), 1):
        try:
            one = json.loads(line)
            _ = one["rows"], [dict(each["values"]) for each in one["scores"].values()]
        except (ValueError, KeyError, TypeError, AttributeError) as error:
            raise AssetError(
                f"{path}: line {number} is no line of scores ({error!r}). Take it out of the file."
            ) from error
        found.append(one)
    return found


def _append(path: Path, line: Mapping[str, Any]) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open("ab") as file:
        file.write(json.dumps(line, allow_nan=False).encode() + b"\n")
