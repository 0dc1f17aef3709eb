"""Work split over the processes that `torchrun` starts (or `accelerate launch` on several GPUs); alone without them."""

from __future__ import annotations

import os
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, TypeVar

__all__ = ["Processes", "processes"]

T = TypeVar("T")


@dataclass(frozen=True)
class Processes:
    """This process among `count`: its number, and the device it was given (None lets it choose)."""

    index: int = 0
    count: int = 1
    device: str | None = None

    def share(self, work: Sequence[T]) -> list[T]:
        """Every `count`th piece of work: together all of it, none twice."""
        return list(work[self.index :: self.count])

    def gathered(self, found: list[Any]) -> list[Any]:
        """What all processes found; waits for the last, so that none is ended while another draws."""
        if self.count == 1:
            return found
        from accelerate.utils import gather_object

        return list(gather_object(found))


def processes(device: str | None = None) -> Processes:
    """This process's part, by the launcher's environment.

    Args:
        device: the one that the user asked for; "cpu" lets processes meet without GPUs.
    """
    if int(os.environ.get("WORLD_SIZE", "1")) < 2:
        return Processes()
    import torch
    from accelerate import PartialState

    state = PartialState(cpu=device == "cpu" or not torch.cuda.is_available())
    return Processes(state.process_index, state.num_processes, str(state.device))
