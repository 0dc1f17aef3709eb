"""The only file that touches diffusers internals: opens a scope around an attention module and meets its kernel.

Two hooks, the same pair of functions for all layers, push and pop the layer's `Act` on a stack of this thread. The
functions in diffusers' registry of attention backends are wrapped: without an open scope they pass through, with one
they run its act. So the model's own processors run, and whichever backend the user selects is the one that is met. The
act hangs on the module and nothing in the hooks knows the layer's name, so layers of one kind share one compiled graph.
"""

from __future__ import annotations

import functools
import threading
import weakref
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from inspect import signature
from typing import Any, Protocol

import torch
from torch import Tensor, nn

from .call import Act
from .errors import LayoutError, UnsupportedModelError
from .select import Layer

__all__ = ["MASKING", "Tap", "backend_name", "check_model", "close_scope", "execution_device", "open_scope"]

MASKING = frozenset({"native", "_native_efficient", "_native_math", "_native_cudnn", "_native_npu", "flex"})
"""Attention backends that apply an additive mask [B, H, Tq, Tk] to every score."""


class _Scope(threading.local):
    """Open attention layers of this thread, innermost last: [act, kernel calls met, module]."""

    def __init__(self) -> None:
        self.frames: list[list[Any]] = []


class _Tapped:
    """Which models are tapped, as text: compiled code that met a kernel depends on it and is traced anew with it.

    Dynamo does not look at the hooks of a module it has compiled, so without this a model that was compiled and run
    before would ignore them.
    """

    names = ""


_scope = _Scope()
_tapped = _Tapped()
_serials: weakref.WeakKeyDictionary[nn.Module, int] = weakref.WeakKeyDictionary()
_live: set[int] = set()
_lock = threading.RLock()


def open_scope(module: nn.Module, *_: Any) -> None:
    """Before an attention module runs: its act waits for the kernel."""
    act = module._attnctrl
    if act is not None:
        _scope.frames.append([act, 0, module])


def close_scope(module: nn.Module, *_: Any) -> None:
    """After an attention module has run."""
    if module._attnctrl is not None:
        _scope.frames.pop()


def _registry() -> dict[Any, Callable[..., Tensor]]:
    from diffusers.models.attention_dispatch import _AttentionBackendRegistry

    return _AttentionBackendRegistry._backends


def _wrap(name: str, original: Callable[..., Tensor]) -> Callable[..., Tensor]:
    @functools.wraps(original)
    def met(**call: Any) -> Tensor:
        if not _tapped.names or not _scope.frames:
            return original(**call)
        return _meet(_scope.frames[-1], name, original, call)

    met._attnctrl_original = original  # type: ignore[attr-defined]
    return met


def _meet(frame: list[Any], name: str, original: Callable[..., Tensor], call: dict[str, Any]) -> Tensor:
    act, number, module = frame
    frame[1] = number + 1
    module._attnctrl_met = True
    # the first kernel call of an attention module is the joint one, later ones read an IP-Adapter's pictures
    if number > 0:
        return original(**call)
    masks = name in MASKING

    def kernel(q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None = None, scale: float | None = None) -> Tensor:
        given: dict[str, Any] = {"query": q.transpose(1, 2), "key": k.transpose(1, 2), "value": v.transpose(1, 2)}
        if scale is not None:
            given["scale"] = scale
        if mask is None:
            return original(**{**call, **given}).transpose(1, 2)
        # a 2D mask would be taken for key padding
        given["attn_mask"] = mask.reshape((1,) * (4 - mask.ndim) + tuple(mask.shape))
        return (original(**{**call, **given}) if masks else _native()(**given)).transpose(1, 2)

    query, key, value = (call[part].transpose(1, 2) for part in ("query", "key", "value"))
    return act.run(query, key, value, call.get("attn_mask"), kernel, call.get("scale")).transpose(1, 2)


def _native() -> Callable[..., Tensor]:
    from diffusers.models.attention_dispatch import AttentionBackendName

    function = _registry()[AttentionBackendName.NATIVE]
    return getattr(function, "_attnctrl_original", function)


def _settle() -> None:
    """Wrap the registry while any model is tapped, unwrap it when none is, and note which are."""
    # models may be collected at any moment, also while another one is traced; then the next call settles it
    if torch._guards.CompileContext.try_get() is not None:
        return
    registry = _registry()
    for key, function in list(registry.items()):
        original = getattr(function, "_attnctrl_original", None)
        if _live and original is None:
            registry[key] = _wrap(key.value, function)
        elif original is not None and not _live:
            registry[key] = original
    _tapped.names = ",".join(str(number) for number in sorted(_live))


def _forget(number: int) -> None:
    """A tapped model is gone without having been detached."""
    with _lock:
        _live.discard(number)
        _settle()


def _serial(model: nn.Module) -> int:
    """The model's number: the lowest that no living model holds, so that re-attaching finds its compiled code again."""
    if model not in _serials:
        taken = set(_serials.values())
        _serials[model] = next(number for number in range(1, len(taken) + 2) if number not in taken)
    return _serials[model]


def backend_name(module: nn.Module) -> str:
    """The attention backend that a layer would call now."""
    from diffusers.models.attention_dispatch import _AttentionBackendRegistry

    chosen = getattr(module.processor, "_attention_backend", None) or _AttentionBackendRegistry._active_backend
    return str(getattr(chosen, "value", chosen))


def execution_device(model: nn.Module, tensor: Tensor) -> torch.device:
    """Where the model will compute: accelerate's offload hooks may move inputs that come in elsewhere."""
    device = getattr(getattr(model, "_hf_hook", None), "execution_device", None)
    return tensor.device if device is None else torch.device(device)


