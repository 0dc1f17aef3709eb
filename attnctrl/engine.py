"""One model under control: tells from a forward's own arguments what acts now, and hangs the acts on the layers."""

from __future__ import annotations

import functools
import warnings
from collections import Counter
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from .accounts import Due
from .ahead import Ahead
from .bank.identity import identity_of
from .call import Row
from .entry import Entry
from .errors import ControlError, SilentControlError, UnsupportedModelError
from .execute import Host
from .families import family_of, sizes_of
from .guidance import Guidance, Step
from .kernels import MASKING, backend_name, known_maskless
from .layout import Frames
from .norms import Norms
from .place import Branches, Place, guidance_of, rows_of, skipped_blocks
from .prefix import Outlines, prefixes_of
from .region import Region
from .report import arrived, left
from .schedule import Moment
from .select import Layer
from .stack import Acts, Presence, Stack, placed
from .tables import Tables
from .tap import Tap
from .tappable import check_model, execution_device, is_compiled
from .texts import Texts
from .watch import watched
from .wraps import Wraps

__all__ = ["Engine", "engine_of"]

_SEAT = "_attnctrl_engine"
_SHARED = (
    "The model's cache keeps one output of a layer for all guidance branches, and these have forwards of their own: "
    "it is emptied between them and saves nothing. Use attnctrl.Reuse, which keeps them apart, or a cache of blocks "
    "such as first-block."
)


