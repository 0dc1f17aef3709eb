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
    from .attach import Handle, Report, attach
    from .controls import Control, Isolate, Regions
    from .explain import Explanation, explain
    from .layout import Region
    from .processors import ControlledAttnProcessor, IsolationAttnProcessor, RegionAttnProcessor, processors
    from .schedule import Sigma

_NAMES = {
    "Control": "controls",
    "ControlledAttnProcessor": "processors",
    "Explanation": "explain",
    "Handle": "attach",
    "Isolate": "controls",
    "IsolationAttnProcessor": "processors",
    "Region": "layout",
    "RegionAttnProcessor": "processors",
    "Regions": "controls",
    "Report": "attach",
    "Sigma": "schedule",
    "attach": "attach",
    "explain": "explain",
    "processors": "processors",
}
_ERRORS = (
    "AssetError",
    "AttnCtrlError",
    "ControlError",
    "LayoutError",
    "PlanError",
    "SceneError",
    "ScheduleError",
    "SelectionError",
    "SilentControlError",
    "UnsupportedModelError",
)
_NAMES.update(dict.fromkeys(_ERRORS, "errors"))

__all__ = sorted(_NAMES)


class _Package(ModuleType):
    """Keeps `attnctrl.attach` the function: importing the submodule of that name would put the module in its place."""

    def __setattr__(self, name: str, value: Any) -> None:
        if not (name in _NAMES and isinstance(value, ModuleType)):
            super().__setattr__(name, value)


sys.modules[__name__].__class__ = _Package


def __getattr__(name: str) -> Any:
    if name not in _NAMES:
        raise AttributeError(f"module 'attnctrl' has no attribute '{name}'")
    value = getattr(import_module(f".{_NAMES[name]}", __name__), name)
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
