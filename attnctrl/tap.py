"""What sits on a tapped model: a scope around each attention module, and the calls that begin and end a forward.

Two hooks, the same pair of functions for all layers, push and pop the layer's `Act` on a stack of this thread;
`attnctrl.kernels` meets the kernel that is called meanwhile. So the model's own processors run, with the user's
backend. The act hangs on the module and no hook knows the layer's name, so layers of one kind share a compiled graph.
"""

from __future__ import annotations

import functools
import weakref
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager
from inspect import signature
from itertools import chain
from typing import Any, Protocol

import torch
from torch import nn

from .act import Act
from .errors import LayoutError, UnsupportedModelError
from .guidance import copied
from .kernels import clear_scopes, close_scope, enter, leave, open_scope, settle
from .replay import within
from .select import Layer
from .tappable import hooks_of, stand_in

__all__ = ["Tap"]


class Listener(Protocol):
    """Who is told of the forwards of a model."""

    def before(self, arguments: dict[str, Any]) -> dict[str, Any] | None:
        """The arguments of a forward that begins; returns those to run it with, None for the same."""

    def after(self, finished: bool) -> None:
        """The forward has ended; `finished` is False after an exception."""

    @property
    def guides(self) -> bool:
        """Whether `led` or `guided` may have something to run."""

    def led(self, arguments: dict[str, Any], forward: Callable[..., Any]) -> AbstractContextManager[None]:
        """Around a forward with these arguments; `forward` runs the model before it."""

    def guided(self, output: Any, arguments: dict[str, Any], forward: Callable[[dict[str, Any]], Any]) -> Any:
        """The output that a forward with these arguments returns; `forward` runs the model once more."""