class Engine:
    """All entries on one model, in the order they came. Nested entries act together; they leave in any order."""

    def __init__(self, model: nn.Module, *, root: nn.Module) -> None:
        self.model = model
        self.family = family_of(model)
        self.layers: tuple[Layer, ...] = self.family.layers(model)
        self.entries: list[Entry] = []
        self.outlines = Outlines(self.family, model, self.layers)
        self._standing = self.family.standing(model)
        self.tap = Tap(model, self.layers, self, root=root, shadows=self.family.shadows)
        self.stack = Stack((), self.layers, self.family.presets, self._standing)
        self._owner: list[Entry] = []
        self._place = Place(self.family)
        self._guidance = Guidance(self.family, self.model)
        self._wraps = Wraps(self.family, model, self.layers, self.tap.shares_caches)
        self._norms = Norms(model)
        self._tables = Tables(model, self.family.table)
        self._measured: tuple[tuple[Any, ...], tuple[Any, ...], tuple[Frames, ...]] | None = None
        self._pending: Due | None = None
        self._warned: set[str] = set()
        self._acted: dict[Branches, Any] = {}
        self._last: Any = None
        self._texts = Texts()
        self._ahead = Ahead()

    def add(self, entry: Entry) -> None:
        """Let an entry act from the next forward on.

        Raises:
            UnsupportedModelError, SelectionError, ControlError: and then nothing has changed.
        """
        check_model(self.model, self.layers)
        identity = functools.cache(functools.partial(identity_of, self.model))
        for control in entry.controls:
            if not control.is_idle:
                control.check_model(identity, self.layers)
        self._rebuild([*self.entries, entry])
        entry.attached = True
        arrived(self, entry)
        if len(self.entries) == 1:
            self.model.__dict__[_SEAT] = self
            self.tap.install()
        if entry.layers_present is None:
            self.tap.install_hooks()
        self._forget()

    def remove(self, entry: Entry) -> None:
        """Take an entry off; the last one takes everything off the model."""
        if entry not in self.entries:
            return
        left(self, entry)
        entry.attached = False
        self._forget()
        rest = [one for one in self.entries if one is not entry]
        if not rest:
            self.entries = []
            self.tap.remove()
            self.model.__dict__.pop(_SEAT, None)
            return
        try:
            self._rebuild(rest)
        except ControlError as error:
            # an entry that took its regions from the leaving one cannot act any more
            self.entries = rest
            self.stack, self._owner = Stack((), self.layers, self.family.presets, self._standing), []
            warnings.warn(f"The controls that stay attached can no longer act: {error}", stacklevel=3)
        if all(one.layers_present is not None for one in rest):
            self.tap.remove_hooks()

    def _rebuild(self, entries: list[Entry]) -> None:
        controls = [control for entry in entries for control in entry.controls]
        stack = Stack(controls, self.layers, self.family.presets, self._standing)
        owner = [entry for entry in entries for control in entry.controls if not control.is_idle]
        known = {id(seat.control): seat for entry in entries for seat in entry.seats}
        for number, seat in enumerate(stack.seats):
            stack.seats[number] = known.get(id(seat.control), seat)
        for entry in entries:
            entry.seats = [seat for seat, whose in zip(stack.seats, owner, strict=True) if whose is entry]
        self.entries, self.stack, self._owner = entries, stack, owner
        self._place, self._guidance = Place(self.family), Guidance(self.family, self.model)

    def before(self, arguments: dict[str, Any]) -> dict[str, Any] | None:
        """Decide what acts in the forward that begins; None runs it as it is."""
        # what is built here outlives this forward, and inference tensors could not serve a later one with gradients;
        # leaving inference mode would turn gradients on
        with_gradients = torch.is_grad_enabled()
        with torch.inference_mode(False), torch.set_grad_enabled(with_gradients):
            return self._before(arguments)

    def _before(self, arguments: dict[str, Any]) -> dict[str, Any] | None:
        self._pending = None
        present = self._present_layers()
        if not self.entries or not self.stack.seats:
            return None
        # a perturbed forward, or a plain one ahead, stands where the one stands that it belongs to
        step, plain = self._ahead.step or self._guidance.further or self._step(arguments), self._ahead.step is not None
        watching = self._ahead.watching
        if not plain:
            self._wraps.kept.age(self._place.run, step.moment.step)
            watching = {name: self.stack.active(step.moment, name, observing=True) for name in step.active}
            self._note(step.branches, (present, *step.active.values()))
        if not any(step.active.values()) and not any(watching.values()):
            return None
        acting = [(row, step.active[row.branch]) for row in step.rows]
        return self._control(arguments, acting, [watching[row.branch] for row in step.rows], step.moment, present)

    def _step(self, arguments: dict[str, Any]) -> Step:
        """Where a forward of the pipeline that begins stands, and what acts there."""
        step = self._where(arguments)
        leads = not (skipped_blocks(arguments) or (self.tap.branch or "").endswith("_skip"))
        guides = self.stack.guides(step.moment)
        self._guidance.begin(step, guides, leads, functools.partial(prefixes_of, self, step, guides))
        return step

    def _where(self, arguments: dict[str, Any]) -> Step:
        scheduler = next((s for entry in self.entries if (s := entry.scheduler) is not None), None)
        moment = self._place.moment(arguments, scheduler, self.stack.needs_position())
        branches = self._branches(arguments, scheduler)
        rows = rows_of(len(arguments[self.family.hidden]), branches, self.stack.scenes)
        active = {name: self.stack.active(moment, name) for name in dict.fromkeys(branches)}
        scale = guidance_of(self.family, [entry.pipe for entry in self.entries], branches)
        return Step(moment, branches, rows, active, scale)

    @contextmanager
    def led(self, arguments: dict[str, Any], forward: Callable[[dict[str, Any]], Any]) -> Iterator[None]:
        """Around a forward of the pipeline with these arguments, behind the plain one that controls ask for."""
        if not any(seat.control.looks_ahead for seat in self.stack.seats):
            yield
            return
        with torch.inference_mode(False), torch.set_grad_enabled(torch.is_grad_enabled()):
            step = self._where(arguments)
        with self._ahead.of(self.stack, step, self._hindrance, forward, arguments):
            yield

    def _hindrance(self) -> str:
        """What is in the way of a plain forward, and what to do about it; "" when nothing is."""
        if self._caches_blocks():
            return "a cache of diffusers would take that for another step. Call model.disable_cache()"
        if is_compiled(self.model):
            return "compiled code keeps none. Run it before the model or its blocks are compiled"
        return ""

    @property
    def guides(self) -> bool:
        """Some control may want a plain forward ahead of one of the pipeline, or perturbed ones behind it."""
        return any(one.control.guide is not None or one.control.looks_ahead for one in self.stack.seats)

    def guided(self, output: Any, arguments: dict[str, Any], forward: Callable[[dict[str, Any]], Any]) -> Any:
        """The output of a forward of the pipeline that has ended, with what perturbed ones add."""
        return self._guidance.finish(output, arguments, forward)

    def after(self, finished: bool) -> None:
        """Account for the forward that ended.

        Raises:
            SilentControlError: when a layer with an act called no kernel.
        """
        pending, self._pending = self._pending, None
        self._wraps.take(finished)
        self._norms.take()
        self._tables.take()
        self._guidance.ended(finished)
        if not finished:
            return
        for entry in self.entries:
            entry.forwards += 1
        if pending is None:
            return
        unmet = [layer for layer in self.tap.unmet() if layer.name not in self._guidance.replayed]
        silent = [layer for layer in unmet if layer.name not in pending.left_out]
        if silent and not self._caches_blocks():
            raise SilentControlError(
                f"{len(silent)} of {len(pending.acts)} controlled layers called no attention kernel that could be met: "
                f"{', '.join(layer.name for layer in silent[:4])}{', ...' if len(silent) > 4 else ''}. Their "
                "processors were replaced, or the model was compiled in a way that leaves hooks out. Attach before "
                "compiling, or attach again."
            )
        pending.credit(self.stack.seats, frozenset(layer.name for layer in unmet))

    def _control(
        self,
        arguments: dict[str, Any],
        acting: list[tuple[Row, tuple[int, ...]]],
        watching: list[tuple[int, ...]],
        moment: Moment,
        present: Presence,
    ) -> dict[str, Any]:
        if self.stack.check_banks(acting, moment, lambda: self._identity) and is_compiled(self.model):
            raise UnsupportedModelError(
                "A bank cannot be read inside compiled code: its keys change at every step. Read it before the "
                "model or its blocks are compiled, or on a copy that is not."
            )
        counts = Counter(row.branch for row, _ in acting)
        rows = [self.stack.line(row, seats, counts[row.branch], moment) for row, seats in acting]
        if torch.is_grad_enabled() and getattr(self.model, "is_gradient_checkpointing", False):
            raise UnsupportedModelError(
                "Gradient checkpointing runs layers again after the forward has ended, without its controls. Call "
                "model.disable_gradient_checkpointing(), or run under torch.no_grad()."
            )
        if (len(set(rows)) > 1 or any(watching)) and self.tap.halves_batches():
            raise UnsupportedModelError(
                "FasterCache runs some steps on the prompt's half of the batch, and these controls tell its rows apart "
                "from the others. Give them branch='all', or the cache is_guidance_distilled=True, which keeps the "
                "batch whole."
            )
        frames, position = self._frames(arguments), self.family.position
        device = execution_device(self.model, arguments[self.family.hidden][0])
        variants, slots = self.stack.variants(
            frames, rows, lambda region: self._embeds(region).shape[0], aligned=position is not None
        )
        if appended := slots.tokens:
            texts = self._texts.make(self.stack, self.family.text(arguments), variants, appended, self._embeds)
            arguments = self.family.append_text(arguments if position is None else position(arguments, slots), texts)
        host = self._host(device)
        acts = placed(self.stack.acts(variants, device, present, host), moment)
        if any(watching):
            if is_compiled(self.model):
                raise UnsupportedModelError(
                    "Attention cannot be recorded inside compiled code. Record before the model or its blocks are "
                    "compiled, or on a copy that is not."
                )
            made = functools.partial(self.stack.acts, device=device, present=present, host=host)
            own = [row for row, _ in acting]
            acts = watched(acts, self.stack, own, variants, watching, made, moment, device, lambda: self._identity)
        self._warn_of_masks(acts)
        self._norms.put(self.stack.pooled(acting), len(acting))
        self._tables.put(self.stack, variants, present)
        # where a guider lets every token read itself alone, or leaves the layer out, there is nothing to control
        perturbed, skipped = self.tap.perturbed(), skipped_blocks(arguments)
        self.tap.assign({name: act for name, (act, _) in acts.items() if name not in perturbed})
        wraps = self._wraps.put(self.stack, acting, variants, acts, arguments, moment, self._place.run, present)
        over = frozenset(name for one in wraps for name in one.wrap.over)
        left_out = perturbed | over | {layer.name for layer in self.layers if layer.index in skipped}
        took_part = [(row, (*on, *eyes)) for (row, on), eyes in zip(acting, watching, strict=True)]
        self._pending = Due(acts, wraps, moment, left_out, took_part)
        return arguments

    @functools.cached_property
    def _identity(self) -> Mapping[str, str]:
        """Which model this is; told anew when controls come or go."""
        return identity_of(self.model)

    def _host(self, device: torch.device) -> Host:
        """What plans may count on; the CPU has nothing to gain from it."""
        if device.type == "cpu" or not any(entry.own_kernels for entry in self.entries):
            return Host()
        # "native" leaves the choice to torch, any other backend is the user's own choice
        native = all(backend_name(layer.module) == "native" for layer in self.layers)
        return Host(own_kernels=native, compiling=is_compiled(self.model))

    def _present_layers(self) -> Presence:
        """Per seat the layers its processors sit on, None for all; entries whose processors are gone leave."""
        for entry in list(self.entries):
            if entry.layers_present is not None and entry.layers_present() is None:
                self.remove(entry)
        return tuple(None if owner.layers_present is None else owner.layers_present() for owner in self._owner)

    def _embeds(self, region: Region) -> Tensor:
        for entry in self.entries:
            if any(region is one for control in entry.controls for scene in control.scenes for one in scene):
                return entry.embeds(region, self.family)
        raise ControlError(f"Region '{region.label}' belongs to no attached control.")

    def _frames(self, arguments: dict[str, Any]) -> tuple[Frames, ...]:
        """The family's frames; ids of a run are one tensor, so they are read from the device once."""
        objects = tuple(arguments.get(name) for name in self.family.watch)
        sizes = (sizes_of(self.family.text(arguments)), sizes_of(arguments[self.family.hidden]))
        last = self._measured
        if last is None or last[1] != sizes or any(a is not b for a, b in zip(last[0], objects, strict=True)):
            self._measured = last = (objects, sizes, self.family.frames(self.model, arguments))
        return last[2]

    def _branches(self, arguments: dict[str, Any], scheduler: Any) -> Branches:
        """The guidance branches that this forward's batch holds, in the order of its rows."""
        given = next((entry.branches for entry in self.entries if entry.branches), ())
        if given:
            return given
        # diffusers' guiders announce a branch as "pred_cond", and as "pred_cond_skip" the prompt's without some layers
        announced = (self.tap.branch or "").removeprefix("pred_").removesuffix("_skip")
        if announced in self.family.branches:
            return (announced,)
        batch = self.family.batch and self._place.batch(arguments, [entry.pipe for entry in self.entries])
        if batch:
            return batch
        if self.tap.branch is not None or not self.stack.needs_branches():
            return (None,)
        return (self._place.branch_by_text(arguments, scheduler),)

    def _caches_blocks(self) -> bool:
        """Diffusers' caching skips layers in some steps."""
        return bool(getattr(self.model, "is_cache_enabled", False)) or self.tap.has_caches()

    def _note(self, branches: Branches, acting: tuple[Any, ...]) -> None:
        """What a cache kept of other controls must not stand in for this forward's."""
        before, self._acted[branches] = self._acted.get(branches, acting), acting
        last, self._last = self._last, (branches, acting)
        if before != acting:
            self.tap.reset_caches()
        elif last not in (None, self._last) and self.tap.shares_caches():
            self.tap.reset_caches()
            if _SHARED not in self._warned:
                self._warned.add(_SHARED)
                warnings.warn(_SHARED, stacklevel=2)

    def _forget(self) -> None:
        """What caches keep is of other controls than those to come."""
        self._acted, self._last = {}, None
        self.__dict__.pop("_identity", None)
        self._wraps.kept.clear()
        self.tap.reset_caches()

    def _warn_of_masks(self, acts: Acts) -> None:
        for layer in self.layers:
            if layer.name not in acts or not acts[layer.name][0].needs_mask:
                continue
            name = backend_name(layer.module)
            if name not in MASKING and name not in self._warned:
                self._warned.add(name)
                known_maskless.add(name)
                warnings.warn(
                    f"The attention backend '{name}' cannot honour a mask, which soft or fine-grained controls need "
                    f"(first at {layer.name}); masked calls run on 'native' instead.",
                    stacklevel=2,
                )


def engine_of(model: nn.Module) -> Engine:
    """The engine that sits on a model, or a new one that does not yet; `torch.compile(model)` counts as the model."""
    inner = getattr(model, "_orig_mod", model)
    found = inner.__dict__.get(_SEAT)
    return found if isinstance(found, Engine) else Engine(inner, root=model)
