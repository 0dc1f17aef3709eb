"""The Diffusers idiom: processors for `set_attn_processor`.

    pipe.transformer.set_attn_processor(processors(pipe, [Isolate(), Regions(regions)]))

Each is a thin class around the layer's original processor. It opens the scope that the hooks of `attach` would open;
all else is the same code. Setting the original processors again takes everything off.
"""

from __future__ import annotations

import warnings
import weakref
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from torch import nn

from .controls import Control, GroupIsolation, Isolate, OpenTexts, Perturb, RegionModulation, Regions, Share, ShareStyle
from .engine import Engine, engine_of
from .entry import Entry
from .errors import SilentControlError, UnsupportedModelError
from .kernels import close_scope, open_scope
from .select import select
from .tappable import check_model, stand_in

__all__ = [
    "ControlledAttnProcessor",
    "IsolationAttnProcessor",
    "PerturbedAttnProcessor",
    "RegionAttnProcessor",
    "SharedAttnProcessor",
    "processors",
    "set_processors",
]


class ControlledAttnProcessor:
    """A layer's original processor, under controls. Made by `processors`, not by hand.

    Attributes:
        original: the processor that it is put around, which does the work.
        controls: the controls of its stack.
    """

    original: Any
    controls: tuple[Control, ...]
    _entry: Entry

    def __call__(self, attn: nn.Module, *args: Any, **kwargs: Any) -> Any:
        if not self._entry.attached:
            raise SilentControlError(
                f"{type(self).__name__} was taken off its model before, and its controls with it. Make new processors "
                "with attnctrl.processors(...)."
            )
        open_scope(attn)
        try:
            return self.original(attn, *args, **kwargs)
        finally:
            close_scope(attn)

    @property
    def _attention_backend(self) -> Any:
        return self.original._attention_backend

    @_attention_backend.setter
    def _attention_backend(self, backend: Any) -> None:
        self.original._attention_backend = backend

    @property
    def _parallel_config(self) -> Any:
        return self.original._parallel_config

    @_parallel_config.setter
    def _parallel_config(self, config: Any) -> None:
        self.original._parallel_config = config


class IsolationAttnProcessor(ControlledAttnProcessor):
    """A layer's original processor with `Isolate` or `GroupIsolation`."""


class RegionAttnProcessor(ControlledAttnProcessor):
    """A layer's original processor with `Regions` or `RegionModulation`."""


class SharedAttnProcessor(ControlledAttnProcessor):
    """A layer's original processor with `Share` or `ShareStyle`."""


class PerturbedAttnProcessor(ControlledAttnProcessor):
    """A layer's original processor with `Perturb`."""


_NAMED: dict[type[Control], type[ControlledAttnProcessor]] = {
    Isolate: IsolationAttnProcessor,
    GroupIsolation: IsolationAttnProcessor,
    Regions: RegionAttnProcessor,
    OpenTexts: RegionAttnProcessor,
    Perturb: PerturbedAttnProcessor,
    Share: SharedAttnProcessor,
    ShareStyle: SharedAttnProcessor,
    RegionModulation: RegionAttnProcessor,
}
_SIGNED: dict[tuple[type, type], type[ControlledAttnProcessor]] = {}


def processors(
    pipe_or_model: Any,
    controls: Control | Sequence[Control],
    *,
    scheduler: Any = None,
    branches: Sequence[str] = (),
    own_kernels: bool = False,
) -> dict[str, Any]:
    """Processors for `model.set_attn_processor`, or `set_processors`, by the names that Diffusers uses.

    Layers that no control touches keep their own processor. The controls act while at least one of the processors is
    set and leave the model when the last one is replaced.

    Args:
        pipe_or_model: a pipeline, or its transformer; the pipeline brings scheduler and text encoder.
        controls: one control or a stack.
        scheduler: for windows on a bare model.
        branches: guidance branches of one batch, as for `attach`.
        own_kernels: as for `attach`.

    Raises:
        UnsupportedModelError: also for processors with weights of their own, which cannot be wrapped; `attach` can.
    """
    from .attach import as_controls, parts_of

    model, pipe = parts_of(pipe_or_model)
    second = getattr(pipe, "transformer_2", None)
    if second is not None and second is not model:
        warnings.warn(
            f"{type(pipe).__name__} has a second transformer for low noise levels, on which these processors do not "
            "act. Use attnctrl.attach(...), which goes on both.",
            stacklevel=2,
        )
    stack = as_controls(controls)
    engine = engine_of(model)
    check_model(model, engine.layers)
    wrapped = _wanted(engine, stack)
    weighted = [layer.name for layer in engine.layers if isinstance(layer.module.processor, nn.Module)]
    if weighted:
        raise UnsupportedModelError(
            f"The processors at {', '.join(weighted[:3])} hold weights (an IP-Adapter?), which a wrapper would take "
            "off the model. Use attnctrl.attach(...), which leaves processors in place."
        )
    kind = _NAMED.get(type(stack[0]), ControlledAttnProcessor) if len(stack) == 1 else ControlledAttnProcessor
    alive: weakref.WeakSet[ControlledAttnProcessor] = weakref.WeakSet()
    entry = Entry(stack, pipe, scheduler, _presence(engine, alive), branches, own_kernels)
    # set_attn_processor wants one for each attention module, also for those of text refiners, which nobody controls
    made = dict(getattr(model, "attn_processors", {}))
    for layer in engine.layers:
        processor = layer.module.processor
        if layer.name in wrapped:
            processor = _around(kind, stand_in(layer.module) or processor, stack, entry)
            alive.add(processor)
        made[f"{layer.name}.processor"] = processor
    if not wrapped:
        return made
    engine.add(entry)
    for processor in alive:
        # weak references only: what a finalizer holds would keep the model, and so the processor, alive
        references = weakref.ref(engine), weakref.ref(entry), weakref.ref(alive)
        weakref.finalize(processor, _leave_when_gone, *references).atexit = False
    return made


