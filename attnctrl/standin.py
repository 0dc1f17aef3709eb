"""Functions in the place of modules' forwards, for a while."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from functools import partial
from typing import Any

from torch import nn

__all__ = ["standing_in"]


@contextmanager
def standing_in(functions: Iterable[tuple[nn.Module, Callable[..., Any]]]) -> Iterator[None]:
    """Modules call functions in the place of their forwards; their own hooks, and what offloads them, run as ever.

    Where somebody else took a place meanwhile, it stays theirs.

    Args:
        functions: of modules, (what stood there, *arguments) -> output; a later one goes around an earlier one.
    """
    put: list[tuple[dict[str, Any], Any, Any]] = []
    try:
        for module, function in functions:
            mine = partial(function, module.forward)
            put.append((vars(module), mine, vars(module).get("forward")))
            vars(module)["forward"] = mine
        yield
    finally:
        for place, mine, before in reversed(put):
            if place.get("forward") is not mine:
                continue
            if before is None:
                del place["forward"]
            else:
                place["forward"] = before
