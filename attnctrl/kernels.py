"""Meets the attention kernels: diffusers' registry of backends, and the `F` of processors that call PyTorch's own.

An attention module that runs opens a scope with its `Act`. Kernels that are called without an open scope pass through;
with one they run the act. The functions in the registry are wrapped, so whichever backend the user selects is met; the
global name `F` of modules that define processors which call `F.scaled_dot_product_attention` is bound to a copy of
`torch.nn.functional`. PyTorch's own function is never replaced: others compare with it. Together with `attnctrl.tap`
the only file that touches diffusers internals.
"""

from __future__ import annotations

import functools
import sys
import threading
import types
import warnings
import weakref
from collections.abc import Callable, Iterable
from typing import Any

import torch
from torch import Tensor, nn

__all__ = [
    "MASKING",
    "backend_name",
    "calls_kernel",
    "clear_scopes",
    "close_scope",
    "enter",
    "leave",
    "open_scope",
    "settle",
]

MASKING = frozenset({"native", "_native_efficient", "_native_math", "_native_cudnn", "_native_npu", "flex"})
"""Attention backends that apply an additive mask [B, H, Tq, Tk] to every score."""

_SDPA = "scaled_dot_product_attention"


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
_functional: set[str] = set()
"""Names of the modules whose `F` has been met."""


def open_scope(module: nn.Module, *_: Any) -> None:
    """Before an attention module runs: its act waits for the kernel."""
    act = module._attnctrl
    if act is not None:
        _scope.frames.append([act, 0, module])


def close_scope(module: nn.Module, *_: Any) -> None:
    """After an attention module has run."""
    if module._attnctrl is not None:
        _scope.frames.pop()


def clear_scopes() -> None:
    """Forget what an interrupted forward has left open."""
    _scope.frames.clear()


def enter(model: nn.Module, processors: Iterable[Any]) -> int:
    """Meet the kernels of a model from now on; returns the number to leave with.

    It is the lowest that no living model holds, so that re-attaching finds its compiled code again.
    """
    with _lock:
        if model not in _serials:
            taken = set(_serials.values())
            _serials[model] = next(number for number in range(1, len(taken) + 2) if number not in taken)
        number = _serials[model]
        _live.add(number)
        for processor in processors:
            if _SDPA in _called(processor):
                _functional.add(type(_inner(processor)).__module__)
        settle()
        return number


def leave(number: int) -> None:
    """Meet the kernels of a model no more; also when it is gone without having been detached."""
    with _lock:
        _live.discard(number)
        settle()


def settle() -> None:
    """Wrap the kernels while any model is tapped, unwrap them when none is, and note which are."""
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
    for name in _functional:
        names = vars(sys.modules[name])
        # whoever has put another one on top calls ours
        before, after = torch.nn.functional, _met_functional()
        if names["F"] is (before if _live else after):
            names["F"] = after if _live else before
    _tapped.names = ",".join(str(number) for number in sorted(_live))


def calls_kernel(processor: Any) -> bool:
    """Whether a processor calls a kernel that is met: diffusers' dispatcher, or `F.scaled_dot_product_attention`."""
    called = _called(processor)
    if "dispatch_attention_fn" in called:
        return True
    names = vars(sys.modules.get(type(_inner(processor)).__module__, types))
    return _SDPA in called and "F" in called and getattr(names.get("F"), "softmax", None) is torch.nn.functional.softmax


def backend_name(module: nn.Module) -> str:
    """The attention backend that a layer would call now."""
    from diffusers.models.attention_dispatch import _AttentionBackendRegistry

    if "dispatch_attention_fn" not in _called(module.processor):
        return "native"
    chosen = getattr(module.processor, "_attention_backend", None) or _AttentionBackendRegistry._active_backend
    return str(getattr(chosen, "value", chosen))


def _inner(processor: Any) -> Any:
    """The model's own processor within ours."""
    while hasattr(processor, "original"):
        processor = processor.original
    return processor


def _called(processor: Any) -> tuple[str, ...]:
    """Names that a processor's call uses."""
    kind = type(_inner(processor))
    method = getattr(kind, "__call__", None)  # noqa: B004
    code = getattr(kind.forward if method is nn.Module.__call__ else method, "__code__", None)
    return () if code is None else code.co_names


