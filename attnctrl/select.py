"""Layers by exact name, range or preset.

A selector is one of these, or a list of them (their union):

    "all"                every attention layer the family knows
    "single"             a whole stack
    "single:0-18"        blocks 0 to 18 of a stack, both included
    "single:0,2,5-9"     single blocks and ranges
    "single:0-37/2"      every second block of a range
    "all/2", "single/3"  every second block of each stack, every third one of a stack, from block 0 on
    "not single:0-18"    all layers but these
    "single-early"       a preset of the family
    "self", "up"         all stacks that have this part in their name, as "up.self" has
    "transformer_blocks.3.attn"   a layer's own name

Indices are numbers, not text: 1 never matches 10. Whatever matches nothing is an error that lists what there is.
"""

from __future__ import annotations

import difflib
import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from .errors import SelectionError

__all__ = ["Layer", "Selector", "describe", "select"]

Selector = str | Sequence[str] | None
Presets = Mapping[str, Callable[[Mapping[str, int]], "str | tuple[str, ...]"]]

_EVERY = re.compile(r"([^:]+)/([1-9]\d*)")
_SPAN = re.compile(r"(\d+)(?:-(\d+)(?:/([1-9]\d*))?)?")


@dataclass(frozen=True)
class Layer:
    """One attention layer.

    Attributes:
        name: its qualified name.
        stack: the stack it sits in; one with dots, such as "up.self", also answers to each of its parts.
        index: its number within the stack.
        module: the attention module.
        frame: name of the frame that its kernel sees (see `attnctrl.layout.Frames`).
        call: which of its kernel calls that is.
        linear: it multiplies keys with values first, without a softmax kernel; no control can act there.
    """

    name: str
    stack: str
    index: int
    module: Any = field(repr=False, compare=False, default=None)
    frame: str = "joint"
    call: int = 0
    linear: bool = False


def select(layers: Sequence[Layer], selector: Selector, presets: Presets | None = None) -> tuple[Layer, ...]:
    """The selected layers in model order.

    Args:
        layers: all layers of the model.
        selector: see the module's text; None means all.
        presets: name -> function of {stack: number of blocks} that gives a selector.

    Raises:
        SelectionError: when a part matches nothing, with what exists and the nearest name.
    """
    parts = ["all"] if selector is None else [selector] if isinstance(selector, str) else list(selector)
    if not parts:
        raise SelectionError(f"An empty list selects no layer. There are {describe(layers)}.")
    chosen: set[str] = set()
    for part in parts:
        chosen |= _match(layers, part, presets or {})
    return tuple(layer for layer in layers if layer.name in chosen)


def _match(layers: Sequence[Layer], part: str, presets: Presets) -> set[str]:
    counts = _counts(layers)
    if part.startswith("not "):
        rest = {layer.name for layer in layers} - _match(layers, part.removeprefix("not "), presets)
        if not rest:
            raise SelectionError(f"'{part}' selects no layer: '{part.removeprefix('not ')}' are all there are.")
        return rest
    if (every := _EVERY.fullmatch(part)) is not None:
        chosen, step = _match(layers, every[1], presets), int(every[2])
        return {layer.name for layer in layers if layer.name in chosen and layer.index % step == 0}
    if part in presets:
        return {layer.name for layer in select(layers, presets[part](counts))}
    stack, colon, spans = part.partition(":")
    if stack in counts and colon:
        return _match_spans(layers, stack, spans, part)
    found = {layer.name for layer in layers if part in ("all", layer.stack, layer.name, *layer.stack.split("."))}
    if not found:
        parts = dict.fromkeys(piece for name in counts for piece in name.split("."))
        known = ["all", *counts, *parts, *presets, *(layer.name for layer in layers)]
        near = difflib.get_close_matches(part, known, n=1)
        hint = f" Did you mean '{near[0]}'?" if near else ""
        raise SelectionError(f"'{part}' selects no layer.{hint} There are {describe(layers)}{_preset_list(presets)}.")
    return found


def _match_spans(layers: Sequence[Layer], stack: str, spans: str, part: str) -> set[str]:
    names = {layer.index: layer.name for layer in layers if layer.stack == stack}
    wanted: list[int] = []
    for span in spans.split(","):
        match = _SPAN.fullmatch(span.strip())
        if match is None:
            raise SelectionError(f"'{part}': '{span}' is no block number or range such as 3, 0-18 or 0-37/2.")
        first, last, step = int(match[1]), int(match[2] or match[1]), int(match[3] or 1)
        if last < first:
            raise SelectionError(f"'{part}': the range {span} runs backwards.")
        wanted += range(first, last + 1, step)
    missing = [index for index in wanted if index not in names]
    if missing:
        raise SelectionError(f"'{part}': there is no {stack} block {missing[0]}. There are {describe(layers)}.")
    return {names[index] for index in wanted}


def _counts(layers: Sequence[Layer]) -> dict[str, int]:
    counts: dict[str, int] = {}
    for layer in layers:
        counts[layer.stack] = counts.get(layer.stack, 0) + 1
    return counts


def _preset_list(presets: Presets) -> str:
    return f"; presets {', '.join(presets)}" if presets else ""


def describe(layers: Sequence[Layer]) -> str:
    """Layers in short form, for messages and reports: "double:0-18, single:0-37"."""
    texts = []
    for stack in _counts(layers):
        indices = sorted(layer.index for layer in layers if layer.stack == stack)
        texts.append(f"{stack}:{','.join(_runs(indices))}")
    return ", ".join(texts) or "no layers"


def _runs(indices: Sequence[int]) -> list[str]:
    runs: list[list[int]] = []
    for index in indices:
        if runs and index == runs[-1][1] + 1:
            runs[-1][1] = index
        else:
            runs.append([index, index])
    return [str(first) if first == last else f"{first}-{last}" for first, last in runs]
