"""Which blocks a perturbed forward shares with the prompt's: those before the first layer that may differ."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from functools import partial
from itertools import takewhile
from typing import TYPE_CHECKING, Any

from torch import nn

from .families import Family
from .guidance import PERTURBED, Step
from .increments import Guide
from .kernels import close_scope, open_scope
from .replay import Prefix, Stretch, within
from .select import Layer
from .tap import Tap, hooks_of, is_compiled

if TYPE_CHECKING:
    from .engine import Engine

__all__ = ["Lists", "lists_of", "prefixes_of", "stretches_before"]


def prefixes_of(engine: Engine, step: Step, guides: Mapping[Guide, tuple[int, ...]]) -> dict[Guide, Prefix]:
    """What the perturbed forward of each branch need not compute after a forward that holds the prompt's rows.

    Args:
        guides: branches, with the numbers of the seats that act in each beside those of "cond".
    """
    family, model, found = engine.family, engine.model, {}
    lists = lists_of(family, model, engine.layers)
    hindered: dict[tuple[Stretch, ...], str] = {}
    for guide, seats in guides.items():
        opening = [engine.stack.seats[number] for number in seats if engine.stack.seats[number].control.guide == guide]
        tell = partial(_tell, [seat.plans for seat in opening])
        first = _parting(engine, step, seats)
        stretches = stretches_before(first, lists, family, model) if guide.replay else ()
        reason = "" if stretches else f"{first.name} is in the first block" if guide.replay else "replay=False"
        if stretches and stretches not in hindered:
            hindered[stretches] = _obstacle(engine.tap, [name for one in stretches for name in one.blocks])
        if reason := reason or hindered[stretches]:
            stretches = ()
        blocks = tuple(f"{name}." for one in stretches for name in one.blocks)
        layers = frozenset(layer.name for layer in engine.layers if layer.name.startswith(blocks))
        found[guide] = Prefix(stretches, sum(map(len, lists.values())), reason, layers, tell)
    return found


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
    if is_compiled(tap.model) or tap.root is not tap.model:
        return "the model or its blocks are compiled"
    if tap.has_caches():
        return "a cache on the model counts its blocks"
    for name in blocks:
        for module in within(tap.model.get_submodule(name)):
            called = (*module._forward_hooks.values(), *module._forward_pre_hooks.values())
            if any(hook not in (open_scope, close_scope) for hook in called):
                return f"{name} has forward hooks, which would not be called"
            if any(map(_loads_others, hooks_of(module))):
                return f"{name} loads the weights of other blocks as well"
    return ""


def _loads_others(hook: Any) -> bool:
    """A hook of diffusers' group offloading that prefetches, or loads several blocks at the first of them."""
    group = getattr(hook, "group", None)
    return group is not None and (group.stream is not None or group.onload_leader is not group.offload_leader)
