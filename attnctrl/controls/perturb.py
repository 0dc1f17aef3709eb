"""Guidance away from a model with weaker attention.

Identity of PAG (arXiv 2403.17377), blurred queries of SEG (2408.00760), and the soft forms, heads and further kinds of
HeadHunter (2506.10978). The closed forms are those of `attnctrl.perturb`.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from os import PathLike
from typing import Any, ClassVar, Literal

import torch
from torch import Tensor

from .. import perturb as forms
from ..call import Situation
from ..errors import ControlError
from ..execute import as_bias
from ..headset import HeadSet, Kind, is_written_set
from ..output import Executed
from ..schedule import Window
from ..select import Layer
from .base import Scenes, Unless, unless
from .guided import Guided

__all__ = ["Block", "Heads", "Kind", "Perturb", "Rows"]

Rows = Literal["all", "image", "text", "reference"]
Block = Literal["row", "within"]
Heads = Sequence[int] | Mapping[str, Sequence[int]] | HeadSet | Sequence[HeadSet] | str | PathLike[str] | None

_SAID = frozenset({"kind", "scale", "window", "strength"})
"""Fields that sets of heads say, where they are not given."""
_OWN: tuple[Kind, ...] = ("identity", "slerp")
"""Kinds that need a value of each query's own."""
_MAPPED: tuple[Kind, ...] = ("max", "slerp")
"""Kinds that read scores by themselves, and so know nothing of visibility."""


