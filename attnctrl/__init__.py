"""Training-free attention control for Diffusers.

    import attnctrl as ac
    with ac.attach(pipe, [ac.Isolate(), ac.Regions(regions)]):
        image = pipe("two friends in a park").images[0]

Names are imported when they are first used, so that `import attnctrl` needs no torch.
"""

from __future__ import annotations

import sys
from importlib import import_module
from types import ModuleType
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from .attach import Handle, attach
    from .bank import Bank
    from .controls import (
        NAG,
        Control,
        GroupIsolation,
        Harmonize,
        Inject,
        Isolate,
        Keep,
        OpenTexts,
        Perturb,
        PlainQueries,
        RegionModulation,
        Regions,
        Reposition,
        Reuse,
        Share,
        ShareStyle,
        Skip,
    )
    from .errors import (
        AssetError,
        AttnCtrlError,
        ControlError,
        LayoutError,
        PlanError,
        SceneError,
        ScheduleError,
        SelectionError,
        SilentControlError,
        UnsupportedModelError,
    )
    from .explain import Explanation, explain
    from .phrases import in_prompt, phrase_spans
    from .pinned import pinned
    from .presets import preset
    from .processors import (
        ControlledAttnProcessor,
        IsolationAttnProcessor,
        PerturbedAttnProcessor,
        RegionAttnProcessor,
        SharedAttnProcessor,
        processors,
        set_processors,
    )
    from .region import Region, segments
    from .report import Report, report
    from .schedule import Sigma

__all__ = [
    "NAG",
    "AssetError",
    "AttnCtrlError",
    "Bank",
    "Control",
    "ControlError",
    "ControlledAttnProcessor",
    "Explanation",
    "GroupIsolation",
    "Handle",
    "Harmonize",
    "Inject",
    "Isolate",
    "IsolationAttnProcessor",
    "Keep",
    "LayoutError",
    "OpenTexts",
    "Perturb",
    "PerturbedAttnProcessor",
    "PlainQueries",
    "PlanError",
    "Region",
    "RegionAttnProcessor",
    "RegionModulation",
    "Regions",
    "Report",
    "Reposition",
    "Reuse",
    "SceneError",
    "ScheduleError",
    "SelectionError",
    "Share",
    "ShareStyle",
    "SharedAttnProcessor",
    "Sigma",
    "SilentControlError",
    "Skip",
    "UnsupportedModelError",
    "attach",
    "explain",
    "in_prompt",
    "phrase_spans",
    "pinned",
    "preset",
    "processors",
    "report",
    "segments",
    "set_processors",
]

_HOMES = {
    "attach": ("Handle", "attach"),
    "bank": ("Bank",),
    "controls": (
        "NAG",
        "Control",
        "GroupIsolation",
        "Harmonize",
        "Inject",
        "Isolate",
        "Keep",
        "OpenTexts",
        "Perturb",
        "PlainQueries",
        "RegionModulation",
        "Regions",
        "Reposition",
        "Reuse",
        "Share",
        "ShareStyle",
        "Skip",
    ),
    "explain": ("Explanation", "explain"),
    "phrases": ("in_prompt", "phrase_spans"),
    "pinned": ("pinned",),
    "presets": ("preset",),
    "region": ("Region", "segments"),
    "processors": (
        "ControlledAttnProcessor",
        "IsolationAttnProcessor",
        "PerturbedAttnProcessor",
        "RegionAttnProcessor",
        "SharedAttnProcessor",
        "processors",
        "set_processors",
    ),
    "report": ("Report", "report"),
    "schedule": ("Sigma",),
}
_HOME = {name: home for home, names in _HOMES.items() for name in names}


class _Package(ModuleType):
    """Keeps `attnctrl.attach` the function: importing the submodule of that name would put the module in its place."""

    def __setattr__(self, name: str, value: Any) -> None:
        if not (name in _HOME and isinstance(value, ModuleType)):
            super().__setattr__(name, value)


sys.modules[__name__].__class__ = _Package


def __getattr__(name: str) -> Any:
    if name not in __all__:
        raise AttributeError(f"module 'attnctrl' has no attribute '{name}'")
    value = getattr(import_module(f".{_HOME.get(name, 'errors')}", __name__), name)
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
