"""Model families: what the engine must be told about a model, as data. One short file each."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from torch import Tensor, nn

from ..errors import UnsupportedModelError
from ..layout import Grid, Layout
from ..select import Layer

__all__ = ["Family", "family_of"]

Arguments = dict[str, Any]


@dataclass(frozen=True)
class Family:
    """One model family.

    Attributes:
        name: short name, for reports.
        models: class names of the transformers that belong to it.
        stacks: (stack, attribute holding its list of blocks), in forward order; the attention is each block's `attn`.
        branches: CFG order, when branches are separate forwards of one step.
        presets: named layer selectors, as functions of {stack: number of blocks}.
        pixels_per_token: side of the square of pixels that one image token stands for, with the usual autoencoder.
        layout: the model's own call arguments -> token ranges.
        timestep: arguments -> noise levels of the rows, Tensor [B].
        text: arguments -> the encoded prompts, [B, tokens, channels].
        append_text: (arguments, texts [B, tokens, channels]) -> arguments whose text sequence ends with the given
            texts.
        encode: (pipeline, prompt) -> [tokens, channels], the prompt encoded by itself, at its real length.
        count: (pipeline, prompt) -> the number of tokens `encode` will give.
    """

    name: str
    models: tuple[str, ...]
    stacks: tuple[tuple[str, str], ...]
    branches: tuple[str, ...]
    presets: Mapping[str, Callable[[Mapping[str, int]], str]]
    pixels_per_token: int
    layout: Callable[[Arguments], Layout]
    timestep: Callable[[Arguments], Tensor]
    text: Callable[[Arguments], Tensor]
    append_text: Callable[[Arguments, Tensor], Arguments]
    encode: Callable[[Any, str], Tensor]
    count: Callable[[Any, str], int]

    def layers(self, model: nn.Module) -> tuple[Layer, ...]:
        """All attention layers in forward order."""
        return tuple(
            Layer(f"{attribute}.{index}.attn", stack, index, block.attn)
            for stack, attribute in self.stacks
            for index, block in enumerate(getattr(model, attribute))
        )

    def plan_layout(self, text: int, image: Grid, references: Sequence[Grid] = ()) -> Layout:
        """The layout of a forward that has not happened yet, for `explain`."""
        return Layout.of(text=text, image=image, references=references)


def family_of(model: nn.Module) -> Family:
    """The family of a model.

    Raises:
        UnsupportedModelError: when there is none, with the known model classes.
    """
    from .flux import FLUX

    families = (FLUX,)
    names = {base.__name__ for base in type(model).__mro__}
    for family in families:
        if names & set(family.models):
            return family
    known = ", ".join(name for family in families for name in family.models)
    raise UnsupportedModelError(
        f"{type(model).__name__} is of no known family. Known models: {known}. A family file must say where its text "
        "and image tokens stand, its CFG order and its stacks of blocks."
    )
