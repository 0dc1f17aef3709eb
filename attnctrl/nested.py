"""What modules take and give: tensors, alone or within lists, tuples and dictionaries of each other."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

from torch import Tensor

__all__ = ["mapped", "tensors_in"]


def mapped(change: Callable[..., Tensor], value: Any, *others: Any) -> Any:
    """The same lists, tuples and dictionaries with `change` of each tensor; whatever else is in them stays.

    Args:
        change: given the tensor of `value`, and those that stand at its place in `others`.
        others: of the same form.
    """
    if isinstance(value, Tensor):
        return change(value, *others)
    if isinstance(value, dict):
        return {name: mapped(change, one, *(other[name] for other in others)) for name, one in value.items()}
    if type(value) in (list, tuple):
        return type(value)(mapped(change, *ones) for ones in zip(value, *others, strict=True))
    return value


def tensors_in(value: Any) -> Iterator[Tensor]:
    """All tensors of a value, in its order."""
    if isinstance(value, Tensor):
        yield value
    elif isinstance(value, dict) or type(value) in (list, tuple):
        for one in value.values() if isinstance(value, dict) else value:
            yield from tensors_in(one)
