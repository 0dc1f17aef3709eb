"""A set of attention heads: which ones, how strongly, when, of which model, and how they were found. No pickle."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping, Sequence
from functools import cached_property
from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import BaseModel, BeforeValidator, ConfigDict, Field, PlainSerializer, ValidationError

from .bank.identity import differing
from .errors import AssetError, ControlError
from .files import write_text
from .scenefile import FileRefused, read_bounded, short
from .schedule import Window, checked_window, is_empty, window_from_json, window_to_json
from .select import Layer

__all__ = [
    "FORMAT",
    "MAX_BYTES",
    "HeadSet",
    "Kind",
    "Round",
    "Scored",
    "SearchRecord",
    "is_written_set",
    "number_of_heads",
]

FORMAT = "attnctrl-heads-1"
MAX_BYTES = 16 * 1024 * 1024
MAX_HEADS = 100_000

Kind = Literal["identity", "uniform", "mean_query", "blur", "temperature", "max", "slerp"]
Share = Annotated[float, Field(ge=0, le=1)]
Name = Annotated[str, Field(min_length=1, max_length=200)]
Head = tuple[Name, Annotated[int, Field(ge=0)]]


def _window(value: Any) -> Window:
    window = checked_window(window_from_json(value), "heads")
    if is_empty(window):
        raise ValueError(f"the window {window} holds no step, so the set would never act; widen it")
    return window


class _Data(BaseModel):
    model_config = ConfigDict(frozen=True, extra="forbid", allow_inf_nan=False)


class Scored(_Data):
    """What a head came to in a round.

    Attributes:
        head: (layer, number).
        pairs: on how many (prompt, seed).
        mean: of the objective, over these pairs.
        delta: mean of the difference to the set as it stood before the round, on the same pairs.
        error: standard error of `delta`; None on a single pair.
    """

    head: Head
    pairs: int
    mean: float
    delta: float
    error: float | None


class Round(_Data):
    """A round of a search.

    Attributes:
        base: mean of the objective over all pairs, of the set as it stood before.
        taken: how many heads the round took.
        scores: of all candidates, the best first.
    """

    base: float
    taken: int
    scores: tuple[Scored, ...]


class SearchRecord(_Data):
    """How a set was found.

    Attributes:
        objectives: weights by name.
        prompts: digest of all pairs (prompt, seed), and `pairs`, how many.
        settings: what the pictures were drawn with: steps, size, guidance.
        forwards: rows that the search ran through the denoiser, those of an earlier part of it included.
    """

    objectives: dict[str, float]
    prompts: str
    pairs: int
    settings: dict[str, Any]
    mode: str
    forwards: int
    rounds: tuple[Round, ...]


class HeadSet(_Data):
    """Heads that are perturbed together; `Perturb(heads=...)` takes one, or the path of a file.

    Attributes:
        heads: (layer, number), the ones found first in front. A layer is named by its own name or as "joint:3".
        kind: what becomes of their maps, see `Perturb`.
        strength: u of all of them, or of each.
        scale: w of the branch.
        window: when it acts.
        model: which model they belong to, see `attnctrl.bank.identity`; None fits any that has these heads.
        search: how they were found; None for a set that was told.

    Raises:
        ControlError: for values that cannot be.
    """

    format: Literal["attnctrl-heads-1"] = "attnctrl-heads-1"
    heads: Annotated[tuple[Head, ...], Field(max_length=MAX_HEADS)]
    kind: Kind = "identity"
    strength: Share | tuple[Share, ...] = 1.0
    scale: Annotated[float, Field(ge=0)] = 3.0
    window: Annotated[Any, BeforeValidator(_window), PlainSerializer(window_to_json)] = (0.0, 1.0)
    model: dict[str, str] | None = None
    search: SearchRecord | None = None

    def __init__(self, /, **data: Any) -> None:
        try:
            super().__init__(**data)
        except ValidationError as error:
            raise ControlError(_told(error)) from None
        if len(set(self.heads)) != len(self.heads):
            twice = next(one for one in self.heads if self.heads.count(one) > 1)
            raise ControlError(f"A set of heads names head {twice[1]} of {twice[0]} twice. Leave one of them out.")
        if isinstance(self.strength, tuple) and len(self.strength) != len(self.heads):
            raise ControlError(
                f"A set of {len(self.heads)} heads has one strength, or one for each; found {len(self.strength)}."
            )

    @cached_property
    def shares(self) -> Mapping[str, Mapping[int, float]]:
        """u of each head, by layer as it is named."""
        each = self.strength if isinstance(self.strength, tuple) else (self.strength,) * len(self.heads)
        found: dict[str, dict[int, float]] = {}
        for (layer, head), share in zip(self.heads, each, strict=True):
            found.setdefault(layer, {})[head] = share
        return found

    @property
    def strongest(self) -> float:
        """The largest u; 0 without heads."""
        return max((u for heads in self.shares.values() for u in heads.values()), default=0.0)

    def changed(self, **changes: Any) -> HeadSet:
        """The same with other values, checked."""
        return HeadSet(**{**{name: getattr(self, name) for name in type(self).model_fields}, **changes})

    def scaled(self, top: float, wanted: float) -> HeadSet:
        """A head of strength `top` gets the strength `wanted`, others in proportion; where top is 0, all get it."""

        def moved(u: float) -> float:
            return wanted if u == top else u * wanted / top

        each = self.strength
        return self.changed(strength=tuple(map(moved, each)) if isinstance(each, tuple) else moved(each))

    def first(self, count: int) -> HeadSet:
        """The `count` heads that were found first, without the record of the search."""
        strength = self.strength[:count] if isinstance(self.strength, tuple) else self.strength
        return self.changed(heads=self.heads[:count], strength=strength, search=None)

    def check_model(self, identity: Callable[[], Mapping[str, str]], layers: Sequence[Layer]) -> None:
        """Whether a model is the one that the set belongs to, and has its heads.

        The dtype may differ; then weights cannot be compared, and class and configuration are.

        Args:
            identity: () -> which model it is.
            layers: all attention layers of it.

        Raises:
            ControlError: when not.
        """
        if self.model is not None:
            found = dict(identity())
            wrong = [name for name in differing(self.model, found) if name != "dtype"]
            if self.model.get("dtype") != found.get("dtype"):
                wrong = [name for name in wrong if name != "weights"]
            if wrong:
                parts = ", ".join(f"{name} {self.model[name]} and not {found.get(name)}" for name in wrong)
                raise ControlError(
                    f"'perturb': these heads belong to another model ({parts}). Search heads for this one, or give the "
                    "set model=None to use it here all the same."
                )
        known = {name: layer for layer in layers for name in (layer.name, f"{layer.stack}:{layer.index}")}
        for name, heads in self.shares.items():
            if name not in known:
                raise ControlError(f"'perturb': the set names a layer {name!r} that this model does not have.")
            count = number_of_heads(known[name])
            if max(heads) >= count:
                raise ControlError(
                    f"'perturb': the set names head {max(heads)} of {name}, which has {count}, from 0 on."
                )

    def to_dict(self) -> dict[str, Any]:
        """As in documents: all but how it was found."""
        return self.model_dump(mode="json", exclude={"search"}, exclude_none=True)

    def save(self, path: str | Path) -> Path:
        """Write it as JSON; whole or not at all."""
        return write_text(path, json.dumps(self.model_dump(mode="json"), indent=1) + "\n")

    @classmethod
    def load(cls, path: str | Path) -> HeadSet:
        """The set in a file.

        Raises:
            AssetError: there is no such file.
            ControlError: it holds no set of heads.
        """
        path = Path(path)
        if not path.exists():
            raise AssetError(f"There is no file {path} with a set of heads. `attnctrl heads search -o` writes one.")
        try:
            data = json.loads(read_bounded(path, MAX_BYTES))
        except (FileRefused, ValueError, RecursionError) as error:
            raise ControlError(f"{path} is no set of heads: {error}.") from error
        if not is_written_set(data):
            raise ControlError(f"{path} is no set of heads: it wants 'format': '{FORMAT}'; found {short(data)}.")
        try:
            return cls(**data)
        except ControlError as error:
            raise ControlError(f"{path}: {error}") from error


def is_written_set(data: Any) -> bool:
    """Whether this is how a set of heads is written, and not heads by layer."""
    return isinstance(data, Mapping) and "format" in data and all(isinstance(key, str) for key in data)


def number_of_heads(layer: Layer) -> int:
    """How many heads the queries of a layer have; raises ControlError where the module does not say it."""
    found = getattr(layer.module, "heads", None)
    if not isinstance(found, int):
        raise ControlError(f"{type(layer.module).__name__} at {layer.name} does not tell its number of heads.")
    return found


def _told(error: ValidationError) -> str:
    parts = []
    for one in error.errors(include_url=False):
        place = ".".join(map(str, one["loc"]))
        # what stands under a validator of its own tells all there is
        message = one["msg"].removeprefix("Value error, ")
        parts.append(f"{place}: {message}; found {short(one['input'])}")
    return f"A set of heads cannot be made: {'; '.join(dict.fromkeys(parts))}."
