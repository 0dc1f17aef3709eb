"""The suites of `attnctrl eval`, by name: (model, seeds, progress, options) to the object that is printed."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

from attnctrl.pipelines.runner import Progress, Runner

from .suite import Options, Suite, measure
from .suites_guidance import GUIDANCE
from .suites_layout import ISOLATION, LAYOUT
from .suites_masks import masks_suite
from .suites_model import model_suite
from .suites_references import REFERENCES
from .suites_reposition import REPOSITION
from .suites_scorer import scorer_suite
from .suites_sets import STYLE, SUBJECTS

PAIRED: dict[str, Suite[Any]] = {
    suite.name: suite for suite in (LAYOUT, ISOLATION, REFERENCES, SUBJECTS, REPOSITION, STYLE, GUIDANCE)
}
"""Those that compare pictures without and with control."""


def _measured(
    suite: Suite[Any], model: str, seeds: int, progress: Progress | None = None, options: Options = Options()
) -> dict[str, Any]:
    return measure(suite, Runner.load(model), model, seeds, progress, options)


SUITES: dict[str, Callable[..., dict[str, Any]]] = {
    "model": model_suite,
    "scorer": scorer_suite,
    "masks": masks_suite,
    **{name: partial(_measured, suite) for name, suite in PAIRED.items()},
}