@dataclass(frozen=True, eq=False)
class Perturb(Guided):
    """Attention maps of the chosen layers are replaced, and the picture is led away from what that gives.

    The prompt's rows run through the model once more, in a branch "perturbed" in which these layers are perturbed, and
    guided = u + s (c - u) + scale (c - p). Controls of the branches "cond" and "all" act there too. Several `Perturb`
    with an equal `Guide` share one branch; others have branches of their own. With branch="cond", "uncond" or "all" the
    perturbation acts in that branch itself, and there is no further forward.

    Attributes:
        kind: what the map A becomes. "identity", each token reads itself alone; "uniform", all it sees alike;
            "mean_query", what the mean query of the chosen rows reads; "blur", queries smoothed over the picture;
            "temperature", softmax of scores / temperature; "max", the strongest key alone; "slerp", the way from A to
            the identity along the arc between distributions.
        heads: numbers of heads, the same in all layers; or numbers by layer, named by its own name or as "stack:3", in
            the place of `layers`. None means all, and an empty list or mapping is "not there". Also a `HeadSet`, the
            path of a file that holds one, or a list of them, one for each sample of the batch: these say kind,
            strength, scale and window too, unless these are given beside them. A strength that is given is that of the
            strongest head of all; the others keep their proportion to it.
        rows: tokens that are perturbed; the others keep their output to the bit.
        block: "row" replaces whole rows of the map; "within" those parts in which the chosen rows read each other, so
            that "identity" leaves to each of them itself and all other tokens.
        strength: u, the share of the perturbed map.
        sigma: of "blur", in tokens.
        temperature: of "temperature".
        scale: w of the branch; 0 is "not there".
        rescale, rescale_mode: in [0, 1], and what of; see `attnctrl.increments.Guide`.
        replay: the branch takes what comes before its first layer from the prompt's forward, where it can.
    """

    name: ClassVar[str] = "perturb"

    kind: Kind = field(default=unless("identity"))
    heads: Heads = field(default=None, kw_only=True)
    rows: Rows = field(default="all", kw_only=True)
    block: Block = field(default="row", kw_only=True)
    sigma: float = field(default=2.0, kw_only=True)
    temperature: float = field(default=2.0, kw_only=True)
    scale: float = field(default=unless(3.0), kw_only=True)
    window: Window = field(default=unless((0.0, 1.0)), kw_only=True)
    strength: float = field(default=unless(1.0), kw_only=True)

    def __post_init__(self) -> None:
        given = frozenset(name for name in _SAID if not isinstance(getattr(self, name), Unless))
        for name in _SAID - given:
            object.__setattr__(self, name, getattr(self, name).value)
        if sets := _sets_of(self.heads):
            self._take(sets, given)
        elif isinstance(self.heads, Mapping):
            if self.layers is not None and tuple(self.layers) != tuple(self.heads):
                raise ControlError(
                    f"'{self.name}': heads by layer name the layers; found layers={self.layers!r} too. Leave it out."
                )
            object.__setattr__(self, "heads", {key: _numbers(heads) for key, heads in self.heads.items()})
            object.__setattr__(self, "layers", tuple(self.heads))
        elif self.heads is not None:
            object.__setattr__(self, "heads", _numbers(self.heads))  # type: ignore[arg-type]
        super().__post_init__()
        for choice, known in (("kind", Kind), ("rows", Rows), ("block", Block)):
            self._check_choice(choice, known)
        for positive in ("sigma", "temperature"):
            self._check_range(positive, 1e-3, float("inf"), open_end=True)
        if self.block == "within" and self.kind != "identity":
            raise ControlError(f"'{self.name}': block='within' is defined for kind='identity'; found {self.kind!r}.")
        if self.kind == "blur" and self.rows == "text":
            raise ControlError(f"'{self.name}': 'blur' smooths over a picture; rows='text' have none.")

    def _take(self, sets: Sequence[HeadSet], given: frozenset[str]) -> None:
        """What sets of heads say, and what is given beside them."""
        beside = {name: getattr(self, name) for name in ("kind", "scale", "window") if name in given}
        found = [one.changed(**beside) for one in sets]
        top = max(one.strongest for one in found)
        if "strength" in given:
            self._check_range("strength", 0, 1)
            found, top = [one.scaled(top, self.strength) for one in found], self.strength
        told = {(one.kind, one.scale, one.window) for one in found}
        if len(told) > 1:
            raise ControlError(
                "'perturb': sets of heads of one control have one kind, scale and window; found "
                f"{' and '.join(map(str, sorted(told, key=str)))}. Give these beside the sets, or a control to each."
            )
        layers = tuple(dict.fromkeys(name for one in found for name in one.shares))
        if self.layers is not None and tuple(self.layers) != layers:
            raise ControlError(
                f"'{self.name}': a set of heads names the layers; found layers={self.layers!r} too. Leave it out."
            )
        ((kind, scale, window),) = told
        values = {"kind": kind, "scale": scale, "window": window, "strength": top, "layers": layers}
        for name, value in {**values, "heads": found[0] if len(found) == 1 else tuple(found)}.items():
            object.__setattr__(self, name, value)

    @property
    def sets(self) -> tuple[HeadSet, ...]:
        """Sets of heads, one for all samples or one for each; () where heads are told otherwise."""
        return _sets_of(self.heads)

    @property
    def scenes(self) -> Scenes:
        # no regions, but samples that are told apart
        return ((),) * len(self.sets) if len(self.sets) > 1 else ()

    def check_model(self, identity: Callable[[], Mapping[str, str]], layers: Sequence[Layer]) -> None:
        for one in self.sets:
            one.check_model(identity, layers)

    @property
    def is_idle(self) -> bool:
        by_layer = self.heads.values() if isinstance(self.heads, Mapping) else [self.heads]
        told: list[Any] = [one.heads for one in self.sets] or list(by_layer)
        nowhere = self.heads is not None and not any(told)
        return super().is_idle or nowhere

    def output(self, situation: Situation, own: frozenset[int], layer: Layer) -> Perturbation | None:
        heads, strength = self._acting(layer, situation.line.scene)
        if heads == ():
            return None
        frame = situation.frame
        if self.kind in _OWN and not frame.is_joint:
            raise ControlError(
                f"'{self.name}': kind '{self.kind}' lets tokens read their own value, and {layer.name} is cross "
                "attention, where they have none. Give it layers of self-attention (such as layers='self'), or another "
                "kind."
            )
        chosen = [item for item in frame.queries.ranges if self.rows in ("all", _kind_of(item.name))]
        if self.kind == "blur":
            chosen = [item for item in chosen if item.grid is not None]
        if not chosen:
            wanted = "tokens of a picture" if self.kind == "blur" else f"rows '{self.rows}'"
            raise ControlError(
                f"'{self.name}': {layer.name} has no {wanted}; its queries are {', '.join(frame.queries.names)}."
            )
        pictures = tuple((item.start, item.grid) for item in chosen if item.grid is not None)
        whole = sum(map(len, chosen)) == frame.queries.tokens
        spans = None if whole else tuple((item.start, item.stop) for item in chosen)
        # where all tokens are chosen, nothing is outside
        within = self.block == "within" and not whole
        return Perturbation(self.kind, strength, heads, spans, pictures, self.sigma, self.temperature, within)

    def _acting(self, layer: Layer, sample: int) -> tuple[tuple[int, ...] | None, float | tuple[float, ...]]:
        """The heads of a layer that are meant in a sample, None for all, and u of all or each of them."""
        if not self.sets:
            return self._heads(layer), self.strength
        own = self.sets[sample if len(self.sets) > 1 else 0].shares
        found = {head: u for name in _names(layer) for head, u in own.get(name, {}).items()}
        return tuple(sorted(found)), tuple(found[head] for head in sorted(found))

    def _heads(self, layer: Layer) -> tuple[int, ...] | None:
        if not isinstance(self.heads, Mapping):
            return None if self.heads is None else tuple(self.heads)  # type: ignore[arg-type]
        names = _names(layer)
        found = [self.heads[name] for name in names if name in self.heads]
        if not found:
            raise ControlError(
                f"'{self.name}': heads by layer want a layer's own name or 'stack:number', one each; {layer.name} is "
                f"meant by one of {', '.join(map(repr, self.heads))}. Write {names[1]!r}."
            )
        return tuple(sorted({head for heads in found for head in heads}))


