"""Keys and values of pictures, kept once and read by any number of later ones.

bank = Bank(dtype="bfloat16", device="cpu")
with attach(pipe, Keep(bank=bank, layers="up.self")):
    pipe("a red star")
with attach(pipe, Share(bank=bank, layers="up.self")):
    pipe(["a red star in the snow", "a red star at sea"])

Keys are kept as the kernel gets them, after norm and rotation, by layer, step, guidance branch and picture.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from itertools import pairwise
from pathlib import Path
from typing import Any, ClassVar, NamedTuple, Protocol, runtime_checkable

import torch
from torch import Tensor

from ..content import States
from ..errors import ControlError, ScheduleError, UnsupportedModelError
from ..region import Grid, by
from ..schedule import Moment
from .identity import differing
from .packing import DTYPES, Packed, pack

__all__ = ["Bank", "Entry", "Held", "Recalled", "checked_branch"]

# schedulers keep their levels in float32
_TOLERANCE = 1e-4


class Entry(NamedTuple):
    """What keys and values are kept under."""

    layer: str
    step: int
    branch: str
    picture: int


@runtime_checkable
class Recalled(Protocol):
    """What is read of a bank, before it is said where a forward stands."""

    def at(self, layer: str, moment: Moment) -> Any:
        """The same for a layer of a forward.

        Raises:
            ControlError, ScheduleError: when the bank holds nothing for it.
        """


@dataclass(frozen=True, eq=False)
class Held:
    """Which image tokens of a picture are kept in the layers of a frame, and who holds them.

    Attributes:
        grid: of all image tokens.
        tokens: int64 [n], those that are kept, in raster order.
        names: of regions.
        member: bool [names, n].
        boxes: (x0, y0, x1, y1) around each region, as shares of the picture; () where that was not kept.
    """

    grid: Grid
    tokens: Tensor
    names: tuple[str, ...]
    member: Tensor
    boxes: tuple[tuple[float, ...], ...] = ()

    def same_as(self, other: Held) -> bool:
        """The same tokens, held by regions of the same names and places."""
        alike = (self.grid, self.names, self.boxes) == (other.grid, other.names, other.boxes)
        return alike and torch.equal(self.tokens, other.tokens) and torch.equal(self.member, other.member)


class Bank:
    """Keys and values of pictures.

    Args:
        dtype: what they are kept in: "float32", "bfloat16", "float16", "float8" (lossy), or None for the model's own.
        device: where they are kept; None leaves them where the model is. From another device those of one layer are
            copied when the layer reads them.

    Attributes:
        model: whose keys they are, see `identity_of`; {} while the bank is empty.
        sigmas: noise levels of the run.
        every: every so many steps are kept, and stand for those that follow them.
        tokens: which image tokens are kept: "all", those of subjects ("subject") or of none ("background").
        queries, texts: queries are kept as well; and states of the prompt's tokens.
        places: by (frame of layers, picture), which tokens these are.
        entries: what is kept.
        version: changes whenever what was kept is forgotten.
    """

    made: ClassVar[int] = 0

    def __init__(self, dtype: str | None = None, device: torch.device | str | None = None) -> None:
        if dtype is not None and dtype not in DTYPES:
            raise ControlError(f"A bank's dtype must be None or one of {', '.join(DTYPES)}; found {dtype!r}.")
        self.dtype = dtype
        self.device = device
        self.clear()

    def clear(self) -> None:
        """Forget all that is kept."""
        Bank.made += 1
        self.version = Bank.made
        self.model: dict[str, str] = {}
        self.sigmas: tuple[float, ...] = ()
        self.every = 1
        self.tokens = "all"
        self.queries = self.texts = False
        self.places: dict[tuple[str, int], Held] = {}
        self.entries: dict[Entry, Packed] = {}
        self._steps: dict[int, None] = {}
        self._branches: dict[str, None] = {}

    @property
    def pictures(self) -> int:
        """How many pictures are kept."""
        return 1 + max((picture for _, picture in self.places), default=-1)

    @property
    def layers(self) -> tuple[str, ...]:
        """Names of the layers, in forward order."""
        return tuple(dict.fromkeys(entry.layer for entry in self.entries))

    @property
    def steps(self) -> tuple[int, ...]:
        """Steps that are kept."""
        return tuple(sorted(self._steps))

    @property
    def branches(self) -> tuple[str, ...]:
        """Guidance branches that are kept."""
        return tuple(sorted(self._branches))

    @property
    def names(self) -> tuple[str, ...]:
        """Names of the regions whose tokens are told apart."""
        return tuple(dict.fromkeys(name for held in self.places.values() for name in held.names))

    @property
    def nbytes(self) -> int:
        """Bytes of keys and values, and of queries, outputs and moments where they are kept."""
        return sum(one.nbytes for one in self.entries.values())

    def __repr__(self) -> str:
        return (
            f"Bank({self.pictures} pictures, {len(self.layers)} layers, {len(self.steps)} of {len(self.sigmas)} steps, "
            f"branches {' and '.join(self.branches) or 'none'}, {self.nbytes / 1e6:.1f} MB)"
        )

    def begin(
        self,
        model: Mapping[str, str],
        sigmas: Sequence[float],
        every: int,
        tokens: str,
        queries: bool = False,
        texts: bool = False,
    ) -> None:
        """A forward begins whose keys are kept.

        Raises:
            ControlError, ScheduleError, UnsupportedModelError: when the bank holds others than of this model, run or
                kind of tokens.
        """
        if not self.model:
            self.model, self.sigmas, self.every, self.tokens = dict(model), tuple(sigmas), every, tokens
            self.queries, self.texts = queries, texts
            return
        self._check_model(model)
        self._check_levels(sigmas)
        names = ("tokens", "every", "queries", "texts")
        kept, asked = [getattr(self, name) for name in names], [tokens, every, queries, texts]
        if kept != asked:
            told = [
                ", ".join(f"{name}={one!r}" for name, one in zip(names, told, strict=True)) for told in (kept, asked)
            ]
            raise ControlError(
                f"The bank keeps {told[0]}; found {told[1]}. Use a bank of its own for each, or clear() this one."
            )

    def put(
        self,
        entry: Entry,
        frame: str,
        held: Held,
        states: States,
        moments: Tensor | None = None,
    ) -> None:
        """Keep a layer's states [heads, tokens, head_dim] of a picture: of its tokens `held`, and of texts behind them;
        and the moments of all its image tokens, see `Packed`.

        Raises:
            ControlError: when the place is taken, or the picture had another size or other tokens before.
        """
        known = self.places.setdefault((frame, entry.picture), held)
        if not known.same_as(held):
            raise ControlError(
                f"The bank keeps {len(known.tokens)} tokens of picture {entry.picture}, of a grid of {by(known.grid)}; "
                f"now it is given {len(held.tokens)} of {by(held.grid)}. Use a bank for each size and set of regions."
            )
        if entry in self.entries:
            raise ControlError(
                f"The bank already has keys of layer {entry.layer}, step {entry.step}, branch '{entry.branch}', "
                f"picture {entry.picture}: a second run, or two branches of that name. Use a bank for "
                "each, or clear() it."
            )
        packed = pack(states.key, states.value, self.dtype, self.device, states.query if self.queries else None)
        if moments is not None:
            packed = replace(packed, moments=moments.to(packed.states.device))
        self.add(entry, packed)

    def put_output(self, entry: Entry, output: Tensor) -> None:
        """Keep what attention gave out [heads, image tokens, head_dim] at the tokens of an entry that is there."""
        self.entries[entry] = self.entries[entry].with_output(output, self.dtype, self.device)

    def add(self, entry: Entry, packed: Packed) -> None:
        """Keep what is packed already."""
        self.entries[entry] = packed
        self._steps[entry.step] = None
        self._branches[entry.branch] = None

    def check(self, model: Mapping[str, str], moment: Moment, branch: str | None) -> None:
        """Whether a forward can read this bank.

        Raises:
            ControlError: when it is empty, or has not this branch.
            ScheduleError: when it is of other noise levels, or has not this step.
            UnsupportedModelError: when it is of another model.
        """
        self.check_filled(model)
        self._check_levels(moment.sigmas)
        if branch not in self.branches:
            raise ControlError(
                f"The bank keeps branches {' and '.join(self.branches)}, and a forward of branch '{branch}' reads it. "
                "Capture with Keep(branch='all') and the same guidance, or read with Share(branch=...) what there is."
                if branch is not None
                else _UNKNOWN_BRANCH
            )
        self.kept_step(moment.step)

    def check_filled(self, model: Mapping[str, str]) -> None:
        """Raises `ControlError` when it is empty, `UnsupportedModelError` when it is of another model."""
        if not self.entries:
            raise ControlError("The bank is empty: run the pipeline with Keep(bank=bank) first, or load one.")
        self._check_model(model)

    def nearest_step(self, sigma: float | None) -> int:
        """The kept step at the noise level nearest to `sigma`, for runs over other levels: an inversion calls the model
        at 0 as well, and at the noisiest level only where it is told to arrive; else the next one stands for it.

        Raises:
            ScheduleError: when none is as near as the bank's own levels are to each other, or it is not kept.
        """
        if sigma is None:
            raise ScheduleError(
                "The bank is read by noise level, and that of this forward cannot be told. Attach to the pipeline, or "
                "pass scheduler=... after its set_timesteps."
            )
        # the share of noise, which is finite where there is no signal
        levels = [1 - 1 / (1 + one) for one in self.sigmas]
        away = [abs(level - (1 - 1 / (1 + sigma))) for level in levels]
        nearest = min(range(len(levels)), key=away.__getitem__)
        widest = max((abs(a - b) for a, b in pairwise(levels)), default=0.0)
        if away[nearest] > widest + _TOLERANCE:
            raise ScheduleError(
                f"The bank is of a run of {_levels(self.sigmas)}, none of them near sigma {sigma:.4g}. Read it in a "
                "run of the scheduler and size of the bank."
            )
        return self.kept_step(nearest)

    def kept_step(self, step: int | None) -> int:
        """The step whose keys stand for this one: itself, or the last one before within `every`.

        Raises:
            ScheduleError: when there is none.
        """
        near = [one for one in self.steps if step is not None and 0 <= step - one < self.every]
        if not near:
            steps = self.steps
            raise ScheduleError(
                f"The bank keeps no keys for step {step}; it has {len(steps)} steps from {steps[0]} to {steps[-1]} "
                f"of a run of {len(self.sigmas)}. Read it in a window inside that of Keep, or keep more."
            )
        return near[-1]

    def held(self, frame: str) -> tuple[Held, ...]:
        """What is kept of each picture in the layers of a frame.

        Raises:
            ControlError: when a picture has nothing there.
        """
        found = [self.places.get((frame, picture)) for picture in range(self.pictures)]
        there = tuple(one for one in found if one is not None)
        if len(there) < len(found):
            raise ControlError(
                f"The bank keeps nothing of the layers of frame '{frame}' that read it; it has {_listed(self.layers)}. "
                "Read it in the layers that Keep had."
            )
        return there

    def check_entries(self, wanted: Iterable[Entry]) -> None:
        """Raises `ControlError` when some of these are not kept."""
        missing = [entry for entry in wanted if entry not in self.entries]
        if missing:
            layers = _listed(dict.fromkeys(entry.layer for entry in missing))
            raise ControlError(
                f"The bank keeps no keys of layer {layers} at step {missing[0].step} in branch '{missing[0].branch}' "
                f"for picture {missing[0].picture}; it has {_listed(self.layers)}. Read it in the layers and "
                "window that Keep had."
            )

    def save(self, path: str | Path) -> Path:
        """Write all to a safetensors file; whole or not at all, see `attnctrl.bank.file`."""
        from .file import save

        return save(self, path)

    @staticmethod
    def load(path: str | Path, pipe_or_model: Any = None, *, device: torch.device | str | None = None) -> Bank:
        """The bank in a file that `save` wrote.

        Args:
            path: of the file.
            pipe_or_model: whose keys they must be; None leaves that to the first forward that reads them.
            device: where they are kept, as of a new bank.

        Raises:
            AssetError: the file is missing, damaged, of a newer format, or of another model.
        """
        from .file import load

        return load(path, pipe_or_model, device)

    def _check_model(self, model: Mapping[str, str]) -> None:
        if found := differing(self.model, model):
            told = ", ".join(f"{name} {self.model[name]} kept, {model.get(name)} here" for name in found)
            raise UnsupportedModelError(
                f"The bank is of another model ({told}): keys of one model mean nothing to another. Capture it anew."
            )

    def _check_levels(self, sigmas: Sequence[float]) -> None:
        near = len(sigmas) == len(self.sigmas) and all(
            math.isclose(a, b, rel_tol=_TOLERANCE, abs_tol=_TOLERANCE**2)
            for a, b in zip(sigmas, self.sigmas, strict=True)
        )
        if not near:
            raise ScheduleError(
                f"The bank is of a run of {_levels(self.sigmas)}, and this one has {_levels(sigmas)}. Run with the "
                "scheduler, the number of steps and the size (where levels depend on it) of the bank."
            )


_UNKNOWN_BRANCH = (
    "Which guidance branch this forward is cannot be told, so a bank cannot be read or filled. Attach to the pipeline, "
    "or name the branches of a batch with attach(..., branches=('uncond', 'cond'))."
)


def checked_branch(branch: str | None) -> str:
    """The branch of a row. Raises `ControlError` when it is unknown."""
    if branch is None:
        raise ControlError(_UNKNOWN_BRANCH)
    return branch


def _levels(sigmas: Sequence[float]) -> str:
    if not sigmas:
        return "no known noise levels"
    return f"{len(sigmas)} steps from sigma {sigmas[0]:.4g} to {sigmas[-1]:.4g}"


def _listed(names: Iterable[str]) -> str:
    names = list(names)
    return ", ".join(names[:3]) + (f" and {len(names) - 3} more" if len(names) > 3 else "")
