"""What every control is: a small frozen dataclass that says what to change, where, when and how strongly."""

from __future__ import annotations

import difflib
from collections.abc import Callable, Mapping, Sequence
from dataclasses import Field, dataclass, fields
from typing import Any, ClassVar, Literal, TypeVar, cast

from torch import Tensor

from ..act import Probe
from ..bank import Bank
from ..call import Blend, Situation
from ..content import Content, Places
from ..errors import ControlError
from ..headset import HeadSet
from ..increments import Guide
from ..layout import Span
from ..output import Output
from ..region import Overlap, Region
from ..rotary import Rotary
from ..schedule import Moment, Window, checked_window, is_empty, window_from_json, window_to_json
from ..select import Layer, Selector
from ..sources import Move
from ..visibility import Visibility
from ..watch import View
from ..wraps import Now, Site, Wrap

__all__ = ["CODE_ONLY", "CONTROLS", "Branch", "Control", "Scenes", "Unless", "default_of", "scenes_of", "unless"]

Branch = Literal["cond", "uncond", "all", "perturbed"]
Scenes = tuple[tuple[Region, ...], ...]
T = TypeVar("T")

CODE_ONLY = "code_only"
"""In the metadata of a field: it is given in code, and is no part of documents."""
CONTROLS: dict[str, type[Control]] = {}
"""All registered controls by name."""


@dataclass(frozen=True)
class Unless:
    """A field that was not given: it has this value unless another field says it. Never outlives `__post_init__`."""

    value: Any


def unless(value: T) -> T:
    """The default of a field that another field may say."""
    return cast(T, Unless(value))


def default_of(item: Field[Any]) -> Any:
    """What a field is where nothing says it."""
    return item.default.value if isinstance(item.default, Unless) else item.default


