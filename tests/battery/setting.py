"""A model of a family as the battery needs it."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, TypeVar

import torch
from torch import Tensor, nn

T = TypeVar("T")


@dataclass(frozen=True)
class Kinds:
    """Who stands in the rows and columns of one kernel call: words of "text", "glyphs", "image", "references", "registers"; the image's grid."""

    queries: str
    keys: str
    grid: tuple[int, ...] = (4, 6)


@dataclass
class Setting:
    """A model, the inputs of one forward, and who stands where in each of its kernel calls.

    `None` among the calls is one that no control touches. `registers` are learned tokens: those that follow the prompt
    ("text") or the image, and those by themselves ("registers"). `fixed`: the text keeps its length, further texts take
    the place of its last tokens. `glyphs` are tokens of the prompt that stand by themselves. `layers` are those that
    controls can act in, None for all.
    """

    model: nn.Module
    inputs: dict[str, Any]
    calls: Sequence[Kinds | None]
    text: int = 5
    references: int = 0
    grid: tuple[int, ...] = (4, 6)
    registers: Mapping[str, int] = field(default_factory=dict)
    prompt: str = "encoder_hidden_states"
    fixed: bool = False
    glyphs: int = 0
    layers: str | None = None

    def run(self, **changes: Any) -> Tensor:
        out = self.model(**{**self.inputs, **changes})[0]
        return out if isinstance(out, Tensor) else torch.stack(out)

    def single(self, row: int) -> dict[str, Any]:
        """Inputs of one row of the batch."""
        batch = len(self.inputs[self.prompt])
        rows = {
            key: value
            for key, value in self.inputs.items()
            if isinstance(value, (Tensor, list)) and len(value) == batch and "ids" not in key
        }
        return {key: value[row : row + 1] for key, value in rows.items()}

    def controlled(self, calls: Sequence[T]) -> list[tuple[T, Kinds]]:
        """The kernel calls that controls may touch, each with who stands where."""
        pairs = zip(calls, self.calls, strict=True)
        return [(call, kinds) for call, kinds in pairs if kinds is not None]
