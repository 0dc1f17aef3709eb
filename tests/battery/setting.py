"""A model, its inputs, and who stands where in each of its kernel calls."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, TypeVar

from torch import Tensor, nn

T = TypeVar("T")


@dataclass(frozen=True)
class Kinds:
    """Who stands in the rows and columns of one kernel call: words of "text", "image", "references"; the image's grid."""

    queries: str
    keys: str
    grid: tuple[int, ...] = (4, 6)


@dataclass
class Setting:
    """A model, the inputs of one forward, and who stands where in each of its kernel calls.

    `None` among the calls is one that no control touches. `fixed`: the text keeps its length, further texts take the
    place of its last tokens.
    """

    model: nn.Module
    inputs: dict[str, Any]
    calls: Sequence[Kinds | None]
    text: int = 5
    references: int = 0
    grid: tuple[int, ...] = (4, 6)
    fixed: bool = False

    def run(self, **changes: Any) -> Tensor:
        return self.model(**{**self.inputs, **changes})[0]

    def single(self, row: int) -> dict[str, Any]:
        """Inputs of one row of the batch."""
        batch = len(self.inputs["encoder_hidden_states"])
        rows = {k: v for k, v in self.inputs.items() if isinstance(v, Tensor) and len(v) == batch and "ids" not in k}
        return {key: value[row : row + 1] for key, value in rows.items()}

    def controlled(self, calls: Sequence[T]) -> list[tuple[T, Kinds]]:
        """The kernel calls that controls may touch, each with who stands where."""
        pairs = zip(calls, self.calls, strict=True)
        return [(call, kinds) for call, kinds in pairs if kinds is not None]
