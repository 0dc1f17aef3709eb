"""Which blocks a perturbed forward shares with the prompt's: those before the first layer that may differ."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from functools import partial
from itertools import takewhile
from typing import TYPE_CHECKING, Any, NamedTuple

from torch import nn

from .families import Family
from .guidance import PERTURBED, Step
from .increments import Guide
from .kernels import close_scope, open_scope
from .replay import Prefix, Stretch, within
from .select import Layer
from .tap import Tap
from .tappable import hooks_of, is_compiled

if TYPE_CHECKING:
    from .engine import Engine

__all__ = ["Lists", "Outlines", "lists_of", "prefixes_of", "stretches_before"]


def prefixes_of(engine: Engine, step: Step, guides: Mapping[Guide, tuple[int, ...]]) -> dict[Guide, Prefix]:
    """What the perturbed forward of each branch need not compute after a forward that holds the prompt's rows.

    Args:
        guides: branches, with the numbers of the seats that act in each beside those of "cond".
    """
    found = {}
    hindered: dict[tuple[str, ...], str] = {}
    for guide, seats in guides.items():
        opening = [engine.stack.seats[number] for number in seats if engine.stack.seats[number].control.guide == guide]
        tell = partial(_tell, [seat.plans for seat in opening])
        first = _parting(engine, step, seats)
        outline = engine.outlines.before(first)
        if not guide.replay:
            reason = "replay=False"
        elif not outline.stretches:
            reason = f"{first.name} is in the first block"
        else:
            if outline.blocks not in hindered:
                hindered[outline.blocks] = _obstacle(engine.tap, outline.blocks)
            reason = hindered[outline.blocks]
        outline = outline if not reason else Outline()
        found[guide] = Prefix(outline.stretches, engine.outlines.blocks, reason, outline.layers, tell)
    return found


class Outline(NamedTuple):
    """What stands before a layer: as stretches, the names of their blocks, and those of the layers in them."""

    stretches: tuple[Stretch, ...] = ()
    blocks: tuple[str, ...] = ()
    layers: frozenset[str] = frozenset()


class Outlines:
    """What stands before each layer of a model, found once: an engine's layers are those that it began with.

    Attributes:
        blocks: how many the model has.
    """

    def __init__(self, family: Family, model: nn.Module, layers: Sequence[Layer]) -> None:
        self._family, self._model, self._layers = family, model, layers
        self._lists = lists_of(family, model, layers)
        self._found: dict[str, Outline] = {}
        self.blocks = sum(map(len, self._lists.values()))

    def before(self, layer: Layer) -> Outline:
        """Of one of the model's layers."""
        if layer.name not in self._found:
            stretches = stretches_before(layer, self._lists, self._family, self._model)
            blocks = tuple(name for one in stretches for name in one.blocks)
            inside = tuple(f"{name}." for name in blocks)
            layers = frozenset(one.name for one in self._layers if one.name.startswith(inside))
            self._found[layer.name] = Outline(stretches, blocks, layers)
        return self._found[layer.name]


def _tell(plans: Sequence[set[str]], text: str) -> None:
    for lines in plans:
        lines.add(text)


def _parting(engine: Engine, step: Step, seats: Sequence[int]) -> Layer:
    """The first layer that may act otherwise than in the prompt's forward, or is watched in the perturbed one."""
    stack, plain = engine.stack, set(step.active["cond"])
    more = [stack.seats[number] for number in {*seats, *stack.active(step.moment, PERTURBED, observing=True)} - plain]
    if any(seat.control.appends_text for seat in more):
        return engine.layers[0]
    # of those that act in both, what they read or draw may hang on the branch
    told = [stack.seats[number] for number in plain]
    more += [seat for seat in told if seat.control.names_branches or seat.control.draws]
    return next(layer for layer in engine.layers if any(layer.name in seat.layers for seat in more))


Lists = Mapping[str, tuple[str, ...]]
"""Names of blocks in forward order, by the attribute of the model that holds them."""


def lists_of(family: Family, model: nn.Module, layers: Sequence[Layer]) -> Lists:
    """All blocks of a model with these layers."""
    attributes = family.lists or tuple(dict.fromkeys(layer.name.partition(".")[0] for layer in layers))
    found = {}
    for attribute in attributes:
        held: Any = getattr(model, attribute, None)
        if held is not None:
            names = [f"{attribute}.{number}" for number in range(len(held))] if isinstance(held, nn.ModuleList) else ()
            found[attribute] = tuple(names) or (attribute,)
    return found


def stretches_before(layer: Layer, lists: Lists, family: Family, model: nn.Module) -> tuple[Stretch, ...]:
    """The blocks before the one that holds a layer, and then the parts of that one before the one that does."""
    found: list[Stretch] = []
    for attribute, blocks in lists.items():
        before = tuple(takewhile(lambda name: not layer.name.startswith(f"{name}."), blocks))
        if before:
            found.append(Stretch(before, before if attribute in family.read_later else before[-1:]))
        if before == blocks:
            continue
        holder = blocks[len(before)]
        while inside := [f"{holder}.{name}" for name in family.parts(model.get_submodule(holder))]:
            # parts differ in what they give, so that the last one's cannot stand in for all
            if before := tuple(takewhile(lambda name: not layer.name.startswith(f"{name}."), inside)):
                found.append(Stretch(before, before, part=True))
            holder = inside[len(before)]
        break
    return tuple(found)


def _obstacle(tap: Tap, blocks: Sequence[str]) -> str:
    """Why these blocks must run in every forward; "" where they may be left out."""
    # asked at every step, as all of it may change between two: most modules have nothing, and are walked over once
    marked = [
        module
        for module in within(tap.model)
        if (own := module.__dict__)["_forward_hooks"]
        or own["_forward_pre_hooks"]
        or "_diffusers_hook" in own
        or "_compiled_call_impl" in own
    ]
    if is_compiled(tap.model, marked) or tap.root is not tap.model:
        return "the model or its blocks are compiled"
    if tap.has_caches(marked):
        return "a cache on the model counts its blocks"
    # the model's own, of which one is ours, are called in any case
    hooked = {id(module) for module in marked if module is not tap.model and _has_hooks(module)}
    loading = {id(module) for module in marked if any(map(_loads_others, hooks_of(module)))}
    for name in blocks if hooked or loading else ():
        inside = {id(module) for module in within(tap.model.get_submodule(name))}
        if inside & hooked:
            return f"{name} has forward hooks, which would not be called"
        if inside & loading:
            return f"{name} loads the weights of other blocks as well"
    return ""


def _has_hooks(module: nn.Module) -> bool:
    """Forward hooks that are not those of controls."""
    called = (*module._forward_hooks.values(), *module._forward_pre_hooks.values())
    return any(hook not in (open_scope, close_scope) for hook in called)


def _loads_others(hook: Any) -> bool:
    """A hook of diffusers' group offloading that prefetches, or loads several blocks at the first of them."""
    group = getattr(hook, "group", None)
    return group is not None and (group.stream is not None or group.onload_leader is not group.offload_leader)
