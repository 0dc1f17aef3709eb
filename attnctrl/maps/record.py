"""Recording: what image tokens attend to while a pipeline runs, next to the user's controls and without a trace."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial
from types import TracebackType
from typing import Any, ClassVar, Literal

import torch
from torch import Tensor

from ..act import Probe
from ..attach import Handle, attach, parts_of
from ..controls.base import Control
from ..errors import ControlError, LayoutError
from ..families import family_of
from ..layout import Frame
from ..region import Grid
from ..report import Report
from ..schedule import Window
from ..select import Layer, Selector
from ..watch import View
from .keys import Cells, Key, Keys, keys_of
from .probe import LayerProbe
from .store import Over, Store

__all__ = ["Reading", "Recording", "record"]

When = Literal["pre", "post"]
_MADE = 256


@dataclass(frozen=True, eq=False, kw_only=True)
class Reading(Control):
    """A seat that only observes: it reads attention into a store. Made by `record`, not by hand.

    Attributes:
        keys: groups of keys.
        prompts: number of prompts, which share the rows of a batch evenly.
        when: "pre", the model's own attention; "post", as controls make it.
        store: where maps go.

    Raises:
        ControlError: when a field is out of range.
    """

    name: ClassVar[str] = "maps"
    observes: ClassVar[bool] = True

    keys: tuple[Keys, ...] = ()
    prompts: int = 1
    when: When = "pre"
    store: Store = field(default_factory=Store)
    _made: dict[Any, Any] = field(default_factory=dict, init=False)

    def __post_init__(self) -> None:
        super().__post_init__()
        self._check_choice("when", When)
        self._check_choice("branch", Literal["cond", "uncond"])
        over = self.store.over
        if over not in ("mean", "last") and not (isinstance(over, float) and 0 <= over < 1):
            raise ControlError(f"'maps': over must be 'mean', 'last' or a share in [0, 1); found {over!r}.")

    def probes(self, view: View) -> dict[str, Probe]:
        """A probe for each layer that has keys of any group."""
        rows = len(view.frames)
        if rows % self.prompts:
            raise LayoutError(
                f"The record was given {self.prompts} prompts, but branch '{self.branch}' has {rows} rows. Give "
                "record(prompt=...) the prompts of the pipeline's call."
            )
        acts = view.acts() if self.when == "post" else {}
        found: dict[str, Probe] = {}
        for layer in view.layers:
            frames = tuple(frames[layer.frame] for frames in view.frames)
            if "image" not in frames[0].queries:
                continue
            counts, groups = self._columns(frames, view.device)
            if not counts:
                continue
            places = [frame.queries["image"] for frame in frames]
            found[layer.name] = LayerProbe(
                rows=view.rows,
                batch=view.batch,
                tokens=frames[0].tokens,
                image=tuple((place.start, place.stop) for place in places),
                grid=frames[0].queries.grid,
                groups=groups,
                hidden=self._appended(frames, view.device) if self.when == "pre" else None,
                act=acts.get(layer.name),
                put=partial(self._put, layer.name, counts),
            )
        if found:
            self.store.begin(view.moment.step)
        return found

    def _put(self, layer: str, counts: dict[str, int], maps: Tensor) -> None:
        for name, part in zip(counts, maps.split(list(counts.values()), dim=1), strict=True):
            # not a view: it would hold all groups, and their padding, alive
            self.store.put(layer, name, part.clone())

    def _columns(self, frames: tuple[Frame, ...], device: torch.device) -> tuple[dict[str, int], Tensor]:
        """(number of columns of each group that has keys here, float32 [rows, keys, columns])."""

        def make() -> tuple[dict[str, int], Tensor]:
            each = len(frames) // self.prompts
            there: dict[str, Tensor] = {}
            for keys in self.keys:
                found = [keys.columns(frame.keys, row // each) for row, frame in enumerate(frames)]
                parts = [part for part in found if part is not None]
                if len(parts) == len(frames):
                    there[keys.name] = torch.stack(parts)
            groups = torch.cat(list(there.values()), dim=-1) if there else torch.empty(0)
            return {name: part.shape[-1] for name, part in there.items()}, groups.to(device)

        return self._once(("columns", frames, device), make)

    def _appended(self, frames: tuple[Frame, ...], device: torch.device) -> Tensor | None:
        """Additive bias [rows, 1, 1, keys] that hides the texts of controls: the model by itself has none."""

        def make() -> Tensor | None:
            hidden = torch.zeros(len(frames), frames[0].keys.tokens, dtype=torch.bool)
            for row, frame in zip(hidden, frames, strict=True):
                for item in frame.keys.ranges:
                    row[item.start : item.stop] = item.name.startswith(("text.region", "text.pad"))
            if not bool(hidden.any()):
                return None
            return torch.zeros(hidden.shape).masked_fill(hidden, float("-inf"))[:, None, None].to(device)

        return self._once(("appended", frames, device), make)

    def _once(self, key: Any, make: Callable[[], Any]) -> Any:
        """What `make` gives, made once: frames of a run stay the same."""
        if key not in self._made:
            if len(self._made) >= _MADE:
                self._made.clear()
            self._made[key] = make()
        return self._made[key]


class Recording:
    """What was read so far. Use it as a context manager, or call `detach`; the maps stay.

    found["cat"] is float32 [rows, h, w] (a film's [rows, frames, h, w]): the share of its attention that each image
    token gives to the group, mean over heads, layers and steps. Rows are those of one guidance branch, pictures of one
    prompt after each other.
    """

    def __init__(self, handle: Handle, reading: Reading, grid: tuple[int, int] | None) -> None:
        self._handle = handle
        self._reading = reading
        self._grid = grid

    @property
    def names(self) -> tuple[str, ...]:
        """All groups."""
        return tuple(keys.name for keys in self._reading.keys)

    @property
    def steps(self) -> tuple[int, ...]:
        """Steps that were read; forwards in order, where there is no scheduler."""
        return tuple(self._reading.store.steps)

    @property
    def layers(self) -> tuple[str, ...]:
        """Names of the layers that were read."""
        return tuple(dict.fromkeys(layer for layer, _ in self._reading.store.tracks))

    @property
    def grid(self) -> Grid:
        """Size of the maps: the one asked for, or that of the finest layer."""
        if not self._reading.store.tracks:
            raise ControlError("Nothing has been read yet. Run the pipeline inside `with maps.record(...)`.")
        finest = self._reading.store.grid
        return finest if self._grid is None else (*finest[:-2], *self._grid)

    def get(self, name: str) -> Tensor | None:
        """As `found[name]`; None where no layer has read it."""
        return self[name] if self._reading.store.layers(name) else None

    def __getitem__(self, name: str) -> Tensor:
        """The maps of a group: float32 [rows, *grid], of `Cells` [rows, cells, *grid].

        Raises:
            ControlError: when there is no such group, or it was not read.
        """
        self._check(name)
        return self._alone(name, self._reading.store.mean(name, self.grid))

    def of_layer(self, name: str, layer: str) -> Tensor:
        """The maps of a group in one layer alone, as `found[name]`, at the layer's own size.

        Raises:
            ControlError: when it was not read there.
        """
        self._check(name)
        if layer not in (known := self._reading.store.layers(name)):
            raise ControlError(f"'{name}' was not read in layer '{layer}'; it was in {', '.join(known)}.")
        return self._alone(name, self._reading.store.value(layer, name))

    def stacked(self, *names: str) -> Tensor:
        """float32 [groups, rows, *grid]: the named groups, or all; as masks and shares take them."""
        return torch.stack([self[name] for name in names or self.names])

    def per_prompt(self, name: str) -> Tensor:
        """The mean of `found[name]` over the pictures of each prompt: float32 [prompts, *grid]."""
        maps = self[name]
        return maps.unflatten(0, (self._reading.prompts, -1)).mean(1)

    def masses(self, name: str) -> Tensor:
        """float32 [steps, rows]: the share of an image token's attention that goes to a group, mean over tokens."""
        self._check(name)
        return self._reading.store.masses(name)

    def report(self) -> Report:
        """Which layers, steps and rows were read."""
        return self._handle.report()

    def detach(self) -> None:
        """Take the record off the model; warns when it never read. A second call does nothing."""
        self._handle.detach()

    def __enter__(self) -> Recording:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._handle.__exit__(kind, error, trace)

    def _check(self, name: str) -> None:
        if name not in self.names:
            raise ControlError(f"There is no group '{name}' in this record; it has {', '.join(self.names)}.")
        if not self._reading.store.layers(name):
            raise ControlError(
                f"'{name}' was not read: no forward has run yet, or none of the layers that were read "
                f"({', '.join(self.layers[:3]) or 'none'}) has such keys. Words are read in joint and cross attention, "
                "regions and cells in joint and self-attention (cells where an image has as many tokens along each "
                "side), references where the pipeline is given any."
            )

    def _alone(self, name: str, maps: Tensor) -> Tensor:
        """A group of one column without the dimension of columns."""
        (keys,) = (keys for keys in self._reading.keys if keys.name == name)
        return maps if isinstance(keys.key, Cells) else maps[:, 0]


def record(
    pipe_or_model: Any,
    groups: Mapping[str, Key] | Sequence[str],
    *,
    prompt: str | Sequence[str] | None = None,
    layers: Selector = None,
    window: Window = (0.0, 1.0),
    branch: Literal["cond", "uncond"] = "cond",
    when: When = "pre",
    over: Over = "mean",
    grid: tuple[int, int] | None = None,
    scheduler: Any = None,
    branches: Sequence[str] = (),
    max_sequence_length: int | None = None,
) -> Recording:
    """Read attention from the next forward on. The model's output stays what it is, bit for bit.

    Args:
        pipe_or_model: as for `attach`; a bare model takes no phrases.
        groups: name -> keys, see `Key`; a list of phrases names each by itself.
        prompt: the prompt, or all prompts of a batch, as the pipeline is given them.
        layers: selector of attention layers; None means all that have a softmax.
        window: when to read.
        branch: guidance branch whose rows are read.
        when: "pre", the model's own attention in the run as it is; "post", with what controls hide from it.
        over: how steps are put together: "mean", "last", or a float in [0, 1), the share a moving mean keeps.
        grid: (rows, columns) of the maps; None takes the finest layer's.
        scheduler: as for `attach`.
        branches: as for `attach`.
        max_sequence_length: as the pipeline's call is given it.

    Raises:
        LayoutError: when a phrase is not in the prompt.
        ControlError, SelectionError, UnsupportedModelError: as for `attach`.
    """
    model = parts_of(pipe_or_model)[0]
    inner: Any = getattr(model, "_orig_mod", model)
    prompts = () if prompt is None else (prompt,) if isinstance(prompt, str) else tuple(prompt)
    if layers is None:
        layers = _soft(family_of(inner).layers(inner))
    reading = Reading(
        keys=keys_of(pipe_or_model, groups, prompts, max_sequence_length),
        prompts=max(1, len(prompts)),
        layers=layers,
        window=window,
        branch=branch,
        when=when,
        store=Store(over),
    )
    return Recording(attach(pipe_or_model, reading, scheduler=scheduler, branches=branches), reading, grid)


def _soft(layers: Sequence[Layer]) -> tuple[str, ...]:
    return tuple(layer.name for layer in layers if not layer.linear)