def set_processors(model: Any, by_name: Mapping[str, Any]) -> None:
    """Set what `processors` made, or the originals again, on any model: some have no `set_attn_processor`.

    Args:
        model: the transformer or UNet.
        by_name: processors by the names of their attributes, such as "layers.0.attention.processor".
    """
    if hasattr(model, "set_attn_processor"):
        model.set_attn_processor(dict(by_name))
        return
    for name, processor in by_name.items():
        model.get_submodule(name.removesuffix(".processor")).processor = processor


def _wanted(engine: Engine, controls: Sequence[Control]) -> frozenset[str]:
    """Layers that need a processor: the selected ones; all of them where texts are appended, to hide them elsewhere."""
    live = [control for control in controls if not control.is_idle]
    if any(control.appends_text for control in live):
        return frozenset(layer.name for layer in engine.layers)
    chosen = [select(engine.layers, control.layers, engine.family.presets) for control in live]
    return frozenset(layer.name for layers in chosen for layer in layers)


def _around(kind: type[ControlledAttnProcessor], original: Any, controls: tuple[Control, ...], entry: Entry) -> Any:
    processor = _signed(kind, type(original))()
    processor.original, processor.controls, processor._entry = original, controls, entry
    return processor


def _signed(kind: type[ControlledAttnProcessor], original: type) -> type[ControlledAttnProcessor]:
    """The class with the original's signature: Diffusers reads it to choose the keyword arguments it passes on.

    One class per pair, as compiled code depends on it.
    """
    if (kind, original) not in _SIGNED:

        def __call__(self: ControlledAttnProcessor, attn: nn.Module, *args: Any, **kwargs: Any) -> Any:
            return kind.__call__(self, attn, *args, **kwargs)

        # not __signature__: a stored one cannot be read in a full graph whose keyword arguments were changed before
        __call__.__wrapped__ = original.__call__  # type: ignore[attr-defined]
        names = ("__doc__", "__module__", "__qualname__")
        body = {"__call__": __call__, **{name: getattr(kind, name) for name in names}}
        _SIGNED[kind, original] = type(kind.__name__, (kind,), body)
    return _SIGNED[kind, original]


def _presence(engine: Engine, alive: weakref.WeakSet[ControlledAttnProcessor]) -> Callable[[], frozenset[str] | None]:
    """A function that names the layers that hold one of the processors; None once they have been there and are gone."""
    seen = False

    def layers_present() -> frozenset[str] | None:
        nonlocal seen
        names = frozenset(
            layer.name for layer in engine.layers if any(one in alive for one in _chain(layer.module.processor))
        )
        gone = seen and not names
        seen = seen or bool(names)
        return None if gone else names

    return layers_present


def _chain(processor: Any) -> list[ControlledAttnProcessor]:
    """A processor and those it is put around, as far as they are ours."""
    found = []
    while isinstance(processor, ControlledAttnProcessor):
        found.append(processor)
        processor = processor.original
    return found


def _leave_when_gone(engine: Callable[[], Engine | None], entry: Callable[[], Entry | None], alive: Any) -> None:
    """One processor is gone; with the last one the entry leaves."""
    one, whose = engine(), entry()
    # iterating skips the one that is just going; its length would still count it
    if one is not None and whose is not None and not list(alive() or ()):
        one.remove(whose)