def check_model(model: nn.Module, layers: Sequence[Layer]) -> None:
    """Refuse what cannot be controlled.

    Raises:
        UnsupportedModelError: for context parallelism, and for processors that do not call diffusers' attention
            dispatcher.
    """
    parallel = getattr(model, "_parallel_config", None)
    if getattr(parallel, "context_parallel_config", None) is not None:
        raise UnsupportedModelError(
            f"{type(model).__name__} runs context parallel: each device sees a shard of the sequence, which masks do "
            "not follow. Load the model without it."
        )
    foreign = {
        f"{type(layer.module.processor).__name__} at {layer.name}"
        for layer in layers
        if not _dispatches(layer.module.processor)
    }
    if foreign:
        raise UnsupportedModelError(
            f"These processors do not call diffusers' dispatch_attention_fn, so their kernel cannot be met: "
            f"{', '.join(sorted(foreign)[:4])}. Set processors that do, such as the model's own."
        )


def _dispatches(processor: Any) -> bool:
    inner = getattr(processor, "original", processor)
    code = getattr(getattr(type(inner), "__call__", None), "__code__", None)  # noqa: B004
    return code is not None and "dispatch_attention_fn" in code.co_names


class Listener(Protocol):
    """Who is told of the forwards of a model."""

    def before(self, arguments: dict[str, Any]) -> dict[str, Any] | None:
        """The arguments of a forward that begins; returns those to run it with, None for the same."""

    def after(self, finished: bool) -> None:
        """The forward has ended; `finished` is False after an exception."""


class Tap:
    """Everything that sits on one model: hooks, the branch name, the share in the wrapped registry.

    Args:
        model: the transformer.
        layers: its attention layers.
        listener: told before and after each forward.

    Attributes:
        root: the module whose call is the forward: the model, or the one that `torch.compile(model)` made of it.
        branch: name of the branch that a pipeline has announced with `cache_context`.
    """

    def __init__(self, model: nn.Module, layers: Sequence[Layer], listener: Listener, *, root: nn.Module) -> None:
        self.model = model
        self.root = root
        self.layers = tuple(layers)
        self.listener = listener
        self.branch: str | None = None
        self._context: dict[str, Any] = {}
        self._signature = signature(type(model).forward)
        self._handles: list[Any] = []
        self._layer_handles: list[Any] = []
        self._shadow: Callable[..., Any] | None = None
        self._shadowed: Callable[..., Any] | None = None
        self._call: _RootCall | None = None
        self._finalizer: weakref.finalize | None = None

    def install(self) -> None:
        """Root call, branch names and the wrapped registry; layers are opened by hooks or by processors."""
        with _lock:
            for layer in self.layers:
                layer.module._attnctrl = None
                layer.module._attnctrl_met = False
            self._install_root()
            self._shadow_cache_context()
            number = _serial(self.model)
            _live.add(number)
            self._finalizer = weakref.finalize(self, _forget, number)
            self._finalizer.atexit = False
            _settle()

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
        with _lock:
            self.remove_hooks()
            self._remove_root()
            for layer in self.layers:
                for name in ("_attnctrl", "_attnctrl_met"):
                    layer.module.__dict__.pop(name, None)
            self._unshadow_cache_context()
            _scope.frames.clear()
            if self._finalizer is not None:
                self._finalizer()
            self._finalizer = None

    def assign(self, acts: Mapping[str, Act]) -> None:
        """Hang each layer's act on its module; layers that are not named run untouched."""
        _settle()  # backends may have been registered since
        for layer in self.layers:
            layer.module._attnctrl_met = False
            layer.module._attnctrl = acts.get(layer.name)

    def unmet(self) -> tuple[Layer, ...]:
        """Layers with an act whose kernel was not called."""
        return tuple(
            layer for layer in self.layers if layer.module._attnctrl is not None and not layer.module._attnctrl_met
        )

    def reset_caches(self) -> None:
        """Forget what diffusers' caches hold of earlier steps, within the branch that is running."""
        from diffusers.hooks.hooks import CacheContext, _set_cache_context

        model: Any = self.model
        model._reset_stateful_cache()
        if self.branch is not None:
            _set_cache_context(model, CacheContext(self.branch, **self._context))

    def clear(self) -> None:
        """Back to idle between forwards."""
        _scope.frames.clear()
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
        _scope.frames.clear()
        try:
            bound = self._signature.bind(model, *args, **kwargs)
        except TypeError as error:
            raise LayoutError(f"{type(model).__name__}.forward cannot be called like this: {error}.") from error
        arguments = dict(bound.arguments)
        arguments.pop(next(iter(self._signature.parameters)))
        changed = self.listener.before(arguments)
        return None if changed is None else ((), changed)

    def _after(self, finished: bool) -> None:
        try:
            self.listener.after(finished)
        finally:
            self.clear()

    def _shadow_cache_context(self) -> None:
        """Record the name of the branch that a pipeline announces; the model's own context runs as before."""
        original = getattr(self.model, "cache_context", None)
        if original is None:
            return

        @contextmanager
        def cache_context(name: str, **kwargs: Any) -> Iterator[None]:
            outer, self.branch, self._context = (self.branch, self._context), name, kwargs
            try:
                with original(name, **kwargs):
                    yield
            finally:
                self.branch, self._context = outer

        self._shadow, self._shadowed = cache_context, self.model.__dict__.get("cache_context")
        self.model.__dict__["cache_context"] = cache_context

    def _unshadow_cache_context(self) -> None:
        # whoever has put another one on top calls ours, which calls the model's
        if self._shadow is None or self.model.__dict__.get("cache_context") is not self._shadow:
            return
        if self._shadowed is None:
            del self.model.__dict__["cache_context"]
        else:
            self.model.__dict__["cache_context"] = self._shadowed


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
