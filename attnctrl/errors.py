"""The errors of the library. Every message says what was asked, what was found, and what to do."""

from __future__ import annotations


class AttnCtrlError(Exception):
    """Base of all errors that a caller can act on."""


class ControlError(AttnCtrlError, ValueError):
    """A control was built or combined with parameters that cannot work."""


class LayoutError(AttnCtrlError, ValueError):
    """Tokens, grids, regions or text spans do not fit the model's forward."""


class SelectionError(AttnCtrlError, ValueError):
    """A selector of layers or heads matched nothing, or a name (of a preset, a variant of a suite) is unknown."""


class ScheduleError(AttnCtrlError, ValueError):
    """A window cannot be placed on the run's noise levels."""


class PlanError(AttnCtrlError, ValueError):
    """A visibility leaves a query without keys, or an executor cannot honour it."""


class UnsupportedModelError(AttnCtrlError, TypeError):
    """The model, its processors or its parallel set-up cannot be controlled."""


class SilentControlError(AttnCtrlError, RuntimeError):
    """A selected layer met no kernel call: the control would have done nothing."""


class SceneError(AttnCtrlError, ValueError):
    """A scene file is malformed or names something that is not there."""


class AssetError(AttnCtrlError, FileNotFoundError):
    """A model, picture or other asset is missing or damaged."""