class Tap:
    """Everything that sits on one model: hooks, the branch name, the share in the wrapped registry.

    Args:
        model: the transformer.
        layers: its attention layers.
        listener: told before and after each forward.
        shadows: functions that stand in for methods, by dotted name, as in `Family.shadows`.

    Attributes:
        root: the module whose call is the forward: the model, or the one that `torch.compile(model)` made of it.
        branch: name of the branch that a pipeline has announced with `cache_context`.
    """

    def __init__(
        self,
        model: nn.Module,
        layers: Sequence[Layer],
        listener: Listener,
        *,
        root: nn.Module,
        shadows: Mapping[str, Callable[..., Any]],
    ) -> None:
        self.model = model
        self.root = root
        self.layers = tuple(layers)
        self.listener = listener
        self.branch: str | None = None
        self._signature = signature(type(model).forward)
        # each layer by name, with the block that it sits in
        self._places = [(x.name, x.module, model.get_submodule(x.name.rpartition(".")[0])) for x in self.layers]
        self._handles: list[Any] = []
        self._layer_handles: list[Any] = []
        self._shadows = dict(shadows)
        self._shadowed: list[tuple[nn.Module, str, Any, Any]] = []
        self._stand_ins: list[tuple[Any, Any, Any]] = []
        self._call: _RootCall | None = None
        self._finalizer: weakref.finalize | None = None

    def install(self) -> None:
        """Root call, branch names and the wrapped registry; layers are opened by hooks or by processors."""
        for layer in self.layers:
            layer.module._attnctrl = None
            layer.module._attnctrl_met = False
        self._install_root()
        for name, function in self._shadows.items():
            owner, _, method = name.rpartition(".")
            self._put_shadow(self.model.get_submodule(owner), method, function)
        if hasattr(self.model, "cache_context"):
            self._put_shadow(self.model, "cache_context", self._cache_context)
        # where there are stand-ins, theirs are the kernels to meet
        number = enter(self.model, [stand_in(layer.module) or layer.module.processor for layer in self.layers])
        self._finalizer = weakref.finalize(self, leave, number)
        self._finalizer.atexit = False

    def install_hooks(self) -> None:
        """Open the scope by hooks on every attention layer."""
        self.remove_hooks()
        for module in (layer.module for layer in self.layers):
            self._layer_handles += [
                module.register_forward_pre_hook(open_scope),
                module.register_forward_hook(close_scope),
            ]

    def remove_hooks(self) -> None:
        """Take the hooks off the attention layers."""
        for handle in self._layer_handles:
            handle.remove()
        self._layer_handles = []

    def remove(self) -> None:
        """Leave the model exactly as it was."""
        self.remove_hooks()
        self._take_stand_ins()
        self._remove_root()
        for layer in self.layers:
            for name in ("_attnctrl", "_attnctrl_met"):
                layer.module.__dict__.pop(name, None)
        self._take_shadows()
        clear_scopes()
        if self._finalizer is not None:
            self._finalizer()
        self._finalizer = None

    def assign(self, acts: Mapping[str, Act]) -> None:
        """Hang each layer's act on its module; layers that are not named run untouched."""
        settle()  # backends may have been registered since
        for layer in self.layers:
            layer.module._attnctrl_met = False
            layer.module._attnctrl = acts.get(layer.name)
            self._put_stand_in(layer)

    def unmet(self) -> tuple[Layer, ...]:
        """Layers with an act whose kernel was not called."""
        return tuple(
            layer for layer in self.layers if layer.module._attnctrl is not None and not layer.module._attnctrl_met
        )

    def has_caches(self, parts: Iterable[nn.Module] | None = None) -> bool:
        """Hooks of diffusers on the model keep outputs of earlier steps; `parts` are all modules that may have some."""
        parts = within(self.model) if parts is None else parts
        return any(hook._is_stateful for module in parts for hook in hooks_of(module))

    def shares_caches(self) -> bool:
        """What is kept of attention layers is not told apart by guidance branch."""
        hooks = (hook for layer in self.layers for hook in hooks_of(layer.module))
        return any(hook._is_stateful and not _managers(hook) for hook in hooks)

    def halves_batches(self) -> bool:
        """FasterCache runs the layers on the prompt's rows alone in some steps."""
        return any(not getattr(hook, "is_guidance_distilled", True) for hook in hooks_of(self.model))

    def reset_caches(self) -> None:
        """Forget what diffusers' caches hold of earlier steps; the branch that is announced stays so."""
        from diffusers.hooks.faster_cache import FasterCacheBlockHook

        for module in self.model.modules():
            managers = [(one, one._context) for hook in hooks_of(module) for one in _managers(hook)]
            if "_diffusers_hook" in vars(module):
                vars(module)["_diffusers_hook"].reset_stateful_hooks(recurse=False)
            for hook in hooks_of(module):
                if isinstance(hook, FasterCacheBlockHook):
                    # a count of 0 is one at which it would use what it does not have
                    hook.state.iteration = hook.block_skip_range
            for manager, context in managers:
                manager.set_context(context)

    def perturbed(self) -> frozenset[str]:
        """Names of the layers that a guider has taken the scores from or leaves out, until it cleans up."""
        return frozenset(name for name, *modules in self._places if any(map(_perturbs, chain(*map(hooks_of, modules)))))

    def clear(self) -> None:
        """Back to idle between forwards."""
        clear_scopes()
        self._take_stand_ins()
        if self._finalizer is not None:
            for layer in self.layers:
                layer.module._attnctrl = None

    def _install_root(self) -> None:
        compiled = getattr(self.root, "_compiled_call_impl", None)
        if compiled is None:
            self._handles = [self.root.register_forward_pre_hook(self._before, with_kwargs=True)]
        self._call = _RootCall(self, compiled)
        # not by setattr, which torch.compile's wrapper passes on to the model inside
        self.root.__dict__["_compiled_call_impl"] = self._call

    def _remove_root(self) -> None:
        for handle in self._handles:
            handle.remove()
        self._handles = []
        sits = self.root.__dict__.get("_compiled_call_impl") is self._call
        if self._call is not None and sits:
            del self.root.__dict__["_compiled_call_impl"]
            if self._call.compiled is not None:
                self.root.__dict__["_compiled_call_impl"] = self._call.compiled
        self._call = None

    def _before(
        self, model: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]
    ) -> tuple[tuple[()], dict[str, Any]] | None:
        if torch.compiler.is_compiling():
            raise UnsupportedModelError(
                "This model was compiled as a whole while controls were on it. Call model.compile() or "
                "torch.compile(model) first and attach to the result (or to its pipeline), or use "
                "model.compile_repeated_blocks()."
            )
        clear_scopes()
        changed = self.listener.before(self.bound(args, kwargs))
        return None if changed is None else ((), changed)

    def bound(self, args: tuple[Any, ...], kwargs: dict[str, Any]) -> dict[str, Any]:
        """The arguments of a forward by name.

        Raises:
            LayoutError: when the model's forward cannot be called with them.
        """
        try:
            bound = self._signature.bind(self.model, *args, **kwargs)
        except TypeError as error:
            raise LayoutError(f"{type(self.model).__name__}.forward cannot be called like this: {error}.") from error
        arguments = dict(bound.arguments)
        arguments.pop(next(iter(self._signature.parameters)))
        return arguments

    def _after(self, finished: bool) -> None:
        try:
            self.listener.after(finished)
        finally:
            self.clear()

    @contextmanager
    def _cache_context(self, original: Callable[..., Any], name: str, **kwargs: Any) -> Iterator[None]:
        """Record the name of the branch that a pipeline announces; the model's own context runs as before."""
        outer, self.branch = self.branch, name
        try:
            with original(name, **kwargs):
                yield
        finally:
            self.branch = outer

    def _put_stand_in(self, layer: Layer) -> None:
        module = layer.module
        if module._attnctrl is not None and (made := stand_in(module)) is not None:
            self._stand_ins.append((module, module.processor, made))
            module.processor = made

    def _take_stand_ins(self) -> None:
        for module, original, made in self._stand_ins:
            if module.processor is made:
                module.processor = original
        self._stand_ins = []

    def _put_shadow(self, owner: nn.Module, method: str, function: Callable[..., Any]) -> None:
        shadow = functools.partial(function, getattr(owner, method))
        self._shadowed.append((owner, method, shadow, owner.__dict__.get(method)))
        owner.__dict__[method] = shadow

    def _take_shadows(self) -> None:
        # whoever has put another one on top calls ours, which calls the model's
        for owner, method, shadow, before in self._shadowed:
            if owner.__dict__.get(method) is not shadow:
                continue
            if before is None:
                del owner.__dict__[method]
            else:
                owner.__dict__[method] = before
        self._shadowed = []


