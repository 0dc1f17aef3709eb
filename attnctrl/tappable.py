"""What a tap needs to know of a model: where it computes, whether it is compiled, which hooks of diffusers it has, and
which processors call a kernel that can be met, or have a stand-in that does."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from .errors import UnsupportedModelError
from .kernels import calls_kernel
from .replay import within
from .select import Layer, describe

__all__ = ["check_model", "execution_device", "hooks_of", "is_compiled", "stand_in", "stand_in_notes"]


def execution_device(model: nn.Module, tensor: Tensor) -> torch.device:
    """Where the model will compute: accelerate's offload hooks may move inputs that come in elsewhere."""
    device = getattr(getattr(model, "_hf_hook", None), "execution_device", None)
    return tensor.device if device is None else torch.device(device)


def is_compiled(model: nn.Module, parts: Iterable[nn.Module] | None = None) -> bool:
    """The model is being traced, or it or a block was compiled in place; `parts` are all modules that may have been."""
    parts = within(model) if parts is None else parts
    return torch.compiler.is_compiling() or any(part._compiled_call_impl for part in parts)


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
        if not (layer.linear or calls_kernel(layer.module.processor) or stand_in(layer.module) is not None)
    }
    if foreign:
        raise UnsupportedModelError(
            "These processors call neither diffusers' dispatch_attention_fn nor F.scaled_dot_product_attention, so "
            f"their kernel cannot be met: {', '.join(sorted(foreign)[:4])}. Set processors that do, such as the "
            "model's own: AttnProcessor2_0() instead of sliced, bmm or xformers processors."
        )


def stand_in(module: Any) -> Any:
    """A processor whose kernel is met and that computes what the module's bmm, sliced or xformers processor does.

    None where there is no need of one, or none: those processors ignore norms of queries and keys, and the one that
    stands in ignores a scale of the module's own.
    """
    from diffusers.models import attention_processor as own

    if type(module.processor) not in (own.AttnProcessor, own.SlicedAttnProcessor, own.XFormersAttnProcessor):
        return None
    plain = module.norm_q is None and module.norm_k is None and module.spatial_norm is None
    if not plain or module.scale != (module.inner_dim // module.heads) ** -0.5:
        return None
    return own.AttnProcessor2_0()


def stand_in_notes(layers: Sequence[Layer]) -> tuple[str, ...]:
    """Which processors have a stand-in where controls act, for reports."""
    kinds: dict[str, list[Layer]] = {}
    for layer in layers:
        if not layer.linear and stand_in(layer.module) is not None:
            kinds.setdefault(type(layer.module.processor).__name__, []).append(layer)
    return tuple(
        f"AttnProcessor2_0 stands in for {kind} at {describe(found)} in the forwards in which controls act there: the "
        "same attention by a kernel that can be met"
        for kind, found in kinds.items()
    )


def hooks_of(module: nn.Module) -> list[Any]:
    """Diffusers' own hooks on a module."""
    registry = vars(module).get("_diffusers_hook")
    return [] if registry is None else list(registry.hooks.values())