def _registry() -> dict[Any, Callable[..., Tensor]]:
    from diffusers.models.attention_dispatch import _AttentionBackendRegistry

    return _AttentionBackendRegistry._backends


def _wrap(name: str, original: Callable[..., Tensor]) -> Callable[..., Tensor]:
    @functools.wraps(original)
    def met(**call: Any) -> Tensor:
        if not _tapped.names or not _scope.frames:
            return original(**call)
        return _meet_dispatched(_scope.frames[-1], name, original, call)

    met._attnctrl_original = original  # type: ignore[attr-defined]
    return met


def _count(frame: list[Any]) -> bool:
    """Count a kernel call of an open scope; whether it is the one that the act is for."""
    act, number, module = frame
    frame[1] = number + 1
    if number != act.call:
        return False
    module._attnctrl_met = True
    return True


def _meet_dispatched(frame: list[Any], name: str, original: Callable[..., Tensor], call: dict[str, Any]) -> Tensor:
    if not _count(frame):
        return original(**call)
    masks = name in MASKING

    def kernel(q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None = None, scale: float | None = None) -> Tensor:
        given: dict[str, Any] = {"query": q.transpose(1, 2), "key": k.transpose(1, 2), "value": v.transpose(1, 2)}
        if scale is not None:
            given["scale"] = scale
        if mask is None:
            return original(**{**call, **given, "attn_mask": None}).transpose(1, 2)
        given["attn_mask"] = _four(mask)
        if masks:
            return original(**{**call, **given}).transpose(1, 2)
        _tell_of_native(name)
        return _native()(**given).transpose(1, 2)

    act, mask, scale = frame[0], call.get("attn_mask"), call.get("scale")
    query, key, value = (call[part].transpose(1, 2) for part in ("query", "key", "value"))
    for probe in act.probes:
        probe.look(query, key, value, mask, kernel, scale)
    if act.parts:
        return act.run(query, key, value, mask, kernel, scale).transpose(1, 2)
    out = original(**call)
    act.tell(out.transpose(1, 2))
    return out


known_maskless: set[str] = set()
"""Backends of which the user was told that masked calls run on another one."""


def _tell_of_native(name: str) -> None:
    """Once per backend: the model's own mask needs another one. Of plans that need one the engine tells beforehand."""
    if name in known_maskless or torch.compiler.is_compiling():
        return
    known_maskless.add(name)
    warnings.warn(
        f"The attention backend '{name}' cannot honour a mask; calls under control that have one run on 'native'.",
        stacklevel=2,
    )


def _native() -> Callable[..., Tensor]:
    from diffusers.models.attention_dispatch import AttentionBackendName

    function = _registry()[AttentionBackendName.NATIVE]
    return getattr(function, "_attnctrl_original", function)


def _four(mask: Tensor) -> Tensor:
    """A 2D mask would be taken for key padding."""
    return mask.reshape((1,) * (4 - mask.ndim) + tuple(mask.shape))


@functools.cache
def _met_functional() -> types.ModuleType:
    """A copy of `torch.nn.functional` whose attention is met."""
    copy = types.ModuleType("torch.nn.functional")
    copy.__dict__.update(torch.nn.functional.__dict__)
    original = torch.nn.functional.scaled_dot_product_attention

    @functools.wraps(original)
    def met(query: Tensor, key: Tensor, value: Tensor, attn_mask: Tensor | None = None, *args: Any, **call: Any) -> Any:
        if not _tapped.names or not _scope.frames or not _count(_scope.frames[-1]):
            return original(query, key, value, attn_mask, *args, **call)

        def kernel(q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None = None, scale: float | None = None) -> Tensor:
            given = call if scale is None else {**call, "scale": scale}
            return original(q, k, v, None if mask is None else _four(mask), *args, **given)

        act, scale = _scope.frames[-1][0], call.get("scale")
        for probe in act.probes:
            probe.look(query, key, value, attn_mask, kernel, scale)
        if act.parts:
            return act.run(query, key, value, attn_mask, kernel, scale)
        out = original(query, key, value, attn_mask, *args, **call)
        act.tell(out)
        return out

    copy.scaled_dot_product_attention = met  # type: ignore[attr-defined]
    return copy