def _managers(hook: Any) -> list[Any]:
    """What keeps a hook's state by branch."""
    from diffusers.hooks.hooks import StateManager

    return [one for one in vars(hook).values() if isinstance(one, StateManager)]


def _perturbs(hook: Any) -> bool:
    """A hook of diffusers' layer skipping; one with a dropout between 0 and 1 still runs the layer."""
    from diffusers.hooks.layer_skip import AttentionProcessorSkipHook, TransformerBlockSkipHook

    return isinstance(hook, (AttentionProcessorSkipHook, TransformerBlockSkipHook)) and hook.dropout == 1


class _RootCall:
    """Stands where PyTorch looks for a compiled call, around the model's call: it sees every forward end.

    PyTorch's own "always" hooks miss interrupts from the keyboard. In a model that `model.compile()` has compiled,
    hooks are part of the compiled code, so there this call also asks what to do before the forward.
    """

    def __init__(self, tap: Tap, compiled: Callable[..., Any] | None) -> None:
        self.tap = tap
        self.compiled = compiled

    def __bool__(self) -> bool:
        """What others read off this place: whether the model is compiled."""
        return self.compiled is not None

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        listener = self.tap.listener
        if not listener.guides:
            return self._forward(*args, **kwargs)
        held = copied(self.tap.bound(args, kwargs))
        with listener.led(copied(held), lambda again: self._forward(**again)):
            return listener.guided(self._forward(*args, **kwargs), held, lambda again: self._forward(**again))

    def _forward(self, *args: Any, **kwargs: Any) -> Any:
        finished = False
        try:
            if self.compiled is None:
                output = self.tap.root._call_impl(*args, **kwargs)
            else:
                changed = self.tap._before(self.tap.model, args, kwargs)
                output = self.compiled(*args, **kwargs) if changed is None else self.compiled(**changed[1])
            finished = True
        finally:
            self.tap._after(finished)
        return output
