"""A pytest plugin for a checkout of diffusers: its own tests with idle controls on everything that they run.

Each call of a pipeline, and each forward of a model of a known family that no pipeline has attached to, runs inside
`attnctrl.attach(..., idle)`. What attnctrl does not know runs as it is. At the end the plugin says how many calls ran
with controls attached and how many without.
"""

from __future__ import annotations

import functools
import inspect
from collections.abc import Callable
from typing import Any

import diffusers
import pytest
from torch import nn

import attnctrl
from attnctrl.engine import _SEAT
from attnctrl.families import all_families

IDLE = attnctrl.Isolate(strength=0.0)
counts = {"attached": 0, "as it is": 0}


def _attached(call: Callable[..., Any]) -> Callable[..., Any]:
    @functools.wraps(call)
    def run(self: Any, *args: Any, **kwargs: Any) -> Any:
        if isinstance(self, nn.Module) and _SEAT in self.__dict__:
            return call(self, *args, **kwargs)
        try:
            handle = attnctrl.attach(self, IDLE)
        except attnctrl.UnsupportedModelError:
            counts["as it is"] += 1
            return call(self, *args, **kwargs)
        counts["attached"] += 1
        with handle:
            return call(self, *args, **kwargs)

    return run


def pytest_configure(config: pytest.Config) -> None:
    """Wrap the pipelines and the models of known families."""
    known = {name for family in all_families() for name in family.models}
    for name in dir(diffusers):
        kind = getattr(diffusers, name, None)
        if not inspect.isclass(kind):
            continue
        if issubclass(kind, diffusers.DiffusionPipeline) and "__call__" in vars(kind):
            kind.__call__ = _attached(kind.__call__)
        elif name in known:
            kind.__call__ = _attached(nn.Module.__call__)


def pytest_terminal_summary(terminalreporter: Any) -> None:
    """Say what ran how."""
    said = ", ".join(f"{count} calls {how}" for how, count in counts.items())
    terminalreporter.write_line(f"attnctrl: {said}")