@dataclass(frozen=True, eq=False, kw_only=True)
class Control:
    """Base of all controls.

    Attributes:
        layers: selector of attention layers (see `attnctrl.select`); None means all.
        window: when to act: (start, stop) of the denoising progress in [0, 1], or `Sigma(high, low)`.
        branch: guidance branch to act in; "all" acts in every one. "perturbed" are those that `Perturb` and
            `Skip` open, in which controls of "cond" act as well.
        strength: in [0, 1]; 0 is "not there".

    Raises:
        ControlError, ScheduleError: when a field is out of range.
    """

    name: ClassVar[str] = ""
    needs_regions: ClassVar[bool] = False
    """The control acts on regions: its own, or else those that other controls of the stack declare."""
    brings_regions: ClassVar[bool] = False
    """Of a document's regions: this control declares them for the whole stack."""
    appends_text: ClassVar[bool] = False
    """The texts of its regions are appended to the model's text sequence while the control acts."""
    placeless: ClassVar[bool] = False
    """The texts of its regions belong to no place: they hold no token of the picture, and are lent to nobody."""
    shares: ClassVar[bool] = False
    """Rows read keys and values of other pictures while it acts, see `reads` and `recalls`."""
    follows: ClassVar[bool] = False
    """It changes what others share, and acts where they do, see `move`."""
    compares: ClassVar[bool] = False
    """Its output takes in those of other pictures, see `reads` and `recalls`."""
    observes: ClassVar[bool] = False
    """It only watches kernel calls, see `probes`; no part of documents."""
    looks_ahead: ClassVar[bool] = False
    """A forward in which nothing is read of other pictures runs ahead of each that it acts in, and its `probes` watch
    that one; it acts where something is shared."""
    wraps: ClassVar[bool] = False
    """It goes around whole modules, see `wrap`."""
    keeps: ClassVar[bool] = False
    """What it puts there keeps outputs for later steps; it leaves alone what others leave out."""
    in_documents: ClassVar[bool] = True
    """It can be told by a document; otherwise it takes what only code can give."""

    layers: Selector = None
    window: Window = (0.0, 1.0)
    branch: Branch = "cond"
    strength: float = 1.0

    def __init_subclass__(cls, **kwargs: Any) -> None:
        super().__init_subclass__(**kwargs)
        if cls.name and cls.in_documents and not cls.observes:
            CONTROLS[cls.name] = cls

    def __post_init__(self) -> None:
        object.__setattr__(self, "window", checked_window(self.window, self.name))
        if isinstance(self.layers, list):
            object.__setattr__(self, "layers", tuple(self.layers))
        self._check_range("strength", 0, 1)
        self._check_choice("branch", Branch)

    @property
    def is_idle(self) -> bool:
        """Nothing to do at any time: as good as not there."""
        return self.strength == 0 or is_empty(self.window)

    @property
    def scenes(self) -> Scenes:
        """Regions the control declares: one tuple for all samples, or one per sample of the batch; () declares none."""
        return ()

    @property
    def prompt_spans(self) -> tuple[tuple[Span, ...], ...]:
        """Tokens of the prompt that are no padding: those of all samples, or of each; () when all of them are words."""
        return ()

    @property
    def copies_filling(self) -> bool:
        """Each region gets a copy of the prompt's padding, as a part of its text."""
        return False

    @property
    def overlap_policy(self) -> Overlap:
        """What becomes of tokens in several of the declared regions."""
        return "union"

    def visibility(self, situation: Situation, own: frozenset[int]) -> Visibility | None:
        """Its part in the visibility stage for the regions `own`; None leaves the stage alone."""
        return None

    def contrast(self, situation: Situation, own: frozenset[int]) -> Visibility | None:
        """What takes the place of its `visibility` in a second execution, which its output gets by `under`."""
        return None

    def blends(self, situation: Situation, own: frozenset[int]) -> Sequence[Blend]:
        """Further passes to mix in."""
        return ()

    def probes(self, view: View) -> Mapping[str, Probe]:
        """By layer, what watches its kernel call in the forward that begins; of controls that observe or look ahead."""
        return {}

    def forget(self) -> None:
        """The forward that it looked ahead of has ended: what was kept for it goes."""

    def content(self, situation: Situation, layer: Layer, places: Callable[[], Places | None]) -> Sequence[Content]:
        """Its part in the content stage of a layer: what becomes of queries, keys and values; () leaves them alone.

        Args:
            places: where the layer's image tokens stand; None where the model does not turn them. Asking raises
                `UnsupportedModelError` for models of which that is not known.
        """
        return ()

    def output(self, situation: Situation, own: frozenset[int], layer: Layer) -> Output | None:
        """Its part in the output stage of a layer: what becomes of the executed call; None leaves it alone."""
        return None

    def wrap(self, site: Site, now: Now) -> Wrap | None:
        """What it puts around a selected layer or its block in the forward that begins; None leaves them alone."""
        return None

    @property
    def draws(self) -> bool:
        """Something is drawn anew at every step."""
        return False

    @property
    def draws_readers(self) -> bool:
        """What is drawn is another thing for each picture that reads."""
        return False

    def opens(self, layer: Layer, draw: int) -> bool:
        """Whether it acts in a selected layer at the step with this number of draws."""
        return True

    def reads(self, image: int, images: int) -> tuple[int, ...]:
        """The other pictures, of `images` in the branch, that `image` reads; where the control shares or compares."""
        return ()

    @property
    def recalls(self) -> Bank | None:
        """The bank that is read: by sharing controls in place of other pictures of the batch."""
        return None

    def pools_with(self, image: int) -> int | None:
        """The picture of its branch with whose statistics an image's GroupNorms are pooled; None leaves them alone."""
        return None

    def check_bank(self, model: Mapping[str, str], moment: Moment, branch: str | None) -> None:
        """Whether a row of this branch can read the bank in a forward.

        Raises:
            ControlError, ScheduleError, UnsupportedModelError: when it cannot.
        """
        if self.recalls is not None:
            self.recalls.check(model, moment, branch)

    def check_model(self, identity: Callable[[], Mapping[str, str]], layers: Sequence[Layer]) -> None:
        """Whether it can go on a model.

        Args:
            identity: () -> which model it is, see `attnctrl.bank.identity`.
            layers: all attention layers of it.

        Raises:
            ControlError: when it cannot.
        """
        return None

    @property
    def names_branches(self) -> bool:
        """It must know of each row which guidance branch it is, also with branch="all"."""
        return self.recalls is not None

    def move(self, situation: Situation, other: int, rotary: Rotary | None) -> Move | None:
        """What becomes of the keys of another picture that is read; None leaves them."""
        return None

    @property
    def exchanges(self) -> bool:
        """It changes what stands where before the first layer, see `exchange`."""
        return False

    def exchange(self, situation: Situation, other: int) -> Tensor | None:
        """How far image tokens of another picture that is read go before its first layer: float64 [image tokens, 2]
        (y, x), in tokens; None leaves them."""
        return None

    @property
    def guide(self) -> Guide | None:
        """The perturbed branch that it opens and acts in; None acts in the branches that there are."""
        return None

    def to_dict(self) -> dict[str, Any]:
        """JSON-serialisable form; fields at their default are left out."""
        data: dict[str, Any] = {"name": self.name}
        for item in fields(self):
            value, default = getattr(self, item.name), default_of(item)
            if value != default and CODE_ONLY in item.metadata:
                raise ControlError(
                    f"'{self.name}' holds {item.name}={value!r}, which is not written to documents; give it in code."
                )
            if value != default:
                data[item.name] = window_to_json(value) if item.name == "window" else _to_json(value)
        return data

    @staticmethod
    def from_dict(data: Mapping[str, Any]) -> Control:
        """The control that `to_dict` described.

        Raises:
            ControlError: for an unknown name or field, with the nearest known one.
        """
        values = dict(data)
        name = values.pop("name", None)
        if name not in CONTROLS:
            raise ControlError(
                f"There is no control named {name!r}.{_nearest(str(name), CONTROLS)} Known: {', '.join(CONTROLS)}."
            )
        cls = CONTROLS[name]
        known = [item.name for item in fields(cls) if CODE_ONLY not in item.metadata]
        for key in values:
            if key not in known:
                raise ControlError(f"'{name}' has no field '{key}'.{_nearest(key, known)} Fields: {', '.join(known)}.")
        if "window" in values:
            values["window"] = window_from_json(values["window"])
        if values.get("regions") is not None:
            values["regions"] = _regions_from_json(values["regions"])
        if isinstance(values.get("heads"), str):
            raise ControlError(f"'{name}': a document holds a set of heads itself; give the file of one in code.")
        return cls(**values)

    def _check_range(self, field: str, low: float, high: float, *, open_end: bool = False) -> None:
        value = getattr(self, field)
        good = low <= value < high if open_end else low <= value <= high
        if not good:
            raise ControlError(
                f"'{self.name}': {field} must be in [{low:g}, {high:g}{')' if open_end else ']'}; found {value}."
            )

    def _check_choice(self, field: str, choices: Any) -> None:
        value, known = getattr(self, field), choices.__args__
        if value not in known:
            hint = _nearest(str(value), known)
            raise ControlError(f"'{self.name}': {field} must be one of {', '.join(known)}; found {value!r}.{hint}")


