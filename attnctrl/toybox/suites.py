"""The suites of `attnctrl eval`, by name: (model, seeds, progress) to the object that is printed."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from .suites_layout import layout_suite
from .suites_model import model_suite
from .suites_scorer import scorer_suite

SUITES: dict[str, Callable[..., dict[str, Any]]] = {
    "layout": layout_suite,
    "model": model_suite,
    "scorer": scorer_suite,
}