def _kind_of(name: str) -> str:
    """What tokens of a range are; learned tokens that fill up a text or a picture are neither."""
    return "register" if name.endswith("registers") else name.partition(".")[0]


def _names(layer: Layer) -> tuple[str, str]:
    """The names by which heads may call their layer."""
    return layer.name, f"{layer.stack}:{layer.index}"


def _sets_of(heads: Any) -> tuple[HeadSet, ...]:
    """The sets of heads that are meant, read from their files; () for other ways to tell heads."""
    listed = heads if isinstance(heads, list | tuple) and heads else [heads]
    if not all(isinstance(one, HeadSet | str | PathLike) or is_written_set(one) for one in listed):
        return ()
    return tuple(one if isinstance(one, HeadSet) else _read(one) for one in listed)


def _read(one: Any) -> HeadSet:
    return HeadSet(**one) if isinstance(one, Mapping) else HeadSet.load(one)


def _numbers(heads: Sequence[int]) -> tuple[int, ...]:
    return tuple(sorted({int(head) for head in heads}))


@dataclass(frozen=True)
class Perturbation:
    """The output of a layer's call under `Perturb`; rows and heads that are not meant keep theirs.

    Attributes:
        strength: of all heads, or of each of `heads`.
        heads: numbers; None for all.
        spans: tokens [start, stop) of the queries; None for all.
        pictures: those among them that are pictures.
        within: keys outside of `spans` stay in sight.
    """

    kind: Kind
    strength: float | tuple[float, ...]
    heads: tuple[int, ...] | None
    spans: tuple[tuple[int, int], ...] | None
    pictures: tuple[forms.Picture, ...]
    sigma: float
    temperature: float
    within: bool

    def __call__(self, call: Executed) -> Tensor:
        """Raises ControlError for heads that are not there, and where visibility cannot be kept."""
        if self.heads and self.heads[-1] >= call.query.shape[1]:
            raise ControlError(
                f"'perturb': there is no head {self.heads[-1]}: the layer has {call.query.shape[1]}, from 0 on."
            )
        if call.planned and (self.within or self.kind in _MAPPED):
            kind = "block='within'" if self.within else f"kind '{self.kind}'"
            raise ControlError(
                f"'perturb': {kind} cannot keep to what other controls hide in the same layer. Give them other layers, "
                "or take kind 'identity', 'uniform', 'mean_query', 'blur' or 'temperature'."
            )
        other = _within(self, call) if self.within else _FORMS[self.kind](self, call)
        if self.overwrites:
            return other.to(call.out.dtype).expand_as(call.out)
        return forms.blend(call.out, other, self._share(call))

    @property
    def overwrites(self) -> bool:
        """Nothing of the untouched attention is left, so it need not be computed."""
        everything = self.heads is None and self.spans is None and not self.within and self.strength == 1
        return everything and self.kind != "slerp"

    def explain(self) -> str:
        """Kind, strength, heads and tokens."""
        heads = "" if self.heads is None else f", heads {', '.join(map(str, self.heads))}"
        tokens = "" if self.spans is None else f", tokens {', '.join(f'{a}-{b - 1}' for a, b in self.spans)}"
        each = self.strength if isinstance(self.strength, tuple) else (self.strength,)
        by = " to ".join(f"{u:g}" for u in dict.fromkeys((min(each), max(each))))
        return f"{self.kind} by {by}{' within' if self.within else ''}{heads}{tokens}"

    def tokens(self, call: Executed) -> Tensor:
        """int64 [n]: the queries that are meant."""
        spans = self.spans or ((0, call.query.shape[2]),)
        return torch.cat([torch.arange(start, stop, device=call.query.device) for start, stop in spans])

    def _share(self, call: Executed) -> Tensor | float:
        """The strength of each row of each head, broadcastable to [B, H, N, 1]."""
        strength = self._strengths(call)
        along = _arc(call, strength) if self.kind == "slerp" else strength
        if self.heads is None and self.spans is None:
            return along
        _, heads, tokens, _ = call.query.shape
        share = forms.exact(call.query).new_zeros(1, heads, tokens, 1)
        for head in range(heads) if self.heads is None else self.heads:
            for start, stop in self.spans or ((0, tokens),):
                share[:, head, start:stop] = 1
        return share * along

    def _strengths(self, call: Executed) -> Tensor | float:
        """u of all heads, or [1, H, 1, 1] with that of each; heads that are not meant have none."""
        if not isinstance(self.strength, tuple):
            return self.strength
        found = forms.exact(call.query).new_zeros(1, call.query.shape[1], 1, 1)
        for head, u in zip(self.heads or (), self.strength, strict=True):
            found[:, head] = u
        return found


