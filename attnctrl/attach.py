"""Arriving and leaving: `attach` puts a stack of controls on a pipeline or model, and takes it off without a trace.

with attach(pipe, [Isolate(), Regions(regions)]) as handle:
    image = pipe("a park").images[0]
print(handle.report())
"""

from __future__ import annotations

import warnings
from collections.abc import Sequence
from types import TracebackType
from typing import Any

from torch import nn

from .controls.base import Control
from .engine import engine_of
from .entry import Entry
from .errors import ControlError, UnsupportedModelError
from .report import Report, merged, report_of

__all__ = ["Handle", "as_controls", "attach", "parts_of"]


class Handle:
    """A stack of controls that is on a model, or on both of a pipeline that has two. Use it as a context manager, or
    call `detach`.
    """

    def __init__(self, parts: Sequence[tuple[Any, Entry]]) -> None:
        self._parts = tuple(parts)

    @property
    def controls(self) -> tuple[Control, ...]:
        return self._parts[0][1].controls

    @property
    def attached(self) -> bool:
        """Whether the controls are still on the model."""
        return any(entry.attached for _, entry in self._parts)

    def report(self) -> Report:
        """What each control did so far."""
        return merged([report_of(engine, entry) for engine, entry in self._parts])

    def _remove(self) -> None:
        for engine, entry in self._parts:
            engine.remove(entry)

    def detach(self) -> None:
        """Take the controls off; warns of those that never acted. A second call does nothing."""
        if not self.attached:
            return
        silent = self.report().warnings
        self._remove()
        for text in silent:
            warnings.warn(text, stacklevel=2)

    def __enter__(self) -> Handle:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if kind is None:
            self.detach()
        else:
            # an exception explains why controls did not act
            self._remove()


def attach(
    pipe_or_model: Any,
    controls: Control | Sequence[Control],
    *,
    scheduler: Any = None,
    branches: Sequence[str] = (),
    own_kernels: bool = False,
) -> Handle:
    """Put controls on a pipeline or a model. They act from the next forward on, until `detach` or the end of `with`.

    Attaching again adds to what is there; the stacks act together and leave in any order.

    Args:
        pipe_or_model: a Diffusers pipeline, or its transformer. The pipeline brings its scheduler (for windows), its
            text encoder (for the prompts of regions), and a second denoiser, where it has one.
        controls: one control or a list; they compose in list order.
        scheduler: whose timesteps place the windows when a bare model is given.
        branches: guidance branches of one batch in the order of its rows, such as ("uncond", "cond"), for a bare model
            or a pipeline that does not tell whether it uses guidance.
        own_kernels: on a GPU, plans may call torch's variable-length and flex attention in place of the model's
            kernel. Exact on the CPU, not yet measured on a device; off, plans make plain calls of the model's kernel.

    Raises:
        UnsupportedModelError: unknown model family, context parallelism, or processors whose kernel cannot be met.
        ControlError, SelectionError: a control that cannot work on this model.
    """
    model, pipe = parts_of(pipe_or_model)
    stack = as_controls(controls)
    # Wan 2.2 hands over to a second denoiser at low noise levels
    second = getattr(pipe, "transformer_2", None)
    models = [model] if second is None or second is model else [model, second]
    parts = [
        (engine_of(one), Entry(stack, pipe, scheduler, branches=branches, own_kernels=own_kernels)) for one in models
    ]
    added = []
    try:
        for engine, entry in parts:
            engine.add(entry)
            added.append((engine, entry))
    except Exception:
        for engine, entry in added:
            engine.remove(entry)
        raise
    return Handle(parts)


def parts_of(pipe_or_model: Any) -> tuple[nn.Module, Any]:
    """(denoiser, pipeline or None).

    Raises:
        UnsupportedModelError: when it is neither a pipeline with a transformer nor a model.
    """
    pipe = None if isinstance(pipe_or_model, nn.Module) else pipe_or_model
    model = pipe_or_model if pipe is None else getattr(pipe, "transformer", None) or getattr(pipe, "unet", None)
    if not isinstance(model, nn.Module):
        raise UnsupportedModelError(
            f"Controls go on a Diffusers pipeline or its transformer; found {type(pipe_or_model).__name__}, which has "
            "neither a transformer nor a unet."
        )
    return model, pipe


def as_controls(controls: Control | Sequence[Control]) -> tuple[Control, ...]:
    """A stack from one control or a list.

    Raises:
        ControlError: when something else is in it.
    """
    stack = (controls,) if isinstance(controls, Control) else tuple(controls)
    strangers = [type(one).__name__ for one in stack if not isinstance(one, Control)]
    if strangers:
        raise ControlError(f"A stack holds controls such as Regions([...]) or Isolate(); found {', '.join(strangers)}.")
    return stack
