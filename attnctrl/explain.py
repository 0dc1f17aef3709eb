"""What a stack of controls would do on a model: tokens, layers, steps, executors, density, influence. Runs nothing.

    print(explain(pipe, [Isolate(), Regions(regions)], width=1024, height=1024, steps=28))

Needs no weights: a transformer made from its config on the meta device will do.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import groupby
from typing import Any

import torch
from torch import Tensor

from .attach import as_controls, parts_of
from .call import Situation, build_passes
from .controls.base import Control
from .execute import Pass
from .families import Family, family_of
from .groups import Group
from .layout import Frames, Measures
from .output import Output
from .region import Grid, Region
from .schedule import Moment
from .select import Layer, describe
from .stack import Stack
from .tappable import stand_in_notes
from .variants import Line, Variant

__all__ = ["Explanation", "explain", "grid_of"]

_CPU = torch.device("cpu")


@dataclass(frozen=True)
class Explanation:
    """The answer of `explain`: `str()` is for people, `to_dict()` for programs.

    Attributes:
        family: the model family.
        controls: per control its name, selected layers, active steps.
        scenes: per sample of the batch a list of phases; a phase names its steps, controls, token ranges, plans, and
            for each region's image tokens whether what belongs to others reaches them (`reach`; in words `influence`).
        notes: estimates that were made.
    """

    family: str
    steps: int
    controls: tuple[dict[str, Any], ...]
    scenes: tuple[tuple[dict[str, Any], ...], ...]
    notes: tuple[str, ...]

    def to_dict(self) -> dict[str, Any]:
        """JSON-serialisable form."""
        return {
            "family": self.family,
            "steps": self.steps,
            "controls": list(self.controls),
            "scenes": [list(phases) for phases in self.scenes],
            "notes": list(self.notes),
        }

    def summary(self) -> str:
        """Controls, and the tokens of the first steps; `str()` says all."""
        tokens = [line for phases in self.scenes for line in _token_lines(phases[0])]
        return "\n".join([*self._control_lines(), *tokens, *(f"note: {note}" for note in self.notes)])

    def _control_lines(self) -> list[str]:
        return [f"{self.family}, {self.steps} steps", *map(_control_line, self.controls)]

    def __str__(self) -> str:
        lines = self._control_lines()
        for number, phases in enumerate(self.scenes):
            lines += [f"sample {number}"] if len(self.scenes) > 1 else []
            for phase in phases:
                lines += _phase_lines(phase)
        return "\n".join([*lines, *(f"note: {note}" for note in self.notes)])


def _control_line(control: Mapping[str, Any]) -> str:
    if control["idle"]:
        return f"  {control['name']}: idle"
    steps, branch = control["steps"] or "none", control["branch"]
    return f"  {control['name']}: layers {control['layers']}; steps {steps}; branch {branch}"


def _token_lines(phase: Mapping[str, Any]) -> list[str]:
    tokens = "  tokens " + ", ".join(f"{name} {count}" for name, count in phase["tokens"].items())
    return [tokens, *(f"  {name}: {count} image tokens" for name, count in phase["regions"].items())]


def _phase_lines(phase: Mapping[str, Any]) -> list[str]:
    names = ", ".join(phase["controls"]) or "no control: the plain model"
    lines = [f"steps {phase['steps']}: {names}", *_token_lines(phase)]
    lines += [f"  {one['layers']}: {one['explain']}" for one in (*phase["plans"], *phase["outputs"])]
    return lines + [f"  {note}" for note in phase["influence"]]


def explain(
    pipe_or_model: Any,
    controls: Control | Sequence[Control],
    *,
    width: int | None = None,
    height: int | None = None,
    grid: Grid | None = None,
    steps: int = 28,
    sigmas: Sequence[float] | None = None,
    text_tokens: int = 512,
    region_tokens: int | Mapping[str, int] | None = None,
    references: Sequence[Grid] = (),
    branch: str = "cond",
) -> Explanation:
    """Say what acts where, without running the model.

    Args:
        pipe_or_model: pipeline or transformer; weights are not looked at.
        width, height: pixels of the picture; or `grid`, its (rows, columns) of image tokens.
        steps: of the run. `sigmas` are its noise levels, for sigma windows; evenly spaced when left out.
        text_tokens: length of the encoded prompt.
        region_tokens: tokens of a region's text: one number, or by prompt. Left out, they are counted by the pipeline's
            tokenizer, or estimated from the words, with a note.
        references: (rows, columns) of reference pictures.
        branch: guidance branch looked at.

    Raises:
        AttnCtrlError: whatever `attach` and the first forward would raise about these controls.
    """
    model, pipe = parts_of(pipe_or_model)
    model = getattr(model, "_orig_mod", model)
    family = family_of(model)
    whole = as_controls(controls)
    stack = Stack(whole, family.layers(model), family.presets, family.standing(model))
    selected = {name for seat in stack.seats for name in seat.layers}
    notes = list(stand_in_notes([layer for layer in stack.layers if layer.name in selected]))
    size = grid or grid_of(pipe, family, width, height)
    frames = family.arrange(model, Measures(text_tokens, size, tuple(references)))
    levels = tuple(sigmas) if sigmas is not None else tuple(1 - i / steps for i in range(steps))
    if sigmas is None and any(not isinstance(control.window, tuple) for control in whole):
        notes.append(
            "sigma windows are placed on evenly spaced noise levels; pass sigmas=[...] of the run for the true ones"
        )
    active = [_active(stack, Moment(sigma, step, levels), branch) for step, sigma in enumerate(levels)]

    def length(region: Region) -> int:
        return _length(region, pipe, family, region_tokens, notes)

    scenes = tuple(
        tuple(
            _phase(stack, frames, scene, numbers, [step for step, _ in steps_of], length)
            for numbers, steps_of in groupby(enumerate(active), key=lambda item: item[1])
        )
        for scene in range(stack.scenes)
    )
    rows = tuple(_control(control, stack, active) for control in whole)
    return Explanation(family.name, len(levels), rows, scenes, tuple(dict.fromkeys(notes)))


def _active(stack: Stack, moment: Moment, branch: str) -> tuple[int, ...]:
    """Seats that act in a branch; with the prompt's go those of the perturbed branches that run beside it."""
    beside = stack.guides(moment) if branch == "cond" else {}
    return tuple(sorted({*stack.active(moment, branch), *(n for seats in beside.values() for n in seats)}))