def _bias(call: Executed) -> Tensor | None:
    return None if call.mask is None else as_bias(call.mask, forms.exact(call.query).dtype)


def _arc(call: Executed, strength: Tensor | float) -> Tensor:
    return forms.geodesic_strength(call.query, call.key, _bias(call), call.scale, strength)


def _own(one: Perturbation, call: Executed) -> Tensor:
    return forms.own_value(call.value, call.query.shape[1])


def _uniform(one: Perturbation, call: Executed) -> Tensor:
    """Scores of a query of zeros are those of the masks alone."""
    query = call.query[:, :, :1] if call.alike else call.query
    return call.attend(torch.zeros_like(query), call.scale)


def _mean(one: Perturbation, call: Executed) -> Tensor:
    query = forms.mean_query(call.query, slice(None) if one.spans is None else one.tokens(call))
    return call.attend(query if call.alike else query.expand_as(call.query), call.scale)


def _blur(one: Perturbation, call: Executed) -> Tensor:
    return call.attend(forms.blur_query(call.query, one.pictures, one.sigma), call.scale)


def _temper(one: Perturbation, call: Executed) -> Tensor:
    scale = call.query.shape[-1] ** -0.5 if call.scale is None else call.scale
    return call.attend(call.query, scale / one.temperature)


def _max(one: Perturbation, call: Executed) -> Tensor:
    return forms.strongest_value(call.query, call.key, call.value, _bias(call), call.scale)


def _within(one: Perturbation, call: Executed) -> Tensor:
    tokens = one.tokens(call)
    found = forms.own_or_outside(call.query, call.key, call.value, _bias(call), call.scale, tokens)
    return call.out.index_copy(2, tokens, found)


_FORMS: dict[Kind, Callable[[Perturbation, Executed], Tensor]] = {
    "identity": _own,
    "uniform": _uniform,
    "mean_query": _mean,
    "blur": _blur,
    "temperature": _temper,
    "max": _max,
    "slerp": _own,
}