def scenes_of(regions: Any, label: str) -> Scenes:
    """Normalise a list of regions (one scene for all samples) or a list of lists (one scene per sample).

    Raises:
        ControlError: when it is neither.
    """
    regions = list(regions)
    if all(isinstance(item, Region) for item in regions):
        return (tuple(regions),) if regions else ()
    if all(isinstance(item, Sequence) and all(isinstance(r, Region) for r in item) for item in regions):
        return tuple(tuple(item) for item in regions)
    kinds = ", ".join(sorted({type(item).__name__ for item in regions}))
    raise ControlError(
        f"'{label}': regions are a list of Region, or one list of them per sample; found a list of {kinds}."
    )


def _nearest(word: str, known: Any) -> str:
    near = difflib.get_close_matches(word, list(known), n=1)
    return f" Did you mean '{near[0]}'?" if near else ""


def _to_json(value: Any) -> Any:
    if isinstance(value, Region | HeadSet):
        return value.to_dict()
    if isinstance(value, tuple | list):
        return [_to_json(item) for item in value]
    if isinstance(value, Mapping):
        return {key: _to_json(item) for key, item in value.items()}
    return value


def _regions_from_json(data: Any) -> Any:
    if isinstance(data, Mapping):
        return Region.from_dict(data)
    return [_regions_from_json(item) for item in data] if isinstance(data, list) else data
