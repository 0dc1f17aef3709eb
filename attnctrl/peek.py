"""What a pipeline gives to its denoiser, without a copy of its code."""

from __future__ import annotations

from inspect import signature
from typing import Any

from torch import nn

from .attach import parts_of

__all__ = ["first_forward"]


class _EnoughError(Exception):
    """The forward that was wanted has been seen."""


def first_forward(pipe: Any, **arguments: Any) -> dict[str, Any]:
    """What the pipeline gives to its denoiser in the first forward of a run, which ends there.

    Prompts are encoded, latents packed and the scheduler's timesteps set as the pipeline does it. Controls that are
    attached see nothing of it, and what they would add is not in the result.

    Args:
        pipe: any pipeline.
        arguments: of its call.
    """
    model: Any = parts_of(pipe)[0]
    seen: dict[str, Any] = {}

    def keep(_module: nn.Module, given: tuple[Any, ...], named: dict[str, Any]) -> None:
        seen.update({**dict(zip(signature(model.forward).parameters, given, strict=False)), **named})
        raise _EnoughError

    hook = model.register_forward_pre_hook(keep, prepend=True, with_kwargs=True)
    try:
        pipe(**arguments)
    except _EnoughError:
        pass
    finally:
        hook.remove()
        pipe.maybe_free_model_hooks()
    return seen
