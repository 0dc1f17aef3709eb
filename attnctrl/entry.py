"""What one call of `attach` or `processors` brings to a model."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

from torch import Tensor

from .controls.base import Control
from .errors import ControlError
from .families import Family
from .region import Region
from .stack import Seat

__all__ = ["Entry"]


class Entry:
    """What one call of `attach` or `processors` brings: its controls, its pipeline, and whether it is still there.

    Args:
        controls: in list order.
        pipe: the pipeline, whose scheduler and text encoder are used; None for a bare model.
        scheduler: overrides the pipeline's.
        layers_present: names of the layers that its processors sit on; None when it opens layers by hooks.
        branches: guidance branches of one batch, in the order of its rows; () finds them out.
        own_kernels: plans may call torch's variable-length and flex attention in place of the model's kernel.
    """

    def __init__(
        self,
        controls: Sequence[Control],
        pipe: Any = None,
        scheduler: Any = None,
        layers_present: Callable[[], frozenset[str] | None] | None = None,
        branches: Sequence[str] = (),
        own_kernels: bool = False,
    ) -> None:
        self.controls = tuple(controls)
        self.own_kernels = own_kernels
        self.branches = tuple(branches)
        self.pipe = pipe
        self._scheduler = scheduler
        self.layers_present = layers_present
        self.attached = False
        self.forwards = 0
        self.seats: list[Seat] = []
        self._encoded: dict[str, Tensor] = {}

    @property
    def scheduler(self) -> Any:
        return self._scheduler if self._scheduler is not None else getattr(self.pipe, "scheduler", None)

    def embeds(self, region: Region, family: Family) -> Tensor:
        """The region's encoded prompt [tokens, channels]; encoded at first use.

        Raises:
            ControlError: for a bare model and a region without prompt_embeds.
        """
        if region.prompt_embeds is not None:
            return region.prompt_embeds
        if self.pipe is None:
            raise ControlError(
                f"Region '{region.label}' has a prompt but no prompt_embeds, and a bare model has no text encoder. "
                "Attach to the pipeline, or give the region prompt_embeds of shape [tokens, channels]."
            )
        if region.prompt not in self._encoded:
            self._encoded[region.prompt] = family.encode(self.pipe, region.prompt)
        return self._encoded[region.prompt]