def grid_of(pipe: Any, family: Family, width: int | None, height: int | None) -> Grid:
    """(rows, columns) of image tokens of a picture of so many pixels, 1024 where left out."""
    # the usual autoencoders shrink by 8
    token = family.pixels_per_token * getattr(pipe, "vae_scale_factor", 8) // 8
    return (height or 1024) // token, (width or 1024) // token


def _length(region: Region, pipe: Any, family: Family, given: int | Mapping[str, int] | None, notes: list[str]) -> int:
    if region.prompt_embeds is not None:
        return len(region.prompt_embeds)
    if isinstance(given, int):
        return given
    if given is not None and region.prompt in given:
        return given[region.prompt]
    if getattr(pipe, "tokenizer", None) is not None or getattr(pipe, "tokenizer_2", None) is not None:
        return family.count(pipe, region.prompt)
    notes.append("lengths of region texts are estimated from their words; a pipeline with a tokenizer counts them")
    return 1 + round(4 / 3 * len(region.prompt.split()))


def _control(control: Control, stack: Stack, active: Sequence[tuple[int, ...]]) -> dict[str, Any]:
    number = next((i for i, seat in enumerate(stack.seats) if seat.control is control), None)
    if number is None:
        return {"name": control.name, "idle": True}
    layers = [layer for layer in stack.layers if layer.name in stack.seats[number].layers]
    steps = [step for step, numbers in enumerate(active) if number in numbers]
    return {
        "name": control.name,
        "idle": False,
        "layers": describe(layers),
        "steps": _spans(steps),
        "branch": control.branch,
        "strength": control.strength,
    }


def _phase(
    stack: Stack, frames: Frames, scene: int, active: tuple[int, ...], steps: Sequence[int], length: Any
) -> dict[str, Any]:
    (variant,), _ = stack.variants([frames], [Line(scene, active)], length)
    plans: list[dict[str, Any]] = []
    reads: list[tuple[str, Edges]] = []
    edited: dict[tuple[Output, ...], list[Layer]] = {}
    for (frame, acting), layers in _by_acting(stack, variant).items():
        situation, plan = stack.situation(variant, frame), stack.plan(variant, frame, acting, _CPU)
        passes = None
        if plan is not None:
            plans.append(
                {
                    "layers": describe(layers),
                    "executor": plan.executor,
                    "density": plan.density,
                    "classes": plan.classes,
                    "bytes": plan.nbytes,
                    "explain": plan.explain(),
                }
            )
            controls = [(stack.seats[i].control, stack.own(stack.seats[i].control, scene)) for i in acting]
            passes = build_passes(situation, controls, stack.hidden(variant, acting))
        reads += [(layer.name, _edges(situation, passes)) for layer in layers]
        for layer in layers:
            if found := stack.outputs(variant, layer, acting):
                edited.setdefault(found, []).append(layer)
    order = {layer.name: i for i, layer in enumerate(stack.layers)}
    edges = [found for _, found in sorted(reads, key=lambda item: order[item[0]])]
    reach = _reach(edges) if active else []
    main = stack.situation(variant, variant.frames.items[0][0])
    counts = {number: int(main.member[number].sum()) for number in stack.placed(scene)} if active else {}
    return {
        "steps": _spans(steps),
        "controls": [stack.seats[i].control.name for i in active],
        "tokens": {name: len(item) for name, item in variant.frames.ranges.items()},
        "regions": {main.regions[number].label: count for number, count in counts.items()},
        "plans": plans,
        "outputs": [
            {"layers": describe(layers), "explain": "; ".join(one.explain() for one in found)}
            for found, layers in edited.items()
        ],
        "reach": reach,
        "influence": [_sentence(one) for one in reach],
    }


def _by_acting(stack: Stack, variant: Variant) -> dict[tuple[str, tuple[int, ...]], list[Layer]]:
    groups: dict[tuple[str, tuple[int, ...]], list[Layer]] = {}
    everywhere = (None,) * len(stack.seats)
    for layer in stack.layers:
        groups.setdefault((layer.frame, stack.acting(variant, layer, everywhere)), []).append(layer)
    return groups


Edges = dict[Group, frozenset[Group]]
"""By group of queries: the groups of keys that it reads in a layer."""


def _edges(situation: Situation, passes: Sequence[Pass] | None) -> Edges:
    """Who reads whom directly in any pass; everyone everyone without one."""
    (row_atom, rows), (column_atom, columns) = situation.queries, situation.keys
    if not passes:
        return {group: frozenset(columns) for group in rows}
    edges = torch.zeros(len(rows), len(columns), dtype=torch.bool)
    row, column = _representatives(row_atom, len(rows)), _representatives(column_atom, len(columns))
    for one in passes:
        q, k = one.visibility.query_atom[row], one.visibility.key_atom[column]
        sees = one.visibility.log_weight[q][:, k].isfinite()
        edges |= sees if one.weight is None else sees & (one.weight[q] > 0)[:, None]
    return {
        group: frozenset(k for k, found in zip(columns, line, strict=True) if found)
        for group, line in zip(rows, edges.tolist(), strict=True)
    }


def _representatives(atom: Tensor, count: int) -> Tensor:
    """A token of each group."""
    token = torch.empty(count, dtype=torch.int64)
    token[atom] = torch.arange(len(atom))
    return token


def _reach(layers: Sequence[Edges]) -> list[dict[str, Any]]:
    """For each region's image tokens and what belongs to others: from which layer on and through whom, or never.

    Returns:
        dicts of `reader`, `source`, `layer` (counted from 1; None is never) and `through` ([] is directly).
    """
    reached: dict[Group, set[Group]] = {}
    after: dict[tuple[Group, Group], tuple[int, Group]] = {}
    for number, edges in enumerate(layers, start=1):
        before = {group: {group} | reached.get(group, set()) for read in edges.values() for group in read}
        for group, read in edges.items():
            for through in sorted(read, key=lambda one: one.name):
                for one in before[through]:
                    after.setdefault((group, one), (number, through))
            reached[group] = set().union(*(before[one] for one in read), reached.get(group, set()))
    groups = {group for edges in layers for query, read in edges.items() for group in (query, *read)}
    seen = sorted(groups, key=lambda group: group.name)
    pictured = [group for group in seen if group.kind == "image" and group.members]
    return [
        {"reader": here.name, "source": there.name, **_path(after, here, there)}
        for here in pictured
        for there in seen
        if there.members and not here.members & there.members
    ]


def _path(after: Mapping[tuple[Group, Group], tuple[int, Group]], here: Group, there: Group) -> dict[str, Any]:
    if (here, there) not in after:
        return {"layer": None, "through": []}
    layer, through = after[here, there]
    path = []
    while through != there:
        path.append(through.name)
        through = after[through, there][1]
    return {"layer": layer, "through": path}


def _sentence(told: Mapping[str, Any]) -> str:
    reader, source, layer, through = (told[name] for name in ("reader", "source", "layer", "through"))
    if layer is None:
        return f"{reader} never reads {source}"
    if through:
        return f"{reader} indirectly reads {source}, from layer {layer} on, through {', '.join(through)}"
    return f"{reader} reads {source}" + ("" if layer == 1 else f", from layer {layer} on")


def _spans(steps: Sequence[int]) -> str:
    """Steps in short form: "0-13"."""
    return describe([Layer(str(step), "", step) for step in steps]).removeprefix(":") if steps else ""
